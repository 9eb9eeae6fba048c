"""GPU times: CUDA graph replays and eager calls, the L2 cache flushed before each, medians."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

Call = Callable[[], object]
_FLUSH_BYTES = 256 * 2**20  # several times any L2 cache


def gpu_us(call: Call, repeats: int = 25) -> float:
    """Microseconds of GPU time of one call (launches included, where the host is slower than the GPU)."""
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    events = []
    for _ in range(repeats):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return median(start.elapsed_time(end) for start, end in events) * 1e3


def graph_us(call: Call, repeats: int = 25) -> float:
    """As `gpu_us`, of the call captured in a CUDA graph: what the GPU takes when the host does not matter."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    for _ in range(3):
        graph.replay()
    microseconds = gpu_us(graph.replay, repeats)
    del results, graph
    return microseconds


def host_us(call: Call, repeats: int = 100, samples: int = 5) -> float:
    """Microseconds of host time of one call whose GPU work is negligible: the smallest of so many averages."""
    averages = []
    for _ in range(samples):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        averages.append((time.perf_counter() - start) / repeats * 1e6)
    torch.cuda.synchronize()
    return min(averages)


def launches(call: Call) -> int:
    """Kernels (and memory operations) that one call starts."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events())


def bandwidth(elements: int = 2**29) -> float:
    """Bytes a second of ``torch.add`` of two bf16 tensors into a third: the fastest that streams go through this GPU."""
    a, b = (torch.zeros(elements, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    out = torch.empty_like(a)
    return 3 * 2 * elements / gpu_us(lambda: torch.add(a, b, out=out)) * 1e6
