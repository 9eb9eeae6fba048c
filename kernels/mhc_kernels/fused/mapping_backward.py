"""Step 1 of a boundary's backward (`backward.py`): from the gradients of mappings and u to those of the projected values."""

import triton
import triton.language as tl

from mhc_kernels.fused import sinkhorn, tiles
from mhc_kernels.fused.gates import gate_backward, logit_backward


@triton.jit
def _store_da(da_ptr, at, k, value, exists, NW: tl.constexpr, LOW: tl.constexpr):
    """da [T, NW] in column k: bf16 hi, and lo LOW columns further; one term if LOW is 0."""
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
        program = tiles.descending(program, tl.num_programs(0) - MAPS)
        _aggregate_backward(
            du_ptr, x_ptr, saved_ptr, alpha_ptr, bias_ptr, pre_ptr, gamma_ptr, rho_ptr,
            da_ptr, factor_ptr, pre_totals_ptr, kappa_ptr, dgammas_ptr, T, program,
            N, P, C, R, RP, NT, HC, NW, LOW, NORM, CENTERED, BM, BC, V, STAGES,
        )  # fmt: skip


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
    GATES: tl.constexpr = P * P if N > 4 else 0
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
        _store_da(da_ptr, at, GATES + k, da, inside, NW, LOW)
        tl.store(totals + k + 0 * rows, tl.sum(dbias, 0, keep_dims=True), mask=first & (k < N))
        tl.store(totals + R, tl.sum(tl.sum(dalpha, 1), 0))
        tl.store(
            factor_ptr + at * 12 + 8 + k, _rms_backward(tl.sum(dr, 1, keep_dims=True), r, N, C), mask=exists & (k == 0)
        )

    dh = tl.load(dpost_ptr + at * N + k, mask=inside, other=0.0)
    a = tl.load(saved_ptr + at * RP + N + k)
    b = tl.load(bias_ptr + N + k, mask=k < N, other=0.0)
    da, dr, dalpha, dbias = gate_backward(dh, a, tl.load(alpha_ptr + 1), b, r, 2.0, HC)
    _store_da(da_ptr, at, GATES + N + k, da, inside, NW, LOW)
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
    if N > 4:
        _store_da(da_ptr, at, k, da, inside, NW, 0)
    else:
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
    N: tl.constexpr, P: tl.constexpr, C: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, NT: tl.constexpr, HC: tl.constexpr,
    NW: tl.constexpr, LOW: tl.constexpr, NORM: tl.constexpr, CENTERED: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    rows = program * BM + tl.arange(0, BM)
    exists = rows < T
    at = tl.minimum(rows, T - 1).to(tl.int64)
    totals = pre_totals_ptr + program * NT
    EVEN: tl.constexpr = C % BC == 0
    GATES: tl.constexpr = P * P if N > 4 else 0
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
        _store_da(da_ptr, at, GATES + k, da, exists, NW, LOW)
        tl.store(totals + k, _total(dbias, exists))
        dalpha_sum += _total(dalpha, exists)
    tl.store(totals + N, dalpha_sum)
    tl.store(factor_ptr + at * 12 + 8, _rms_backward(dr, r, N, C), mask=exists)
