"""The backward of a boundary, in two passes over the row, and the gradients of the parameters.

With g the gradient of x' that comes from downstream, and da that of the projected values a = phi x':

1. `mapping_backward_kernel`: ``dH_pre_j = du . x'_j`` (units: 1 + 4), the backward of gates and Sinkhorn: da, and the
   factor of x' that the RMS contributes.
2. `phi_backward_kernel`: ``dphi = da^T x'`` (4), partial sums over ranges of tokens.
3. `stream_backward_kernel`: ``g += H_pre du + phi^T da + factor x'``, with x' recomputed from x and y (it is not read), then
   ``dx = H_res^T g``, ``dy = H_post . g``, ``dH_res_ij = g_i . x_j``, ``dH_post_i = g_i . y`` (units: 4 + 1 + 4 + 1 + 5).
   Its first programs add up the partial sums of the parameters' gradients, in order: no atomics, the same bits every time.

For n > 4 the second kernel also writes ``g + phi^T da + factor x'``, and the third one reads that instead of g (16 units more
for n = 8): with 64 coefficients a token it has no registers left for the product.
"""

import triton
import triton.language as tl

from mhc_kernels.fused import sinkhorn, tiles
from mhc_kernels.fused.gates import gate_backward, logit_backward


@triton.jit
def _store_da(da_ptr, at, k, value, exists, NW: tl.constexpr, LOW: tl.constexpr):
    """da [T, NW]: bf16 hi, and lo from column LOW; one float32 term if LOW is 0."""
    hi = value.to(da_ptr.dtype.element_ty)
    tl.store(da_ptr + at * NW + k, hi, mask=exists)
    if LOW > 0:
        tl.store(da_ptr + at * NW + LOW + k, (value - hi.to(tl.float32)).to(tl.bfloat16), mask=exists)


@triton.jit
def _total(value, exists):
    return tl.sum(tl.where(exists, value, 0.0), 0)


