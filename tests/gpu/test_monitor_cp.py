"""The monitor under context parallelism, which needs Transformer Engine: the numbers of one process, from two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mhc_megatron.monitor.records import FILE, Record, read
from mhc_megatron.quickstart import data
from mhc_megatron.quickstart.jobs import megatron_arguments
from tests.gpu.test_two_gpus import pytestmark, train  # noqa: F401

# One Sinkhorn iteration and large logits: gains that are not 1. One step: the same weights everywhere.
JOB = "--enable-mhc --mhc-init=paper --mhc-init-alpha=2 --mhc-sinkhorn-iterations=1 --lr-warmup-iters=0 --eval-iters=0".split()
RUNS = {
    "one": ([], 1),
    "cp2": (["--context-parallel-size=2"], 2),
    # What bf16 rounds differently, and what another sample of the same text gives.
    "rounded": (["--mhc-backend=reference"], 1),
    "other": (["--mhc-monitor-tokens=64"], 1),
}
MEANS = ("pre", "post", "res_mean", "similarity", "single", "composite", "row_error", "column_error")


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    pytest.importorskip("transformer_engine.pytorch", reason="context parallelism needs Transformer Engine")
    folder: Path = tmp_path_factory.mktemp("monitor-cp")
    shared = [*megatron_arguments(data.prepare(folder), 1, gpu=True), *JOB]
    for name, (further, processes) in RUNS.items():
        train([*shared, *further, f"--mhc-monitor-dir={folder / name}"], processes)
        assert len((folder / name / FILE).read_text().splitlines()) == 2, "one rank writes, a start and a record"
    return {name: read(folder / name).records[1] for name in RUNS}


def difference(a: Any, b: Any, sublayers: slice = slice(None)) -> float:
    """The largest, of all numbers under a name of the record."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return max(difference(a[name], b[name], sublayers) for name in a)
    ours, theirs = (np.asarray(values, dtype=float)[sublayers] for values in (a, b))
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max())


def test_same_tokens(records: dict[str, Record]) -> None:
    """The first sublayer's streams are embeddings, the same to the bit on every rank: so is all that is computed of them."""
    one, cp2, other = records["one"], records["cp2"], records["other"]
    assert (cp2["tokens"], cp2["sublayers"]) == (one["tokens"], one["sublayers"])
    for name in ("pre", "post", "res_mean", "single", "row_error", "column_error"):
        assert difference(cp2[name], one[name], slice(1)) < 1e-5, name
        if name in ("pre", "post", "res_mean"):
            assert difference(other[name], one[name], slice(1)) > 1e-3, f"{name}: any tokens would do"


def test_same_numbers(records: dict[str, Record]) -> None:
    """Deeper streams have been through attention, whose sums run in another order: as far off as other kernels are in bf16."""
    one, cp2 = records["one"], records["cp2"]
    assert cp2["loss"] == pytest.approx(one["loss"], rel=1e-3)
    off = {name: (difference(cp2[name], one[name]), difference(records["rounded"][name], one[name])) for name in MEANS}
    print("\n".join(f"{name:12} cp2 {ours:.1e}  rounding {rounding:.1e}" for name, (ours, rounding) in off.items()))
    for name, (ours, rounding) in off.items():
        assert ours < 4 * rounding + 1e-5, name
