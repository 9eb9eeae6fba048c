"""The experiment's results put into a Markdown page, its pictures beside it."""

from __future__ import annotations

import shutil
from pathlib import Path

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
_PICTURES = {
    "gains-by-depth": "gain against depth",
    "gains-by-depth-near-1": "gain against depth, runs with gains near 1",
    "gains-by-iteration": "composite gain while training",
    "loss": "training loss and gradient norm",
}


def fill(page: Path, table: str, report: Path) -> None:
    """Replace what is between the page's markers by the table and the report's pictures, copied to a folder named as the page.

    Raises:
        ValueError: if the page lacks a marker.
    """
    text = page.read_text()
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} has no place for results: it needs the lines {BEGIN} and {END}")
    folder = page.with_suffix("")
    folder.mkdir(exist_ok=True)
    pictures = ""
    for name, title in _PICTURES.items():
        if (report / f"{name}.png").exists():
            shutil.copyfile(report / f"{name}.png", folder / f"{name}.png")
            pictures += f"![{title}]({folder.name}/{name}.png)\n\n"
    page.write_text(f"{head}{BEGIN}\n\n{table}\n{pictures}{END}{tail}")
