"""The extremes of the composite gains over all depths: a product of the whole model near 1 can hide streams that fade halfway."""

from __future__ import annotations

from typing import NamedTuple

from mhc_megatron.monitor.band import show
from mhc_megatron.monitor.records import Record


class Extreme(NamedTuple):
    """gain: None if it is not finite. layer: of the sublayer that the product begins with, from 1."""

    gain: float | None
    layer: int

    def __str__(self) -> str:
        return f"{show(self.gain)} at layer {self.layer}"


def extreme(record: Record, direction: str, bound: str) -> Extreme:
    """The largest of the largest sums (``max``) or the smallest of the smallest (``min``) of all products to the exit."""
    gains: list[float | None] = record["composite"][direction][bound]
    layers = [layer for layer, _ in record["sublayers"]]
    known = [gain for gain in gains if gain is not None]
    if len(known) < len(gains):  # where it happens: nearest to the exit, all below follow
        return Extreme(None, max(layer for gain, layer in zip(gains, layers, strict=True) if gain is None))
    gain = max(known) if bound == "max" else min(known)
    return Extreme(gain, layers[gains.index(gain)])
