"""Operators for one step alone, each with its backward: mix, aggregate, Sinkhorn, adding an output. x is ``[..., n*C]``."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import next_power_of_2

from mhc_kernels.fused import add_output, backward, configs, forward, single_backward
from mhc_kernels.fused.launch import Plan, Step
from mhc_kernels.fused.library import Sizes, cdiv, operator, sizes

plans = lru_cache(4096)
"""For the functions that make them: plans are kept by sizes and options, and every layer has the same."""


class Read(NamedTuple):
    """What a sublayer read, as an aggregation's options: the dtype of the norm's weight (None: no norm), if it is centered."""

    gamma: torch.dtype | None
    centered: bool


def mix_project_step(s: Sizes, mixes: bool, projects: bool, squares: bool, biased: bool, drops: bool, p: float) -> Step:
    """`mix_project_kernel` on x, y, y_bias, seed, res, post, w -> out, sums; names that it does not need may be missing.

    squares: with the sum of squares of what it mixes (always if it projects).
    """
    config = configs.mix_project(s)
    arrays = ("x", "y", "y_bias", "seed", "res", "post", "w" if projects else "x", "out" if mixes else "x")
    meta = (
        s.n, s.padded_streams, s.c, s.rows, s.padded_rows, mixes, projects, biased, drops, s.bf16, s.dot32,
        s.sums_width, s.rows + s.sums_low if squares else 0,
        config.SWAP and not s.dot32, config.BM, config.BC, config.SPLIT, config.V, config.STAGES,
    )  # fmt: skip
    grid = (cdiv(s.t, config.BM) * config.SPLIT, 1, 1)
    return Step(forward.mix_project_kernel, grid, (*arrays, "sums" if squares else "x"), (s.t, p), meta, config.warps)


def stream_backward_step(
    s: Sizes, g: bool, aggregates: bool, mixes: bool, projects: bool, biased: bool, drops: bool, accumulates: bool, p: float,
    counts: tuple[int, int, int] = (0, 0, 0), normalises: bool = False, centered: bool = False, read: Read | None = None,
) -> Step:  # fmt: skip
    """`stream_backward_kernel`. counts: of totals, pre_totals, partials, if it projects. read: if it computes the sublayer's
    input again.

    g, aggregates, mixes, projects: through what the gradient comes: later streams, u, x', phi.
    """
    config = configs.stream_backward(s)
    if projects:
        own = ("da", "factor", "w_back")
        gammas = ("dgammas", "dgamma") if normalises else ("x", "x")
        sums = ("totals", "pre_totals", "partials", *gammas, "dalpha", "dbias", "dphi")
    else:
        own, sums = ("x",) * 3, ("x",) * 8
    norm = ("gamma", "rho", "kappa") if normalises else ("x",) * 3
    g_name = "back" if projects and s.wide else "g"
    outputs = ("dx", "dy", "dres", "dpost") if mixes else ("dx", "x", "x", "x")
    pre = "pre" if aggregates else "x"
    reads, reading = ("x",) * 4, (False, False, False)
    if read is not None:
        read_norm = read.gamma is not None
        reads = ("read_pre", *(("read_rho", "read_gamma") if read_norm else ("x", "x")), "read")
        reading = (True, read_norm, read_norm and read.centered)
    arrays = (g_name, "du", "x", "y", "y_bias", "seed", "res", "post", pre, *own, *norm, *outputs, *reads, *sums)
    meta = (
        s.n, s.padded_streams, s.c, s.rows, s.padded_rows, s.padded_totals, s.padded_pre, s.partial_rows,
        mixes, aggregates, projects, g or g_name == "back", biased, drops, s.bf16, s.dot32, accumulates,
        normalises, centered, *reading,
        config.BM, config.BC, config.V, config.STAGES, configs.REDUCE_BLOCK, configs.GAMMA_BLOCK,
    )  # fmt: skip
    programs = cdiv(s.t, config.BM)
    if projects:
        programs += 1 + cdiv(s.rows * s.n * s.c, configs.REDUCE_BLOCK)
    if normalises:
        programs += cdiv(s.c, configs.GAMMA_BLOCK)
    return Step(backward.stream_backward_kernel, (programs, 1, 1), arrays, (s.t, *counts, p), meta, config.warps)


def _fake_mix(
    x: Tensor, res: Tensor, post: Tensor, y: Tensor, y_bias: Tensor | None, seed: Tensor | None, p: float
) -> Tensor:
    return torch.empty_like(x)


_MIX = ("x", "res", "post", "y", "y_bias", "seed")


@plans
def _mix_plan(s: Sizes, biased: bool, drops: bool, p: float) -> Plan:
    return Plan((*_MIX, "out"), [mix_project_step(s, True, False, False, biased, drops, p)])


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
        plan = _mix_plan(s, y_bias is not None, seed is not None, p)
        plan.run(s.device, x, res, post, y, x if y_bias is None else y_bias, x if seed is None else seed, out)
    return out


def _fake_mix_backward(
    g: Tensor, x: Tensor, res: Tensor, post: Tensor, y: Tensor, y_bias: Tensor | None, seed: Tensor | None, p: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(y), torch.empty_like(res), torch.empty_like(post)


@plans
def _mix_backward_plan(s: Sizes, biased: bool, drops: bool, p: float) -> Plan:
    tensors = (*_MIX, "g", "du", "dx", "dy", "dres", "dpost")
    return Plan(tensors, [stream_backward_step(s, True, False, True, False, biased, drops, False, p)])


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
        plan = _mix_backward_plan(s, y_bias is not None, seed is not None, p)
        plan.run(s.device, x, res, post, y, x if y_bias is None else y_bias, x if seed is None else seed, g, x, *out)
    return out


def _u_shape(x: Tensor, n: int) -> tuple[int, ...]:
    return (*x.shape[:-1], x.shape[-1] // n)


def _by_rows(s: Sizes, kernel: Any, arrays: tuple[str, ...]) -> Plan:
    """One launch, with the aggregation's blocks."""
    config = configs.aggregate(s)
    meta = (s.n, s.c, config.BM, config.BC, config.STAGES)
    return Plan(arrays, [Step(kernel, (cdiv(s.t, config.BM), 1, 1), arrays, (s.t,), meta, config.warps)])


