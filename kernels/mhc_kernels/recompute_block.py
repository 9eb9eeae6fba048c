"""Streams that the backward computes again instead of keeping them (arXiv 2512.24880, section 4.3.2).

What a boundary keeps of n*C values a token is its streams, x' and (as the one before wrote it) x. Both follow from the first
streams of a block and each sublayer's output, H_res and H_post, which are kept anyway: the output is C wide, the mappings
n*n + n numbers. So one `mix` a boundary brings them back: neither phi nor Sinkhorn runs again, and no sublayer does.
What the sublayer reads follows from the streams: `recompute_input`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class _Block:
    """Successive boundaries of which only the first one's streams are kept."""

    def __init__(self, length: int):
        self.length = length
        # Weak: the autograd graph owns its nodes, and they own what they saved. A block keeps nothing alive.
        self.boundaries: list[weakref.ref[Any]] = []
        # Storage, size and version of what the last boundary returned.
        self.last: tuple[StorageWeakRef, int, int] | None = None
        self.streams: dict[int, Tensor] = {}
        self.ending: int | None = None  # the pass of the autograd engine that has called `begin`

    def begin(self) -> None:
        """In a pass of the autograd engine: its end will forget what it makes; what a failed one has left is forgotten now."""
        this = torch._C._current_graph_task_id()
        if self.ending != this:
            self.streams.clear()
            # Not when the first boundary is done: a pass may end before it comes to that.
            torch.autograd.Variable._execution_engine.queue_callback(self.end)
            self.ending = this

    def compute(self, count: int, mix: Callable[[Any, Tensor | None], Tensor]) -> None:
        """Fill in the streams 1 to ``count``."""
        x: Tensor | None = None
        for k in range(count):
            context = self.boundaries[k]()
            if context is None:
                raise RuntimeError(
                    "recompute: the backward has come to streams of a block whose earlier boundaries are not in its graph; call "
                    "recompute() for a new block after detach()"
                )
            x = mix(context, x)
            self.streams[k + 1] = x

    def end(self) -> None:
        """Forget what one pass of the autograd engine has made."""
        self.ending = None
        self.streams.clear()
        for reference in self.boundaries:
            context = reference()
            if context is not None:
                context.unpacked = None


class RecomputePlace(NamedTuple):
    """Where in a block some streams are; `recompute` starts one. Only the block's first streams are kept.

    Pass it to `mhc_kernels.boundary` together with those streams, and its `next` to the following one, with the streams that
    came out; the last one to `mhc_kernels.mix` at the chain's end. The results have the same bits as without. In the backward,
    a block's streams come into being when its last boundary needs them (one `mix` each) and are freed as the boundaries before
    are done. So a boundary's backward needs what the earlier ones of its block saved: two passes over different parts of a
    graph want ``retain_graph=True``.
    """

    block: _Block
    number: int

    def next(self) -> RecomputePlace:
        """The place of the streams that the boundary here returns: in this block, or the first one of another.

        Another one as well if the boundary here has no backward: it keeps nothing to compute its streams from.
        """
        last = self.number + 1 == self.block.length
        if last or self.number >= len(self.block.boundaries):
            return recompute(self.block.length)
        return self._replace(number=self.number + 1)

    @property
    def is_first(self) -> bool:
        """Whether the streams here are kept."""
        return self.number == 0

    @property
    def is_last(self) -> bool:
        """Whether the streams that the boundary here returns are kept."""
        return self.number + 1 == self.block.length

    def check(self, x: Tensor) -> None:
        """Raise ValueError if x is not what the boundary before this place returned, as it returned it."""
        block = self.block
        if _repeats() or not (self.number or block.boundaries):
            return
        if self.number == len(block.boundaries) and block.last is not None:
            storage, size, version = block.last
            same = not storage.expired() and storage.cdata == x.untyped_storage()._cdata
            if same and size == x.numel() and version == x._version:
                return
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
            if not _repeats():
                raise ValueError("recompute: two boundaries at one place; pass its next() to the second one")
            return
        self.check(x)
        block.boundaries.append(weakref.ref(context))
        block.last = (StorageWeakRef(out.untyped_storage()), out.numel(), out._version)

    def streams(self, mix: Callable[[Any, Tensor | None], Tensor]) -> Tensor:
        """The streams here, computed now with all before them if they are not there.

        Args:
            mix: what the boundary of a context (the autograd node) wrote, given its x; None: the one that it saved.
        """
        self.block.begin()
        if self.number not in self.block.streams:
            self.block.compute(self.number, mix)
        return self.block.streams[self.number]

    def release(self) -> None:
        """Free the streams after this place: nothing in this pass needs them any more."""
        for known in [known for known in self.block.streams if known > self.number]:
            del self.block.streams[known]


# torch 2.6 may lack it.
_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def can_tell_hooks() -> bool:
    """Whether this torch tells if hooks on saved tensors are active; else they may be, always."""
    return _top_hooks is not None


def saved_tensors_are_hooked() -> bool:
    """Whether what autograd saves now goes through somebody's hooks (activation checkpoints, offloading), or may."""
    return _top_hooks is None or _top_hooks(True) is not None


def _repeats() -> bool:
    """Whether a non-reentrant activation checkpoint repeats its forward to get at what was saved; its nodes come to nothing."""
    # Without _top_hooks such checkpoints are refused, by the errors above.
    hooks = None if _top_hooks is None else _top_hooks(True)
    return hooks is not None and "_recomputation_hook" in getattr(hooks[0], "__qualname__", "")


def recompute(length: int) -> RecomputePlace:
    """The first place of a block of ``length`` boundaries. A block of one keeps everything.

    Raises:
        ValueError: for a length below 1.
    """
    if length < 1:
        raise ValueError(f"recompute: length must be >= 1, got {length!r}")
    return RecomputePlace(_Block(length), 0)
