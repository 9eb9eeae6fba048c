"""--mhc-recompute around Transformer Engine: the same bits, less memory, the same memory after every step."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from mhc_megatron import MHCConfig

pytestmark = pytest.mark.gpu
pytest.importorskip("transformer_engine.pytorch", reason="needs Transformer Engine")

from mhc_kernels import free_until_backward  # noqa: E402
from mhc_megatron.residual import add  # noqa: E402
from mhc_megatron.residual.chain import Chain  # noqa: E402
from tests import models  # noqa: E402
from tests.gpu.test_fp8 import RECIPES, WIDTHS  # noqa: E402
from tests.gpu.training import LOCAL, QUICKSTART, SMALL, build, text, train  # noqa: E402
from tests.unit.kernels.test_recompute_input import size  # noqa: E402

MHC = MHCConfig(init="paper")
RECOMPUTE = dataclasses.replace(MHC, recompute=True)
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "moe_act", "mla_up_proj"]}
CHECKPOINTS = {"recompute_granularity": "selective", "recompute_modules": ["moe", "mlp"]}
FP8 = {**WIDTHS, **RECIPES["tensorwise"], "moe_router_padding_for_fp8": True}
OVERLAP = {"moe_shared_expert_overlap": True}  # on a stream of its own


SETTINGS: dict[str, dict] = {
    "": {},
    "without MLA": {**models.MODELS["moe"], **SMALL},
    "with selective recompute": SELECTIVE,
    "with checkpoints": CHECKPOINTS,
    "shared experts beside": OVERLAP,
    "FP8": FP8,
    "FP8 delayed": {**FP8, **RECIPES["delayed"]},
    "FP8 blockwise": {**FP8, **RECIPES["blockwise"]},
    "FP8 with selective recompute": {**FP8, **SELECTIVE},
    "FP8 between layers in bf16": {**FP8, "first_last_layers_bf16": True},
    "MTP": {"mtp_num_layers": 2},
    "MTP, FP8": {**FP8, "mtp_num_layers": 1},
    "shared experts again": {"recompute_granularity": "selective", "recompute_modules": ["shared_experts"]},
    "FP8 with checkpoints": {**FP8, **CHECKPOINTS},
    "local": LOCAL,
}


@pytest.mark.parametrize("name", SETTINGS)
def test_same_bits(name: str, one_process: None) -> None:
    """Losses and gradients of 20 steps, accumulated over two microbatches: equal to the last bit."""
    base = {} if "hidden_size" in SETTINGS[name] else QUICKSTART
    model = {**base, **SETTINGS[name], "hidden_size": 512}  # several tiles: the kernels' loops are other machine code
    te = name != "local"

    def of(mhc: MHCConfig) -> tuple[list[float], str]:
        run = train(model, mhc, 512, microbatches=2, te=te, bits=True)
        return run.losses, run.gradients

    kept, again = of(MHC), of(MHC)
    assert again == kept, "the modules themselves differ from run to run: the comparison would say nothing"
    assert of(RECOMPUTE) == kept


@pytest.mark.parametrize("name", ["", "FP8", "FP8 delayed"])
def test_full_recompute_has_the_same_bits(name: str, one_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron's, of whole layers by Transformer Engine's checkpoint, to which mHC's own gives way: the bits of the same chains
    without it, which end with every layer."""
    extend = Chain.extend

    def alone(chain: Chain, *args: Any, **kwargs: Any) -> Any:
        chain._last = None
        return extend(chain, *args, **kwargs)

    model = {**QUICKSTART, **SETTINGS[name], "hidden_size": 512}
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    again = train({**model, **full}, RECOMPUTE, 512, microbatches=2, bits=True)
    monkeypatch.setattr(Chain, "extend", alone)
    kept = train(model, MHC, 512, microbatches=2, bits=True)
    print(f"\n{name}: losses apart by {max(again.distance(kept)):.1e}, peaks {again.peak:.3f}, {kept.peak:.3f} GiB")
    assert (again.losses, again.gradients) == (kept.losses, kept.gradients)
    assert again.peak < kept.peak


def test_inputs_are_free_between(one_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Transformer Engine's modules saved of every sublayer's input has no memory until the backward."""
    storages: list[StorageWeakRef] = []

    def free(u: torch.Tensor, y: torch.Tensor) -> bool:
        storages.append(StorageWeakRef(u.untyped_storage()))
        assert free_until_backward(u, y)
        return True

    monkeypatch.setattr(add, "free_until_backward", free)
    model = build(QUICKSTART, RECOMPUTE, 512)
    loss = models.forward(model, text(1, 512)).float().mean()
    assert [size(storage) for storage in storages] == [0] * 8
    loss.backward()
    assert [size(storage) for storage in storages] == [None] * 8


def test_less_memory_and_none_left(one_process: None) -> None:
    sequence = 4096
    kept, recomputed = (train(QUICKSTART, mhc, sequence, microbatches=2) for mhc in (MHC, RECOMPUTE))
    streams = sequence // 2 * 4 * QUICKSTART["hidden_size"] * 2 / 2**30
    needs = [run.peak - run.allocated[-1] / 2**30 for run in (kept, recomputed)]
    print(f"\na step's memory: {needs[0] / streams:.2f}, {needs[1] / streams:.2f} times one sublayer's streams")
    print(f"bytes after each step {recomputed.allocated}")
    # 8 sublayers, blocks of 2: four of eight streams are not kept, one or two of them at a time come back. Nor are eight inputs
    # of a quarter of the size, of which one at a time comes back: 4 - 2 + (8 - 1) / 4.
    assert needs[0] - needs[1] > 3.5 * streams
    assert len(set(recomputed.allocated[2:])) == 1  # the first step allocates the optimizer's state
