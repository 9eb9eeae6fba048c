"""mHC around Transformer Engine's FP8: it changes a loss curve by 1 % at most, or not twice as much as without mHC."""

from __future__ import annotations

from typing import Any

import pytest

from mhc_megatron import MHCConfig

pytestmark = pytest.mark.gpu
pytest.importorskip("transformer_engine.pytorch", reason="needs Transformer Engine")

from tests.gpu.training import QUICKSTART, Run, train  # noqa: E402

SEQUENCE = 512
# FP8 products want multiples of 16.
WIDTHS = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_head_dim": 16, "qk_pos_emb_head_dim": 16, "v_head_dim": 16}
MODEL = {**QUICKSTART, **WIDTHS}
RECIPES: dict[str, dict[str, Any]] = {
    "bf16": {},
    "delayed": {"fp8": "hybrid", "fp8_recipe": "delayed"},
    "tensorwise": {"fp8": "hybrid", "fp8_recipe": "tensorwise"},
    "blockwise": {"fp8": "e4m3", "fp8_recipe": "blockwise"},
}


@pytest.fixture(scope="module")
def runs() -> dict[tuple[str, str], Run]:
    return {}


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "bf16"])
def test_fp8_moves_the_loss_as_it_does_without_mhc(
    recipe: str, runs: dict[tuple[str, str], Run], one_process: None
) -> None:
    for name in ("bf16", recipe):
        padding = {"moe_router_padding_for_fp8": True} if name != "bf16" else {}
        for kind, mhc in (("residual", None), ("mhc", MHCConfig(init="paper", recompute=True))):
            if (kind, name) not in runs:
                runs[kind, name] = train({**MODEL, **RECIPES[name], **padding}, mhc, SEQUENCE)
    stock = max(runs["residual", recipe].distance(runs["residual", "bf16"]))
    ours = max(runs["mhc", recipe].distance(runs["mhc", "bf16"]))
    losses = runs["mhc", recipe].losses
    print(
        f"\n{recipe}: FP8 moves the loss by {ours:.1e} with mHC, {stock:.1e} without; {losses[0]:.3f} -> {losses[-1]:.3f}"
    )
    assert losses[-1] < 0.9 * losses[0]
    assert ours < max(1e-2, 2 * stock)
