"""The streams as Megatron carries them: [s, b, n*C] between layers, [s, b, n, C] for the operations."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from mhc_kernels import RecomputePlace
    from mhc_megatron.pipeline.split import Departure
    from mhc_megatron.residual.input import HyperConnectionInput


class Residual(NamedTuple):
    """What an mHC input hands to the bias-dropout-add instead of Megatron's residual tensor.

    x: ``[s, b, n*C]``, the streams' dtype; post ``[s, b, n]`` and res ``[s, b, n, n]``, float32. grad: whether the
    input ran with gradients (Megatron calls every add with them). successor: the mHC input that will read the result, if
    it is known (`chain`). recompute: x's place in a block of streams that the backward computes again. departure: of the last
    sublayer of a pipeline chunk whose streams have left already (`pipeline.split`). u: ``[s, b, C]``, H_pre @ x as the kernels
    returned it, if the backward is to compute it again (`mhc_kernels.free_until_backward`).
    """

    x: Tensor
    post: Tensor
    res: Tensor
    grad: bool
    successor: HyperConnectionInput | None = None
    recompute: RecomputePlace | None = None
    departure: Departure | None = None
    u: Tensor | None = None


def expand(hidden: Tensor, num_streams: int) -> Tensor:
    """Copy ``[s, b, C]`` into all streams: ``[s, b, n*C]`` (the model's entry)."""
    return hidden.repeat(1, 1, num_streams)


def unflatten(hidden: Tensor, num_streams: int) -> Tensor:
    """View ``[s, b, n*C]`` as ``[s, b, n, C]``."""
    return hidden.unflatten(-1, (num_streams, hidden.shape[-1] // num_streams))
