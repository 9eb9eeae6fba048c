"""The protocol of copy engines' links: what the two streams of a link do, played in every order that a GPU might choose."""

from __future__ import annotations

import random
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
    for offset, length in shape.cut(size):
        assert offset == end
        assert 0 < length <= shape.slot
        end += length
    assert end == size


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
                self.memory[arguments[0]] = arguments[1]
            elif kind == "copy":
                target, source, size = arguments
                self.memory[target] = (self.memory.get(source, source), size)

    def _waits(self, operation: tuple[Any, ...]) -> bool:
        return operation[0] == "wait" and self.memory[operation[1]] < operation[2]


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_overwritten_and_nobody_waits_for_ever(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw, machine = random.Random(seed), Machine()
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
    watchdog = Watchdog(timedelta(seconds=10))
    watchdog._thread = object()  # type: ignore[assignment]
    now = 0.0
    monkeypatch.setattr("mhc_megatron.pipeline.copies.watchdog.time.monotonic", lambda: now)
    first, second, third = Event(), Event(), Event()
    watchdog.watch(first, "send of a")  # type: ignore[arg-type]
    now = 5.0
    watchdog.watch(second, "send of b")  # type: ignore[arg-type]
    watchdog.watch(third, "receive of c")  # type: ignore[arg-type]
    assert watchdog.overdue(9.0) is None
    assert watchdog.overdue(11.0) == "send of a"
    first.done = True
    assert watchdog.overdue(12.0) is None
    third.done = True
    assert watchdog.overdue(16.0) == "send of b"


def test_what_was_chosen_is_said() -> None:
    assert "through host memory" in Copies({}, {}, {"host memory": 4}, {}).describe()
    assert Copies({}, {}, {}, {"no GPU": 2}).describe() == ("NCCL moves the transfers, not copy engines: no GPU (2)")
    both = Copies({}, {}, {"host memory": 3}, {"the stages are on different nodes": 1}).describe()
    assert "3 of 4" in both
    assert "different nodes (1)" in both
    assert ring.ON_GPU.slots * ring.ON_GPU.slot == 160 * 2**20, "README and docs say so"
