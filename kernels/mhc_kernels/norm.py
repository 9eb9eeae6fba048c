"""The RMSNorm that may follow an aggregation: what a sublayer reads, normalised."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FUSED_NORM_STREAMS = 4
"""Up to so many streams the kernels normalise what they aggregate; with more they have no room for it."""


class RMSNorm(NamedTuple):
    """A norm of u: ``gamma * u / sqrt(mean(u^2) + eps)``; ``(1 + gamma)`` if centered (Megatron's zero-centered gamma).

    weight: gamma ``[C]``, any floating dtype.
    """

    weight: Tensor
    eps: float
    centered: bool = False

    def __call__(self, u: Tensor) -> Tensor:
        """u ``[..., C]`` normalised over C, computed in float32 (float64 if u is), in u's dtype."""
        wide = torch.promote_types(u.dtype, torch.float32)
        gamma = self.weight.to(wide)
        gamma = 1 + gamma if self.centered else gamma
        return torch.nn.functional.rms_norm(u.to(wide), u.shape[-1:], gamma, self.eps).to(u.dtype)

    def check(self, width: int) -> None:
        """Raises ValueError unless the weight is ``[width]`` and of a floating dtype."""
        if self.weight.shape != (width,) or not self.weight.is_floating_point():
            raise ValueError(
                f"norm: the weight must be [{width}] and floating, got {list(self.weight.shape)}, {self.weight.dtype}"
            )
