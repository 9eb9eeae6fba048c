"""The chain of sublayers: what one sublayer's add may compute for the next one, and how the next one finds it.

An add that knows which sublayer comes next computes that one's mappings and input in the same pass that writes the
streams (`mhc_kernels.boundary`), and leaves them on the tensor it returns. They are used only if the very tensor arrives:
not another one (pipeline edge, a hook that replaces it), and with the same place in the autograd graph (a reentrant
activation checkpoint returns its inner tensor with another history). Else the sublayer computes them itself, from what did
arrive: a wrong guess about what comes next costs time, not correctness. Changing the streams in place is seen as well, where
PyTorch counts it (not through ``.data``); in training PyTorch refuses it, where the streams are saved for the backward.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

from torch import Tensor, nn

from mhc_kernels import RecomputePlace

_ATTRIBUTE = "_mhc_prepared"


class Prepared(NamedTuple):
    """What the streams' next reader needs: u ``[s, b, C]``, post ``[s, b, n]``, res ``[s, b, n, n]``; whether u has passed the
    reader's norm; the streams' place in a block that the backward computes again."""

    u: Tensor
    post: Tensor
    res: Tensor
    normed: bool
    recompute: RecomputePlace | None
    reader: nn.Module
    history: Any
    version: int


def prepare(
    hidden: Tensor,
    u: Tensor,
    post: Tensor,
    res: Tensor,
    normed: bool,
    recompute: RecomputePlace | None,
    reader: nn.Module,
) -> Tensor:
    """Leave u, post and res on the streams for ``reader``; returns the streams."""
    setattr(hidden, _ATTRIBUTE, Prepared(u, post, res, normed, recompute, reader, hidden.grad_fn, _version(hidden)))
    return hidden


def take(hidden: Tensor, reader: nn.Module) -> Prepared | None:
    """What was left on these streams for ``reader``, if it still holds.

    It stays there: a checkpoint's recompute has to find what the forward found. (Under such a checkpoint u is not freed.)
    """
    prepared: Prepared | None = getattr(hidden, _ATTRIBUTE, None)
    if prepared is None or prepared.reader is not reader:
        return None
    if prepared.history is not hidden.grad_fn or prepared.version != _version(hidden):
        return None
    return prepared


def forget(hidden: Tensor) -> None:
    """Drop what was left on these streams: its u has been freed, and another reader of it has to compute it anew."""
    if hasattr(hidden, _ATTRIBUTE):
        delattr(hidden, _ATTRIBUTE)


def _version(hidden: Tensor) -> int:
    return 0 if hidden.is_inference() else hidden._version  # inference tensors keep no count


class ChainLength:
    """How many sublayers, and layers, follow each other without a cut."""

    def __init__(self) -> None:
        self.sublayers = self.layers = 0


class Chain:
    """Finds each sublayer's successor while a model is built: its layers are built in order.

    A chain goes on as long as layer numbers do, in models of one TransformerConfig. Under full recompute it is cut
    between layers: Megatron returns to each of its blocks from outside, so what the block before has prepared is never
    there.
    """

    def __init__(self) -> None:
        self._last: weakref.ref[nn.Module] | None = None
        self._place: tuple[int, int] | None = None
        self._length = ChainLength()

    def extend(self, config: Any, layer_number: int, inputs: list[Any], alone: bool = False) -> ChainLength:
        """Link the mHC inputs of one layer to each other and to the previous layer's last one. Returns the chain so far.

        alone: the layer reads and writes one stream: nothing comes before or after it.
        """
        before: Any = None
        if not alone and self._last is not None and self._place == (id(config), layer_number - 1):
            before = self._last()
        if config.recompute_granularity == "full":
            before = None
        for reader in inputs:
            if before is not None:
                before.set_successor(reader)
            else:
                self._length = ChainLength()
            self._length.sublayers += 1
            reader.set_chain(self._length)
            before = reader
        self._last = weakref.ref(before) if before is not None and not alone else None
        self._place = (id(config), layer_number)
        self._length.layers += bool(inputs)
        return self._length


CHAIN = Chain()
