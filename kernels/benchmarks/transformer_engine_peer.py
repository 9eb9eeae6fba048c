"""Transformer Engine's mHC (``transformer_engine.pytorch.triton.mhc``) on the same work, through its public functions.

Its layout: x [s, b, C, n], H_res transposed (so the rows of phi and bias for H_res are permuted), phi's columns c*n + j.
n = 4, 20 iterations and eps = 1.19e-7 are fixed. Its sublayer is "mappings and aggregate of x, then mix of x": the work of
a boundary.

Import torch, then this, before anything loads cuDNN.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformer_engine.pytorch  # noqa: F401  (loads its libraries, in the order that works)
import triton
from cases import Inputs
from torch import Tensor
from transformer_engine.common.triton import mhc as kernels
from transformer_engine.pytorch.triton import mhc as te

N = 4
# norm_weight (ones: the same function) makes dphi one Triton kernel; split-K uses atomics; the accumulator adds x's gradients
# in a float32 buffer instead of by autograd in bf16.
VARIANTS: dict[str, dict[str, bool]] = {
    "plain": {},
    "gamma": {"gamma": True},
    "gamma, split-K": {"gamma": True, "split_k": True},
    "gamma, accumulator": {"gamma": True, "accumulator": True},
}


def tune_quickly() -> None:
    """Let its autotuner measure each configuration for 5 + 20 ms instead of 25 + 100: a run then takes minutes less."""
    for kernel in vars(kernels).values():
        if hasattr(kernel, "configs") and hasattr(kernel, "do_bench"):
            kernel.do_bench = functools.partial(triton.testing.do_bench, warmup=5, rep=20)


def _rows() -> list[int]:
    """Row r of its phi is row _rows()[r] of ours."""
    return [*range(2 * N), *(2 * N + b * N + a for a in range(N) for b in range(N))]


class TransformerEngineCase:
    """``forward()`` and ``forward_backward()`` of one variant.

    Only gradients of u and x' are given; those of the mappings come from its own mix.
    """

    def __init__(self, inputs: Inputs, *, gamma: bool = False, split_k: bool = False, accumulator: bool = False):
        x = inputs.x.transpose(1, 2).unsqueeze(1).contiguous()
        c = x.shape[2]
        phi = inputs.phi[_rows()].unflatten(1, (N, c)).transpose(1, 2).flatten(1).contiguous()
        tensors = [x, inputs.y.unsqueeze(1), phi, inputs.alpha, inputs.bias[_rows()].unsqueeze(0).contiguous()]
        if gamma:
            tensors.append(torch.ones(N * c, device=x.device))
        self.leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        self.has_gamma, self.split_k = gamma, split_k
        self.buffer = torch.empty(x.shape, device=x.device) if accumulator else None
        streams, u = inputs.gradients[:2]
        self.gradients = (streams.transpose(1, 2).unsqueeze(1).contiguous(), u.unsqueeze(1))

    def forward(self) -> tuple[Tensor, Tensor]:
        """x' [T, 1, C, n] and u [T, 1, C]."""
        x, y, phi, alpha, bias, *gamma = self.leaves
        common: dict[str, Any] = {"fused_grad_x_acc_buffer": self.buffer}
        weight = gamma[0] if gamma else None
        u, post, res = te.mhc_generate_mix_and_aggregate(
            x, phi, alpha, bias, norm_weight=weight, use_split_k=self.split_k, **common
        )
        # x' first: its backward overwrites the accumulator, u's adds to it.
        return te.mhc_fused_expand_combine(y, None, post, x, res, N, **common), u

    def forward_backward(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.forward(), self.leaves, self.gradients)
