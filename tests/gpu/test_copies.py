"""Pipeline transfers by copy engines, between two processes of one machine."""

from __future__ import annotations

import random
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mhc_megatron.pipeline.copies import connect, driver
from mhc_megatron.pipeline.copies.ring import ON_GPU
from tests.ranks import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
]


@pytest.fixture(autouse=True)
def several_queues(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)  # conftest.py's is that of tensor parallelism


def _connect(minutes: float = 5) -> connect.Copies:
    rank = dist.get_rank()
    ends = [(1, None), (None, 1)] if rank == 0 else [(None, 0), (0, None)]
    return connect.connect(dict(enumerate(ends)), lambda: timedelta(minutes=minutes))


def exchange(way: str) -> None:
    """Tensors of random sizes, several under way, both directions, beside computation; what was sent, to the bit."""
    copies = _connect()
    assert copies.ways == {way: 2}, copies
    mine, theirs = dist.get_rank(), 1 - dist.get_rank()
    draw = random.Random(3)
    sizes = [draw.choice([1, 3, 255, 2**18 + 1, ON_GPU.slot // 4, ON_GPU.slot + 5]) for _ in range(60)]
    a = torch.randn(4096, 4096, device="cuda")
    under_way: list[Any] = []
    for turn, size in enumerate(sizes):
        sent, expected = (
            (torch.arange(size, device="cuda", dtype=torch.int32) * (2 * rank + 3) + turn).to(torch.int16)
            for rank in (mine, theirs)
        )
        found = torch.full_like(expected, -1)
        if draw.random() < 0.3:
            a = (a @ a).clamp_(-1, 1)  # sends and receives wait for it
        handle = copies.receivers[theirs].receive(found)
        under_way.append((handle, copies.senders[mine].send(sent), sent, found, expected))
        if draw.random() < 0.5 or turn == len(sizes) - 1:
            for received, gone, _, got, wanted in under_way:
                received.wait()
                assert torch.equal(got, wanted)
                gone.wait()
            torch.cuda.synchronize()
            assert all(received.is_completed() and gone.is_completed() for received, gone, *_ in under_way)
            under_way.clear()


@pytest.mark.parametrize(("way", "disabled"), [(connect.PEER, "0"), (connect.HOST, "1")])
def test_exchange(way: str, disabled: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.cuda.device(1):
        other = driver.bus_id()
    if way == connect.PEER and not driver.linked(other):
        pytest.skip("NVLink does not connect the GPUs")
    monkeypatch.setenv("NCCL_P2P_DISABLE", disabled)
    run_ranks(exchange, 2, tmp_path, {}, way=way)


def refused(reason: str) -> None:
    copies = _connect()
    assert not copies.senders
    assert not copies.receivers
    assert not copies.ways
    assert [key for key in copies.reasons if reason in key], copies.reasons


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CUDA_DEVICE_MAX_CONNECTIONS": "1"}, "CUDA_DEVICE_MAX_CONNECTIONS=1"),
        ({"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"}, "NCCL_SHM_DISABLE"),
    ],
)
def test_refused(environment: dict[str, str], reason: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    run_ranks(refused, 2, tmp_path, {}, reason=reason)


def lose_a_peer(folder: Path) -> None:
    copies = _connect(minutes=0.1)
    (folder / f"connected{dist.get_rank()}").touch()
    if dist.get_rank() == 0:
        copies.receivers[1].receive(torch.empty(2**20, device="cuda")).wait()
        torch.cuda.synchronize()
    time.sleep(60)


def test_a_lost_peer_ends_the_run(tmp_path: Any) -> None:
    started = time.monotonic()
    with pytest.raises(Exception, match="process 0 terminated with signal SIGABRT"):
        run_ranks(lose_a_peer, 2, tmp_path, {}, folder=tmp_path)
    assert time.monotonic() - started < 50
    assert all((tmp_path / f"connected{rank}").exists() for rank in range(2))
