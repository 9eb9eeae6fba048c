"""Operators for a boundary between two sublayers, and for its second half where a chain of sublayers starts.

``boundary`` mixes a sublayer's output into the streams, computes the next sublayer's mappings from the result, and what
that sublayer reads: 3 launches. ``boundary_backward`` is all of its gradients: 3 launches.
Without y, the streams are taken as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mhc_kernels.fused import configs, forward, mapping_backward, pack, phi_backward
from mhc_kernels.fused.launch import Part, Plan, Step, divide
from mhc_kernels.fused.library import Sizes, cdiv, operator, sizes, sizes_of
from mhc_kernels.fused.memory import Form, allocator, form
from mhc_kernels.fused.single import mix_project_step, plans, stream_backward_step
from mhc_kernels.reference import streams_of

Outputs = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor, Tensor]


Shape = tuple[tuple[int, ...], torch.dtype]


def _kept(s: Sizes, aggregates: bool, normalises: bool) -> dict[str, Part]:
    """What the backward needs besides: projected values and in column R the RMS factor; phi as `pack_kernel` lays it out; of
    the norm 1 / rms(u); the weights pre, unless they are what was asked for."""
    columns = s.packed[1] * s.packed[2]
    return divide(
        "kept",
        saved=((s.t, s.padded_rows), torch.float32),
        w_back=((s.padded_rows, columns), s.product_dtype),
        **({"rho": ((cdiv(s.t, 4) * 4,), torch.float32)} if normalises else {}),
        **({"pre": ((s.t, s.n), torch.float32)} if aggregates else {}),
    )


def _shapes(
    s: Sizes, lead: tuple[int, ...], dtype: torch.dtype, mixes: bool, aggregates: bool, normalises: bool
) -> tuple[Shape | None, ...]:
    """Of the `Outputs`; None: there is no such output."""
    kept = s.kept + (cdiv(s.t, 4) * 4 if normalises else 0) + (s.t * s.n if aggregates else 0)
    return (
        ((*lead, s.n * s.c), dtype) if mixes else None,
        ((*lead, s.c), dtype) if aggregates else None,
        None if aggregates else ((*lead, s.n), torch.float32),
        ((*lead, s.n), torch.float32),
        ((*lead, s.n, s.n), torch.float32),
        ((kept,), torch.float32),
    )


_FORWARD = (
    "x", "res", "post", "y", "y_bias", "seed", "phi", "alpha", "bias", "gamma",
    "out", "u", "pre", "post_out", "res_out", "kept", "scratch",
)  # fmt: skip


@plans
def _forward_plan(
    s: Sizes, mixes: bool, biased: bool, drops: bool, p: float, aggregates: bool, iterations: int, eps: float,
    eps_sinkhorn: float, hc: bool, gamma: torch.dtype | None, norm_eps: float, centered: bool,
) -> Plan:  # fmt: skip
    # gamma's is the one dtype that does not follow from the streams': the kernels of a plan are compiled for it.
    normalises = gamma is not None
    n, padded, c = s.packed
    out = "out" if mixes else "x"
    block = configs.pack(s.padded_rows, padded, c)
    meta: tuple = (c, n, padded, s.padded_rows, s.width, s.low, block, s.bf16)
    packing = Step(pack.pack_kernel, (cdiv(c, block), 1, 1), ("phi", "w", "w_back"), (s.rows,), meta, 4)

    split = square_parts = configs.mix_project(s).SPLIT
    if s.wide:
        split = configs.project(s).SPLIT
        if mixes:
            steps = [_mix_pack_step(mix_project_step(s, True, False, True, biased, drops, p), packing)]
        else:
            square_parts = split
            steps = [packing]
        steps.append(_project_step(s, out, squares=not mixes))
    else:
        steps = [packing, mix_project_step(s, mixes, True, True, biased, drops, p)]

    config, block = configs.aggregate(s), configs.token_block(s.n)
    programs = cdiv(s.t, block)
    grid = (programs + (cdiv(s.t, config.BM) if aggregates else 0), 1, 1)
    norm = ("gamma", "rho") if normalises else ("x", "x")
    arrays = ("sums", out, "alpha", "bias", "u", "pre", "post_out", "res_out", "saved", *norm)
    meta = (
        s.n, s.padded_streams, s.c, s.rows, s.padded_rows, s.sums_width, s.sums_low, split, square_parts,
        iterations, hc, eps_sinkhorn, normalises, centered, block, config.BM, config.BC, config.STAGES,
    )  # fmt: skip
    steps.append(Step(forward.map_aggregate_kernel, grid, arrays, (s.t, programs, eps, norm_eps), meta, config.warps))

    scratch = divide(
        "scratch",
        sums=((max(split, square_parts), s.t, s.sums_width), torch.float32),
        w=((padded * c, s.width), s.product_dtype),
    )
    return Plan(_FORWARD, steps, {**_kept(s, aggregates, normalises), **scratch}, unchecked=7)


def _mix_pack_step(mix: Step, packing: Step) -> Step:
    programs = packing.grid[0]
    return Step(
        forward.mix_pack_kernel,
        (programs + mix.grid[0], 1, 1),
        (*packing.arrays, *mix.arrays),
        (*packing.scalars, programs, *mix.scalars),
        (*packing.meta, *mix.meta),
        mix.warps,
    )


def _project_step(s: Sizes, out: str, squares: bool) -> Step:
    config = configs.project(s)
    grid = (cdiv(s.t, config.BM) * config.SPLIT, 1, 1)
    meta = (
        s.n * s.c, s.low + s.rows if s.bf16 else s.rows, *s.widths, s.sums_width, s.sums_low + s.rows if squares else 0, s.dot32,
        config.BM, config.BC, config.SPLIT, config.V, config.STAGES,
    )  # fmt: skip
    return Step(forward.project_kernel, grid, (out, "w", "sums"), (s.t,), meta, config.warps)


class _Call(NamedTuple):
    """What one set of sizes and options needs: launches (None without tokens), the results' forms (None: no such result)."""

    plan: Plan | None
    results: tuple[Form | None, ...]
    scratch: Form | None

    def allocate(self, new: Callable[..., Tensor]) -> list[Any]:
        """The results, uninitialised."""
        return [None if result is None else new(*result) for result in self.results]


