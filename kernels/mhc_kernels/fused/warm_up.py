"""Building the kernels before they are needed: the first training step then waits for no compiler."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from mhc_kernels import ops
from mhc_kernels.add_output import add_output_, output_gradients
from mhc_kernels.fused.launch import CompileTimes
from mhc_kernels.norm import RMSNorm
from mhc_kernels.recompute_input import free_until_backward

Norm = tuple[torch.dtype, bool] | None
"""Dtype of a RMSNorm's weight, and whether it is zero-centered."""


def warm_up(
    streams: int,
    width: int,
    dtype: torch.dtype,
    *,
    iterations: int = 20,
    eps: float = 1e-6,
    profile: str = "paper",
    mode: str = "mhc",
    output_bias: bool = False,
    dropout_p: float = 0.0,
    accumulate: bool = False,
    norm: Norm = None,
    recompute: bool = False,
    others: Sequence[Norm] = (),
    split: bool = False,
    device: torch.device | str = "cuda",
) -> tuple[int, float]:
    """Compile, or load from Triton's cache, what a chain of sublayers runs: forward and backward, the random state unchanged.

    Args:
        streams, width, dtype: n, C and dtype of the streams.
        iterations, eps, profile, mode, accumulate: as in `mhc_kernels.connect`.
        output_bias, dropout_p: whether sublayers return a bias with their output, and the probability of dropout on it.
        norm: dtype of the weight of a RMSNorm fused into the aggregation, and whether it is zero-centered; None for none.
        recompute: whether what sublayers read is computed again in the backward (`mhc_kernels.free_until_backward`); others:
            then, norms in the same chain that calls before this one were for.
        split: whether a sublayer's output is added to streams that have come without it (`mhc_kernels.add_output_`).
        device: where.

    Returns:
        (kernels, seconds) that were built; (0, 0.0) if all of them were there.
    """
    kernels, seconds = CompileTimes.kernels, CompileTimes.seconds
    tokens, rows = 16, streams * streams + 2 * streams

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device, requires_grad=True)

    x, y = zeros(tokens, streams * width, dtype=dtype), zeros(tokens, width, dtype=dtype)
    bias = zeros(width, dtype=dtype) if output_bias else None
    parameters = (zeros(rows, streams * width), zeros(3), zeros(rows))
    if accumulate:
        for parameter in parameters:
            parameter.main_grad = torch.zeros_like(parameter)  # type: ignore[attr-defined]

    def made(norm: Norm) -> RMSNorm | None:
        return None if norm is None else RMSNorm(zeros(width, dtype=norm[0]), 1e-5, norm[1])

    following = made(norm)
    neighbours = [pair for other in others for pair in ((norm, other), (other, norm))]
    settings: dict[str, Any] = {
        "iterations": iterations,
        "eps": eps,
        "profile": profile,
        "mode": mode,
        "flat": True,
        "backend": "triton",
    }
    devices = [device] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        # Evaluation has no dropout; and not all inputs are freed that may be (under hooks on saved tensors, say).
        for p, frees in itertools.product({0.0, dropout_p}, {False, recompute}):
            more: dict[str, Any] = {**settings, "accumulate": accumulate, "norm": following}
            streams_, u, post, res = ops.connect(x, *parameters, **more)
            ends: tuple[torch.Tensor, ...] = (u,)
            y_, last = y, y
            if frees:
                y_ = u.sin()  # which keeps u
                free_until_backward(u, y_)
                ends = ()
            streams_, u, post, res = ops.boundary(streams_, res, post, y_, bias, *parameters, **more, dropout_p=p)
            if frees:
                last = u.sin()
                free_until_backward(u, last)
            else:
                ends = (*ends, u)
            out = ops.mix(streams_, res, post, last, bias, dropout_p=p, flat=True, backend="triton")
            mean = ops.aggregate(
                out.unflatten(-1, (streams, width)), torch.full_like(post, 1 / streams), backend="triton"
            )
            ends = (mean, *ends)
            torch.autograd.backward(ends, ends)
            for before, after in neighbours if frees else ():
                streams_, u, post, res = ops.connect(x, *parameters, **{**more, "norm": made(before)})
                y_ = u.sin()
                free_until_backward(u, y_)
                more |= {"norm": made(after), "dropout_p": p}
                ends = ops.boundary(streams_, res, post, y_, bias, *parameters, **more)[:2]
                torch.autograd.backward(ends, ends)
                del more["dropout_p"]
    if split:
        with torch.no_grad():
            post = post.detach()
            add_output_(x.detach(), post, y.detach(), backend="triton")
            output_gradients(x.detach(), post, y, torch.empty_like(y), torch.empty_like(post), backend="triton")
    return CompileTimes.kernels - kernels, CompileTimes.seconds - seconds
