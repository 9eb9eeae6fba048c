"""--mhc-recompute around Transformer Engine: the same bits, less memory, the same memory after every step."""

from __future__ import annotations

import dataclasses

import pytest

from mhc_megatron import MHCConfig

pytestmark = pytest.mark.gpu
pytest.importorskip("transformer_engine.pytorch", reason="needs Transformer Engine")

from tests.gpu.training import QUICKSTART, train  # noqa: E402

MHC = MHCConfig(init="paper")
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "moe_act", "mla_up_proj"]}


@pytest.mark.parametrize("settings", [{}, SELECTIVE], ids=["", "with selective recompute"])
def test_same_bits_and_less_memory(settings: dict, one_process: None) -> None:
    """Losses of 20 steps, with gradients accumulated over two microbatches: equal to the last bit."""
    sequence = 4096
    kept = train({**QUICKSTART, **settings}, MHC, sequence, microbatches=2)
    recomputed = train({**QUICKSTART, **settings}, dataclasses.replace(MHC, recompute=True), sequence, microbatches=2)
    assert recomputed.losses == kept.losses
    # 8 sublayers, blocks of 2: four of eight streams are not kept.
    streams = sequence // 2 * 4 * QUICKSTART["hidden_size"] * 2 / 2**30
    assert kept.peak - recomputed.peak > 2 * streams
    # Step 1 creates the optimizer's state; after that nothing may stay.
    assert len(set(recomputed.allocated[2:])) == 1
