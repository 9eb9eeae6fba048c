"""The forward of a boundary between two sublayers, in two passes over the row of n*C values.

`mix_project_kernel`: ``x' = H_res x + H_post y``, and x' times phi (partial sums) while it is in registers.
`map_aggregate_kernel`: the mappings from those sums, and ``u = H_pre x'``; some programs do the one, some the other.
Units of C elements a token, n = 4: the first moves 4 + 1 + 4, the second 4 + 1. For n > 4 the projection is a kernel of its own
(n units more): as the mix has n*n coefficients a token and phi n*n + 2n rows, the two have no room for each other.
"""

import triton
import triton.language as tl

from mhc_kernels.fused import pack, sinkhorn, tiles
from mhc_kernels.fused.gates import gate


@triton.jit(do_not_specialize=["T"])
def mix_project_kernel(
    x_ptr, y_ptr, y_bias_ptr, seed_ptr, res_ptr, post_ptr, w_ptr, out_ptr, sums_ptr, T, p_drop,
    N: tl.constexpr, P: tl.constexpr, C: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    MIX: tl.constexpr, PROJECT: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr, BF16: tl.constexpr, DOT32: tl.constexpr,
    SP: tl.constexpr, SQUARES: tl.constexpr,
    SWAP: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, SPLIT: tl.constexpr, V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x [T, N, C], y [T, C], res [T, N*N], post [T, N] -> out [T, N, C]; sums [SPLIT, T, SP]: with PROJECT out @ phi (SP =
    RP), and in column SQUARES (if not 0) sum(out^2).

    Without MIX, out is x and not written. w is `pack_kernel`'s forward array: bf16 hi | lo if BF16, else float32.
    """
    program = tiles.descending(tl.program_id(0), tl.num_programs(0))
    _mix_project(
        x_ptr, y_ptr, y_bias_ptr, seed_ptr, res_ptr, post_ptr, w_ptr, out_ptr, sums_ptr, T, p_drop, program,
        N, P, C, R, RP, MIX, PROJECT, BIAS, DROPOUT, BF16, DOT32, SP, SQUARES, SWAP, BM, BC, SPLIT, V, STAGES,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "ROWS", "PACKS"])
def mix_pack_kernel(
    phi_ptr, w_ptr, w_back_ptr, x_ptr, y_ptr, y_bias_ptr, seed_ptr, res_ptr, post_ptr, no_w_ptr, out_ptr, sums_ptr,
    ROWS, PACKS, T, p_drop,
    PC: tl.constexpr, PN: tl.constexpr, PP: tl.constexpr, PRP: tl.constexpr, NW: tl.constexpr, LOW: tl.constexpr,
    PBC: tl.constexpr, PBF16: tl.constexpr,
    N: tl.constexpr, P: tl.constexpr, C: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    MIX: tl.constexpr, PROJECT: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr, BF16: tl.constexpr, DOT32: tl.constexpr,
    SP: tl.constexpr, SQUARES: tl.constexpr,
    SWAP: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, SPLIT: tl.constexpr, V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`pack_kernel` in PACKS programs and `mix_project_kernel`, which does not project, in the others: what is packed is for
    the kernel after this one."""
    program, packs = tiles.take_turns(PACKS)
    if packs:
        pack.pack(phi_ptr, w_ptr, w_back_ptr, ROWS, program, PC, PN, PP, PRP, NW, LOW, PBC, PBF16)
    else:
        program = tiles.descending(program, tl.num_programs(0) - PACKS)
        _mix_project(
            x_ptr, y_ptr, y_bias_ptr, seed_ptr, res_ptr, post_ptr, no_w_ptr, out_ptr, sums_ptr, T, p_drop, program,
            N, P, C, R, RP, MIX, PROJECT, BIAS, DROPOUT, BF16, DOT32, SP, SQUARES, SWAP, BM, BC, SPLIT, V, STAGES,
        )  # fmt: skip


@triton.jit
def _mix_project(
    x_ptr, y_ptr, y_bias_ptr, seed_ptr, res_ptr, post_ptr, w_ptr, out_ptr, sums_ptr, T, p_drop, program,
    N: tl.constexpr, P: tl.constexpr, C: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    MIX: tl.constexpr, PROJECT: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr, BF16: tl.constexpr, DOT32: tl.constexpr,
    SP: tl.constexpr, SQUARES: tl.constexpr,
    SWAP: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, SPLIT: tl.constexpr, V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    part = program % SPLIT  # neighbours share the rows: they read adjacent pieces at the same time
    rows = (program // SPLIT) * BM + tl.arange(0, BM)
    exists = rows < T
    at = tl.minimum(rows, T - 1).to(tl.int64)  # loads need no row mask
    EVEN: tl.constexpr = C % (BC * SPLIT) == 0
    if MIX:
        res = tiles.load_columns(res_ptr + at * (N * N), N * N)
        post = tiles.load_columns(post_ptr + at * N, N)
    NW: tl.constexpr = 2 * RP if BF16 else RP
    if SWAP:
        acc = tl.zeros((NW, BM), tl.float32)
    else:
        acc = tl.zeros((BM, NW), tl.float32)
    squares = tl.zeros((BM, BC // V), tl.float32)
    rk = tl.arange(0, P * BC)
    rw = tl.arange(0, NW)
    for c0 in tl.range(0, C, BC * SPLIT, num_stages=STAGES):
        c = c0 + part * BC
        columns = c + tl.arange(0, BC)
        mask = (columns < C)[None, :]
        at_x = at[:, None] * (N * C) + columns[None, :]
        x = tiles.load_streams(x_ptr + at_x, mask, N, C, EVEN)
        if MIX:
            at_y = at[:, None] * C + columns[None, :]
            y, _ = tiles.load_output(
                y_ptr, y_bias_ptr, seed_ptr, rows, columns, at_y, mask, p_drop, C, BIAS, DROPOUT, EVEN
            )
            mixed = tiles.mix_streams(res, post, x, y, N)
            x = ()
            for i in tl.static_range(N):
                o = mixed[i].to(out_ptr.dtype.element_ty)
                tiles.store(out_ptr + at_x + i * C, o, exists, mask, EVEN)
                x = x + (o.to(tl.float32),)
        if SQUARES > 0:
            squares += tiles.partial(_sum_of_squares(x, N), BM, BC, V)
        if PROJECT:
            w = tiles.load_rows(w_ptr, c * P + rk, NW, rw, (c * P + rk < C * P)[:, None], EVEN)
            a = tiles.interleave(x, N, BM, BC)
            if DOT32:
                acc = tl.dot(a, w.to(tl.float32), acc, input_precision="tf32x3")
            elif SWAP:
                acc = tl.dot(tl.trans(w), tl.trans(a.to(tl.bfloat16)), acc)
            else:
                acc = tl.dot(a.to(tl.bfloat16), w, acc)
    if PROJECT:
        if SWAP:
            acc = tl.trans(acc)
        if BF16:
            acc = tl.sum(tl.reshape(acc, (BM, 2, RP)), axis=1)
        r = tl.arange(0, RP)
        acc = tl.where(r[None, :] == SQUARES, tl.sum(squares, 1)[:, None], acc)
        tl.store(sums_ptr + (part * T + at)[:, None] * SP + r[None, :], acc, mask=exists[:, None])
    elif SQUARES > 0:
        tl.store(sums_ptr + (part * T + at) * SP + SQUARES, tl.sum(squares, 1), mask=exists)


@triton.jit(do_not_specialize=["T"])
def project_kernel(
    x_ptr, w_ptr, sums_ptr, T,
    K: tl.constexpr, USED: tl.constexpr, NW1: tl.constexpr, NW2: tl.constexpr, SP: tl.constexpr,
    DOT32: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The projection alone, for many streams: x [T, K], w [K, NW1 + NW2], USED columns of it -> sums [SPLIT, T, SP]: x @ w.

    hi and lo are not added up here. Two products, as the number of columns is not near a power of two (n = 8: 160).
    Nothing but these may read x: Triton 3.6 gives a tile that registers read as well one slot of shared memory less, and copies
    the tile after next into the slot that the products still read.
    """
    part = tl.program_id(0) % SPLIT
    rows = (tl.program_id(0) // SPLIT) * BM + tl.arange(0, BM)
    exists = rows < T
    at = tl.minimum(rows, T - 1).to(tl.int64)
    NW: tl.constexpr = NW1 + NW2
    EVEN: tl.constexpr = K % (BK * SPLIT) == 0
    r1 = tl.arange(0, NW1)
    acc1 = tl.zeros((BM, NW1), tl.float32)
    if NW2 > 0:
        r2 = NW1 + tl.arange(0, NW2)
        acc2 = tl.zeros((BM, NW2), tl.float32)
    for k0 in tl.range(0, K, BK * SPLIT, num_stages=STAGES):
        k = k0 + part * BK + tl.arange(0, BK)
        inside = (k < K)[:, None]
        x = tiles.load_rows(x_ptr, at, K, k, (k < K)[None, :], EVEN)
        w = tiles.load_rows(w_ptr, k, NW, r1, inside & (r1 < USED)[None, :], EVEN and NW1 <= USED)
        if DOT32:
            acc1 = tl.dot(x.to(tl.float32), w.to(tl.float32), acc1, input_precision="tf32x3")
        else:
            acc1 = tl.dot(x, w, acc1)
        if NW2 > 0:
            w = tiles.load_rows(w_ptr, k, NW, r2, inside & (r2 < USED)[None, :], EVEN and NW <= USED)
            if DOT32:
                acc2 = tl.dot(x.to(tl.float32), w.to(tl.float32), acc2, input_precision="tf32x3")
            else:
                acc2 = tl.dot(x, w, acc2)
    sums = sums_ptr + (part * T + at)[:, None] * SP
    tl.store(sums + r1[None, :], acc1, mask=exists[:, None] & (r1 < USED)[None, :])
    if NW2 > 0:
        tl.store(sums + r2[None, :], acc2, mask=exists[:, None] & (r2 < USED)[None, :])


@triton.jit
def _sum_of_squares(x, N: tl.constexpr):
    total = x[0] * x[0]
    for i in tl.static_range(1, N):
        total += x[i] * x[i]
    return total


@triton.jit
def _projected(pointers, step, LOW: tl.constexpr, SPLIT: tl.constexpr):
    """Projected values: the partial sums of all splits, in order; with those of phi's low terms, if they are LOW further."""
    total = tl.load(pointers)
    for s in tl.static_range(1, SPLIT):
        total += tl.load(pointers + s * step)
    if LOW > 0:
        for s in tl.static_range(SPLIT):
            total += tl.load(pointers + s * step + LOW)
    return total


@triton.jit
def _projected_where(pointers, step, mask, LOW: tl.constexpr, SPLIT: tl.constexpr):
    total = tl.load(pointers, mask=mask, other=0.0)
    for s in tl.static_range(1, SPLIT):
        total += tl.load(pointers + s * step, mask=mask, other=0.0)
    if LOW > 0:
        for s in tl.static_range(SPLIT):
            total += tl.load(pointers + s * step + LOW, mask=mask, other=0.0)
    return total


@triton.jit
def _rms_factor(pointers, step, eps, N: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr):
    return tl.rsqrt(_projected(pointers, step, 0, PARTS) / (N * C) + eps)


@triton.jit(do_not_specialize=["T", "PROGRAMS"])
def map_aggregate_kernel(
    sums_ptr, x_ptr, alpha_ptr, bias_ptr, u_ptr, pre_ptr, post_ptr, res_ptr, saved_ptr, gamma_ptr, rho_ptr,
    T, PROGRAMS, eps, norm_eps,
    N: tl.constexpr, P: tl.constexpr, C: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, SP: tl.constexpr, LOW: tl.constexpr,
    SPLIT: tl.constexpr, PARTS: tl.constexpr, ITERATIONS: tl.constexpr, HC: tl.constexpr, EPS: tl.constexpr,
    NORM: tl.constexpr, CENTERED: tl.constexpr,
    BS: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Mappings of the streams x [T, N, C] from their projection sums [SPLIT, T, SP], and u [T, C].

    Programs [0, PROGRAMS) compute pre [T, N], post [T, N], res [T, N*N] and saved [T, RP] (projected values, and r in
    column R) for BS tokens each; the programs after them u for BM tokens each. EPS > 0: profile deepseek-v4. PARTS: of the
    sum of squares. NORM: u is normalised, gamma [C] the norm's weight, and rho [T] is 1 / rms(u).
    """
    program = tl.program_id(0)
    if program < PROGRAMS:
        _map(
            sums_ptr, alpha_ptr, bias_ptr, pre_ptr, post_ptr, res_ptr, saved_ptr, T, program, eps,
            N, P, C, R, RP, SP, LOW, SPLIT, PARTS, ITERATIONS, HC, EPS, BS,
        )  # fmt: skip
    else:
        program -= PROGRAMS
        if N > 4:  # `project_kernel` was here before, upwards
            program = tiles.descending(program, tl.num_programs(0) - PROGRAMS)
        _project_aggregate(
            sums_ptr, x_ptr, alpha_ptr, bias_ptr, u_ptr, gamma_ptr, rho_ptr, T, program * BM, eps, norm_eps,
            N, C, R, SP, LOW, SPLIT, PARTS, HC, EPS, NORM, CENTERED, BM, BC, STAGES,
        )  # fmt: skip


@triton.jit
def _map(
    sums_ptr, alpha_ptr, bias_ptr, pre_ptr, post_ptr, res_ptr, saved_ptr, T, program, eps,
    N: tl.constexpr, P: tl.constexpr, C: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, SP: tl.constexpr, LOW: tl.constexpr,
    SPLIT: tl.constexpr, PARTS: tl.constexpr, ITERATIONS: tl.constexpr, HC: tl.constexpr, EPS: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    rows = program * BS + tl.arange(0, BS)
    exists = rows < T
    at = tl.minimum(rows, T - 1).to(tl.int64)
    step = T.to(tl.int64) * SP
    r = _rms_factor(sums_ptr + at * SP + R + LOW, step, eps, N, C, PARTS)

    k = tl.arange(0, RP)[None, :]
    projected = _projected_where(sums_ptr + at[:, None] * SP + k, step, k < R, LOW, SPLIT)
    tl.store(saved_ptr + at[:, None] * RP + k, tl.where(k == R, r[:, None], projected), mask=exists[:, None])

    k = tl.arange(0, P)[None, :]
    inside = exists[:, None] & (k < N)
    a = _projected(sums_ptr + at[:, None] * SP + k, step, LOW, SPLIT)
    h = gate(a, tl.load(alpha_ptr), tl.load(bias_ptr + k, mask=k < N, other=0.0), r[:, None], 1.0, EPS, HC)
    tl.store(pre_ptr + at[:, None] * N + k, h, mask=inside)
    a = _projected(sums_ptr + at[:, None] * SP + N + k, step, LOW, SPLIT)
    h = gate(a, tl.load(alpha_ptr + 1), tl.load(bias_ptr + N + k, mask=k < N, other=0.0), r[:, None], 2.0, 0.0, HC)
    tl.store(post_ptr + at[:, None] * N + k, h, mask=inside)

    i = sinkhorn.row_index(P)
    j = sinkhorn.column_index(P)
    known = (i < N) & (j < N)
    k = i * N + j
    a = _projected_where(sums_ptr + at[:, None, None] * SP + 2 * N + k, step, known, LOW, SPLIT)
    b = tl.load(bias_ptr + 2 * N + k, mask=known, other=0.0)
    alpha = tl.load(alpha_ptr + 2)
    if HC:
        m = gate(a, alpha, b, r[:, None, None], 1.0, 0.0, HC)
    else:
        m = sinkhorn.forward(alpha * (r[:, None, None] * a) + b, ITERATIONS, EPS, N, P)
    tl.store(res_ptr + at[:, None, None] * (N * N) + k, m, mask=exists[:, None, None] & known)


@triton.jit
def _project_aggregate(
    sums_ptr, x_ptr, alpha_ptr, bias_ptr, u_ptr, gamma_ptr, rho_ptr, T, first, eps, norm_eps,
    N: tl.constexpr, C: tl.constexpr, R: tl.constexpr, SP: tl.constexpr, LOW: tl.constexpr,
    SPLIT: tl.constexpr, PARTS: tl.constexpr, HC: tl.constexpr, EPS: tl.constexpr,
    NORM: tl.constexpr, CENTERED: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    step = T.to(tl.int64) * SP
    rows = first + tl.arange(0, BM)
    exists = rows < T
    at = tl.minimum(rows, T - 1).to(tl.int64)
    sums = sums_ptr + at * SP
    r = _rms_factor(sums + R + LOW, step, eps, N, C, PARTS)
    pre = ()
    for k in tl.static_range(N):
        a = _projected(sums + k, step, LOW, SPLIT)
        pre = pre + (gate(a, tl.load(alpha_ptr), tl.load(bias_ptr + k), r, 1.0, EPS, HC)[:, None],)
    squares = _aggregate(x_ptr, u_ptr, at, exists, pre, N, C, BM, BC, STAGES)
    if NORM:
        _normalise(u_ptr, gamma_ptr, rho_ptr, at, exists, squares, norm_eps, C, CENTERED, BC)


@triton.jit
def _aggregate(
    x_ptr, u_ptr, at, exists, pre,
    N: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Stores u; returns ``sum(u^2)``, ``[BM]``, which costs nothing if nobody takes it."""
    EVEN: tl.constexpr = C % BC == 0
    squares = tl.zeros((BM, BC), tl.float32)
    for c in tl.range(0, C, BC, num_stages=STAGES):
        columns = c + tl.arange(0, BC)
        mask = (columns < C)[None, :]
        x = tiles.load_streams(x_ptr + at[:, None] * (N * C) + columns[None, :], mask, N, C, EVEN)
        u = tiles.weighted_sum(pre, x, N)
        tiles.store(u_ptr + at[:, None] * C + columns[None, :], u, exists, mask, EVEN)
        squares += u * u
    return tl.sum(squares, 1)


@triton.jit
def _normalise(
    u_ptr, gamma_ptr, rho_ptr, at, exists, squares, norm_eps, C: tl.constexpr, CENTERED: tl.constexpr, BC: tl.constexpr
):
    """RMSNorm of the rows of u that this program has stored, which are in the cache."""
    EVEN: tl.constexpr = C % BC == 0
    rho = tl.rsqrt(squares / C + norm_eps)
    tl.store(rho_ptr + at, rho, mask=exists)
    tl.debug_barrier()
    for c in tl.range(0, C, BC):
        columns = c + tl.arange(0, BC)
        mask = (columns < C)[None, :]
        pointers = u_ptr + at[:, None] * C + columns[None, :]
        gamma = tiles.load_gamma(gamma_ptr, columns, C, CENTERED, EVEN)
        tiles.store(pointers, tiles.load(pointers, mask, EVEN) * rho[:, None] * gamma, exists, mask, EVEN)


@triton.jit(do_not_specialize=["T"])
def aggregate_kernel(
    x_ptr, pre_ptr, u_ptr, T, N: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, STAGES: tl.constexpr
):
    """x [T, N, C], pre [T, N] -> u [T, C], for given weights (`mhc_kernels.aggregate`)."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    at = tl.minimum(rows, T - 1).to(tl.int64)
    pre = tiles.load_columns(pre_ptr + at * N, N)
    _aggregate(x_ptr, u_ptr, at, rows < T, pre, N, C, BM, BC, STAGES)


@triton.jit(do_not_specialize=["T"])
def aggregate_again_kernel(
    x_ptr, pre_ptr, gamma_ptr, rho_ptr, u_ptr, T,
    N: tl.constexpr, C: tl.constexpr, NORM: tl.constexpr, CENTERED: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """u [T, C] as `map_aggregate_kernel` has written it, bit for bit, from what it has kept: pre [T, N], and rho [T] if NORM.

    Upwards, as `stream_backward_kernel`, which reads x before, goes down. rho is known: one pass over the row does for the norm.
    """
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    exists = rows < T
    at = tl.minimum(rows, T - 1).to(tl.int64)
    pre = tiles.load_columns(pre_ptr + at * N, N)
    EVEN: tl.constexpr = C % BC == 0
    rho = tl.load(rho_ptr + at)[:, None] if NORM else 1.0
    for c in tl.range(0, C, BC, num_stages=STAGES):
        columns = c + tl.arange(0, BC)
        mask = (columns < C)[None, :]
        x = tiles.load_streams(x_ptr + at[:, None] * (N * C) + columns[None, :], mask, N, C, EVEN)
        u = tiles.read_again(pre, x, rho, gamma_ptr, columns, u_ptr.dtype.element_ty, N, C, NORM, CENTERED, EVEN)
        tiles.store(u_ptr + at[:, None] * C + columns[None, :], u, exists, mask, EVEN)


@triton.jit(do_not_specialize=["T"])
def sinkhorn_kernel(
    logits_ptr, res_ptr, T,
    N: tl.constexpr, P: tl.constexpr, ITERATIONS: tl.constexpr, EPS: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """logits [T, N*N] -> res [T, N*N]."""
    at, inside = sinkhorn.places(T, N, P, BS)
    logits = tl.load(logits_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(res_ptr + at, sinkhorn.forward(logits, ITERATIONS, EPS, N, P), mask=inside)
