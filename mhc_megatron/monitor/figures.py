"""The report's pictures (matplotlib). A run has one colour in all of them; solid: largest sums, dashed: smallest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mhc_megatron.monitor.records import DIRECTIONS, Record, Run

_SUMS = {"forward": "row sum", "backward": "column sum"}
_MAPS = 8  # heat maps of H_res, of sublayers evenly spaced
_LOG_ABOVE = 10.0  # gains that reach this, or its inverse, are drawn on a logarithmic axis; others again without them


def draw(runs: Sequence[Run]) -> dict[str, Any]:
    """Matplotlib figures by name, in the order of the page; those that the runs have nothing for are left out."""
    import matplotlib

    matplotlib.use("Agg")
    monitored = [run for run in runs if run.monitored]
    figures: dict[str, Any] = {}
    if monitored:
        figures["gains-by-depth"] = _gains_by_depth(monitored)
        near = [run for run in monitored if _is_near_one(run)]
        if 0 < len(near) < len(monitored):
            figures["gains-by-depth-near-1"] = _gains_by_depth(near, _colors(monitored))
        figures["gains-by-iteration"] = _gains_by_iteration(monitored)
    if any(len(_series(run.records.values(), "loss")[0]) > 1 for run in runs):
        figures["loss"] = _loss(runs)
    for run in monitored:
        figures[f"h-res-{run.name}"] = _heat_maps(run)
    if monitored:
        figures["streams"] = _streams(monitored)
    return figures


def _colors(runs: Sequence[Run]) -> list[tuple[Run, str]]:
    # Fixed by name: the same model kind looks the same in every picture, whichever runs are drawn.
    fixed = {"residual": "C7", "hc": "C3", "mhc": "C0", "mhc-preserve": "C2"}
    return [(run, fixed.get(run.name, f"C{(i + 1) % 10}")) for i, run in enumerate(runs)]


def _subplots(rows: int, columns: int, size: tuple[float, float], **options: Any) -> Any:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **options)
    for axis in axes.flat:
        axis.grid(alpha=0.25, lw=0.6)
    return figure, axes


def _nan(values: Sequence[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]


def _finish_gains(axis: Any, direction: str, where: str) -> None:
    values = [abs(y) for line in axis.lines for y in line.get_ydata() if y == y and y != 0]
    axis.axhline(1, color="black", lw=0.8, alpha=0.5)
    if values and (max(values) > _LOG_ABOVE or min(values) < 1 / _LOG_ABOVE):
        axis.set_yscale("log")
    axis.set(ylabel=f"{_SUMS[direction]} ({direction})", xlabel=where)


def _is_near_one(run: Run) -> bool:
    record = run.monitored[-1]
    gains = [
        gain
        for kind in ("single", "composite")
        for d in DIRECTIONS
        for b in ("max", "min")
        for gain in record[kind][d][b]
    ]
    return all(gain is not None and 1 / _LOG_ABOVE <= gain <= _LOG_ABOVE for gain in gains)


def _gains_by_depth(runs: Sequence[Run], colors: Sequence[tuple[Run, str]] = ()) -> Any:
    """The paper's figures 3 and 7: at each run's last monitored iteration."""
    chosen = [(run, color) for run, color in colors or _colors(runs) if run in runs]
    figure, axes = _subplots(2, 2, (11, 7))
    titles = {"single": "single layer: H_res of the sublayer", "composite": "composite: from the sublayer to the exit"}
    for column, (kind, title) in enumerate(titles.items()):
        for row, direction in enumerate(DIRECTIONS):
            axis = axes[row, column]
            for run, color in chosen:
                record = run.monitored[-1]
                label = f"{run.name}, iteration {record['iteration']}"
                depth = range(1, len(record["sublayers"]) + 1)
                axis.plot(depth, _nan(record[kind][direction]["max"]), color=color, label=label)
                axis.plot(depth, _nan(record[kind][direction]["min"]), color=color, ls="--", lw=1)
            _finish_gains(axis, direction, "sublayer (two a layer)")
        axes[0, column].set_title(title)
    axes[0, 0].legend()
    figure.suptitle("Gain against depth: largest (solid) and smallest (dashed) absolute sum, mean over tokens")
    return figure


def _gains_by_iteration(runs: Sequence[Run]) -> Any:
    figure, axes = _subplots(1, 2, (11, 4))
    for axis, direction in zip(axes[0], DIRECTIONS, strict=True):
        for run, color in _colors(runs):
            iterations = [record["iteration"] for record in run.monitored]
            for bound, style in (("max", "-"), ("min", "--")):
                values = [record["composite"][direction][bound][0] for record in run.monitored]
                axis.plot(iterations, _nan(values), color=color, ls=style, label=run.name if bound == "max" else None)
        _finish_gains(axis, direction, "iteration")
    axes[0, 0].legend()
    figure.suptitle("Composite gain of the whole model while it trains")
    return figure


def _series(records: Any, name: str) -> tuple[list[int], list[float]]:
    known = [(record["iteration"], record[name]) for record in records if record.get(name) is not None]
    return [i for i, _ in known], [value for _, value in known]


def _loss(runs: Sequence[Run]) -> Any:
    norms = any(_series(run.records.values(), "grad_norm")[0] for run in runs)
    figure, axes = _subplots(1, 2 if norms else 1, (11, 4))
    for run, color in _colors(runs):
        axes[0, 0].plot(*_series(run.records.values(), "loss"), color=color, lw=1, label=run.name)
        if norms:
            axes[0, 1].plot(*_series(run.records.values(), "grad_norm"), color=color, lw=1, label=run.name)
    axes[0, 0].set(xlabel="iteration", ylabel="training loss (nats a token)")
    axes[0, 0].legend()
    if norms:
        axes[0, 1].set(xlabel="iteration", ylabel="gradient norm", yscale="log")
    return figure


def _heat_maps(run: Run) -> Any:
    import matplotlib.pyplot as plt

    record = run.monitored[-1]
    count = len(record["sublayers"])
    shown = sorted({round(k * (count - 1) / max(1, _MAPS - 1)) for k in range(_MAPS)})
    maps = [(f"{record['sublayers'][i][0]} {record['sublayers'][i][1]}", record["res_mean"][i]) for i in shown]
    maps.append((f"product of {count}", record["composite_mean"]))
    columns = (len(maps) + 1) // 2
    figure, axes = plt.subplots(2, columns, figsize=(2.3 * columns, 5.2), layout="constrained", squeeze=False)
    for axis in axes.flat[len(maps) :]:
        axis.axis("off")
    for axis, (title, matrix) in zip(axes.flat, maps, strict=False):
        rows = [_nan(row) for row in matrix]
        limit = max([1.0, *(abs(value) for row in rows for value in row if value == value)])
        axis.imshow(rows, cmap="RdBu_r", vmin=-limit, vmax=limit)
        for i, row in enumerate(rows):
            for j, value in enumerate(row):
                color = "white" if abs(value) > 0.7 * limit else "black"
                axis.text(j, i, _short(value), ha="center", va="center", fontsize=7, color=color)
        # The sums are what the gains are made of.
        axis.set_yticks(range(len(rows)), [_short(sum(row)) for row in rows], fontsize=7)
        axis.set_xticks(range(len(rows)), [_short(sum(column)) for column in zip(*rows, strict=True)], fontsize=7)
        axis.set_title(title, fontsize=9)
    figure.suptitle(
        f"{run.name}, iteration {record['iteration']}: H_res[i, j], stream j into stream i, mean over tokens; "
        "row and column sums at the axes",
        fontsize=9,
    )
    return figure


def _short(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 100 else f"{value:.3g}"


def _streams(runs: Sequence[Run]) -> Any:
    panels: list[tuple[str, Callable[[Record], list[float | None]]]] = [
        ("stream similarity (mean cosine)", lambda record: record["similarity"]),
        ("column sums' largest error", lambda record: record["column_error"]),
        ("H_pre: highest stream - lowest", lambda record: [_range(row) for row in record["pre"]["mean"]]),
        ("H_post: highest stream - lowest", lambda record: [_range(row) for row in record["post"]["mean"]]),
    ]
    figure, axes = _subplots(2, 2, (11, 6))
    for axis, (title, values) in zip(axes.flat, panels, strict=True):
        for run, color in _colors(runs):
            record = run.monitored[-1]
            axis.plot(range(1, len(record["sublayers"]) + 1), _nan(values(record)), color=color, label=run.name)
        axis.set(title=title, xlabel="sublayer (two a layer)")
    axes[0, 0].legend()
    return figure


def _range(row: list[float | None]) -> float | None:
    known = [value for value in row if value is not None]
    return max(known) - min(known) if len(known) == len(row) else None
