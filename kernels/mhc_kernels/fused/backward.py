"""The backward of a boundary, in two passes over the row, and the gradients of the parameters.

With g the gradient of x' that comes from downstream, and da that of the projected values a = phi x':

1. `mapping_backward_kernel`: ``dH_pre_j = du . x'_j`` (units: 1 + 4), the backward of gates and Sinkhorn: da, and the
   factor of x' that the RMS contributes.
2. `phi_backward_kernel`: ``dphi = da^T x'`` (4), partial sums over blocks of tokens.
3. `stream_backward_kernel`: ``g += H_pre du + phi^T da + factor x'``, with x' recomputed from x and y (it is not read), then
   ``dx = H_res^T g``, ``dy = H_post . g``, ``dH_res_ij = g_i . x_j``, ``dH_post_i = g_i . y`` (units: 4 + 1 + 4 + 1 + 5).
   Its first programs add up the partial sums of the parameters' gradients, in order: no atomics, the same bits every time.

For n > 4 the second kernel also writes ``g + phi^T da + factor x'``, and the third one reads that instead of g (16 units more
for n = 8): with 64 coefficients a token it has no registers left for the product.
"""

import triton
import triton.language as tl

from mhc_kernels.fused import tiles
from mhc_kernels.fused.phi_backward import factor_of, times_phi


