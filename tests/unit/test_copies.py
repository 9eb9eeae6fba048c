"""The protocol of copy engines' links: what the two streams of a link do, played in every order that a GPU might choose."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from mhc_megatron.pipeline.copies import link as link_module
from mhc_megatron.pipeline.copies import ring
from mhc_megatron.pipeline.copies.connect import Copies
from mhc_megatron.pipeline.copies.ring import ON_GPU, ON_HOST, Shape
from mhc_megatron.pipeline.copies.watchdog import Watchdog

SMALL = Shape(3, 512, 4, 256)


@pytest.mark.parametrize("shape", [ON_HOST, ON_GPU, SMALL])
@pytest.mark.parametrize("size", [0, 1, 255, 257, 2**20, 2**20 + 1, 16 * 2**20 + 3, 335544320, 84148224])
def test_pieces_are_the_tensor(shape: Shape, size: int) -> None:
    end = 0
    pieces = list(shape.cut(size))
    for offset, length in pieces:
        assert offset == end
        assert 0 < length <= shape.slot
        end += length
    assert end == size
    assert len(pieces) < 2 or pieces[0][1] >= min(shape.smallest, shape.slot)


def test_pieces_overlap() -> None:
    assert len(list(ON_HOST.cut(335544320))) >= 16
    assert len(list(ON_GPU.cut(335544320))) == 4
    assert len(list(ON_GPU.cut(84148224))) == 2
    assert len(list(ON_GPU.cut(1000))) == 1


class Machine:
    """Two streams and the memory between them: a link's ends put their operations here, and `run` does them."""

    def __init__(self) -> None:
        self.streams: dict[str, list[tuple[Any, ...]]] = {"send": [], "receive": []}
        self.memory: dict[Any, Any] = {"full": 0, "free": 0}

    def wait_value(self, stream: str, address: str, value: int) -> None:
        self.streams[stream].append(("wait", address, value))

    def write_value(self, stream: str, address: str, value: int) -> None:
        self.streams[stream].append(("write", address, value))

    def copy(self, stream: str, target: int, source: int, size: int) -> None:
        self.streams[stream].append(("copy", target, source, size))

    def run(self, draw: random.Random) -> None:
        """Whatever stream may go on, in any order. A stream that waits lets the other one run."""
        while any(self.streams.values()):
            able = [name for name, queue in self.streams.items() if queue and not self._waits(queue[0])]
            assert able, "both wait"
            kind, *arguments = self.streams[draw.choice(able)].pop(0)
            if kind == "write":
                self.memory[arguments[0]] = arguments[1] % 2**32
            elif kind == "copy":
                target, source, size = arguments
                self.memory[target] = (self.memory.get(source, source), size)

    def _waits(self, operation: tuple[Any, ...]) -> bool:
        """CU_STREAM_WAIT_VALUE_GEQ."""
        return operation[0] == "wait" and (self.memory[operation[1]] - operation[2]) % 2**32 >= 2**31


@pytest.mark.parametrize("first", [0, 2**32 - 40])
@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_overwritten_and_nobody_waits_for_ever(
    seed: int, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """first: of the pieces, which are counted modulo 2^32."""
    draw, machine = random.Random(seed), Machine()
    machine.memory |= {"full": first, "free": first}
    monkeypatch.setattr(link_module, "driver", machine)
    monkeypatch.setattr(link_module._End, "_start", lambda self, _: self._stream)
    monkeypatch.setattr(link_module._End, "_end", lambda *_: None)
    shared: Any = SimpleNamespace(
        shape=SMALL, full="full", free="free", slots=[f"slot {k}" for k in range(SMALL.slots)]
    )
    ends: list[Any] = [
        link_module.Sender(shared, "send", None, ""),  # type: ignore[arg-type]
        link_module.Receiver(shared, "receive", None, ""),  # type: ignore[arg-type]
    ]
    for end in ends:
        end._count = first
    sizes = [draw.choice([1, 100, 700, 3000]) for _ in range(30)]
    source, target = 10**6, 10**9
    expected = {}
    for number, size in enumerate(sizes):
        start = 10_000 * number
        ends[0].send(SimpleNamespace(nbytes=size, data_ptr=lambda start=start: source + start))
        ends[1].receive(SimpleNamespace(nbytes=size, data_ptr=lambda start=start: target + start))
        for offset, length in SMALL.cut(size):
            expected[target + start + offset] = ((source + start + offset, length), length)
        if draw.random() < 0.3:
            machine.run(draw)
    machine.run(draw)
    assert {key: value for key, value in machine.memory.items() if key in expected} == expected


class Event:
    def __init__(self, done: bool = False):
        self.done = done

    def query(self) -> bool:
        return self.done


def test_watchdog(monkeypatch: pytest.MonkeyPatch) -> None:
    minutes = [1.0]
    watchdog = Watchdog(lambda: timedelta(minutes=minutes[0]))
    watchdog._thread = object()  # type: ignore[assignment]
    first, second, third = Event(), Event(), Event()
    watchdog.watch("send", first, "a")  # type: ignore[arg-type]
    minutes[0] = 2.0
    watchdog.watch("send", second, "b")  # type: ignore[arg-type]
    watchdog.watch("receive", third, "c")  # type: ignore[arg-type]
    assert [(p.what, p.timeout) for p in watchdog.oldest()] == [("send of a", 60.0), ("receive of c", 120.0)]
    first.done = third.done = True
    assert [(p.what, p.timeout) for p in watchdog.oldest()] == [("send of b", 120.0)]


@pytest.mark.parametrize(("seconds", "ends"), [(0.3, True), (0, False)])
def test_alarm_needs_no_lock_of_pythons(seconds: float, ends: bool) -> None:
    """The main thread is in a call of C's that keeps the lock."""
    program = f"""
import ctypes
from mhc_megatron.pipeline.copies.alarm import Alarm
alarm = Alarm()
alarm.set(0.2)
alarm.set({seconds})
ctypes.PyDLL(None).usleep(900_000)
"""
    ended = subprocess.run([sys.executable, "-c", program], check=False, timeout=60)
    assert ended.returncode == (-signal.SIGABRT if ends else 0)


def test_memory_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some builds of Python lack os.memfd_create: by the C library's."""
    monkeypatch.delattr(os, "memfd_create")
    descriptor = ring._memory_file()
    try:
        assert os.readlink(f"/proc/self/fd/{descriptor}").startswith(f"/memfd:{ring._NAME}")
        os.posix_fallocate(descriptor, 0, 4096)
        assert os.pwrite(descriptor, b"mhc", 4000) == 3
    finally:
        os.close(descriptor)


def test_what_was_chosen_is_said() -> None:
    assert "through host memory" in Copies({}, {}, {"host memory": 4}, {}).describe()
    without = Copies({}, {}, {}, {"no GPU": 2})
    assert without.describe() == "NCCL moves the transfers, not copy engines: no GPU (2)"
    assert without.describe(asked=True).startswith("--mhc-pipeline-transport copy-engine was asked for, but NCCL")
    both = Copies({}, {}, {"host memory": 3}, {"the stages are on different nodes": 1}).describe()
    assert "3 of 4" in both
    assert "different nodes (1)" in both
