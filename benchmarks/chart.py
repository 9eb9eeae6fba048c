"""The results of `overhead.py` as a picture: what each kind adds to a step's time and to its memory.

python benchmarks/chart.py PICTURE.png RESULTS.json [RESULTS.json ...]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

KINDS = ("hc", "mhc", "recompute")  # the reference would dwarf them
PAPER = 6.7  # % of a step, arXiv 2512.24880, 27B


def draw(files: list[Path], picture: Path) -> None:
    """One group of bars a file and number of layers: step time above the residual model's in %, peak memory in GiB.

    Raises:
        SystemExit: for a block twice.
    """
    groups: dict[str, dict[str, tuple[float, float]]] = {}
    for file in files:
        content = json.loads(file.read_text())
        settings = content["settings"]
        for layers, results in content["results"].items():
            device = settings["device"].removeprefix("NVIDIA ").partition(" ")[0]
            padded = ", padded" if settings.get("padded") else ""
            label = f"{settings['shape']}, {layers} layers\n{settings['tokens']} tokens{padded}\n{device}"
            if label in groups:
                raise SystemExit(f"{file}: the picture has that block already: {' '.join(label.split())}")
            base = results["residual"]
            groups[label] = {
                # Files from before "over" have medians alone.
                kind: (100 * r.get("over", r["step_ms"] / base["step_ms"] - 1), r["peak_gib"] - base["peak_gib"])
                for kind, r in results.items()
                if kind in KINDS
            }
    figure, (time, memory) = plt.subplots(2, 1, figsize=(9, 7), sharex=True)
    for number, kind in enumerate(KINDS):
        places = [place + (number - 1) * 0.27 for place, group in enumerate(groups.values()) if kind in group]
        values = [group[kind] for group in groups.values() if kind in group]
        if not values:
            continue
        for axes, column in ((time, 0), (memory, 1)):
            axes.bar(places, [value[column] for value in values], width=0.25, label=kind)
    time.axhline(PAPER, color="black", linestyle="--", label="the paper's 27B")
    time.set_ylabel("step time above the residual model's, %")
    memory.set_ylabel("peak memory above it, GiB")
    memory.set_xticks(range(len(groups)), groups, fontsize=8)
    time.legend(loc="upper left")
    figure.tight_layout()
    figure.savefig(picture, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("results", type=Path, nargs="+")
    options = parser.parse_args()
    draw(options.results, options.picture)


if __name__ == "__main__":
    main()