@triton.jit(
    do_not_specialize=["T", "TOTALS", "PRE_TOTALS", "PARTS"],
    do_not_specialize_on_alignment=["dalpha_ptr", "dbias_ptr", "dphi_ptr"],
)
def stream_backward_kernel(
    g_ptr, du_ptr, x_ptr, y_ptr, y_bias_ptr, seed_ptr, res_ptr, post_ptr, pre_ptr, da_ptr, factor_ptr, w_ptr,
    gamma_ptr, rho_ptr, kappa_ptr, dx_ptr, dy_ptr, dres_ptr, dpost_ptr,
    read_pre_ptr, read_rho_ptr, read_gamma_ptr, read_ptr,
    totals_ptr, pre_totals_ptr, partials_ptr, dgammas_ptr, dgamma_ptr, dalpha_ptr, dbias_ptr, dphi_ptr,
    T, TOTALS, PRE_TOTALS, PARTS, p_drop,
    N: tl.constexpr, P: tl.constexpr, C: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, RT: tl.constexpr, NT: tl.constexpr,
    PR: tl.constexpr, MIX: tl.constexpr, AGGREGATE: tl.constexpr, PROJECT: tl.constexpr, G: tl.constexpr,
    BIAS: tl.constexpr, DROPOUT: tl.constexpr, BF16: tl.constexpr, DOT32: tl.constexpr, ACCUMULATE: tl.constexpr,
    NORM: tl.constexpr, CENTERED: tl.constexpr,
    READ: tl.constexpr, READ_NORM: tl.constexpr, READ_CENTERED: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, V: tl.constexpr, STAGES: tl.constexpr, BR: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """Gradients of the streams and of the sublayer's output, BM tokens a program.

    g [T, N, C] from downstream (0 unless G); du [T, C] and pre [T, N] if AGGREGATE; da, factor [T, 3, 4] and w
    (`pack_kernel`'s backward array) if PROJECT; for N > 4, g is back of `phi_streams_backward_kernel`.
    With MIX: dx [T, N, C], dy [T, C], dres [T, N*N], dpost [T, N]; without: dx alone (x is x').

    With READ: also what the sublayer read, u [T, C] from x, as the forward wrote it: from its weights [T, N], and with
    READ_NORM its rho [T] and gamma [C] (`aggregate_again_kernel` without a pass of its own).

    With PROJECT the first programs add up the parameters' partial sums (to what is there, if ACCUMULATE: Megatron's
    main_grad): dalpha [3] and dbias [R]; dphi [R, N*C], BR elements each, from partials [PARTS, PR, N*C].
    """
    if PROJECT:
        PHI: tl.constexpr = 1 + (R * N * C + BR - 1) // BR
        REDUCE: tl.constexpr = PHI + ((C + BG - 1) // BG if NORM else 0)
        if tl.program_id(0) == 0:
            _reduce_gates(
                totals_ptr, pre_totals_ptr, dalpha_ptr, dbias_ptr, TOTALS, PRE_TOTALS, N, R, RT, NT, ACCUMULATE
            )
        elif tl.program_id(0) < PHI:
            _reduce_phi(partials_ptr, dphi_ptr, PARTS, tl.program_id(0) - 1, N * C, R, PR, ACCUMULATE, BR)
        elif tl.program_id(0) < REDUCE:
            _reduce_gamma(dgammas_ptr, dgamma_ptr, PRE_TOTALS, tl.program_id(0) - PHI, C, BG)
        else:
            program = tiles.descending(tl.program_id(0) - REDUCE, tl.num_programs(0) - REDUCE)
            _stream_backward(
                g_ptr, du_ptr, x_ptr, y_ptr, y_bias_ptr, seed_ptr, res_ptr, post_ptr, pre_ptr, da_ptr, factor_ptr, w_ptr,
                gamma_ptr, rho_ptr, kappa_ptr, dx_ptr, dy_ptr, dres_ptr, dpost_ptr,
                read_pre_ptr, read_rho_ptr, read_gamma_ptr, read_ptr, T, p_drop, program,
                N, P, C, R, RP, MIX, AGGREGATE, PROJECT, G, BIAS, DROPOUT, BF16, DOT32, NORM, CENTERED,
                READ, READ_NORM, READ_CENTERED, BM, BC, V, STAGES,
            )  # fmt: skip
    else:
        program = tiles.descending(tl.program_id(0), tl.num_programs(0))
        _stream_backward(
            g_ptr, du_ptr, x_ptr, y_ptr, y_bias_ptr, seed_ptr, res_ptr, post_ptr, pre_ptr, da_ptr, factor_ptr, w_ptr,
            gamma_ptr, rho_ptr, kappa_ptr, dx_ptr, dy_ptr, dres_ptr, dpost_ptr,
            read_pre_ptr, read_rho_ptr, read_gamma_ptr, read_ptr, T, p_drop, program,
            N, P, C, R, RP, MIX, AGGREGATE, PROJECT, G, BIAS, DROPOUT, BF16, DOT32, NORM, CENTERED,
            READ, READ_NORM, READ_CENTERED, BM, BC, V, STAGES,
        )  # fmt: skip


@triton.jit
def _stream_backward(
    g_ptr, du_ptr, x_ptr, y_ptr, y_bias_ptr, seed_ptr, res_ptr, post_ptr, pre_ptr, da_ptr, factor_ptr, w_ptr,
    gamma_ptr, rho_ptr, kappa_ptr, dx_ptr, dy_ptr, dres_ptr, dpost_ptr,
    read_pre_ptr, read_rho_ptr, read_gamma_ptr, read_ptr, T, p_drop, program,
    N: tl.constexpr, P: tl.constexpr, C: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    MIX: tl.constexpr, AGGREGATE: tl.constexpr, PROJECT: tl.constexpr, G: tl.constexpr,
    BIAS: tl.constexpr, DROPOUT: tl.constexpr, BF16: tl.constexpr, DOT32: tl.constexpr,
    NORM: tl.constexpr, CENTERED: tl.constexpr,
    READ: tl.constexpr, READ_NORM: tl.constexpr, READ_CENTERED: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    rows = program * BM + tl.arange(0, BM)
    exists = rows < T
    at = tl.minimum(rows, T - 1).to(tl.int64)
    EVEN: tl.constexpr = C % BC == 0
    if MIX:
        res = tiles.load_columns(res_ptr + at * (N * N), N * N)
        post = tiles.load_columns(post_ptr + at * N, N)
        dots = tiles.zeros(N * (N + 1), BM, BC // V)
    if AGGREGATE:
        pre = tiles.load_columns(pre_ptr + at * N, N)
    if NORM:
        rho = tl.load(rho_ptr + at)[:, None]
        kappa = tl.load(kappa_ptr + at)[:, None]
    if READ:
        read_pre = tiles.load_columns(read_pre_ptr + at * N, N)
        read_rho = tl.load(read_rho_ptr + at)[:, None] if READ_NORM else 1.0
    WIDE: tl.constexpr = N > 4
    if PROJECT and not WIDE:
        rn = tl.arange(0, RP)
        factor = factor_of(factor_ptr + at * 12)[:, None]
        da_step: tl.constexpr = 2 * RP if BF16 else RP
        da = tl.load(da_ptr + at[:, None] * da_step + rn[None, :], mask=rn[None, :] < R, other=0.0)
    rk = tl.arange(0, P * BC)
    for c in tl.range(0, C, BC, num_stages=STAGES):
        columns = c + tl.arange(0, BC)
        mask = (columns < C)[None, :]
        at_y = at[:, None] * C + columns[None, :]
        at_x = at[:, None] * (N * C) + columns[None, :]
        x = tiles.load_streams(x_ptr + at_x, mask, N, C, EVEN)
        if READ:
            u = tiles.read_again(
                read_pre, x, read_rho, read_gamma_ptr, columns, read_ptr.dtype.element_ty, N, C,
                READ_NORM, READ_CENTERED, EVEN,
            )  # fmt: skip
            tiles.store(read_ptr + at_y, u, exists, mask, EVEN)
        if MIX:
            y, keep = tiles.load_output(
                y_ptr, y_bias_ptr, seed_ptr, rows, columns, at_y, mask, p_drop, C, BIAS, DROPOUT, EVEN
            )
        if G:
            g = tiles.load_streams(g_ptr + at_x, mask, N, C, EVEN)
        else:
            g = tiles.zeros(N, BM, BC)
        if PROJECT and not WIDE:
            if MIX:
                out = tiles.mix_streams(res, post, x, y, N)
            else:
                out = x
        if AGGREGATE:
            du = tiles.load(du_ptr + at_y, mask, EVEN)
            if NORM:
                gamma = tiles.load_gamma(gamma_ptr, columns, C, CENTERED, EVEN)
                du = rho * gamma * du - kappa * tiles.weighted_sum(pre, out, N)
            new = ()
            for i in tl.static_range(N):
                new = new + (g[i] + pre[i] * du,)
            g = new
        if PROJECT and not WIDE:
            if N == 2:
                # A dot a stream: the interleaved one has pairs of streams where the tensor core leaves pairs of channels, and
                # the compiler then takes that layout, two bytes at a time, for everything.
                back = ()
                for i in tl.static_range(N):
                    w = tiles.load_rows(w_ptr + i * C, rn, C * P, columns, mask, EVEN)
                    back = back + (times_phi(da, w, None, DOT32),)
            else:
                w = tiles.load_rows(w_ptr, rn, C * P, c * P + rk, (c * P + rk < C * P)[None, :], EVEN)
                back = tiles.separate(times_phi(da, w, None, DOT32), N, BM, BC)
            new = ()
            for i in tl.static_range(N):
                new = new + (g[i] + factor * out[i] + back[i],)
            g = new
        if MIX:
            tiles.store(dy_ptr + at_y, keep * tiles.weighted_sum(post, g, N), exists, mask, EVEN)
            for j in tl.static_range(N):
                total = res[j] * g[0]
                for i in tl.static_range(1, N):
                    total += res[i * N + j] * g[i]
                tiles.store(dx_ptr + at_x + j * C, total, exists, mask, EVEN)
            new = ()
            for i in tl.static_range(N):
                for j in tl.static_range(N):
                    new = new + (dots[i * (N + 1) + j] + tiles.partial(g[i] * x[j], BM, BC, V),)
                new = new + (dots[i * (N + 1) + N] + tiles.partial(g[i] * y, BM, BC, V),)
            dots = new
        else:
            for i in tl.static_range(N):
                tiles.store(dx_ptr + at_x + i * C, g[i], exists, mask, EVEN)
    if MIX:
        for i in tl.static_range(N):
            for j in tl.static_range(N):
                tl.store(dres_ptr + at * (N * N) + (i * N + j), tl.sum(dots[i * (N + 1) + j], 1), mask=exists)
            tl.store(dpost_ptr + at * N + i, tl.sum(dots[i * (N + 1) + N], 1), mask=exists)


@triton.jit
def _reduce_phi(
    partials_ptr, dphi_ptr, PARTS, program,
    K: tl.constexpr, R: tl.constexpr, PR: tl.constexpr, ACCUMULATE: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    k = program * BR + tl.arange(0, BR)
    inside = k < R * K
    total = tl.zeros((BR,), tl.float32)
    at = partials_ptr + k
    for _ in tl.range(0, PARTS):
        total += tl.load(at, mask=inside, other=0.0)
        at += PR * K
    _deliver(total, dphi_ptr + k, inside, ACCUMULATE)


@triton.jit
def _reduce_gamma(dgammas_ptr, dgamma_ptr, PARTS, program, C: tl.constexpr, BG: tl.constexpr):
    """dgamma [C] from dgammas [PARTS, C], BG channels a program."""
    ROWS: tl.constexpr = 4096 // BG
    columns = program * BG + tl.arange(0, BG)
    inside = columns < C
    total = tl.zeros((ROWS, BG), tl.float32)
    for part in tl.range(0, PARTS, ROWS):
        parts = part + tl.arange(0, ROWS)
        pointers = dgammas_ptr + parts[:, None] * C + columns[None, :]
        total += tl.load(pointers, mask=(parts < PARTS)[:, None] & inside[None, :], other=0.0)
    tl.store(dgamma_ptr + columns, tl.sum(total, 0).to(dgamma_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _reduce_gates(
    totals_ptr, pre_totals_ptr, dalpha_ptr, dbias_ptr, TOTALS, PRE_TOTALS,
    N: tl.constexpr, R: tl.constexpr, RT: tl.constexpr, NT: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    ct = tl.arange(0, RT)
    total = _sum_rows(totals_ptr, TOTALS, RT)
    _deliver(total, dbias_ptr + ct, ct < R, ACCUMULATE)
    _deliver(total, dalpha_ptr + ct - R, (ct >= R) & (ct < R + 3), ACCUMULATE)
    tl.debug_barrier()
    # The other programs' share of the same elements.
    cn = tl.arange(0, NT)
    pre_total = _sum_rows(pre_totals_ptr, PRE_TOTALS, NT)
    _deliver(pre_total, dbias_ptr + cn, cn < N, True)
    _deliver(pre_total, dalpha_ptr + cn - N, cn == N, True)


@triton.jit
def _sum_rows(ptr, ROWS, W: tl.constexpr):
    BP: tl.constexpr = 4096 // W
    columns = tl.arange(0, W)
    total = tl.zeros((BP, W), tl.float32)
    for row in tl.range(0, ROWS, BP):
        rows = row + tl.arange(0, BP)
        total += tl.load(ptr + rows[:, None] * W + columns[None, :], mask=(rows < ROWS)[:, None], other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _deliver(total, pointers, mask, ADD: tl.constexpr):
    if ADD:
        total += tl.load(pointers, mask=mask, other=0.0)
    tl.store(pointers, total, mask=mask)
