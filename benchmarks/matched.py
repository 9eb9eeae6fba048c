"""Both ends of the transfers of one step on two GPUs: how long they moved data, how long one end waited for the other.

A transfer's kernel runs on either GPU from when it is launched there until the data has gone; the data moves from when the later
one starts. Kernels are matched by the stream they run on (both ranks make their streams in the same order) and their number
on it.
"""

from __future__ import annotations

from collections import defaultdict
from statistics import median
from typing import Any, NamedTuple

Span = tuple[float, float]


class Rank(NamedTuple):
    """Of one rank, in ms: start and end of transfers' kernels by stream, when anything else ran, and for how long by name."""

    transfers: dict[int, list[Span]]
    computing: list[Span]
    kernels: dict[str, float]


class Moved(NamedTuple):
    """One transfer: ms in which data moved, in which one end alone was there, and in which a rank computed while data moved."""

    moving: float
    waiting: float
    beside: float


def recorded(profiler: Any) -> Rank:
    """What a `torch.profiler.profile` of CUDA saw on this rank. Times of ranks of one host are comparable."""
    transfers: dict[int, list[Span]] = defaultdict(list)
    others = []
    kernels: dict[str, float] = defaultdict(float)
    for event in profiler.profiler.kineto_results.events():
        if "CUDA" not in str(event.device_type()) or event.duration_ns() <= 0:
            continue
        span = (event.start_ns() / 1e6, (event.start_ns() + event.duration_ns()) / 1e6)
        if "nccl" in event.name().lower():
            transfers[event.device_resource_id()].append(span)
        elif "DtoD" not in event.name():  # the local copies that stand for transfers
            others.append(span)
            kernels[event.name()] += span[1] - span[0]
    return Rank({stream: sorted(spans) for stream, spans in transfers.items()}, union(others), dict(kernels))


def union(spans: list[Span]) -> list[Span]:
    """Disjoint, in order."""
    found: list[Span] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def slowed(rank: Rank, alone: Rank) -> str:
    """A step with transfers against one without: is it longer because computation waits, or because it is slower?"""
    (step, computing), (step_alone, computing_alone) = map(_lengths, (rank, alone))
    return (
        f"computes {computing:.1f} ms, {computing_alone:.1f} without transfers ({computing - computing_alone:+.1f}); "
        f"not in {step - computing:.1f}, {step_alone - computing_alone:.1f} ms"
    )


def longer(rank: Rank, alone: Rank, count: int = 4) -> str:
    """What is slower beside transfers: the kernels whose times in a step differ most from those in one without."""
    names = rank.kernels.keys() | alone.kernels.keys()
    more = {name: rank.kernels.get(name, 0.0) - alone.kernels.get(name, 0.0) for name in names}
    most = sorted(more, key=lambda name: -more[name])[:count]
    rest = sum(more.values()) - sum(more[name] for name in most)
    named = [f"{more[name]:+.1f} ms to {alone.kernels.get(name, 0.0):.1f} {name[:60]}" for name in most]
    return "; ".join([*named, f"{rest:+.1f} all others"])


def _lengths(rank: Rank) -> tuple[float, float]:
    """ms from the first computation to the last, and of that in which something computed."""
    return rank.computing[-1][1] - rank.computing[0][0], sum(end - start for start, end in rank.computing)


def match(first: Rank, second: Rank) -> dict[int, list[Moved]]:
    """By stream. Streams on which the two have not launched as many are left out."""
    computing = union([*first.computing, *second.computing])
    found = {}
    for stream in first.transfers.keys() & second.transfers.keys():
        pairs = list(zip(first.transfers[stream], second.transfers[stream], strict=False))
        if len(pairs) == len(first.transfers[stream]) == len(second.transfers[stream]):
            found[stream] = [_moved(*pair, computing) for pair in pairs]
    return found


def _moved(a: Span, b: Span, computing: list[Span]) -> Moved:
    start, end = max(a[0], b[0]), max(a[1], b[1])
    beside = sum(max(0.0, min(end, until) - max(start, since)) for since, until in computing)
    return Moved(end - start, start - min(a[0], b[0]), beside)


def describe(first: Rank, second: Rank) -> str:
    """A line a stream."""
    lines = []
    for stream, moved in sorted(match(first, second).items()):
        moving, waiting = [m.moving for m in moved], [m.waiting for m in moved]
        share = sum(m.beside for m in moved) / max(sum(moving), 1e-9)
        lines.append(
            f"    stream {stream}: {len(moved)} transfers, moving {median(moving):.2f} ms ({min(moving):.2f} to "
            f"{max(moving):.2f}), {share:.0%} of that beside computation; waiting {median(waiting):.2f}, "
            f"{sum(waiting):.0f} in all"
        )
    return "\n".join(lines)
