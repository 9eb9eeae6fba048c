"""The work that is timed: one boundary between two sublayers, forward and backward, by each implementation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mhc_kernels import aggregate, boundary, mappings, mix

SHAPES = ((4096, 1280), (8192, 2560), (8192, 4096), (8192, 7168), (16384, 2560))
FORWARD_UNITS = {n: 3 * n + 2 for n in range(1, 9)}
UNITS = {n: 7 * n + 6 for n in range(1, 9)}
"""Units of C elements a token of the two-pass byte bound, forward and in all: 14 and 34 for n = 4."""


@dataclass(frozen=True)
class Inputs:
    """x [T, n, C], y [T, C] bf16; res [T, n, n], post [T, n]; phi, alpha, bias of the next sublayer; gradients of the results."""

    x: Tensor
    res: Tensor
    post: Tensor
    y: Tensor
    phi: Tensor
    alpha: Tensor
    bias: Tensor
    gradients: tuple[Tensor, Tensor, Tensor, Tensor]


def make_inputs(t: int, c: int, n: int = 4, seed: int = 0) -> Inputs:
    """Random numbers on the GPU; the logits of H_res have a standard deviation of about 1."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    rows = n * n + 2 * n
    return Inputs(
        x=random(t, n, c).bfloat16(),
        res=torch.softmax(random(t, n, n), -1),
        post=1 + 0.1 * random(t, n),
        y=random(t, c).bfloat16(),
        phi=random(rows, n * c) / math.sqrt(n * c),
        alpha=torch.tensor([0.7, 0.9, 0.8], device="cuda"),
        bias=0.5 * random(rows),
        gradients=(random(t, n, c).bfloat16(), random(t, c).bfloat16(), random(t, n), random(t, n, n)),
    )


Forward = Callable[..., tuple[Tensor, ...]]


def fused(
    x: Tensor, res: Tensor, post: Tensor, y: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor
) -> tuple[Tensor, ...]:
    """This package's Triton kernels, the boundary in one step."""
    return boundary(x, res, post, y, None, phi, alpha, bias, backend="triton")


def separate(
    x: Tensor, res: Tensor, post: Tensor, y: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor
) -> tuple[Tensor, ...]:
    """This package's Triton kernels, one operation at a time."""
    out = mix(x, res, post, y, backend="triton")
    pre, post, res = mappings(out, phi, alpha, bias, backend="triton")
    return out, aggregate(out, pre, backend="triton"), post, res


def reference(
    x: Tensor, res: Tensor, post: Tensor, y: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor
) -> tuple[Tensor, ...]:
    """Plain PyTorch (the definition)."""
    return boundary(x, res, post, y, None, phi, alpha, bias, backend="reference")


class Case:
    """One implementation on one set of inputs: ``forward()`` and ``forward_backward()``."""

    def __init__(self, implementation: Forward, inputs: Inputs):
        self.implementation = implementation
        self.gradients = inputs.gradients
        tensors = (inputs.x, inputs.res, inputs.post, inputs.y, inputs.phi, inputs.alpha, inputs.bias)
        self.leaves = [tensor.detach().requires_grad_() for tensor in tensors]

    def forward(self) -> tuple[Tensor, ...]:
        return self.implementation(*self.leaves)

    def forward_backward(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.forward(), self.leaves, self.gradients)
