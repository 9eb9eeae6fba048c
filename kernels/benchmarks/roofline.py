"""The results of `boundary.py` as a picture: time against the bytes that the work needs, and the memory's speed as a line.

python kernels/benchmarks/roofline.py RESULTS.json PICTURE.png
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import cases
import matplotlib.pyplot as plt


def _needed_bytes(result: dict[str, Any]) -> int:
    return cases.UNITS[result["n"]] * result["t"] * result["c"] * 2


def draw(results: list[dict[str, Any]], picture: Path) -> None:
    """Forward + backward of every implementation at every shape, n = 4."""
    points = defaultdict(list)
    for result in results:
        if "both_us" in result and result["n"] == 4:
            name = "Transformer Engine, best" if result["name"].startswith("TE ") else result["name"]
            points[name].append((_needed_bytes(result) / 1e9, result["both_us"]))
    figure, axes = plt.subplots(figsize=(7, 5))
    for name, values in points.items():
        best: dict[float, float] = {}
        for gigabytes, microseconds in values:
            best[gigabytes] = min(microseconds, best.get(gigabytes, microseconds))
        axes.plot(*zip(*sorted(best.items()), strict=True), marker="o", label=name)
    speed = results[0]["bytes_per_second"]
    ends = sorted({x for values in points.values() for x, _ in values})
    limit = [gigabytes * 1e15 / speed for gigabytes in (ends[0], ends[-1])]
    axes.plot((ends[0], ends[-1]), limit, "k--", label=f"memory, {speed / 1e12:.2f} TB/s")
    axes.set(xscale="log", yscale="log", xlabel="GB that two passes need (34 units)", ylabel="forward + backward, us")
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(picture, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    draw(json.loads(options.results.read_text())["results"], options.picture)


if __name__ == "__main__":
    main()
