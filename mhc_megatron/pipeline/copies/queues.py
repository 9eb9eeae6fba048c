"""Whether a stream that waits for another GPU keeps other work of this one back.

The driver puts streams on a few queues (CUDA_DEVICE_MAX_CONNECTIONS), and what waits on a queue for something that is not there
yet stops all that is behind it: a rank whose computation stands behind a receive from a rank that waits for that computation
would wait for ever. Streams of a priority of their own have queues of their own, as far as is known; so it is tried out.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

import torch

from mhc_megatron.pipeline.copies import driver

_POOL = 32  # streams that PyTorch has of a priority
_PATIENCE = 10.0  # seconds: a GPU may be somebody else's meanwhile


def why_dependent(streams: Sequence[torch.cuda.Stream]) -> str | None:
    """What is wrong with the streams; None if each may wait, and neither the others nor PyTorch's streams do."""
    if os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1":
        return "CUDA_DEVICE_MAX_CONNECTIONS=1: the GPU has one queue, and a receive that waits would stop all that is behind it"
    flags = torch.zeros(2 * len(streams), dtype=torch.int32, pin_memory=True)
    addresses = [flags.data_ptr() + 4 * number for number in range(len(flags))]
    number = torch.zeros(1, device="cuda")
    number.add_(1)  # its kernel is there: loading one would wait for the GPU
    others = [torch.cuda.current_stream(), *(torch.cuda.Stream(priority=p) for p in (0, -1) for _ in range(_POOL))]
    torch.cuda.synchronize()

    def compute() -> list[torch.cuda.Event]:
        events = []
        for stream in others:
            with torch.cuda.stream(stream):
                number.add_(1)
                events.append(stream.record_event())
        return events

    def write(kept: int) -> list[torch.cuda.Event]:
        events = []
        for k, stream in enumerate(streams):
            if k != kept:
                driver.write_value(stream.cuda_stream, addresses[len(streams) + k], 1)
                events.append(stream.record_event())
        return events

    trials: list[tuple[Sequence[int], Callable[[], list[torch.cuda.Event]]]] = [(range(len(streams)), compute)]
    trials += [([k], lambda k=k: write(k)) for k in range(len(streams))]  # type: ignore[misc]
    for waiting, work in trials:
        flags.zero_()
        for k in waiting:
            driver.wait_value(streams[k].cuda_stream, addresses[k], 1)
        free = _complete(work())
        flags.fill_(1)
        torch.cuda.synchronize()
        if not free:
            return "a stream that waits keeps other work of the GPU back (CUDA_DEVICE_MAX_CONNECTIONS=32 may help)"
    return None


def _complete(events: list[torch.cuda.Event]) -> bool:
    until = time.monotonic() + _PATIENCE
    while not all(event.query() for event in events):
        if time.monotonic() > until:
            return False
        time.sleep(1e-4)
    return True
