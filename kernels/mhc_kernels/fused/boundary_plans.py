"""The launches of a boundary and of its backward, and the shapes of what they return."""

from __future__ import annotations

from typing import NamedTuple

import torch

from mhc_kernels.fused import configs, forward, mapping_backward, pack, phi_backward
from mhc_kernels.fused.launch import Part, Plan, Step, divide
from mhc_kernels.fused.library import Sizes, cdiv
from mhc_kernels.fused.single import Read, mix_project_step, plans, stream_backward_step

Shape = tuple[tuple[int, ...], torch.dtype]


class ForwardOptions(NamedTuple):
    """Of `boundary`. mixes, biased, drops: whether y, y_bias, seed are given; gamma: the norm's dtype; the others as there."""

    mixes: bool
    biased: bool
    drops: bool
    p: float
    aggregates: bool
    iterations: int
    eps: float
    eps_sinkhorn: float
    hc: bool
    gamma: torch.dtype | None
    norm_eps: float
    centered: bool

    def backward(self, g: bool, du: bool, accumulates: bool, read: Read | None) -> BackwardOptions:
        """Given whether out and u have gradients, and whether there are gradients of the parameters to add to; and what the
        sublayer read, if that is computed again."""
        mixed = (self.mixes, self.biased, self.drops, self.p)
        mapped = (self.iterations, self.eps_sinkhorn, self.hc)
        return BackwardOptions(g, du, accumulates, *mixed, *mapped, self.gamma, self.centered, self.aggregates, read)


class BackwardOptions(NamedTuple):
    """Of `boundary_backward`. keeps_pre: whether the weights pre are in kept. read: of the sublayer's input, if that is computed
    again (`BackwardCall.run`)."""

    g: bool
    aggregates: bool
    accumulates: bool
    mixes: bool
    biased: bool
    drops: bool
    p: float
    iterations: int
    eps_sinkhorn: float
    hc: bool
    gamma: torch.dtype | None
    centered: bool
    keeps_pre: bool
    read: Read | None = None


def _kept(s: Sizes, aggregates: bool, normalises: bool) -> dict[str, Part]:
    """What the backward needs besides: projected values and in column R the RMS factor; phi as `pack_kernel` lays it out; of
    the norm 1 / rms(u); the weights pre, unless they are what was asked for."""
    columns = s.packed[1] * s.packed[2]
    return divide(
        "kept",
        saved=((s.t, s.padded_rows), torch.float32),
        w_back=((s.padded_rows, columns), s.back_dtype),
        **({"rho": ((cdiv(s.t, 4) * 4,), torch.float32)} if normalises else {}),
        **({"pre": ((s.t, s.n), torch.float32)} if aggregates else {}),
    )


def output_shapes(
    s: Sizes, lead: tuple[int, ...], dtype: torch.dtype, mixes: bool, aggregates: bool, normalises: bool
) -> tuple[Shape | None, ...]:
    """Of what `boundary` returns; None: there is no such output."""
    kept = s.kept + (cdiv(s.t, 4) * 4 if normalises else 0) + (s.t * s.n if aggregates else 0)
    return (
        ((*lead, s.n * s.c), dtype) if mixes else None,
        ((*lead, s.c), dtype) if aggregates else None,
        None if aggregates else ((*lead, s.n), torch.float32),
        ((*lead, s.n), torch.float32),
        ((*lead, s.n, s.n), torch.float32),
        ((kept,), torch.float32),
    )


def _absent(*groups: tuple[bool, tuple[str, ...]]) -> dict[str, str]:
    """For `Plan`: x stands in for the names of groups that are not given."""
    return {name: "x" for given, names in groups if not given for name in names}


_FORWARD = (
    "x", "res", "post", "y", "y_bias", "seed", "phi", "alpha", "bias", "gamma",
    "out", "u", "pre", "post_out", "res_out", "kept", "scratch",
)  # fmt: skip


@plans
def forward_plan(s: Sizes, options: ForwardOptions) -> Plan:
    """Takes the tensors of `_FORWARD`; None for those that there are not with these options."""
    mixes, biased, drops, p, aggregates, iterations, eps, eps_sinkhorn, hc, gamma, norm_eps, centered = options
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
        # Without y the mix sums squares and writes nothing.
        steps = [
            _mix_pack_step(mix_project_step(s, mixes, False, True, biased, drops, p), packing),
            _project_step(s, out),
        ]
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
    absent = _absent(
        (mixes, ("res", "post", "y", "out")), (biased, ("y_bias",)), (drops, ("seed",)), (normalises, ("gamma",)),
        (aggregates, ("u",)), (not aggregates, ("pre",)),
    )  # fmt: skip
    return Plan(_FORWARD, steps, {**_kept(s, aggregates, normalises), **scratch}, _FORWARD[-7:], absent)


