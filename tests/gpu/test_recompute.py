"""--mhc-recompute around Transformer Engine: the same bits, less memory, the same memory after every step."""

from __future__ import annotations

import dataclasses

import pytest

from mhc_megatron import MHCConfig

pytestmark = pytest.mark.gpu
pytest.importorskip("transformer_engine.pytorch", reason="needs Transformer Engine")

from tests.gpu.training import QUICKSTART, train  # noqa: E402

MHC = MHCConfig(init="paper")
RECOMPUTE = dataclasses.replace(MHC, recompute=True)
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "moe_act", "mla_up_proj"]}


@pytest.mark.parametrize("settings", [{}, SELECTIVE], ids=["", "with selective recompute"])
def test_same_bits(settings: dict, one_process: None) -> None:
    """Losses of 20 steps, with gradients accumulated over two microbatches: equal to the last bit."""
    model = {**QUICKSTART, **settings}
    kept, again = (train(model, MHC, 512, microbatches=2).losses for _ in range(2))
    assert again == kept, "Transformer Engine itself differs from run to run: the comparison would say nothing"
    assert train(model, RECOMPUTE, 512, microbatches=2).losses == kept


def test_less_memory_and_none_left(one_process: None) -> None:
    sequence = 4096
    kept, recomputed = (train(QUICKSTART, mhc, sequence, microbatches=2) for mhc in (MHC, RECOMPUTE))
    streams = sequence // 2 * 4 * QUICKSTART["hidden_size"] * 2 / 2**30
    needs = [run.peak - run.allocated[-1] / 2**30 for run in (kept, recomputed)]
    print(f"\na step's memory: {needs[0] / streams:.2f}, {needs[1] / streams:.2f} times one sublayer's streams")
    print(f"bytes after each step {recomputed.allocated}")
    # 8 sublayers, blocks of 2: four of eight streams are not kept, one or two of them at a time come back.
    assert needs[0] - needs[1] > 2 * streams
    assert len(set(recomputed.allocated[2:])) == 1  # the first step allocates the optimizer's state
