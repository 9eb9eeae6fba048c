"""One row a run: what its gains came to."""

from __future__ import annotations

from collections.abc import Sequence

from mhc_megatron.monitor.band import show
from mhc_megatron.monitor.records import Record, Run

COLUMNS = (
    "run",
    "iteration",
    "loss",
    "composite forward",
    "composite backward",
    "single-layer forward",
    "single-layer backward",
    "largest composite of the run",
)


def rows(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """COLUMNS of every run, at its last monitored iteration. Gains as ``min to max``, means over tokens: of the whole model's
    product, and over all sublayers. The last column has the iteration in brackets."""
    return [_row(run) for run in runs]


def markdown(runs: Sequence[Run], **further: Sequence[str]) -> str:
    """The rows as a Markdown table; further: columns of the caller's, one cell a run."""
    names = (*COLUMNS, *(name.replace("_", " ") for name in further))
    cells = [(*row, *(column[i] for column in further.values())) for i, row in enumerate(rows(runs))]
    lines = [names, tuple("---" for _ in names), *cells]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _row(run: Run) -> tuple[str, ...]:
    last = run.records[max(run.records)]
    head = (run.name, str(last["iteration"]), show_loss(last.get("loss")))
    if not run.monitored:
        return (*head, *("1 (residual)",) * 4, "1 (residual)")
    record = run.monitored[-1]
    head = (run.name, str(record["iteration"]), show_loss(record.get("loss")))
    spans = [
        _span(record, kind, direction) for kind in ("composite", "single") for direction in ("forward", "backward")
    ]
    largest, iteration = max((_largest(r), r["iteration"]) for r in run.monitored)
    return (*head, *spans, f"{largest:.4g} ({iteration})")


def show_loss(loss: float | None) -> str:
    """Nats a token."""
    return "not finite" if loss is None else f"{loss:.4f}"


def _span(record: Record, kind: str, direction: str) -> str:
    gains = record[kind][direction]
    least, most = (gains["min"][:1], gains["max"][:1]) if kind == "composite" else (gains["min"], gains["max"])
    if None in least or None in most:
        return show(None)
    return f"{show(min(least))} to {show(max(most))}"


def _largest(record: Record) -> float:
    gains = [record["composite"][direction]["max"][0] for direction in ("forward", "backward")]
    return float("inf") if None in gains else max(gains)
