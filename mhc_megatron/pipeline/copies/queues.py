"""Whether a stream that waits for another GPU keeps other work of this one back.

The driver puts streams on a few queues (CUDA_DEVICE_MAX_CONNECTIONS), and their copies on others
(CUDA_DEVICE_MAX_COPY_CONNECTIONS). What waits on a queue for something that is not there yet stops all that is behind it: a rank
whose computation stands behind a receive from a rank that waits for that computation would wait for ever. Streams of a priority
of their own have queues of their own, as far as is known, for kernels; so it is tried out.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

import torch

from mhc_megatron.pipeline.copies import driver

KERNELS, TO_GPU, TO_HOST, WITHIN = "kernels", "copies to the GPU", "copies to the host", "copies within the GPU"
_POOL = 32  # streams that PyTorch has of a priority
_MORE = 4  # of every priority, as other libraries may have them
_SIZE = 2**16  # of a copy, bytes
PATIENCE = 10.0
"""Seconds until something is taken for not happening: a GPU may be somebody else's meanwhile."""


def why_dependent(streams: Sequence[torch.cuda.Stream]) -> str | None:
    """What is wrong with streams of the highest priority; None if each may wait, with copies behind that, and neither kernels
    nor copies on others do."""
    if os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1":
        return "CUDA_DEVICE_MAX_CONNECTIONS=1: the GPU has one queue, and a receive that waits would stop all that is behind it"
    scratch = _Scratch(len(streams))
    made = [driver.make_stream(priority) for priority in driver.priorities()[1:] for _ in range(_MORE)]
    pools = [torch.cuda.Stream(priority=p) for p in (0, -1) for _ in range(_POOL)]
    others = [torch.cuda.current_stream(), *pools, *made]
    all_wait = range(len(streams))
    trials: list[tuple[Sequence[int], str, Sequence[torch.cuda.Stream]]] = [
        (all_wait, kind, others) for kind in (KERNELS, TO_GPU, TO_HOST, WITHIN)
    ]
    for waiting in all_wait:
        free = [stream for k, stream in enumerate(streams) if k != waiting]
        trials += [([waiting], kind, free) for kind in (TO_GPU, TO_HOST, WITHIN)]
    try:
        for waits, kind, tried in trials:
            try:
                for k in waits:
                    scratch.wait(streams[k], k)
                missing = late([scratch.work(stream, kind) for stream in tried])
            finally:
                scratch.let_go()
            if missing:
                return (
                    f"a stream that waits keeps {kind} on {len(missing)} of {len(tried)} others back "
                    f"(CUDA_DEVICE_MAX_CONNECTIONS=32 and CUDA_DEVICE_MAX_COPY_CONNECTIONS=32 may help)"
                )
    finally:
        for stream in made:
            driver.destroy_stream(stream)
    return None


def late(events: Sequence[torch.cuda.Event]) -> list[int]:
    """Which of them have not happened after a while; empty as soon as all have."""
    until = time.monotonic() + PATIENCE
    missing = list(range(len(events)))
    while missing and time.monotonic() < until:
        missing = [k for k in missing if not events[k].query()]
        time.sleep(1e-4)
    return missing


class _Scratch:
    """Flags to wait for, and memory to copy."""

    def __init__(self, count: int):
        self._flags = torch.zeros(count, dtype=torch.int32, pin_memory=True)
        self._host = torch.zeros(2 * _SIZE, dtype=torch.uint8, pin_memory=True)
        gpu = torch.zeros(3 * _SIZE, dtype=torch.uint8, device="cuda")
        number = torch.zeros(1, device="cuda")
        to, host = gpu.data_ptr(), self._host.data_ptr()
        copies = {
            TO_GPU: (to, host),
            TO_HOST: (host + _SIZE, to + _SIZE),
            WITHIN: (to + 2 * _SIZE, to + _SIZE),
        }
        self._gpu, self._number, self._copies = gpu, number, copies
        # Everything once: at its first time CUDA may load something for it, and wait for the GPU.
        for kind in (KERNELS, TO_GPU, TO_HOST, WITHIN):
            self.work(torch.cuda.current_stream(), kind).query()
        for k in range(count):
            driver.write_value(torch.cuda.current_stream().cuda_stream, self._flag(k), 1)
            driver.wait_value(torch.cuda.current_stream().cuda_stream, self._flag(k), 1)
        self.let_go()

    def _flag(self, k: int) -> int:
        return self._flags.data_ptr() + 4 * k

    def wait(self, stream: torch.cuda.Stream, k: int) -> None:
        """Let the stream wait, and copies behind that."""
        driver.wait_value(stream.cuda_stream, self._flag(k), 1)
        for places in self._copies.values():
            driver.copy(stream.cuda_stream, *places, _SIZE)

    def work(self, stream: torch.cuda.Stream, kind: str) -> torch.cuda.Event:
        """Something for the stream to do."""
        if kind == KERNELS:
            with torch.cuda.stream(stream):
                self._number.add_(1)
        else:
            driver.copy(stream.cuda_stream, *self._copies[kind], _SIZE)
        return stream.record_event()

    def let_go(self) -> None:
        """Of all that waits."""
        self._flags.fill_(1)
        torch.cuda.synchronize()
        self._flags.zero_()
