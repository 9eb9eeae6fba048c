"""Operators for a boundary between two sublayers, and for its second half where a chain of sublayers starts.

``boundary`` mixes a sublayer's output into the streams, computes the next sublayer's mappings from the result, and what
that sublayer reads: 3 launches. ``boundary_backward`` is all of its gradients: 3 launches.
Without y, the streams are taken as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mhc_kernels.fused import configs, forward, mapping_backward, pack, phi_backward
from mhc_kernels.fused.launch import Part, Plan, Step, divide
from mhc_kernels.fused.library import Sizes, cdiv, operator, sizes
from mhc_kernels.fused.single import mix_project_step, plans, stream_backward_step
from mhc_kernels.reference import streams_of

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _kept(s: Sizes, normalises: bool) -> dict[str, Part]:
    """What the backward needs besides: projected values and in column R the RMS factor; phi as `pack_kernel` lays it out; of
    the norm 1 / rms(u)."""
    columns = s.packed[1] * s.packed[2]
    return divide(
        "kept",
        saved=((s.t, s.padded_rows), torch.float32),
        w_back=((s.padded_rows, columns), s.product_dtype),
        **({"rho": ((s.t,), torch.float32)} if normalises else {}),
    )


def _outputs(
    x: Tensor,
    res: Tensor | None,
    post: Tensor | None,
    y: Tensor | None,
    bias: Tensor,
    aggregates: bool,
    normalises: bool,
) -> Outputs:
    s = sizes(x, streams_of(bias))
    lead = x.shape[:-1]
    kept = bias.new_empty(s.kept + s.t if normalises else s.kept)
    if y is None or post is None or res is None:
        return (
            x.new_empty(0),
            x.new_empty((*lead, s.c) if aggregates else 0),
            bias.new_empty((*lead, s.n)),
            bias.new_empty((*lead, s.n)),
            bias.new_empty((*lead, s.n, s.n)),
            kept,
        )
    return (
        torch.empty_like(x),
        torch.empty_like(y) if aggregates else x.new_empty(0),
        torch.empty_like(post),
        torch.empty_like(post),
        torch.empty_like(res),
        kept,
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
    return Plan(_FORWARD, steps, {**_kept(s, normalises), **scratch})


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


def _fake_boundary(
    x: Tensor, res: Tensor | None, post: Tensor | None, y: Tensor | None, y_bias: Tensor | None, seed: Tensor | None, p: float,
    phi: Tensor, alpha: Tensor, bias: Tensor, aggregates: bool, iterations: int, eps: float, eps_sinkhorn: float, hc: bool,
    gamma: Tensor | None, norm_eps: float, centered: bool,
) -> Outputs:  # fmt: skip
    return _outputs(x, res, post, y, bias, aggregates, gamma is not None)


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
        out ``[..., n*C]`` (empty without y), u ``[..., C]`` (empty unless aggregates), pre, post, res of the next
        sublayer, float32; kept, float32, what the backward needs besides (`_kept`).
    """
    s = sizes(x, streams_of(bias))
    outputs = _outputs(x, res, post, y, bias, aggregates, gamma is not None)
    if s.t:
        plan = _forward_plan(
            s, y is not None, y_bias is not None, seed is not None, p, aggregates, iterations, eps, eps_sinkhorn, hc,
            None if gamma is None else gamma.dtype, norm_eps, centered,
        )  # fmt: skip
        plan.run(
            x, x if res is None else res, x if post is None else post, x if y is None else y,
            x if y_bias is None else y_bias, x if seed is None else seed, phi, alpha, bias, x if gamma is None else gamma,
            *outputs, bias.new_empty(plan.floats["scratch"]),
        )  # fmt: skip
    return outputs


Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _gradients(
    x: Tensor, res: Tensor | None, post: Tensor | None, y: Tensor | None, alpha: Tensor, bias: Tensor, gamma: Tensor | None,
    accumulates: bool,
) -> Gradients:  # fmt: skip
    shape = (bias.shape[0], x.shape[-1])
    return (
        torch.empty_like(x),
        x.new_empty(0) if y is None else torch.empty_like(y),
        x.new_empty(0) if res is None else torch.empty_like(res),
        x.new_empty(0) if post is None else torch.empty_like(post),
        x.new_empty(0) if gamma is None else torch.empty_like(gamma),
        x.new_empty(0) if accumulates else bias.new_empty(shape),
        x.new_empty(0) if accumulates else torch.empty_like(alpha),
        x.new_empty(0) if accumulates else torch.empty_like(bias),
    )


_BACKWARD = (
    "g", "du", "dpre", "dpost_out", "dres_out", "x", "res", "post", "y", "y_bias", "seed", "out", "pre", "kept", "alpha", "bias",
    "gamma", "scratch", "back", "dx", "dy", "dres", "dpost", "dgamma", "dphi", "dalpha", "dbias",
)  # fmt: skip


