"""One row a run: what its gains came to."""

from __future__ import annotations

from collections.abc import Sequence

from mhc_megatron.monitor.band import show
from mhc_megatron.monitor.depth import extreme
from mhc_megatron.monitor.records import DIRECTIONS, Record, Run

COLUMNS = (
    "run",
    "iteration",
    "loss",
    "composite forward",
    "composite backward",
    "composite forward, any depth",
    "composite backward, any depth",
    "single-layer forward",
    "single-layer backward",
    "largest composite of the run, any depth",
    "smallest composite of the run, any depth",
)


def rows(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """COLUMNS of every run, at its last monitored iteration. Gains as ``min to max``, means over tokens: of the whole model's
    product, of those from any sublayer to the exit, and of single sublayers. The last columns have the iteration in brackets."""
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
        return (*head, *("1 (residual)",) * (len(COLUMNS) - len(head)))
    record = run.monitored[-1]
    head = (run.name, str(record["iteration"]), show_loss(record.get("loss")))
    composite, single = ([_span(record, kind, d) for d in DIRECTIONS] for kind in ("composite", "single"))
    depths = [f"{extreme(record, d, 'min')} to {extreme(record, d, 'max')}" for d in DIRECTIONS]
    return (*head, *composite, *depths, *single, _of_the_run(run, "max"), _of_the_run(run, "min"))


def show_loss(loss: float | None) -> str:
    """Nats a token."""
    return "not finite" if loss is None else f"{loss:.4f}"


def _span(record: Record, kind: str, direction: str) -> str:
    gains = record[kind][direction]
    least, most = (gains["min"][:1], gains["max"][:1]) if kind == "composite" else (gains["min"], gains["max"])
    if None in least or None in most:
        return show(None)
    return f"{show(min(least))} to {show(max(most))}"


def _of_the_run(run: Run, bound: str) -> str:
    """The largest or smallest gain of all depths and iterations; the first that is not finite, if there is one."""
    found = [(extreme(record, d, bound), record["iteration"]) for record in run.monitored for d in DIRECTIONS]
    unknown = [(one, iteration) for one, iteration in found if one.gain is None]
    choose = max if bound == "max" else min
    one, iteration = unknown[0] if unknown else choose(found, key=lambda pair: pair[0].gain or 0.0)
    return f"{one} ({iteration})"
