"""What the tests of the Triton kernels share: where they run, random arguments, and how far results may be apart."""

from __future__ import annotations

import math

import torch
from torch import Tensor

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"  # on the CPU: Triton's interpreter, the same kernels
F64 = torch.float64
PARAMETERS = ("next_phi", "next_alpha", "next_bias")


# Of streams; of phi; of alpha and bias: relative, in the norm. The interpreter
# truncates float32 to bf16 where a GPU rounds: twice the error.
BOUNDS = {
    torch.float32: (1e-5, 1e-5, 1e-5),
    torch.float16: (3e-3, 2e-3, 1e-3),
    torch.bfloat16: (3e-3, 2e-3, 1e-3) if ON_GPU else (6e-3, 4e-3, 2e-3),
}


def error(ours: Tensor, expected: Tensor) -> float:
    """Relative, in the norm; where nothing is expected (H_res of one stream has no gradient), absolute."""
    ours, expected = ours.detach().to(F64), expected.detach().to(F64)
    return float((ours - expected).norm() / (expected.norm() if expected.norm() > 0 else 1.0))


class Case:
    """Random arguments of a boundary, and gradients of its results."""

    def __init__(self, t: int, n: int, c: int, dtype: torch.dtype = torch.float32, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        rows = n * n + 2 * n
        self.arguments: dict[str, Tensor] = {
            "x": random(t, n, c).to(dtype),
            "res": torch.softmax(random(t, n, n), -1),
            "post": 1 + 0.3 * random(t, n),
            "y": random(t, c).to(dtype),
            "bias": random(c).to(dtype),
            "next_phi": random(rows, n * c) / math.sqrt(n * c),
            "next_alpha": 0.5 + torch.rand(3, generator=generator),
            "next_bias": random(rows),
        }
        self.arguments = {k: v.to(DEVICE) for k, v in self.arguments.items()}
        gradients = (random(t, n, c).to(dtype), random(t, c).to(dtype), random(t, n), random(t, n, n))
        self.gradients = tuple(g.to(DEVICE) for g in gradients)

    def leaves(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        return {k: v.detach().clone().to(dtype or v.dtype).requires_grad_() for k, v in self.arguments.items()}