@plans
def aggregate_again_plan(s: Sizes, gamma: torch.dtype | None, centered: bool) -> Plan:
    """Takes x, gamma, kept and u: u from x once more, as a forward that kept ``kept`` wrote it. gamma: the norm's dtype."""
    # In the plan's key, as in `forward_plan`: its kernel is compiled for this dtype.
    config, normalises = configs.aggregate(s), gamma is not None
    norm = ("gamma", "rho") if normalises else ("x", "x")
    meta = (s.n, s.c, normalises, centered, config.BM, config.BC, config.STAGES)
    grid = (cdiv(s.t, config.BM), 1, 1)
    step = Step(forward.aggregate_again_kernel, grid, ("x", "pre", *norm, "u"), (s.t,), meta, config.warps)
    return Plan(("x", "gamma", "kept", "u"), [step], _kept(s, True, normalises))


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


def _project_step(s: Sizes, out: str) -> Step:
    config = configs.project(s)
    grid = (cdiv(s.t, config.BM) * config.SPLIT, 1, 1)
    meta = (
        s.n * s.c, s.low + s.rows if s.bf16 else s.rows, *s.widths, s.sums_width, s.dot32,
        config.BM, config.BC, config.SPLIT, config.STAGES,
    )  # fmt: skip
    return Step(forward.project_kernel, grid, (out, "w", "sums"), (s.t,), meta, config.warps)


def gradient_shapes(
    s: Sizes, lead: tuple[int, ...], dtype: torch.dtype, mixes: bool, gamma: torch.dtype | None, accumulates: bool
) -> tuple[Shape | None, ...]:
    """Of what `boundary_backward` returns; None: there is no such gradient."""
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
    "x", "g", "du", "dpre", "dpost_out", "dres_out", "res", "post", "y", "y_bias", "seed", "out", "pre", "kept", "alpha", "bias",
    "gamma", "read_kept", "read_gamma", "read", "scratch", "back",
    "dx", "dy", "dres", "dpost", "dgamma", "dphi", "dalpha", "dbias",
)  # fmt: skip


@plans
def backward_plan(s: Sizes, options: BackwardOptions) -> Plan:
    """Takes the tensors of `_BACKWARD`; None for those that there are not with these options."""
    g, aggregates, accumulates, mixes, biased, drops, p, *mapped, gamma, centered, keeps_pre, read = options
    iterations, eps_sinkhorn, hc = mapped
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
    splits = min(columns.PARTS, cdiv(s.t, columns.BM))
    grid = (cdiv(k, columns.BK), splits, 1)
    blocks = (columns.BM, columns.BK, columns.STAGES)
    if s.wide:
        arrays = ("da", "out", "partials", "factor", "w_back", "g", "back")
        meta = (k, s.n, s.padded_streams, s.da_width, s.dot32, g, *blocks)
        phi = Step(phi_backward.phi_streams_backward_kernel, grid, arrays, (s.t,), meta, columns.warps)
    else:
        meta = (k, s.padded_rows, s.da_width, s.dot32, *blocks)
        phi = Step(phi_backward.phi_backward_kernel, grid, ("da", "out", "partials"), (s.t,), meta, columns.warps)

    counts = (maps, rows, splits)
    streams = stream_backward_step(
        s, g, aggregates, mixes, True, biased, drops, accumulates, p, counts, normalises, centered, read
    )
    scratch = divide(
        "scratch",
        partials=((splits, s.partial_rows, k), torch.float32),
        da=((s.t, s.da_width), s.product_dtype),
        factor=((s.t, 3, 4), torch.float32),
        totals=((maps, s.padded_totals), torch.float32),
        kappa=((cdiv(s.t, 4) * 4 if normalises else 0,), torch.float32),
        dgammas=((rows if normalises else 0, s.c), torch.float32),
        pre_totals=((rows, s.padded_pre), torch.float32),
    )
    absent = _absent(
        (g, ("g",)), (aggregates, ("du",)), (mixes, ("res", "post", "y", "dy", "dres", "dpost")), (biased, ("y_bias",)),
        (drops, ("seed",)), (not keeps_pre, ("pre",)), (normalises, ("gamma", "dgamma")),
        (read is not None, ("read_kept", "read")), (read is not None and read.gamma is not None, ("read_gamma",)),
    )  # fmt: skip
    if aggregates:
        absent["dpre"] = "alpha"
    if not s.wide:
        absent["back"] = "out"
    # The gradients of the parameters may be Megatron's, at any address.
    parts = {**_kept(s, keeps_pre, normalises), **scratch}
    if read is not None:
        theirs = _kept(s, True, read.gamma is not None)
        parts |= {f"read_{name}": theirs[name]._replace(base="read_kept") for name in ("pre", "rho") if name in theirs}
    return Plan(_BACKWARD, [mapping, phi, streams], parts, _BACKWARD[-10:], absent)
