"""python -m mhc_megatron report: pictures and a page from the monitor's files of one or several runs."""

from __future__ import annotations

import argparse
import base64
import dataclasses
import html
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mhc_megatron.monitor import summary
from mhc_megatron.monitor.records import Run, read

PAGE = "report.html"
_CAPTIONS = {
    "gains-by-depth": "The Amax gain magnitude of arXiv 2512.24880, figures 3 and 7: per token the largest absolute row sum "
    "(forward) and column sum (backward), then the mean over tokens. Dashed: the smallest sums, which show a stream that fades.",
    "gains-by-depth-near-1": "The runs above whose gains stay within a factor of 10.",
    "gains-by-iteration": "Gains of the product of H_res over all sublayers.",
    "loss": "Loss and gradient norm of the monitored iterations.",
    "h-res": "H_res[i, j] carries stream j into stream i.",
    "streams": "At each run's last monitored iteration.",
}


def add_parser(commands: Any) -> None:
    """Add the report to the command line's sub-commands."""
    parser = commands.add_parser(
        "report",
        help="draw the gains, H_res and losses that runs with --enable-mhc have logged: PNG files and an HTML page",
    )
    parser.add_argument("runs", nargs="+", metavar="folder", help="with mhc-monitor.jsonl; name=folder names the run")
    parser.add_argument("--out", type=Path, help="where the files go (default: the first folder's report/)")


def run(options: argparse.Namespace) -> int:
    """Make the report; returns the exit status."""
    try:
        runs = read_runs(options.runs)
        out = options.out or Path(options.runs[0].partition("=")[2] or options.runs[0]) / "report"
        page = write(runs, out)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    print(summary.markdown(runs))
    print(f"report: {page}, and {len(list(out.glob('*.png')))} PNG files beside it")
    return 0


def read_runs(arguments: Sequence[str]) -> list[Run]:
    """Runs from ``folder`` or ``name=folder``; names that are there twice get a number.

    Raises:
        FileNotFoundError, ValueError: see `records.read`.
    """
    runs: list[Run] = []
    for argument in arguments:
        name, equals, folder = argument.partition("=")
        run = read(folder, name) if equals and not Path(argument).exists() else read(argument)
        if run.skipped:
            print(
                f"report: {argument}: {run.skipped} unreadable lines left out (a run killed while it wrote)",
                file=sys.stderr,
            )
        names = [other.name for other in runs]
        number = next(
            i for i in range(1, len(arguments) + 1) if (run.name if i == 1 else f"{run.name}-{i}") not in names
        )
        runs.append(run if number == 1 else dataclasses.replace(run, name=f"{run.name}-{number}"))
    return runs


def write(runs: Sequence[Run], out: Path) -> Path:
    """Write one PNG a figure and the page, which has them inside; returns the page.

    Raises:
        ModuleNotFoundError: without matplotlib, naming the extra. OSError: if the folder can't be written.
    """
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "the report needs matplotlib: pip install 'mhc-megatron[report]', or pip install matplotlib"
        ) from None
    from mhc_megatron.monitor.figures import draw

    out.mkdir(parents=True, exist_ok=True)
    sections = []
    for name, figure in draw(runs).items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110)
        plt.close(figure)
        (out / f"{name}.png").write_bytes(buffer.getvalue())
        caption = _CAPTIONS["h-res" if name.startswith("h-res") else name]
        image = base64.b64encode(buffer.getvalue()).decode()
        sections.append(f'<figure><img alt="{html.escape(name)}" src="data:image/png;base64,{image}">')
        sections.append(f"<figcaption>{html.escape(caption)}</figcaption></figure>")
    page = out / PAGE
    page.write_text(_PAGE.format(table=_table(runs), settings=_settings(runs), sections="\n".join(sections)))
    return page


def _table(runs: Sequence[Run]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in summary.COLUMNS)
    body = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in summary.rows(runs))
    return f"<table><tr>{head}</tr>" + "".join(f"<tr>{row}</tr>" for row in body) + "</table>"


def _settings(runs: Sequence[Run]) -> str:
    lines = (f"{run.name}: " + ", ".join(f"{key} {value}" for key, value in run.run.items()) for run in runs if run.run)
    return "<br>".join(map(html.escape, lines))


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>mHC gains</title><style>
body {{ font: 15px/1.45 system-ui, sans-serif; max-width: 1150px; margin: 2em auto; padding: 0 1em; color: #222; }}
table {{ border-collapse: collapse; }} td, th {{ padding: .3em .7em; border-bottom: 1px solid #ddd; text-align: right; }}
td:first-child, th:first-child {{ text-align: left; }} figure {{ margin: 2em 0; }} img {{ max-width: 100%; }}
figcaption, .settings {{ color: #555; font-size: 13px; }}
</style></head><body><h1>mHC gains</h1>
{table}
<p class="settings">Gains are min to max of the absolute sums, means over tokens, at the last monitored iteration.
<br>{settings}</p>
{sections}
</body></html>
"""
