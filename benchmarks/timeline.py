"""One step on one GPU as a picture: a row a CUDA stream, transfers apart from computation."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

COLOURS = {"transfer": "tab:red", "mHC": "tab:blue", "other": "lightgrey"}


def draw(profiler: Any, picture: Path, title: str) -> None:
    """profiler: a `torch.profiler.profile` that has recorded CUDA kernels."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows: dict[Any, list[tuple[float, float, str]]] = defaultdict(list)
    for event in profiler.profiler.kineto_results.events():
        if "CUDA" in str(event.device_type()) and event.duration_ns() > 0:
            rows[event.device_resource_id()].append((event.start_ns(), event.duration_ns(), _kind(event.name())))
    if not rows:
        print(f"{picture}: the profiler saw no kernels")
        return
    start = min(first for events in rows.values() for first, _, _ in events)
    streams = sorted(rows, key=lambda stream: (all(kind == "transfer" for *_, kind in rows[stream]), stream))
    figure, axes = plt.subplots(figsize=(14, 1 + 0.5 * len(streams)))
    for row, stream in enumerate(streams):
        for kind, colour in COLOURS.items():
            bars = [((first - start) / 1e6, length / 1e6) for first, length, k in rows[stream] if k == kind]
            axes.broken_barh(bars, (row - 0.4, 0.8), facecolors=colour)
    axes.set_yticks(range(len(streams)), [f"stream {stream}" for stream in streams])
    axes.set_xlabel("ms")
    axes.set_title(title)
    axes.legend(handles=[plt.Rectangle((0, 0), 1, 1, color=c, label=k) for k, c in COLOURS.items()], loc="upper right")
    figure.tight_layout()
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def _kind(name: str) -> str:
    if "nccl" in name.lower():
        return "transfer"
    own = (
        "mix_project",
        "map_aggregate",
        "stream_backward",
        "mapping_backward",
        "phi_backward",
        "pack_kernel",
        "aggregate_",
    )
    return "mHC" if any(part in name for part in own) else "other"
