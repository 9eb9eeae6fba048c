"""Operators for one step alone: mix, aggregate, Sinkhorn, each with its backward. x is ``[..., n*C]``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from triton import next_power_of_2

from mhc_kernels.fused import backward, configs, forward
from mhc_kernels.fused.launch import Launcher
from mhc_kernels.fused.library import Sizes, cdiv, operator, sizes
from mhc_kernels.fused.workspace import Part

_mix_project = Launcher(forward.mix_project_kernel)
_project = Launcher(forward.project_kernel)
_stream_backward = Launcher(backward.stream_backward_kernel, unaligned=3)
_aggregate = Launcher(forward.aggregate_kernel)
_aggregate_backward = Launcher(backward.aggregate_backward_kernel)
_sinkhorn = Launcher(forward.sinkhorn_kernel)
_sinkhorn_backward = Launcher(backward.sinkhorn_backward_kernel)


def launch_mix_project(
    s: Sizes, x: Tensor, res: Tensor | None, post: Tensor | None, y: Tensor | None, y_bias: Tensor | None, seed: Tensor | None,
    p: float, w: Tensor | Part | None, out: Tensor, sums: Tensor | Part | None,
) -> None:  # fmt: skip
    """`mix_project_kernel`: mixes if y is given, projects if w is."""
    config = configs.mix_project(s.n, s.c, s.bf16)
    # A pointer that is not used may be any.
    tensors = (x, _or(y, x), _or(y_bias, x), _or(seed, x), _or(res, x), _or(post, x), _or(w, x), out, _or(sums, x))
    meta = (
        s.n, s.padded_streams, s.c, s.rows, s.padded_rows,
        y is not None, w is not None, y_bias is not None, seed is not None, s.bf16, s.dot32,
        config.SWAP and not s.dot32, config.BM, config.BC, config.SPLIT, config.V, config.STAGES,
    )  # fmt: skip
    _mix_project(cdiv(s.t, config.BM) * config.SPLIT, tensors, (s.t, p), meta, config.warps)


def launch_project(s: Sizes, x: Tensor, w: Part, sums: Part) -> None:
    """`project_kernel`."""
    config = configs.project(s.n, s.c, s.bf16)
    meta = (
        s.n * s.c, s.rows, s.padded_rows, s.bf16, s.dot32, config.BM, config.BC, config.SPLIT, config.V, config.STAGES,
    )  # fmt: skip
    _project(cdiv(s.t, config.BM) * config.SPLIT, (x, w, sums), (s.t,), meta, config.warps)


class Partials(NamedTuple):
    """Partial sums of the parameters' gradients, and where their totals go (added to what is there, if accumulates)."""

    totals: Part
    pre_totals: Part
    phi: Part
    dalpha: Tensor
    dbias: Tensor
    dphi: Tensor
    accumulates: bool


def launch_stream_backward(
    s: Sizes, g: Tensor | None, du: Tensor | None, x: Tensor, y: Tensor | None, y_bias: Tensor | None,
    seed: Tensor | None, p: float, res: Tensor | None, post: Tensor | None, pre: Tensor | None,
    da: Part | None, factor: Part | None, w: Part | None,
    out: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None], partials: Partials | None,
) -> None:  # fmt: skip
    """`stream_backward_kernel`: through the mix if y is given, the aggregation if du is, the projection if da is.

    out: dx, dy, dres, dpost.
    """
    dx, dy, dres, dpost = out
    config = configs.stream_backward(s.n, s.c, s.bf16)
    sums, accumulates = ((x,) * 6, False) if partials is None else (partials[:6], partials.accumulates)
    counts = (0, 0, 0) if partials is None else tuple(t.shape[0] for t in partials[:3])
    tensors = (
        _or(g, x), _or(du, x), x, _or(y, x), _or(y_bias, x), _or(seed, x), _or(res, x), _or(post, x), _or(pre, x),
        _or(da, x), _or(factor, x), _or(w, x), dx, _or(dy, x), _or(dres, x), _or(dpost, x), *sums,
    )  # fmt: skip
    meta = (
        s.n, s.padded_streams, s.c, s.rows, s.padded_rows, s.padded_totals, s.padded_pre,
        y is not None, du is not None, da is not None, g is not None,
        y_bias is not None, seed is not None, s.bf16, s.dot32, accumulates,
        config.BM, config.BC, config.V, config.STAGES, configs.REDUCE_BLOCK,
    )  # fmt: skip
    programs = cdiv(s.t, config.BM)
    if partials is not None:
        programs += 1 + cdiv(s.rows * s.n * s.c, configs.REDUCE_BLOCK)
    _stream_backward(programs, tensors, (s.t, *counts, p), meta, config.warps)


def _or(tensor: Tensor | Part | None, other: Tensor) -> Tensor | Part:
    return other if tensor is None else tensor


