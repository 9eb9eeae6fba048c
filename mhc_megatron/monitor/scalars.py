"""A monitored step as named numbers, for TensorBoard and W&B."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from mhc_megatron.monitor.depth import extreme
from mhc_megatron.monitor.records import DIRECTIONS, Record


def scalars(record: Record) -> dict[str, float]:
    """``mhc/...``: of the whole model, and extremes over its depth; ``mhc-layers/<what>/<layer>-<sublayer>``: of every sublayer.
    What is not finite is left out, as Megatron's writers do with what they don't have."""
    named: dict[str, float | None] = {}
    for direction in DIRECTIONS:
        composite, single = record["composite"][direction], record["single"][direction]
        named[f"mhc/composite-{direction}-max"] = composite["max"][0]
        named[f"mhc/composite-{direction}-min"] = composite["min"][0]
        for bound in ("max", "min"):
            gain, layer = extreme(record, direction, bound)
            named[f"mhc/composite-{direction}-{bound}-any-depth"] = gain
            named[f"mhc/composite-{direction}-{bound}-any-depth-layer"] = None if gain is None else layer
        named[f"mhc/single-{direction}-max"] = _extreme(max, single["max"])
        named[f"mhc/single-{direction}-min"] = _extreme(min, single["min"])
    for what in ("row_error", "column_error", "similarity"):
        named[f"mhc/{what.replace('_', '-')}"] = _extreme(max, record[what])
    for what in ("pre", "post"):
        means, deviations = record[what]["mean"], record[what]["std"]
        # Among the streams of a sublayer, and of a stream among tokens.
        named[f"mhc/{what}-spread-streams"] = _extreme(max, [_spread(row) for row in means])
        named[f"mhc/{what}-spread-tokens"] = _extreme(max, [_extreme(max, row) for row in deviations])
    for i, (layer, name) in enumerate(record["sublayers"]):
        place = f"{layer:03d}-{name}"
        for direction in DIRECTIONS:
            for kind in ("single", "composite"):
                for bound in ("max", "min"):
                    named[f"mhc-layers/{kind}-{direction}-{bound}/{place}"] = record[kind][direction][bound][i]
        named[f"mhc-layers/similarity/{place}"] = record["similarity"][i]
    return {name: value for name, value in named.items() if value is not None}


def _extreme(choose: Callable[..., Any], values: Iterable[float | None]) -> float | None:
    known = list(values)
    return None if None in known else choose(known)


def _spread(row: list[float | None]) -> float | None:
    highest, lowest = _extreme(max, row), _extreme(min, row)
    return None if highest is None or lowest is None else highest - lowest
