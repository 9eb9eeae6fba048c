"""Warnings when a gain leaves its band: once when it leaves, again only after it came back."""

from __future__ import annotations

from typing import Any

from mhc_megatron.monitor.records import DIRECTIONS, Record

_SHOWN = 4  # layers a warning names; it says how many more there are


class Band:
    """Watches single-layer and composite gains.

    Args:
        band: gains from 1/band to band are in order (MHCConfig.monitor_band).
    """

    def __init__(self, band: float):
        self.low, self.high = 1 / band, band
        self._outside: set[Any] = set()

    def check(self, record: Record) -> list[str]:
        """Messages for gains (means over tokens) that are outside now and were not before."""
        sublayers = [f"layer {layer} {name}" for layer, name in record["sublayers"]]
        single = {i: text for i in range(len(sublayers)) if (text := self._describe(record["single"], i))}
        # One that leaves near the exit takes those of all lower sublayers along: the highest one says where it happens.
        composite = next(
            ((i, text) for i in reversed(range(len(sublayers))) if (text := self._describe(record["composite"], i))),
            None,
        )
        messages = []
        new = [f"{sublayers[i]}: {text}" for i, text in single.items() if i not in self._outside]
        if new:
            more = f"; and {len(new) - _SHOWN} more sublayers" if len(new) > _SHOWN else ""
            messages.append(f"gains of single layers {self._left()}: " + "; ".join(new[:_SHOWN]) + more)
        if composite and "composite" not in self._outside:
            messages.append(
                f"composite gain {self._left()}: from {sublayers[composite[0]]} to the exit: {composite[1]}"
            )
        self._outside = {*single, *(["composite"] if composite else [])}
        return [f"iteration {record['iteration']}: {message}" for message in messages]

    def _left(self) -> str:
        return f"outside [{self.low:.3g}, {self.high:.3g}] (--mhc-monitor-band)"

    def _describe(self, gains: dict[str, Any], i: int) -> str:
        """The directions that are outside, with their smallest and largest sums; empty if none is."""
        parts = []
        for direction in DIRECTIONS:
            least, most = gains[direction]["min"][i], gains[direction]["max"][i]
            if any(gain is None or not self.low <= gain <= self.high for gain in (least, most)):
                parts.append(f"{direction} {show(least)} to {show(most)}")
        return ", ".join(parts)


def show(gain: float | None) -> str:
    """A gain for people; null is one that is not finite."""
    return "not finite" if gain is None else f"{gain:.4g}"