@plans
def _aggregate_plan(s: Sizes) -> Plan:
    return _by_rows(s, forward.aggregate_kernel, ("x", "pre", "u"))


@operator("aggregate(Tensor x, Tensor pre) -> Tensor", lambda x, pre: x.new_empty(_u_shape(x, pre.shape[-1])))
def aggregate(x: Tensor, pre: Tensor) -> Tensor:
    """``H_pre @ x``."""
    s = sizes(x, pre.shape[-1])
    u = x.new_empty(_u_shape(x, s.n))
    if s.t:
        _aggregate_plan(s).run(s.device, x, pre, u)
    return u


@plans
def _aggregate_backward_plan(s: Sizes, into_sum: bool) -> Plan:
    """into_sum: the gradients of `add_output_`."""
    arrays = ("du", "x", "pre", "dx", "dpre")
    config = configs.aggregate(s)
    meta = (s.n, s.c, config.BM, config.BC, config.V, config.STAGES, into_sum)
    kernel = single_backward.aggregate_backward_kernel
    return Plan(arrays, [Step(kernel, (cdiv(s.t, config.BM), 1, 1), arrays, (s.t,), meta, config.warps)])


@operator(
    "aggregate_backward(Tensor du, Tensor x, Tensor pre) -> (Tensor dx, Tensor dpre)",
    lambda du, x, pre: (torch.empty_like(x), torch.empty_like(pre)),
)
def aggregate_backward(du: Tensor, x: Tensor, pre: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and pre."""
    s = sizes(x, pre.shape[-1])
    dx, dpre = torch.empty_like(x), torch.empty_like(pre)
    if s.t:
        _aggregate_backward_plan(s, False).run(s.device, du, x, pre, dx, dpre)
    return dx, dpre


@plans
def _add_output_plan(s: Sizes) -> Plan:
    return _by_rows(s, add_output.add_output_kernel, ("x", "post", "y"))


@operator("add_output_(Tensor(a!) x, Tensor post, Tensor y) -> ()", lambda x, post, y: None)
def add_output_(x: Tensor, post: Tensor, y: Tensor) -> None:
    """``x += outer(post, y)``; x ``[..., n*C]``."""
    s = sizes(x, post.shape[-1])
    if s.t:
        _add_output_plan(s).run(s.device, x, post, y)


@operator(
    "add_output_backward(Tensor g, Tensor post, Tensor y, Tensor(a!) dy, Tensor(b!) dpost) -> ()",
    lambda g, post, y, dy, dpost: None,
)
def add_output_backward(g: Tensor, post: Tensor, y: Tensor, dy: Tensor, dpost: Tensor) -> None:
    """The gradients of y and post into dy and dpost; that of x is g, ``[..., n*C]``."""
    s = sizes(g, post.shape[-1])
    if s.t:
        _aggregate_backward_plan(s, True).run(s.device, y, g, post, dy, dpost)


@plans
def _sinkhorn_plan(t: int, n: int, dtype: torch.dtype, iterations: int, eps: float, differentiates: bool) -> Plan:
    block = configs.token_block_backward(n, 4) if differentiates else configs.token_block(n)
    arrays = ("logits", "dres", "dlogits") if differentiates else ("logits", "res")
    kernel = single_backward.sinkhorn_backward_kernel if differentiates else forward.sinkhorn_kernel
    meta = (n, next_power_of_2(n), iterations, eps, block)
    return Plan(arrays, [Step(kernel, (cdiv(t, block), 1, 1), arrays, (t,), meta, 4)])


@operator(
    "sinkhorn(Tensor logits, int iterations, float eps) -> Tensor",
    lambda logits, iterations, eps: logits.new_empty(logits.shape, dtype=torch.float32),
)
def sinkhorn(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """logits ``[..., n, n]`` -> H_res; eps > 0: profile deepseek-v4."""
    res = logits.new_empty(logits.shape, dtype=torch.float32)
    t, n = logits.shape[:-2].numel(), logits.shape[-1]
    if t:
        _sinkhorn_plan(t, n, logits.dtype, iterations, eps, False).run(logits.get_device(), logits, res)
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
        _sinkhorn_plan(t, n, logits.dtype, iterations, eps, True).run(logits.get_device(), logits, dres, dlogits)
    return dlogits
