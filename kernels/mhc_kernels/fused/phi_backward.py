"""Step 2 of a boundary's backward (`backward.py`): the gradient of phi; for many streams that of the projection's input, too."""

import triton
import triton.language as tl

from mhc_kernels.fused import tiles


@triton.jit
def times_phi(da, w, acc, DOT32: tl.constexpr):
    """``acc + da w``; acc may be None."""
    if DOT32:
        back = tl.dot(da.to(tl.float32), w.to(tl.float32), acc, input_precision="tf32x3")
    else:
        back = tl.dot(da, w, acc)
    return back


@triton.jit
def factor_of(pointers):
    return tl.load(pointers) + tl.load(pointers + 4) + tl.load(pointers + 8)


@triton.jit(do_not_specialize=["T"])
def phi_backward_kernel(
    da_ptr, x_ptr, partials_ptr, T,
    K: tl.constexpr, RP: tl.constexpr, NW: tl.constexpr, DOT32: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """partials [parts, RP, K]: ``da^T x``, every parts-th block of BM tokens each; x [T, K], da [T, NW]."""
    columns = tl.program_id(0) * BK + tl.arange(0, BK)
    inside = (columns < K)[None, :]
    rn = tl.arange(0, NW)
    acc = tl.zeros((NW, BK), tl.float32)
    for t in tl.range(tl.program_id(1) * BM, T, tl.num_programs(1) * BM, num_stages=STAGES):
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


@triton.jit
def _split(w):
    """float32 as two bf16 terms: hi, lo."""
    hi = w.to(tl.bfloat16)
    return hi, (w - hi.to(tl.float32)).to(tl.bfloat16)


@triton.jit(do_not_specialize=["T"])
def phi_streams_backward_kernel(
    da_ptr, x_ptr, partials_ptr, factor_ptr, w_ptr, g_ptr, back_ptr, T,
    K: tl.constexpr, N: tl.constexpr, P: tl.constexpr, NW: tl.constexpr, DOT32: tl.constexpr,
    G: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """As `phi_backward_kernel`, for many streams: also back [T, K], ``g + da phi + factor x``, while x is here.

    g [T, K] (0 unless G), factor [T, 3, 4] as in `stream_backward_kernel`; w [rows, K] is phi; partials [parts, N*N + 2N, K].
    da [T, NW] in two pieces: H_res (P*P columns), H_pre and H_post (2P; bf16: hi | lo). H_res has no lo, which every program
    would have to read: its rows' rounding is small beside x's. phi has one (bf16): where x is 0, back is almost only its
    product, and is rounded again twice on its way to dx.
    """
    columns = tl.program_id(0) * BK + tl.arange(0, BK)
    inside = (columns < K)[None, :]
    EVEN: tl.constexpr = K % BK == 0
    RES: tl.constexpr = P * P
    TERMS: tl.constexpr = (NW - RES) // (2 * P)
    r1 = tl.arange(0, RES)
    k2 = tl.arange(0, 2 * P * TERMS)  # the small piece's two terms in one product
    r2 = k2 % (2 * P)
    ALL: tl.constexpr = N == P
    w1 = tiles.load_rows(w_ptr + 2 * N * K, r1, K, columns, inside & (r1 < N * N)[:, None], EVEN and ALL)
    w2 = tiles.load_rows(w_ptr, r2, K, columns, inside & (r2 < 2 * N)[:, None], EVEN and ALL)
    if TERMS > 1:
        w1, low1 = _split(w1)
        w2, low2 = _split(w2)
    acc1 = tl.zeros((RES, BK), tl.float32)
    acc2 = tl.zeros((2 * P * TERMS, BK), tl.float32)
    for t in tl.range(tl.program_id(1) * BM, T, tl.num_programs(1) * BM, num_stages=STAGES):
        rows = t + tl.arange(0, BM)
        at = rows.to(tl.int64)[:, None]
        exists = (rows < T)[:, None]
        x = tl.load(x_ptr + at * K + columns[None, :], mask=exists & inside, other=0.0)
        da1 = _load_piece(da_ptr + at * NW + r1[None, :], exists, r1 < N * N, ALL)
        da2 = _load_piece(da_ptr + at * NW + (RES + k2)[None, :], exists, r2 < 2 * N, ALL)
        acc1 = _outer(da1, x, acc1, DOT32)
        acc2 = _outer(da2, x, acc2, DOT32)
        back = times_phi(da2, w2, times_phi(da1, w1, None, DOT32), DOT32)
        if TERMS > 1:
            back = times_phi(da2, low2, times_phi(da1, low1, back, DOT32), DOT32)
        back += factor_of(factor_ptr + tl.minimum(at, T - 1) * 12) * x.to(tl.float32)
        if G:
            back += tl.load(g_ptr + at * K + columns[None, :], mask=exists & inside, other=0.0).to(tl.float32)
        tiles.store(back_ptr + at * K + columns[None, :], back, rows < T, inside, EVEN)
    out = partials_ptr + tl.program_id(1).to(tl.int64) * (N * N + 2 * N) * K + columns[None, :]
    tl.store(out + (2 * N + r1[:, None]) * K, acc1, mask=inside & (r1 < N * N)[:, None])
    r2 = tl.arange(0, 2 * P)[:, None]
    acc2 = tl.sum(tl.reshape(acc2, (TERMS, 2 * P, BK)), axis=0)
    tl.store(out + r2 * K, acc2, mask=inside & (r2 < 2 * N))