def _call(plan: Plan | None, shapes: Sequence[Shape | None]) -> _Call:
    scratch = None if plan is None else form((plan.floats["scratch"],), torch.float32)
    return _Call(plan, tuple(None if shape is None else form(*shape) for shape in shapes), scratch)


@plans
def _forward_call(
    shape: tuple[int, ...], n: int, dtype: torch.dtype, device: int, mixes: bool, biased: bool, drops: bool, p: float,
    aggregates: bool, iterations: int, eps: float, eps_sinkhorn: float, hc: bool, gamma: torch.dtype | None, norm_eps: float,
    centered: bool,
) -> _Call:  # fmt: skip
    s = sizes_of(shape, n, dtype, device)
    plan = None
    if s.t:
        plan = _forward_plan(
            s, mixes, biased, drops, p, aggregates, iterations, eps, eps_sinkhorn, hc, gamma, norm_eps, centered
        )
    return _call(plan, _shapes(s, shape[:-1], dtype, mixes, aggregates, gamma is not None))


def _fake_boundary(
    x: Tensor, res: Tensor | None, post: Tensor | None, y: Tensor | None, y_bias: Tensor | None, seed: Tensor | None, p: float,
    phi: Tensor, alpha: Tensor, bias: Tensor, aggregates: bool, iterations: int, eps: float, eps_sinkhorn: float, hc: bool,
    gamma: Tensor | None, norm_eps: float, centered: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    s = sizes(x, streams_of(bias))
    shapes = _shapes(s, x.shape[:-1], x.dtype, y is not None, aggregates, gamma is not None)
    return tuple(None if shape is None else x.new_empty(shape[0], dtype=shape[1]) for shape in shapes)


@operator(
    "boundary(Tensor x, Tensor? res, Tensor? post, Tensor? y, Tensor? y_bias, Tensor? seed, float p, "
    "Tensor phi, Tensor alpha, Tensor bias, bool aggregates, int iterations, float eps, float eps_sinkhorn, bool hc, "
    "Tensor? gamma, float norm_eps, bool centered) -> "
    "(Tensor out, Tensor u, Tensor pre, Tensor post_out, Tensor res_out, Tensor kept)",
    _fake_boundary,
)
def boundary(
    x: Tensor, res: Tensor | None, post: Tensor | None, y: Tensor | None, y_bias: Tensor | None, seed: Tensor | None, p: float,
    phi: Tensor, alpha: Tensor, bias: Tensor, aggregates: bool, iterations: int, eps: float, eps_sinkhorn: float, hc: bool,
    gamma: Tensor | None, norm_eps: float, centered: bool,
) -> Outputs:  # fmt: skip
    """The streams after a sublayer, and what the next one takes from them.

    Args:
        x ``[..., n*C]``, res ``[..., n, n]``, post ``[..., n]``, y ``[..., C]``, y_bias ``[C]``: as in
        `mhc_kernels.mix`; y None: out is x. seed ``[1]`` int64, p: dropout of y + y_bias; None for none. phi ``[R,
        n*C]``, alpha ``[3]``, bias ``[R]``: the next sublayer's, as in `mhc_kernels.mappings`.
        aggregates: whether u is wanted.
        iterations, eps: of Sinkhorn, inside the RMS. eps_sinkhorn > 0: profile deepseek-v4. hc: mode hc.
        gamma ``[C]``, norm_eps, centered: RMSNorm of u, as in `mhc_kernels.RMSNorm`; None for none. n <= 4.

    Returns:
        out ``[..., n*C]`` (None without y), u ``[..., C]`` (None unless aggregates), pre (None if aggregates: it is in kept), post,
        res of the next sublayer, float32; kept, float32, what the backward needs besides (`_kept`).
    """
    call = _forward_call(
        x.shape, streams_of(bias), x.dtype, x.get_device(), y is not None, y_bias is not None, seed is not None, p, aggregates,
        iterations, eps, eps_sinkhorn, hc, None if gamma is None else gamma.dtype, norm_eps, centered,
    )  # fmt: skip
    new = allocator(x)
    out, u, pre, post_out, res_out, kept = results = call.allocate(new)
    if call.plan is not None and call.scratch is not None:
        call.plan.run(
            x, x if res is None else res, x if post is None else post, x if y is None else y,
            x if y_bias is None else y_bias, x if seed is None else seed, phi, alpha, bias, x if gamma is None else gamma,
            x if out is None else out, x if u is None else u, x if pre is None else pre, post_out, res_out, kept,
            new(*call.scratch),
        )  # fmt: skip
    return tuple(results)  # type: ignore[return-value]


Gradients = tuple[
    Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None
]


def _gradient_shapes(
    s: Sizes, lead: tuple[int, ...], dtype: torch.dtype, mixes: bool, gamma: torch.dtype | None, accumulates: bool
) -> tuple[Shape | None, ...]:
    """Of the `Gradients`; None: there is no such gradient."""
    return (
        ((*lead, s.n * s.c), dtype),
        ((*lead, s.c), dtype) if mixes else None,
        ((*lead, s.n, s.n), torch.float32) if mixes else None,
        ((*lead, s.n), torch.float32) if mixes else None,
        None if gamma is None else ((s.c,), gamma),
        None if accumulates else ((s.rows, s.n * s.c), torch.float32),
        None if accumulates else ((3,), torch.float32),
        None if accumulates else ((s.rows,), torch.float32),
    )


_BACKWARD = (
    "g", "du", "dpre", "dpost_out", "dres_out", "x", "res", "post", "y", "y_bias", "seed", "out", "pre", "kept", "alpha", "bias",
    "gamma", "scratch", "back", "dx", "dy", "dres", "dpost", "dgamma", "dphi", "dalpha", "dbias",
)  # fmt: skip


@plans
def _backward_plan(
    s: Sizes, g: bool, aggregates: bool, mixes: bool, biased: bool, drops: bool, accumulates: bool, p: float,
    iterations: int, eps_sinkhorn: float, hc: bool, gamma: torch.dtype | None, centered: bool, keeps_pre: bool,
) -> Plan:  # fmt: skip
    normalises = gamma is not None
    config = configs.mapping_backward(s, normalises)
    block = configs.token_block_backward(s.n, config.warps)
    maps, rows = cdiv(s.t, block), cdiv(s.t, config.BM) if aggregates else 0
    arrays: tuple[str, ...] = (
        "du", "out", "dpre", "dpost_out", "dres_out", "saved", "alpha", "bias", "pre",
        *(("gamma", "rho") if normalises else ("x", "x")), "da", "factor", "totals", "pre_totals",
        *(("kappa", "dgammas") if normalises else ("x", "x")),
    )  # fmt: skip
    meta: tuple = (
        s.n, s.padded_streams, s.c, s.rows, s.padded_rows, s.padded_totals, s.padded_pre,
        iterations, hc, eps_sinkhorn, aggregates, s.da_width, s.da_low, normalises, centered,
        block, config.BM, config.BC, config.V, config.STAGES,
    )  # fmt: skip
    mapping = Step(
        mapping_backward.mapping_backward_kernel, (maps + rows, 1, 1), arrays, (s.t, maps), meta, config.warps
    )

    k = s.n * s.c
    columns = configs.phi_backward(s)
    parts = min(columns.PARTS, cdiv(s.t, columns.BM))
    grid = (cdiv(k, columns.BK), parts, 1)
    blocks = (columns.BM, columns.BK, columns.STAGES)
    if s.wide:
        arrays = ("da", "out", "partials", "factor", "w_back", "g", "back")
        meta = (k, s.n, s.padded_streams, s.da_width, s.dot32, g, *blocks)
        phi = Step(phi_backward.phi_streams_backward_kernel, grid, arrays, (s.t,), meta, columns.warps)
    else:
        meta = (k, s.padded_rows, s.da_width, s.dot32, *blocks)
        phi = Step(phi_backward.phi_backward_kernel, grid, ("da", "out", "partials"), (s.t,), meta, columns.warps)

    counts = (maps, rows, parts)
    streams = stream_backward_step(
        s, g, aggregates, mixes, True, biased, drops, accumulates, p, counts, normalises, centered
    )
    scratch = divide(
        "scratch",
        partials=((parts, s.partial_rows, k), torch.float32),
        da=((s.t, s.da_width), s.product_dtype),
        factor=((s.t, 3, 4), torch.float32),
        totals=((maps, s.padded_totals), torch.float32),
        kappa=((cdiv(s.t, 4) * 4 if normalises else 0,), torch.float32),
        dgammas=((rows if normalises else 0, s.c), torch.float32),
        pre_totals=((rows, s.padded_pre), torch.float32),
    )
    # The gradients of the parameters may be Megatron's, at any address.
    return Plan(_BACKWARD, [mapping, phi, streams], {**_kept(s, keeps_pre, normalises), **scratch}, unchecked=10)


@plans
def _backward_call(
    shape: tuple[int, ...], n: int, dtype: torch.dtype, device: int, g: bool, aggregates: bool, mixes: bool, biased: bool, drops: bool,
    accumulates: bool, p: float, iterations: int, eps_sinkhorn: float, hc: bool, gamma: torch.dtype | None, centered: bool,
    keeps_pre: bool,
) -> _Call:  # fmt: skip
    s = sizes_of(shape, n, dtype, device)
    plan = None
    if s.t:
        plan = _backward_plan(
            s, g, aggregates, mixes, biased, drops, accumulates, p, iterations, eps_sinkhorn, hc, gamma, centered, keeps_pre
        )
    return _call(plan, _gradient_shapes(s, shape[:-1], dtype, mixes, gamma, accumulates))


def _fake_boundary_backward(
    g: Tensor | None, du: Tensor | None, dpre: Tensor | None, dpost_out: Tensor | None, dres_out: Tensor | None,
    x: Tensor, res: Tensor | None, post: Tensor | None, y: Tensor | None, y_bias: Tensor | None, seed: Tensor | None, p: float,
    out: Tensor, pre: Tensor | None, kept: Tensor, alpha: Tensor, bias: Tensor,
    main_phi: Tensor | None, main_alpha: Tensor | None, main_bias: Tensor | None,
    iterations: int, eps_sinkhorn: float, hc: bool, gamma: Tensor | None, centered: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    s = sizes(x, streams_of(bias))
    dtype = None if gamma is None else gamma.dtype
    shapes = _gradient_shapes(s, x.shape[:-1], x.dtype, y is not None, dtype, main_phi is not None)
    return tuple(None if shape is None else x.new_empty(shape[0], dtype=shape[1]) for shape in shapes)


@operator(
    "boundary_backward(Tensor? g, Tensor? du, Tensor? dpre, Tensor? dpost_out, Tensor? dres_out, "
    "Tensor x, Tensor? res, Tensor? post, Tensor? y, Tensor? y_bias, Tensor? seed, float p, "
    "Tensor out, Tensor? pre, Tensor kept, Tensor alpha, Tensor bias, "
    "Tensor(a!)? main_phi, Tensor(b!)? main_alpha, Tensor(c!)? main_bias, int iterations, float eps_sinkhorn, bool hc, "
    "Tensor? gamma, bool centered) -> "
    "(Tensor dx, Tensor dy, Tensor dres, Tensor dpost, Tensor dgamma, Tensor dphi, Tensor dalpha, Tensor dbias)",
    _fake_boundary_backward,
)
def boundary_backward(
    g: Tensor | None, du: Tensor | None, dpre: Tensor | None, dpost_out: Tensor | None, dres_out: Tensor | None,
    x: Tensor, res: Tensor | None, post: Tensor | None, y: Tensor | None, y_bias: Tensor | None, seed: Tensor | None, p: float,
    out: Tensor, pre: Tensor | None, kept: Tensor, alpha: Tensor, bias: Tensor,
    main_phi: Tensor | None, main_alpha: Tensor | None, main_bias: Tensor | None,
    iterations: int, eps_sinkhorn: float, hc: bool, gamma: Tensor | None, centered: bool,
) -> Gradients:  # fmt: skip
    """All gradients of `boundary`.

    Args:
        g, du, dpre, dpost_out, dres_out: gradients of out, u, pre, post_out, res_out; None is zero. du or dpre, not both.
        out: the streams that phi was multiplied with (x itself without y). pre: None if it is in kept.
        main_phi, main_alpha, main_bias: float32 gradients to add to (all or none) instead of returning new ones.
        The others: as given to `boundary` and returned by it.

    Returns:
        Gradients of x, y, res, post, gamma, phi, alpha, bias; None where there is nothing to return.
    """
    n = streams_of(bias)
    accumulates = main_phi is not None
    call = _backward_call(
        x.shape, n, x.dtype, x.get_device(), g is not None, du is not None, y is not None, y_bias is not None, seed is not None,
        accumulates, p, iterations, eps_sinkhorn, hc, None if gamma is None else gamma.dtype, centered, pre is None,
    )  # fmt: skip
    new = allocator(x)
    dx, dy, dres, dpost, dgamma, *parameters = results = call.allocate(new)
    if call.plan is None or call.scratch is None:
        for gradient in results[4:]:
            if gradient is not None:
                gradient.zero_()
        return tuple(results)  # type: ignore[return-value]
    lead = x.shape[:-1]
    if dpost_out is None:
        dpost_out = bias.new_zeros((*lead, n))
    if dres_out is None:
        dres_out = bias.new_zeros((*lead, n, n))
    if dpre is None:
        dpre = alpha if du is not None else bias.new_zeros((*lead, n))
    call.plan.run(
        x if g is None else g, x if du is None else du, dpre, dpost_out, dres_out,
        x, x if res is None else res, x if post is None else post, x if y is None else y,
        x if y_bias is None else y_bias, x if seed is None else seed, out, x if pre is None else pre, kept, alpha, bias,
        x if gamma is None else gamma,
        new(*call.scratch), torch.empty_like(out) if n > 4 else out,
        dx, x if dy is None else dy, x if dres is None else dres, x if dpost is None else dpost, x if dgamma is None else dgamma,
        *((main_phi, main_alpha, main_bias) if accumulates else parameters),
    )  # fmt: skip
    return tuple(results)  # type: ignore[return-value]
