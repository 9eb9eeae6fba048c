"""A boundary and its backward in one dtype against the definition in float64, on any device: what an installation computes."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mhc_kernels import boundary, reference

_PARAMETERS = ("next_phi", "next_alpha", "next_bias")
# Relative, in the norm: streams and their gradients; phi's gradient; alpha, bias and mappings.
_BOUNDS = {torch.float32: (1e-5, 1e-5, 1e-5), torch.bfloat16: (3e-3, 2e-3, 1e-3)}


class Deviation(NamedTuple):
    """One result or gradient: its distance from float64, relative in the norm, and the largest that is right."""

    name: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bound  # False for NaN


def deviations(
    device: torch.device,
    dtype: torch.dtype,
    *,
    backend: str = "auto",
    tokens: int = 256,
    streams: int = 4,
    width: int = 1280,
) -> list[Deviation]:
    """Run `boundary` forward and backward on random arguments ``x [tokens, streams, width]`` of this dtype.

    Args:
        dtype: float32 or bfloat16.

    Returns:
        the deviation of every result (``x'``, ``u``, ``H_post``, ``H_res``) and of every argument's gradient.
    """
    ours = _arguments(tokens, streams, width, dtype, device)
    exact = {name: value.detach().to(torch.float64).requires_grad_() for name, value in ours.items()}
    x, res, post, y, bias, *parameters = ours.values()
    results = boundary(x, res, post, y, bias, *parameters, backend=backend)
    generator = torch.Generator().manual_seed(1)
    gradients = [torch.randn(r.shape, generator=generator).to(r) for r in results]
    torch.autograd.backward(results, gradients)

    mixed = reference.mix(*(exact[name] for name in ("x", "res", "post", "y", "bias")))
    # What follows reads the streams as they are stored; the rounding itself has no gradient.
    stored = mixed + (results[0].detach().to(torch.float64) - mixed.detach())
    pre, post, res = reference.mappings(stored, *(exact[name] for name in _PARAMETERS))
    torch.autograd.backward(
        (stored, reference.aggregate(stored, pre), post, res), [g.to(torch.float64) for g in gradients]
    )

    of_streams, of_phi, of_mappings = _BOUNDS[dtype]
    expected = (mixed, reference.aggregate(stored, pre), post, res)
    bounds = (of_streams, of_streams, of_mappings, of_mappings)
    found = [
        Deviation(name, _error(result, right), bound)
        for name, result, right, bound in zip(("x'", "u", "H_post", "H_res"), results, expected, bounds, strict=True)
    ]
    for name, leaf in ours.items():
        # That of y's bias is the sum of dy as it is stored: terms that cancel leave the rounding of each.
        right = _gradient(ours["y"]).to(torch.float64).sum(0) if name == "bias" else _gradient(exact[name])
        bound = {"next_phi": of_phi, "next_alpha": of_mappings, "next_bias": of_mappings}.get(name, of_streams)
        found.append(Deviation(f"d {name}", _error(_gradient(leaf), right), bound))
    return found


def _arguments(tokens: int, n: int, width: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rows = n * n + 2 * n
    arguments = {
        "x": random(tokens, n, width).to(dtype),
        "res": torch.softmax(random(tokens, n, n), -1),
        "post": 1 + 0.3 * random(tokens, n),
        "y": random(tokens, width).to(dtype),
        "bias": random(width).to(dtype),
        "next_phi": random(rows, n * width) / math.sqrt(n * width),
        "next_alpha": 0.5 + torch.rand(3, generator=generator),
        "next_bias": random(rows),
    }
    return {name: value.to(device).requires_grad_() for name, value in arguments.items()}


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def _error(ours: Tensor, right: Tensor) -> float:
    ours, right = ours.detach().to(torch.float64), right.detach()
    return float((ours - right).norm() / right.norm())
