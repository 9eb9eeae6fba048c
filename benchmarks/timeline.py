"""One step on one GPU as a picture: a row a CUDA stream, transfers apart from computation."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

COLOURS = {"transfer": "tab:red", "mHC": "tab:blue", "experts": "tab:green", "other": "darkgrey"}
ZOOM = (0.45, 0.6)
"""The part of the step that the lower panel shows."""

Rows = dict[Any, list[tuple[float, float, str]]]
"""By stream: start and length in ms, kind. Experts: routed ones (`_experts`)."""


def draw(profiler: Any, picture: Path, title: str) -> float:
    """Draw what a `torch.profiler.profile` recorded.

    Returns the share of the time in which something other than transfers ran.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = _rows(profiler)
    if not rows:
        print(f"{picture}: the profiler saw no kernels")
        return float("nan")
    end = max(first + length for events in rows.values() for first, length, _ in events)
    busy = _covered([event for events in rows.values() for event in events if event[2] != "transfer"]) / end
    streams = sorted(rows, key=lambda stream: (all(kind == "transfer" for *_, kind in rows[stream]), stream))
    figure, panels = plt.subplots(2, figsize=(14, 2 + 0.7 * len(streams)))
    for axes, (left, right) in zip(panels, ((0.0, 1.0), ZOOM), strict=True):
        for row, stream in enumerate(streams):
            for kind, colour in COLOURS.items():
                bars = [(first, length) for first, length, k in rows[stream] if k == kind]
                axes.broken_barh(bars, (row - 0.4, 0.8), facecolors=colour)
        axes.set_yticks(range(len(streams)), [f"stream {stream}" for stream in streams])
        axes.set_xlim(left * end, right * end)
        axes.set_xlabel("ms")
    panels[0].set_title(f"{title}: computing {busy:.0%} of the time")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour, label=kind) for kind, colour in COLOURS.items()]
    figure.legend(handles=handles, loc="upper right", ncols=len(COLOURS))
    figure.tight_layout()
    figure.savefig(picture, dpi=110)
    plt.close(figure)
    return busy


def _rows(profiler: Any) -> Rows:
    rows: Rows = defaultdict(list)
    events = [
        event
        for event in profiler.profiler.kineto_results.events()
        if "CUDA" in str(event.device_type()) and event.duration_ns() > 0
    ]
    start = min((event.start_ns() for event in events), default=0)
    experts: dict[Any, bool] = defaultdict(bool)
    for event in sorted(events, key=lambda event: event.start_ns()):
        stream, name = event.device_resource_id(), event.name()
        kind = _kind(name)
        if kind == "other":
            experts[stream], kind = _experts(name, experts[stream])
        rows[stream].append(((event.start_ns() - start) / 1e6, event.duration_ns() / 1e6, kind))
    return rows


def _experts(name: str, before: bool) -> tuple[bool, str]:
    """Whether routed experts go on after a kernel, and what it is. before: whether they were under way before it.

    Tokens are permuted for them, and back after them, by kernels of these names (``moe_permute_fusion``), in the backward too.
    """
    if name.startswith("_unpermute_kernel"):
        return False, "experts"
    after = before or name.startswith("_permute_kernel")
    return after, "experts" if after else "other"


def _covered(events: list[tuple[float, float, str]]) -> float:
    """Length of the union of intervals."""
    total, until = 0.0, 0.0
    for first, length, _ in sorted(events):
        total += max(0.0, first + length - max(first, until))
        until = max(until, first + length)
    return total


def _kind(name: str) -> str:
    if "nccl" in name.lower():
        return "transfer"
    own = (
        "mix_project",
        "map_aggregate",
        "stream_backward",
        "mapping_backward",
        "phi_backward",
        "phi_streams_backward",
        "project_kernel",
        "pack_kernel",
        "add_output",
        "aggregate_",
    )
    return "mHC" if any(part in name for part in own) else "other"
