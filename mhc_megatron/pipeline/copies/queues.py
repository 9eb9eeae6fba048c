"""Whether a stream that waits for another GPU keeps other work of this one back.

The driver puts streams, and their copies, on a few queues (CUDA_DEVICE_MAX_CONNECTIONS), and what waits on a queue for something
that is not there yet stops all that is behind it: a rank whose computation stands behind a receive from a rank that waits for
that computation would wait for ever. Streams of a priority of their own have queues of their own, as far as is known; so it is
tried out.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

import torch

from mhc_megatron.pipeline.copies import driver

_POOL = 32  # streams that PyTorch has of a priority
_MORE = 4  # of every priority, as other libraries may have them
_SIZE = 2**16  # of a copy, bytes
PATIENCE = 10.0
"""Seconds until something is taken for not happening: a GPU may be somebody else's meanwhile."""


def why_dependent(streams: Sequence[torch.cuda.Stream]) -> str | None:
    """What is wrong with streams of the highest priority; None if each may wait, with a copy behind that, and neither kernels
    nor copies on others do."""
    if os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1":
        return "CUDA_DEVICE_MAX_CONNECTIONS=1: the GPU has one queue, and a receive that waits would stop all that is behind it"
    scratch = _Scratch(len(streams))
    made = [driver.make_stream(priority) for priority in driver.priorities()[1:] for _ in range(_MORE)]
    pools = [torch.cuda.Stream(priority=p) for p in (0, -1) for _ in range(_POOL)]
    others = [torch.cuda.current_stream(), *pools, *made]
    everything = range(len(streams))
    trials: list[tuple[Sequence[int], Callable[[], list[torch.cuda.Event]]]] = [
        (everything, lambda: [scratch.work(stream, computes=True) for stream in others])
    ]
    for waiting in everything:
        free = [stream for k, stream in enumerate(streams) if k != waiting]
        trials.append(([waiting], lambda free=free: [scratch.work(stream) for stream in free]))  # type: ignore[misc]
    try:
        for waits, work in trials:
            try:
                for k in waits:
                    scratch.wait(streams[k], k)
                ended = complete(work())
            finally:
                scratch.let_go()
            if not ended:
                return "a stream that waits keeps other work of the GPU back (CUDA_DEVICE_MAX_CONNECTIONS=32 may help)"
    finally:
        for stream in made:
            driver.destroy_stream(stream)
    return None


def complete(events: Sequence[torch.cuda.Event]) -> bool:
    """Whether all of them happen in time."""
    until = time.monotonic() + PATIENCE
    while not all(event.query() for event in events):
        if time.monotonic() > until:
            return False
        time.sleep(1e-4)
    return True


class _Scratch:
    """Flags to wait for, and memory to copy."""

    def __init__(self, count: int):
        self._flags = torch.zeros(count + 1, dtype=torch.int32, pin_memory=True)
        self._host = torch.zeros(2 * _SIZE, dtype=torch.uint8, pin_memory=True)
        self._gpu = torch.zeros(3 * _SIZE, dtype=torch.uint8, device="cuda")
        self._number = torch.zeros(1, device="cuda")
        self._number.add_(1)  # its kernel is there: loading one would wait for the GPU
        torch.cuda.synchronize()

    def wait(self, stream: torch.cuda.Stream, k: int) -> None:
        driver.wait_value(stream.cuda_stream, self._flags.data_ptr() + 4 * k, 1)
        self.work(stream)

    def work(self, stream: torch.cuda.Stream, computes: bool = False) -> torch.cuda.Event:
        """Copies in all directions, and a flag; or a kernel before them."""
        if computes:
            with torch.cuda.stream(stream):
                self._number.add_(1)
        gpu, host, handle = self._gpu.data_ptr(), self._host.data_ptr(), stream.cuda_stream
        for target, source in ((gpu, host), (host + _SIZE, gpu + _SIZE), (gpu + 2 * _SIZE, gpu + _SIZE)):
            driver.copy(handle, target, source, _SIZE)
        if not computes:
            driver.write_value(handle, self._flags.data_ptr() + 4 * (len(self._flags) - 1), 1)
        return stream.record_event()

    def let_go(self) -> None:
        """Of all that waits."""
        self._flags.fill_(1)
        torch.cuda.synchronize()
        self._flags.zero_()
