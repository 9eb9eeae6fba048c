"""Ranks agree on which links copy engines serve, whatever goes wrong on one of them: three stages in a ring, over gloo. The GPU's
part is left out (tests/gpu/test_copies.py has it)."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from mhc_megatron.pipeline.copies import connect as module
from mhc_megatron.pipeline.copies.ring import Offer, Ring
from mhc_megatron.pipeline.links import BACKWARD, FORWARD
from tests.ranks import run_ranks

STAGES = 3
CASES: dict[str, tuple[set[tuple[int, int]], str]] = {
    # (sending rank, direction) of the links that are left to NCCL, and why
    "nothing": (set(), ""),
    "prepare": ({(1, FORWARD), (1, BACKWARD), (0, FORWARD), (2, BACKWARD)}, "MemoryError: prepare"),
    "make": ({(1, FORWARD), (0, BACKWARD)}, "no room"),
    "open": ({(0, FORWARD)}, "RuntimeError: open"),
    "try": ({(2, BACKWARD)}, "a trial transfer arrived wrong"),
    "machine": ({(1, FORWARD), (1, BACKWARD), (0, FORWARD), (2, BACKWARD)}, "the stages are on different nodes"),
    "see": ({(0, FORWARD), (0, BACKWARD)}, "one stage's process can't see the other one's GPU (CUDA_VISIBLE_DEVICES)"),
    "everything": ({(rank, d) for rank in range(STAGES) for d in (FORWARD, BACKWARD)}, "they need NVIDIA GPUs"),
}


def agree(case: str) -> None:
    rank = dist.get_rank()

    def prepare() -> Any:
        if case == "prepare" and rank == 1:
            raise MemoryError("prepare")
        name = "elsewhere" if case == "machine" and rank == 1 else "here"
        ends = [(end, d) for end in ("send", "receive") for d in module.DIRECTIONS]
        return module._Fact(name, f"GPU {rank}"), dict.fromkeys(ends)

    def make(on_gpu: bool) -> Any:
        assert on_gpu
        if case == "make" and rank == 2:
            raise OSError("no room")
        return object(), Offer(os.getpid(), 0, b"", b""), os.open("/dev/null", os.O_RDONLY)

    def take(offer: Offer) -> Any:
        if case == "open" and rank == 0 and offer.process == expected_next:
            raise RuntimeError("open")
        return object()

    def trial(*_: Any) -> dict[str, str]:
        return {f"receive {BACKWARD}": "a trial transfer arrived wrong"} if case == "try" and rank == 1 else {}

    processes: list[int] = [0] * STAGES
    dist.all_gather_object(processes, os.getpid())
    expected_next = processes[1]
    if case != "everything":
        module._prepare = prepare
    module.driver.linked = lambda _: None if case == "see" and rank == 0 else True
    Ring.make, Ring.open, module._try = make, take, trial  # type: ignore[method-assign, assignment]
    following, before = (rank + 1) % STAGES, (rank - 1) % STAGES
    copies = module.connect({FORWARD: (following, before), BACKWARD: (before, following)}, lambda: timedelta(minutes=1))
    sent: list[Any] = [None] * STAGES
    received: list[Any] = [None] * STAGES
    dist.all_gather_object(sent, [(rank, d) for d in copies.senders])
    dist.all_gather_object(received, [((before, following)[d], d) for d in copies.receivers])
    refused, reason = CASES[case]
    all_links = {(r, d) for r in range(STAGES) for d in (FORWARD, BACKWARD)}
    assert {link for row in sent for link in row} == all_links - refused
    assert {link for row in received for link in row} == all_links - refused
    assert copies.reasons == ({reason: len(refused)} if refused else {})
    assert copies.ways == ({module.PEER: len(all_links - refused)} if all_links - refused else {})


@pytest.mark.parametrize("case", CASES)
def test_both_ends_agree(case: str, tmp_path: Path) -> None:
    run_ranks(agree, STAGES, tmp_path, {}, case=case)
