"""Streams that the backward computes again instead of keeping them (arXiv 2512.24880, section 4.3.2).

What a boundary keeps of n*C values a token is its streams, x' and (as the one before wrote it) x. Both follow from the first
streams of a block and each sublayer's output, H_res and H_post, which are kept anyway: the output is C wide, the mappings
n*n + n numbers. So one `mix` a boundary brings them back: neither phi nor Sinkhorn runs again, and no sublayer does.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Block:
    """Successive boundaries of which only the first one's streams are kept."""

    def __init__(self, length: int):
        self.length = length
        # Weak: the autograd graph owns its nodes, and they own what they saved. A block keeps nothing alive.
        self.boundaries: list[weakref.ref[Any]] = []
        self.address = 0
        self.streams: dict[int, Tensor] = {}


class RecomputePlace(NamedTuple):
    """Where in a block some streams are; `recompute` starts one. Only the block's first streams are kept.

    Pass it to `mhc_kernels.boundary` together with those streams, and its `next` to the following one, with the streams that
    came out; the last one to `mhc_kernels.mix` at the chain's end. The results have the same bits as without. In the backward,
    a block's streams come into being when its last boundary needs them (one `mix` each) and are freed as the boundaries before
    are done.
    """

    block: _Block
    number: int

    def next(self) -> RecomputePlace:
        """The place of the streams that the boundary here returns: in this block, or the first one of another."""
        return (
            recompute(self.block.length)
            if self.number + 1 == self.block.length
            else self._replace(number=self.number + 1)
        )

    @property
    def is_first(self) -> bool:
        """Whether the streams here are kept."""
        return self.number == 0

    @property
    def is_last(self) -> bool:
        """Whether the streams that the boundary here returns are kept."""
        return self.number + 1 == self.block.length

    def check(self, x: Tensor) -> None:
        """Raise ValueError if x is not what the boundary before this place returned."""
        block = self.block
        if self.number > len(block.boundaries) or (block.boundaries and x.data_ptr() != block.address):
            raise ValueError(
                "recompute: x is not what the boundary before this place returned; call recompute() for a new block where other "
                "streams come in"
            )

    def enter(self, context: Any, x: Tensor, out: Tensor) -> None:
        """Put a boundary here. ``context``: its autograd node.

        Raises:
            ValueError: if there is one already, or x is not what the one before returned.
        """
        block = self.block
        if self.number < len(block.boundaries):
            # A non-reentrant activation checkpoint repeats the forward to get at what was saved; the nodes stay the first ones.
            if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
                raise ValueError("recompute: two boundaries at one place; pass its next() to the second one")
            return
        self.check(x)
        block.boundaries.append(weakref.ref(context))
        block.address = out.data_ptr()

    def streams(self, mix: Callable[[Any, Tensor | None], Tensor]) -> Tensor:
        """The streams here, computed now with all before them if they are not there.

        Args:
            mix: what the boundary of a context (the autograd node) wrote, given its x; None: the one that it saved.
        """
        block = self.block
        if self.number not in block.streams:
            x: Tensor | None = None
            for k in range(self.number):
                x = mix(block.boundaries[k](), x)
                block.streams[k + 1] = x
        return block.streams[self.number]

    def release(self) -> None:
        """Free the streams after this place: nothing in this pass needs them any more."""
        for known in [known for known in self.block.streams if known > self.number]:
            del self.block.streams[known]


def recompute(length: int) -> RecomputePlace:
    """The first place of a block of ``length`` boundaries. A block of one keeps everything.

    Raises:
        ValueError: for a length below 1.
    """
    if length < 1:
        raise ValueError(f"recompute: length must be >= 1, got {length!r}")
    return RecomputePlace(_Block(length), 0)