def _fake_mix(
    x: Tensor, res: Tensor, post: Tensor, y: Tensor, y_bias: Tensor | None, seed: Tensor | None, p: float
) -> Tensor:
    return torch.empty_like(x)


@operator(
    "mix(Tensor x, Tensor res, Tensor post, Tensor y, Tensor? y_bias, Tensor? seed, float p) -> Tensor", _fake_mix
)
def mix(
    x: Tensor, res: Tensor, post: Tensor, y: Tensor, y_bias: Tensor | None, seed: Tensor | None, p: float
) -> Tensor:
    """``H_res @ x + outer(H_post, dropout(y + y_bias))``."""
    out = torch.empty_like(x)
    s = sizes(x, post.shape[-1])
    if s.t:
        launch_mix_project(s, x, res, post, y, y_bias, seed, p, None, out, None)
    return out


def _fake_mix_backward(
    g: Tensor, x: Tensor, res: Tensor, post: Tensor, y: Tensor, y_bias: Tensor | None, seed: Tensor | None, p: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(y), torch.empty_like(res), torch.empty_like(post)


@operator(
    "mix_backward(Tensor g, Tensor x, Tensor res, Tensor post, Tensor y, Tensor? y_bias, Tensor? seed, float p)"
    " -> (Tensor dx, Tensor dy, Tensor dres, Tensor dpost)",
    _fake_mix_backward,
)
def mix_backward(
    g: Tensor, x: Tensor, res: Tensor, post: Tensor, y: Tensor, y_bias: Tensor | None, seed: Tensor | None, p: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, y (that of y_bias is its sum over tokens), res and post."""
    out = torch.empty_like(x), torch.empty_like(y), torch.empty_like(res), torch.empty_like(post)
    s = sizes(x, post.shape[-1])
    if s.t:
        launch_stream_backward(s, g, None, x, y, y_bias, seed, p, res, post, None, None, None, None, out, None)
    return out


def _u_shape(x: Tensor, n: int) -> tuple[int, ...]:
    return (*x.shape[:-1], x.shape[-1] // n)


@operator("aggregate(Tensor x, Tensor pre) -> Tensor", lambda x, pre: x.new_empty(_u_shape(x, pre.shape[-1])))
def aggregate(x: Tensor, pre: Tensor) -> Tensor:
    """``H_pre @ x``."""
    s = sizes(x, pre.shape[-1])
    u = x.new_empty(_u_shape(x, s.n))
    if s.t:
        config = configs.aggregate(s.n, s.c, s.bf16)
        _aggregate(
            cdiv(s.t, config.BM), (x, pre, u), (s.t,), (s.n, s.c, config.BM, config.BC, config.STAGES), config.warps
        )
    return u


@operator(
    "aggregate_backward(Tensor du, Tensor x, Tensor pre) -> (Tensor dx, Tensor dpre)",
    lambda du, x, pre: (torch.empty_like(x), torch.empty_like(pre)),
)
def aggregate_backward(du: Tensor, x: Tensor, pre: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and pre."""
    s = sizes(x, pre.shape[-1])
    dx, dpre = torch.empty_like(x), torch.empty_like(pre)
    if s.t:
        config = configs.aggregate(s.n, s.c, s.bf16)
        meta = (s.n, s.c, config.BM, config.BC, config.V, config.STAGES)
        _aggregate_backward(cdiv(s.t, config.BM), (du, x, pre, dx, dpre), (s.t,), meta, config.warps)
    return dx, dpre


@operator(
    "sinkhorn(Tensor logits, int iterations, float eps) -> Tensor",
    lambda logits, iterations, eps: logits.new_empty(logits.shape, dtype=torch.float32),
)
def sinkhorn(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """logits ``[..., n, n]`` -> H_res; eps > 0: profile deepseek-v4."""
    res = logits.new_empty(logits.shape, dtype=torch.float32)
    t, n = logits.shape[:-2].numel(), logits.shape[-1]
    if t:
        block = configs.token_block(n)
        _sinkhorn(cdiv(t, block), (logits, res), (t,), (n, next_power_of_2(n), iterations, eps, block), 4)
    return res


@operator(
    "sinkhorn_backward(Tensor dres, Tensor logits, int iterations, float eps) -> Tensor",
    lambda dres, logits, iterations, eps: torch.empty_like(logits),
)
def sinkhorn_backward(dres: Tensor, logits: Tensor, iterations: int, eps: float) -> Tensor:
    """The gradient of the logits."""
    dlogits = torch.empty_like(logits)
    t, n = logits.shape[:-2].numel(), logits.shape[-1]
    if t:
        block = configs.token_block(n)
        meta = (n, next_power_of_2(n), iterations, eps, block)
        _sinkhorn_backward(cdiv(t, block), (logits, dres, dlogits), (t,), meta, 4)
    return dlogits