@triton.jit(do_not_specialize=["T", "MAPS"])
def mapping_backward_kernel(
    du_ptr, x_ptr, dpre_ptr, dpost_ptr, dres_ptr, saved_ptr, alpha_ptr, bias_ptr, pre_ptr, gamma_ptr, rho_ptr,
    da_ptr, factor_ptr, totals_ptr, pre_totals_ptr, kappa_ptr, dgammas_ptr, T, MAPS,
    N: tl.constexpr, P: tl.constexpr, C: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, RT: tl.constexpr, NT: tl.constexpr,
    ITERATIONS: tl.constexpr, HC: tl.constexpr, EPS: tl.constexpr, AGGREGATE: tl.constexpr, NW: tl.constexpr,
    LOW: tl.constexpr, NORM: tl.constexpr, CENTERED: tl.constexpr,
    BS: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of the projected values (da), and factor [T, 3, 4]: x's factor from the RMS, a term
    each from H_res, H_post and H_pre at [:, :, 0].

    MAPS programs: BS tokens each, H_post and H_res from dpost [T, N] and dres [T, N*N]; H_pre from dpre [T, N] as well,
    unless AGGREGATE: then the other programs take dH_pre of BM tokens each from du [T, C] and x [T, N, C].

    totals [MAPS, RT]: sums over the program's tokens for dbias (R), then dalpha (3); pre_totals [programs, NT]: dbias
    (N), dalpha (1). NORM: du is the gradient of gamma * rho * u, u = H_pre x; then the gradient of u is
    rho * gamma * du - kappa * u, and dgammas [programs, C] are the sums for dgamma.
    """
    if N > 4:
        program, maps = tiles.take_turns(MAPS)
    else:
        maps = tl.program_id(0) < MAPS
        program = tl.where(maps, tl.program_id(0), tl.program_id(0) - MAPS)
    if maps:
        _maps_backward(
            dpre_ptr, dpost_ptr, dres_ptr, saved_ptr, alpha_ptr, bias_ptr, da_ptr, factor_ptr, totals_ptr, T,
            program,
            N, P, C, R, RP, RT, ITERATIONS, HC, EPS, AGGREGATE, NW, LOW, BS,
        )  # fmt: skip
    else:
        _aggregate_backward(
            du_ptr, x_ptr, saved_ptr, alpha_ptr, bias_ptr, pre_ptr, gamma_ptr, rho_ptr,
            da_ptr, factor_ptr, pre_totals_ptr, kappa_ptr, dgammas_ptr, T, program,
            N, C, R, RP, NT, HC, NW, LOW, NORM, CENTERED, BM, BC, V, STAGES,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T", "RANGE"])
def phi_backward_kernel(
    da_ptr, x_ptr, partials_ptr, T, RANGE,
    K: tl.constexpr, RP: tl.constexpr, NW: tl.constexpr, DOT32: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """partials [parts, RP, K]: ``da^T x`` over RANGE tokens (a multiple of BM) each; x [T, K], da [T, NW]."""
    columns = tl.program_id(0) * BK + tl.arange(0, BK)
    inside = (columns < K)[None, :]
    rn = tl.arange(0, NW)
    acc = tl.zeros((NW, BK), tl.float32)
    first = tl.program_id(1) * RANGE
    for t in tl.range(first, tl.minimum(first + RANGE, T), BM, num_stages=STAGES):
        rows = t + tl.arange(0, BM)
        at = rows.to(tl.int64)[:, None]
        exists = (rows < T)[:, None]
        if K % BK == 0:
            x = tl.load(x_ptr + at * K + columns[None, :], mask=exists, other=0.0)
        else:
            x = tl.load(x_ptr + at * K + columns[None, :], mask=exists & inside, other=0.0)
        da = tl.load(da_ptr + at * NW + rn[None, :], mask=exists, other=0.0)
        acc = _outer(da, x, acc, DOT32)
    if NW > RP:
        acc = tl.sum(tl.reshape(acc, (2, RP, BK)), axis=0)
    r = tl.arange(0, RP)
    out = partials_ptr + (tl.program_id(1).to(tl.int64) * RP + r[:, None]) * K + columns[None, :]
    tl.store(out, acc, mask=inside)


@triton.jit
def _load_piece(pointers, exists, used, ALL: tl.constexpr):
    if ALL:
        da = tl.load(pointers, mask=exists, other=0.0)
    else:
        da = tl.load(pointers, mask=exists & used[None, :], other=0.0)
    return da


@triton.jit
def _outer(da, x, acc, DOT32: tl.constexpr):
    """``acc + da^T x``."""
    if DOT32:
        acc = tl.dot(tl.trans(da.to(tl.float32)), x.to(tl.float32), acc, input_precision="tf32x3")
    else:
        acc = tl.dot(tl.trans(da), x, acc)
    return acc


@triton.jit(do_not_specialize=["T", "RANGE"])
def phi_streams_backward_kernel(
    da_ptr, x_ptr, partials_ptr, factor_ptr, w_ptr, g_ptr, back_ptr, T, RANGE,
    K: tl.constexpr, R: tl.constexpr, NW1: tl.constexpr, NW2: tl.constexpr, NW: tl.constexpr, DOT32: tl.constexpr,
    G: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """As `phi_backward_kernel`, for many streams: also back [T, K], ``g + da phi + factor x``, while x is here.

    g [T, K] (0 unless G), factor [T, 3, 4] and w [rows, K] as in `stream_backward_kernel`; da [T, NW] (NW1 + NW2, or
    twice that for hi | lo) and partials [parts, NW1 + NW2, K] in two pieces, as R is not near a power of two (n = 8: 64 + 16).
    """
    columns = tl.program_id(0) * BK + tl.arange(0, BK)
    inside = (columns < K)[None, :]
    EVEN: tl.constexpr = K % BK == 0
    PR: tl.constexpr = NW1 + NW2
    TERMS: tl.constexpr = NW // PR
    r1 = tl.arange(0, NW1)
    k2 = tl.arange(0, NW2 * TERMS)  # the small piece's two terms in one product
    r2 = NW1 + k2 % NW2
    at2 = r2 + k2 // NW2 * PR
    w1 = tiles.load_rows(w_ptr, r1, K, columns, inside & (r1 < R)[:, None], EVEN and NW1 <= R)
    w2 = tiles.load_rows(w_ptr, r2, K, columns, inside & (r2 < R)[:, None], EVEN and PR <= R)
    acc1 = tl.zeros((NW1, BK), tl.float32)
    acc2 = tl.zeros((NW2 * TERMS, BK), tl.float32)
    first = tl.program_id(1) * RANGE
    for t in tl.range(first, tl.minimum(first + RANGE, T), BM, num_stages=STAGES):
        rows = t + tl.arange(0, BM)
        at = rows.to(tl.int64)[:, None]
        exists = (rows < T)[:, None]
        x = tl.load(x_ptr + at * K + columns[None, :], mask=exists & inside, other=0.0)
        da1 = _load_piece(da_ptr + at * NW + r1[None, :], exists, r1 < R, NW1 <= R)
        da2 = _load_piece(da_ptr + at * NW + at2[None, :], exists, r2 < R, PR <= R)
        acc1 = _outer(da1, x, acc1, DOT32)
        acc2 = _outer(da2, x, acc2, DOT32)
        if TERMS == 2:
            low = _load_piece(da_ptr + at * NW + PR + r1[None, :], exists, r1 < R, NW1 <= R)
            acc1 = _outer(low, x, acc1, DOT32)
        back = _times_phi(da2, w2, _times_phi(da1, w1, None, DOT32), DOT32)
        back += _factor(factor_ptr + tl.minimum(at, T - 1) * 12) * x.to(tl.float32)
        if G:
            back += tl.load(g_ptr + at * K + columns[None, :], mask=exists & inside, other=0.0).to(tl.float32)
        tiles.store(back_ptr + at * K + columns[None, :], back, rows < T, inside, EVEN)
    out = partials_ptr + tl.program_id(1).to(tl.int64) * PR * K + columns[None, :]
    tl.store(out + r1[:, None] * K, acc1, mask=inside)
    r2 = NW1 + tl.arange(0, NW2)
    acc2 = tl.sum(tl.reshape(acc2, (TERMS, NW2, BK)), axis=0)
    tl.store(out + r2[:, None] * K, acc2, mask=inside)


@triton.jit
def _maps_backward(
    dpre_ptr, dpost_ptr, dres_ptr, saved_ptr, alpha_ptr, bias_ptr, da_ptr, factor_ptr, totals_ptr, T, program,
    N: tl.constexpr, P: tl.constexpr, C: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, RT: tl.constexpr,
    ITERATIONS: tl.constexpr, HC: tl.constexpr, EPS: tl.constexpr, AGGREGATE: tl.constexpr, NW: tl.constexpr,
    LOW: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    # Sums are stored from the whole tile, by one of the elements that hold them: a tensor of the sums alone would change
    # layout through shared memory, several threads writing the same value to one place (a race, if a harmless one).
    totals = totals_ptr + program * RT
    rows = program * BS + tl.arange(0, BS)[:, None]
    exists = rows < T
    at = tl.minimum(rows, T - 1).to(tl.int64)
    r = tl.load(saved_ptr + at * RP + R)
    k = tl.arange(0, P)[None, :]
    inside = exists & (k < N)
    first = tl.arange(0, BS)[:, None] == 0
    if AGGREGATE:  # the other programs' part
        tl.store(totals + k + 0 * rows, tl.zeros((BS, P), tl.float32), mask=first & (k < N))
        tl.store(totals + R, 0.0)
    else:
        dh = tl.load(dpre_ptr + at * N + k, mask=inside, other=0.0)
        a = tl.load(saved_ptr + at * RP + k)
        b = tl.load(bias_ptr + k, mask=k < N, other=0.0)
        da, dr, dalpha, dbias = gate_backward(dh, a, tl.load(alpha_ptr), b, r, 1.0, HC)
        _store_da(da_ptr, at, k, da, inside, NW, LOW)
        tl.store(totals + k + 0 * rows, tl.sum(dbias, 0, keep_dims=True), mask=first & (k < N))
        tl.store(totals + R, tl.sum(tl.sum(dalpha, 1), 0))
        tl.store(
            factor_ptr + at * 12 + 8 + k, _rms_backward(tl.sum(dr, 1, keep_dims=True), r, N, C), mask=exists & (k == 0)
        )

    dh = tl.load(dpost_ptr + at * N + k, mask=inside, other=0.0)
    a = tl.load(saved_ptr + at * RP + N + k)
    b = tl.load(bias_ptr + N + k, mask=k < N, other=0.0)
    da, dr, dalpha, dbias = gate_backward(dh, a, tl.load(alpha_ptr + 1), b, r, 2.0, HC)
    _store_da(da_ptr, at, N + k, da, inside, NW, LOW)
    tl.store(totals + N + k + 0 * rows, tl.sum(dbias, 0, keep_dims=True), mask=first & (k < N))
    tl.store(totals + R + 1, tl.sum(tl.sum(dalpha, 1), 0))
    tl.store(
        factor_ptr + at * 12 + 4 + k, _rms_backward(tl.sum(dr, 1, keep_dims=True), r, N, C), mask=exists & (k == 0)
    )

    rows = program * BS + tl.arange(0, BS)[:, None, None]
    exists = rows < T
    at = tl.minimum(rows, T - 1).to(tl.int64)
    r = tl.load(saved_ptr + at * RP + R)
    i = sinkhorn.row_index(P)
    j = sinkhorn.column_index(P)
    known = (i < N) & (j < N)
    k = i * N + j
    inside = exists & known
    dm = tl.load(dres_ptr + at * (N * N) + k, mask=inside, other=0.0)
    a = tl.load(saved_ptr + at * RP + 2 * N + k, mask=known, other=0.0)
    b = tl.load(bias_ptr + 2 * N + k, mask=known, other=0.0)
    alpha = tl.load(alpha_ptr + 2)
    if HC:
        da, dr, dalpha, dbias = gate_backward(dm, a, alpha, b, r, 1.0, HC)
    else:
        dl = sinkhorn.backward(alpha * (r * a) + b, dm, ITERATIONS, EPS, N, P)
        da, dr, dalpha, dbias = logit_backward(dl, a, alpha, r)
    _store_da(da_ptr, at, 2 * N + k, da, inside, NW, LOW)
    first = tl.arange(0, BS)[:, None, None] == 0
    tl.store(totals + 2 * N + k + 0 * rows, tl.sum(dbias, 0, keep_dims=True), mask=first & known)
    tl.store(totals + R + 2, tl.sum(tl.sum(tl.sum(dalpha, 2), 1), 0))
    dr = tl.sum(tl.sum(dr, 2, keep_dims=True), 1, keep_dims=True)
    tl.store(factor_ptr + at * 12 + k, _rms_backward(dr, r, N, C), mask=exists & (k == 0))


@triton.jit
def _rms_backward(dr, r, N: tl.constexpr, C: tl.constexpr):
    """The factor of x in its gradient, given that of ``r = 1 / rms(x)``."""
    return -dr * r * r * r / (N * C)


@triton.jit
def _aggregate_backward(
    du_ptr, x_ptr, saved_ptr, alpha_ptr, bias_ptr, pre_ptr, gamma_ptr, rho_ptr,
    da_ptr, factor_ptr, pre_totals_ptr, kappa_ptr, dgammas_ptr, T, program,
    N: tl.constexpr, C: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, NT: tl.constexpr, HC: tl.constexpr, NW: tl.constexpr,
    LOW: tl.constexpr, NORM: tl.constexpr, CENTERED: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    rows = program * BM + tl.arange(0, BM)
    exists = rows < T
    at = tl.minimum(rows, T - 1).to(tl.int64)
    totals = pre_totals_ptr + program * NT
    EVEN: tl.constexpr = C % BC == 0
    dots = tiles.zeros(N, BM, BC // V)
    if NORM:
        u_dots = tiles.zeros(N, BM, BC // V)
        pre = tiles.load_columns(pre_ptr + at * N, N)
        rho = tl.load(rho_ptr + at)
    for c in tl.range(0, C, BC, num_stages=STAGES):
        columns = c + tl.arange(0, BC)
        mask = (columns < C)[None, :]
        du = tiles.load(du_ptr + at[:, None] * C + columns[None, :], mask, EVEN)
        x = tiles.load_streams(x_ptr + at[:, None] * (N * C) + columns[None, :], mask, N, C, EVEN)
        if NORM:  # du is that of the norm's output
            u = tiles.weighted_sum(pre, x, N)
            dgamma = tl.where(exists[:, None], du * u * rho[:, None], 0.0)
            tl.store(dgammas_ptr + program * C + columns, tl.sum(dgamma, 0), mask=columns < C)
            du *= tiles.load_gamma(gamma_ptr, columns, C, CENTERED, EVEN)
            new = ()
            for i in tl.static_range(N):
                new = new + (u_dots[i] + tiles.partial(u * x[i], BM, BC, V),)
            u_dots = new
        new = ()
        for i in tl.static_range(N):
            new = new + (dots[i] + tiles.partial(du * x[i], BM, BC, V),)
        dots = new
    if NORM:
        # dv = gamma times the gradient of the norm's output; sum(dv u) = sum_i pre_i sum(dv x_i)
        kappa = tl.sum(tiles.weighted_sum(pre, dots, N), 1) * rho * rho * rho / C
        tl.store(kappa_ptr + at, kappa, mask=exists)
    r = tl.load(saved_ptr + at * RP + R)
    alpha = tl.load(alpha_ptr)
    dr = tl.zeros((BM,), tl.float32)
    dalpha_sum = 0.0
    for k in tl.static_range(N):
        a = tl.load(saved_ptr + at * RP + k)
        dh = tl.sum(dots[k], 1)
        if NORM:
            dh = rho * dh - kappa * tl.sum(u_dots[k], 1)
        da, dr_k, dalpha, dbias = gate_backward(dh, a, alpha, tl.load(bias_ptr + k), r, 1.0, HC)
        dr += dr_k
        _store_da(da_ptr, at, k, da, exists, NW, LOW)
        tl.store(totals + k, _total(dbias, exists))
        dalpha_sum += _total(dalpha, exists)
    tl.store(totals + N, dalpha_sum)
    tl.store(factor_ptr + at * 12 + 8, _rms_backward(dr, r, N, C), mask=exists)


@triton.jit(
    do_not_specialize=["T", "TOTALS", "PRE_TOTALS", "PARTS"],
    do_not_specialize_on_alignment=["dalpha_ptr", "dbias_ptr", "dphi_ptr"],
)
def stream_backward_kernel(
    g_ptr, du_ptr, x_ptr, y_ptr, y_bias_ptr, seed_ptr, res_ptr, post_ptr, pre_ptr, da_ptr, factor_ptr, w_ptr,
    gamma_ptr, rho_ptr, kappa_ptr, dx_ptr, dy_ptr, dres_ptr, dpost_ptr,
    totals_ptr, pre_totals_ptr, partials_ptr, dgammas_ptr, dgamma_ptr, dalpha_ptr, dbias_ptr, dphi_ptr,
    T, TOTALS, PRE_TOTALS, PARTS, p_drop,
    N: tl.constexpr, P: tl.constexpr, C: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, RT: tl.constexpr, NT: tl.constexpr,
    PR: tl.constexpr, MIX: tl.constexpr, AGGREGATE: tl.constexpr, PROJECT: tl.constexpr, G: tl.constexpr,
    BIAS: tl.constexpr, DROPOUT: tl.constexpr, BF16: tl.constexpr, DOT32: tl.constexpr, ACCUMULATE: tl.constexpr,
    NORM: tl.constexpr, CENTERED: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, V: tl.constexpr, STAGES: tl.constexpr, BR: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """Gradients of the streams and of the sublayer's output, BM tokens a program.

    g [T, N, C] from downstream (0 unless G); du [T, C] and pre [T, N] if AGGREGATE; da, factor [T, 3, 4] and w
    (`pack_kernel`'s backward array) if PROJECT; for N > 4, g is back of `phi_streams_backward_kernel`.
    With MIX: dx [T, N, C], dy [T, C], dres [T, N*N], dpost [T, N]; without: dx alone (x is x').

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
            _stream_backward(
                g_ptr, du_ptr, x_ptr, y_ptr, y_bias_ptr, seed_ptr, res_ptr, post_ptr, pre_ptr, da_ptr, factor_ptr, w_ptr,
                gamma_ptr, rho_ptr, kappa_ptr, dx_ptr, dy_ptr, dres_ptr, dpost_ptr, T, p_drop, tl.program_id(0) - REDUCE,
                N, P, C, R, RP, MIX, AGGREGATE, PROJECT, G, BIAS, DROPOUT, BF16, DOT32, NORM, CENTERED, BM, BC, V, STAGES,
            )  # fmt: skip
    else:
        _stream_backward(
            g_ptr, du_ptr, x_ptr, y_ptr, y_bias_ptr, seed_ptr, res_ptr, post_ptr, pre_ptr, da_ptr, factor_ptr, w_ptr,
            gamma_ptr, rho_ptr, kappa_ptr, dx_ptr, dy_ptr, dres_ptr, dpost_ptr, T, p_drop, tl.program_id(0),
            N, P, C, R, RP, MIX, AGGREGATE, PROJECT, G, BIAS, DROPOUT, BF16, DOT32, NORM, CENTERED, BM, BC, V, STAGES,
        )  # fmt: skip


@triton.jit
def _factor(pointers):
    return tl.load(pointers) + tl.load(pointers + 4) + tl.load(pointers + 8)


@triton.jit
def _times_phi(da, w, acc, DOT32: tl.constexpr):
    """``acc + da w``; acc may be None."""
    if DOT32:
        back = tl.dot(da.to(tl.float32), w.to(tl.float32), acc, input_precision="tf32x3")
    else:
        back = tl.dot(da, w, acc)
    return back


@triton.jit
def _stream_backward(
    g_ptr, du_ptr, x_ptr, y_ptr, y_bias_ptr, seed_ptr, res_ptr, post_ptr, pre_ptr, da_ptr, factor_ptr, w_ptr,
    gamma_ptr, rho_ptr, kappa_ptr, dx_ptr, dy_ptr, dres_ptr, dpost_ptr, T, p_drop, program,
    N: tl.constexpr, P: tl.constexpr, C: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    MIX: tl.constexpr, AGGREGATE: tl.constexpr, PROJECT: tl.constexpr, G: tl.constexpr,
    BIAS: tl.constexpr, DROPOUT: tl.constexpr, BF16: tl.constexpr, DOT32: tl.constexpr,
    NORM: tl.constexpr, CENTERED: tl.constexpr,
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
    WIDE: tl.constexpr = N > 4
    if PROJECT and not WIDE:
        rn = tl.arange(0, RP)
        factor = _factor(factor_ptr + at * 12)[:, None]
        da_step: tl.constexpr = 2 * RP if BF16 else RP
        da = tl.load(da_ptr + at[:, None] * da_step + rn[None, :], mask=rn[None, :] < R, other=0.0)
    rk = tl.arange(0, P * BC)
    for c in tl.range(0, C, BC, num_stages=STAGES):
        columns = c + tl.arange(0, BC)
        mask = (columns < C)[None, :]
        at_y = at[:, None] * C + columns[None, :]
        at_x = at[:, None] * (N * C) + columns[None, :]
        x = tiles.load_streams(x_ptr + at_x, mask, N, C, EVEN)
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
                    back = back + (_times_phi(da, w, None, DOT32),)
            else:
                w = tiles.load_rows(w_ptr, rn, C * P, c * P + rk, (c * P + rk < C * P)[None, :], EVEN)
                back = tiles.separate(_times_phi(da, w, None, DOT32), N, BM, BC)
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


@triton.jit(do_not_specialize=["T"])
def sinkhorn_backward_kernel(
    logits_ptr, dres_ptr, dlogits_ptr, T,
    N: tl.constexpr, P: tl.constexpr, ITERATIONS: tl.constexpr, EPS: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """logits, dres [T, N*N] -> dlogits [T, N*N]."""
    at, inside = sinkhorn.places(T, N, P, BS)
    logits = tl.load(logits_ptr + at, mask=inside, other=0.0).to(tl.float32)
    dm = tl.load(dres_ptr + at, mask=inside, other=0.0)
    g = sinkhorn.backward(logits, dm, ITERATIONS, EPS, N, P)
    tl.store(dlogits_ptr + at, g.to(dlogits_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T"])
def aggregate_backward_kernel(
    du_ptr, x_ptr, pre_ptr, dx_ptr, dpre_ptr, T,
    N: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """du [T, C], x [T, N, C], pre [T, N] -> dx [T, N, C], dpre [T, N] (`mhc_kernels.aggregate`)."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    exists = rows < T
    at = tl.minimum(rows, T - 1).to(tl.int64)
    EVEN: tl.constexpr = C % BC == 0
    pre = tiles.load_columns(pre_ptr + at * N, N)
    dots = tiles.zeros(N, BM, BC // V)
    for c in tl.range(0, C, BC, num_stages=STAGES):
        columns = c + tl.arange(0, BC)
        mask = (columns < C)[None, :]
        at_x = at[:, None] * (N * C) + columns[None, :]
        du = tiles.load(du_ptr + at[:, None] * C + columns[None, :], mask, EVEN)
        x = tiles.load_streams(x_ptr + at_x, mask, N, C, EVEN)
        new = ()
        for i in tl.static_range(N):
            tiles.store(dx_ptr + at_x + i * C, pre[i] * du, exists, mask, EVEN)
            new = new + (dots[i] + tiles.partial(du * x[i], BM, BC, V),)
        dots = new
    for i in tl.static_range(N):
        tl.store(dpre_ptr + at * N + i, tl.sum(dots[i], 1), mask=exists)