@plans
def _backward_plan(
    s: Sizes, g: bool, aggregates: bool, mixes: bool, biased: bool, drops: bool, accumulates: bool, p: float,
    iterations: int, eps_sinkhorn: float, hc: bool, gamma: torch.dtype | None, centered: bool,
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
    return Plan(_BACKWARD, [mapping, phi, streams], {**_kept(s, normalises), **scratch}, unaligned=3)


def _fake_boundary_backward(
    g: Tensor | None, du: Tensor | None, dpre: Tensor | None, dpost_out: Tensor | None, dres_out: Tensor | None,
    x: Tensor, res: Tensor | None, post: Tensor | None, y: Tensor | None, y_bias: Tensor | None, seed: Tensor | None, p: float,
    out: Tensor, pre: Tensor, kept: Tensor, alpha: Tensor, bias: Tensor,
    main_phi: Tensor | None, main_alpha: Tensor | None, main_bias: Tensor | None,
    iterations: int, eps_sinkhorn: float, hc: bool, gamma: Tensor | None, centered: bool,
) -> Gradients:  # fmt: skip
    return _gradients(x, res, post, y, alpha, bias, gamma, main_phi is not None)


@operator(
    "boundary_backward(Tensor? g, Tensor? du, Tensor? dpre, Tensor? dpost_out, Tensor? dres_out, "
    "Tensor x, Tensor? res, Tensor? post, Tensor? y, Tensor? y_bias, Tensor? seed, float p, "
    "Tensor out, Tensor pre, Tensor kept, Tensor alpha, Tensor bias, "
    "Tensor(a!)? main_phi, Tensor(b!)? main_alpha, Tensor(c!)? main_bias, int iterations, float eps_sinkhorn, bool hc, "
    "Tensor? gamma, bool centered) -> "
    "(Tensor dx, Tensor dy, Tensor dres, Tensor dpost, Tensor dgamma, Tensor dphi, Tensor dalpha, Tensor dbias)",
    _fake_boundary_backward,
)
def boundary_backward(
    g: Tensor | None, du: Tensor | None, dpre: Tensor | None, dpost_out: Tensor | None, dres_out: Tensor | None,
    x: Tensor, res: Tensor | None, post: Tensor | None, y: Tensor | None, y_bias: Tensor | None, seed: Tensor | None, p: float,
    out: Tensor, pre: Tensor, kept: Tensor, alpha: Tensor, bias: Tensor,
    main_phi: Tensor | None, main_alpha: Tensor | None, main_bias: Tensor | None,
    iterations: int, eps_sinkhorn: float, hc: bool, gamma: Tensor | None, centered: bool,
) -> Gradients:  # fmt: skip
    """All gradients of `boundary`.

    Args:
        g, du, dpre, dpost_out, dres_out: gradients of out, u, pre, post_out, res_out; None is zero. du or dpre, not both.
        out: the streams that phi was multiplied with (x itself without y).
        main_phi, main_alpha, main_bias: float32 gradients to add to (all or none) instead of returning new ones.
        The others: as given to `boundary` and returned by it.

    Returns:
        Gradients of x, y, res, post, gamma, phi, alpha, bias; empty where there is nothing to return.
    """
    s = sizes(x, streams_of(bias))
    accumulates = main_phi is not None
    gradients = _gradients(x, res, post, y, alpha, bias, gamma, accumulates)
    if not s.t:
        for gradient in gradients[4:]:  # empty where there is nothing to return
            gradient.zero_()
        return gradients
    lead = x.shape[:-1]
    if dpost_out is None:
        dpost_out = bias.new_zeros((*lead, s.n))
    if dres_out is None:
        dres_out = bias.new_zeros((*lead, s.n, s.n))
    if dpre is None:
        dpre = alpha if du is not None else bias.new_zeros((*lead, s.n))
    plan = _backward_plan(
        s, g is not None, du is not None, y is not None, y_bias is not None, seed is not None, accumulates, p,
        iterations, eps_sinkhorn, hc, None if gamma is None else gamma.dtype, centered,
    )  # fmt: skip
    parameters = gradients[5:]
    if main_phi is not None and main_alpha is not None and main_bias is not None:
        parameters = (main_phi, main_alpha, main_bias)
    plan.run(
        x if g is None else g, x if du is None else du, dpre, dpost_out, dres_out,
        x, x if res is None else res, x if post is None else post, x if y is None else y,
        x if y_bias is None else y_bias, x if seed is None else seed, out, pre, kept, alpha, bias, x if gamma is None else gamma,
        bias.new_empty(plan.floats["scratch"]), torch.empty_like(out) if s.wide else out, *gradients[:5], *parameters,
    )  # fmt: skip
    return gradients
