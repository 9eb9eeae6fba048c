"""The monitor's numbers by their definition, in float64 and token by token, for the tests that compare with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from mhc_kernels import reference
from mhc_megatron import MHCConfig
from mhc_megatron.monitor.capture import find_sublayers
from mhc_megatron.monitor.records import Record
from tests import models


@contextmanager
def streams(model: torch.nn.Module) -> Iterator[dict[Any, torch.Tensor]]:
    """Copies of the streams that reach every mHC input first: those of the first microbatch."""
    seen: dict[Any, torch.Tensor] = {}

    def see(module: Any, inputs: tuple[torch.Tensor]) -> None:
        if module not in seen:
            seen[module] = inputs[0].detach().clone()

    modules = [sublayer.module() for sublayer in find_sublayers([model])]
    handles = [module.register_forward_pre_hook(see) for module in modules]
    yield seen
    for handle in handles:
        handle.remove()


def definition(seen: dict[Any, torch.Tensor], mhc: MHCConfig) -> list[tuple[np.ndarray, ...]]:
    """Of every sublayer: streams, H_pre, H_post, H_res of the sampled tokens, by the reference in float64.

    The sample is position k of sequence k mod MICROBATCH: SEQUENCE tokens are fewer than the monitor may take.
    """
    result = []
    for module, hidden in seen.items():
        x = torch.stack([hidden[k, k % models.MICROBATCH] for k in range(models.SEQUENCE)])
        x = x.double().unflatten(-1, (mhc.num_streams, -1))
        own = module.hyper_connection
        parameters = (own.phi.detach().double(), own.alpha.detach().double(), own.bias.detach().double())
        mappings = reference.mappings(
            x, *parameters, iterations=mhc.sinkhorn_iterations, profile=mhc.profile, mode=mhc.mode
        )
        result.append(tuple(t.cpu().numpy() for t in (x, *mappings)))
    return result


def amax(matrix: np.ndarray) -> dict[str, tuple[float, float]]:
    rows, columns = np.abs(matrix.sum(1)), np.abs(matrix.sum(0))
    return {"forward": (rows.max(), rows.min()), "backward": (columns.max(), columns.min())}


def check(record: Record, sublayers: list[tuple[np.ndarray, ...]], rel: float) -> None:
    """Compare a record with `definition`; rel: of gains and means, with 1e-6 for what is near 0."""
    count, tokens = len(sublayers), range(models.SEQUENCE)
    for depth, (x, pre, post, res) in enumerate(sublayers):
        single = [amax(res[t]) for t in tokens]
        # From this sublayer to the exit: the last one's matrix is the leftmost factor.
        products = [np.linalg.multi_dot([*(sublayers[k][3][t] for k in range(count - 1, depth - 1, -1)), np.eye(res.shape[-1])])
                    for t in tokens]  # fmt: skip
        for what, matrices in (("single", single), ("composite", [amax(product) for product in products])):
            for direction in ("forward", "backward"):
                ours = record[what][direction]
                largest, smallest = zip(*(matrix[direction] for matrix in matrices), strict=True)
                assert ours["max"][depth] == pytest.approx(np.mean(largest), rel=rel)
                assert ours["min"][depth] == pytest.approx(np.mean(smallest), rel=rel, abs=1e-6)
                assert ours["highest"][depth] == pytest.approx(max(largest), rel=rel)
                assert ours["lowest"][depth] == pytest.approx(min(smallest), rel=rel, abs=1e-6)
        assert record["column_error"][depth] == pytest.approx(
            np.abs(res.sum(1) - 1).max(1).mean(), rel=5 * rel, abs=5e-6
        )
        assert record["row_error"][depth] == pytest.approx(np.abs(res.sum(2) - 1).max(1).mean(), rel=5 * rel, abs=5e-6)
        for name, values in (("pre", pre), ("post", post)):
            np.testing.assert_allclose(record[name]["mean"][depth], values.mean(0), rtol=rel, atol=1e-6)
            np.testing.assert_allclose(record[name]["std"][depth], values.std(0), rtol=50 * rel, atol=1e-6)
        pairs = [
            x[t, i] @ x[t, j] / np.linalg.norm(x[t, i]) / np.linalg.norm(x[t, j])
            for t in tokens for i in range(x.shape[1]) for j in range(i)
        ]  # fmt: skip
        assert record["similarity"][depth] == pytest.approx(np.mean(pairs), rel=rel, abs=1e-6)
        np.testing.assert_allclose(record["res_mean"][depth], res.mean(0), rtol=rel, atol=1e-6)
        if depth == 0:
            np.testing.assert_allclose(record["composite_mean"], np.mean(products, 0), rtol=rel, atol=1e-6)
