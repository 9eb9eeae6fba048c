"""Operators for a boundary between two sublayers, and for its second half where a chain of sublayers starts.

``boundary`` mixes a sublayer's output into the streams, computes the next sublayer's mappings from the result, and what
that sublayer
reads: pack + 2 launches. ``boundary_backward`` is all of its gradients: 3 launches.
Without y, the streams are taken as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mhc_kernels.fused import backward, configs, forward, pack
from mhc_kernels.fused.launch import Launcher
from mhc_kernels.fused.library import Sizes, cdiv, operator, sizes
from mhc_kernels.fused.single import Partials, launch_mix_project, launch_project, launch_stream_backward
from mhc_kernels.fused.workspace import Shape, divide, floats
from mhc_kernels.reference import streams_of

_pack = Launcher(pack.pack_kernel)
_map_aggregate = Launcher(forward.map_aggregate_kernel)
_mapping_backward = Launcher(backward.mapping_backward_kernel)
_phi_backward = Launcher(backward.phi_backward_kernel)

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _outputs(
    x: Tensor, res: Tensor | None, post: Tensor | None, y: Tensor | None, bias: Tensor, aggregates: bool
) -> Outputs:
    s = sizes(x, streams_of(bias))
    lead = x.shape[:-1]
    kept = bias.new_empty(floats(*_kept(s)))
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


def _kept(s: Sizes) -> tuple[Shape, Shape]:
    """What the backward needs besides: projected values and in column R the RMS factor; phi as `pack_kernel` lays it out."""
    return (
        ((s.t, s.padded_rows), torch.float32),
        ((s.padded_rows, s.packed[1] * s.packed[2]), s.product_dtype),
    )


def _fake_boundary(
    x: Tensor, res: Tensor | None, post: Tensor | None, y: Tensor | None, y_bias: Tensor | None, seed: Tensor | None, p: float,
    phi: Tensor, alpha: Tensor, bias: Tensor, aggregates: bool, iterations: int, eps: float, eps_sinkhorn: float, hc: bool,
) -> Outputs:  # fmt: skip
    return _outputs(x, res, post, y, bias, aggregates)


@operator(
    "boundary(Tensor x, Tensor? res, Tensor? post, Tensor? y, Tensor? y_bias, Tensor? seed, float p, "
    "Tensor phi, Tensor alpha, Tensor bias, bool aggregates, int iterations, float eps, float eps_sinkhorn, bool hc) -> "
    "(Tensor out, Tensor u, Tensor pre, Tensor post_out, Tensor res_out, Tensor kept)",
    _fake_boundary,
)
def boundary(
    x: Tensor, res: Tensor | None, post: Tensor | None, y: Tensor | None, y_bias: Tensor | None, seed: Tensor | None, p: float,
    phi: Tensor, alpha: Tensor, bias: Tensor, aggregates: bool, iterations: int, eps: float, eps_sinkhorn: float, hc: bool,
) -> Outputs:  # fmt: skip
    """The streams after a sublayer, and what the next one takes from them.

    Args:
        x ``[..., n*C]``, res ``[..., n, n]``, post ``[..., n]``, y ``[..., C]``, y_bias ``[C]``: as in
        `mhc_kernels.mix`; y None: out is x. seed ``[1]`` int64, p: dropout of y + y_bias; None for none. phi ``[R,
        n*C]``, alpha ``[3]``, bias ``[R]``: the next sublayer's, as in `mhc_kernels.mappings`.
        aggregates: whether u is wanted.
        iterations, eps: of Sinkhorn, inside the RMS. eps_sinkhorn > 0: profile deepseek-v4. hc: mode hc.

    Returns:
        out ``[..., n*C]`` (empty without y), u ``[..., C]`` (empty unless aggregates), pre, post, res of the next
        sublayer, float32; kept, float32, what the backward needs besides (`_kept`).
    """
    s = sizes(x, streams_of(bias))
    outputs = _outputs(x, res, post, y, bias, aggregates)
    if not s.t:
        return outputs
    out, u, pre, post_out, res_out, kept = outputs
    saved, w_back = divide(kept, *_kept(s))
    n, padded, c = s.packed
    split = (configs.project if s.wide else configs.mix_project)(s.n, s.c, s.bf16).SPLIT
    shapes = (((split, s.t, s.padded_rows), torch.float32), ((padded * c, s.width), s.product_dtype))
    sums, w = divide(bias.new_empty(floats(*shapes)), *shapes)
    block = configs.pack(s.padded_rows, padded, c)
    _pack(cdiv(c, block), (phi, w, w_back), (s.rows,), (c, n, padded, s.padded_rows, block, s.bf16), 4)
    if s.wide:
        if y is not None:
            launch_mix_project(s, x, res, post, y, y_bias, seed, p, None, out, None)
        launch_project(s, x if y is None else out, w, sums)
    else:
        launch_mix_project(s, x, res, post, y, y_bias, seed, p, w, x if y is None else out, sums)
    config = configs.aggregate(s.n, s.c, s.bf16)
    block = configs.token_block(s.n)
    programs = cdiv(s.t, block)
    meta = (
        s.n, s.padded_streams, s.c, s.rows, s.padded_rows, split, iterations, hc, eps_sinkhorn,
        block, config.BM, config.BC, config.STAGES,
    )  # fmt: skip
    _map_aggregate(
        programs + (cdiv(s.t, config.BM) if aggregates else 0),
        (sums, x if y is None else out, alpha, bias, u, pre, post_out, res_out, saved),
        (s.t, programs, eps),
        meta,
        config.warps,
    )
    return outputs


Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _gradients(
    x: Tensor, res: Tensor | None, post: Tensor | None, y: Tensor | None, alpha: Tensor, bias: Tensor, accumulates: bool
) -> Gradients:
    shape = (bias.shape[0], x.shape[-1])
    return (
        torch.empty_like(x),
        x.new_empty(0) if y is None else torch.empty_like(y),
        x.new_empty(0) if res is None else torch.empty_like(res),
        x.new_empty(0) if post is None else torch.empty_like(post),
        x.new_empty(0) if accumulates else bias.new_empty(shape),
        x.new_empty(0) if accumulates else torch.empty_like(alpha),
        x.new_empty(0) if accumulates else torch.empty_like(bias),
    )


def _fake_boundary_backward(
    g: Tensor | None, du: Tensor | None, dpre: Tensor | None, dpost_out: Tensor | None, dres_out: Tensor | None,
    x: Tensor, res: Tensor | None, post: Tensor | None, y: Tensor | None, y_bias: Tensor | None, seed: Tensor | None, p: float,
    out: Tensor, pre: Tensor, kept: Tensor, alpha: Tensor, bias: Tensor,
    main_phi: Tensor | None, main_alpha: Tensor | None, main_bias: Tensor | None,
    iterations: int, eps_sinkhorn: float, hc: bool,
) -> Gradients:  # fmt: skip
    return _gradients(x, res, post, y, alpha, bias, main_phi is not None)


@operator(
    "boundary_backward(Tensor? g, Tensor? du, Tensor? dpre, Tensor? dpost_out, Tensor? dres_out, "
    "Tensor x, Tensor? res, Tensor? post, Tensor? y, Tensor? y_bias, Tensor? seed, float p, "
    "Tensor out, Tensor pre, Tensor kept, Tensor alpha, Tensor bias, "
    "Tensor(a!)? main_phi, Tensor(b!)? main_alpha, Tensor(c!)? main_bias, int iterations, float eps_sinkhorn, bool hc) -> "
    "(Tensor dx, Tensor dy, Tensor dres, Tensor dpost, Tensor dphi, Tensor dalpha, Tensor dbias)",
    _fake_boundary_backward,
)
def boundary_backward(
    g: Tensor | None, du: Tensor | None, dpre: Tensor | None, dpost_out: Tensor | None, dres_out: Tensor | None,
    x: Tensor, res: Tensor | None, post: Tensor | None, y: Tensor | None, y_bias: Tensor | None, seed: Tensor | None, p: float,
    out: Tensor, pre: Tensor, kept: Tensor, alpha: Tensor, bias: Tensor,
    main_phi: Tensor | None, main_alpha: Tensor | None, main_bias: Tensor | None,
    iterations: int, eps_sinkhorn: float, hc: bool,
) -> Gradients:  # fmt: skip
    """All gradients of `boundary`.

    Args:
        g, du, dpre, dpost_out, dres_out: gradients of out, u, pre, post_out, res_out; None is zero. du or dpre, not both.
        out: the streams that phi was multiplied with (x itself without y).
        main_phi, main_alpha, main_bias: float32 gradients to add to (all or none) instead of returning new ones.
        The others: as given to `boundary` and returned by it.

    Returns:
        Gradients of x, y, res, post, phi, alpha, bias; empty where there is nothing to return.
    """
    s = sizes(x, streams_of(bias))
    gradients = _gradients(x, res, post, y, alpha, bias, main_phi is not None)
    dx, dy, dres, dpost, dphi, dalpha, dbias = gradients
    accumulates = main_phi is not None
    if not s.t:
        for gradient in () if accumulates else (dphi, dalpha, dbias):
            gradient.zero_()
        return gradients
    lead, device = x.shape[:-1], x.device
    if dpost_out is None:
        dpost_out = torch.zeros((*lead, s.n), dtype=torch.float32, device=device)
    if dres_out is None:
        dres_out = torch.zeros((*lead, s.n, s.n), dtype=torch.float32, device=device)
    if du is None and dpre is None:
        dpre = torch.zeros((*lead, s.n), dtype=torch.float32, device=device)
    if main_phi is not None and main_alpha is not None and main_bias is not None:
        dphi, dalpha, dbias = main_phi, main_alpha, main_bias

    c = configs.mapping_backward(s.n, s.c, s.bf16)
    maps, rows = cdiv(s.t, configs.token_block(s.n)), 0 if du is None else cdiv(s.t, c.BM)
    k = s.n * s.c
    columns = configs.phi_backward(s.n, s.c, s.bf16)
    length = cdiv(cdiv(s.t, columns.PARTS), columns.BM) * columns.BM
    parts = cdiv(s.t, length)
    shapes = (
        ((parts, s.padded_rows, k), torch.float32),
        ((s.t, s.da_width), s.product_dtype),
        ((s.t, 3, 4), torch.float32),
        ((maps, s.padded_totals), torch.float32),
        ((rows, s.padded_pre), torch.float32),
    )
    partials, da, factor, totals, pre_totals = divide(bias.new_empty(floats(*shapes)), *shapes)
    saved, w = divide(kept, *_kept(s))
    meta = (
        s.n, s.padded_streams, s.c, s.rows, s.padded_rows, s.padded_totals, s.padded_pre,
        iterations, hc, eps_sinkhorn, du is not None, s.da_width, configs.token_block(s.n), c.BM, c.BC, c.V, c.STAGES,
    )  # fmt: skip
    _mapping_backward(
        maps + rows,
        (x if du is None else du, out, alpha if dpre is None else dpre, dpost_out, dres_out, saved, alpha, bias,
         da, factor, totals, pre_totals),
        (s.t, maps),
        meta,
        c.warps,
    )  # fmt: skip

    back = torch.empty_like(out) if s.wide else out
    shape = (k, s.rows, s.padded_rows, s.da_width, s.dot32, s.wide, g is not None, columns.BM, columns.BK, columns.STAGES)
    _phi_backward(
        (cdiv(k, columns.BK), parts),
        (da, out, partials, factor, w, out if g is None else g, back),
        (s.t, length),
        shape,
        columns.warps,
    )
    if s.wide:
        g = back

    mixed = (None, None, None) if y is None else (dy, dres, dpost)
    sums = Partials(totals, pre_totals, partials, dalpha, dbias, dphi, accumulates)
    launch_stream_backward(s, g, du, x, y, y_bias, seed, p, res, post, pre, da, factor, w, (dx, *mixed), sums)
    return gradients
