"""Backward of the operations that run alone: Sinkhorn and the aggregation."""

import triton
import triton.language as tl

from mhc_kernels.fused import sinkhorn, tiles


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
    SUM: tl.constexpr,
):  # fmt: skip
    """du [T, C], x [T, N, C], pre [T, N] -> dx [T, N, C], dpre [T, N] (`mhc_kernels.aggregate`).

    SUM: into dx [T, C] the sum of pre_i x_i: with y, the streams' gradient and H_post, the gradients of `add_output_kernel`.
    """
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    exists = rows < T
    at = tl.minimum(rows, T - 1).to(tl.int64)
    EVEN: tl.constexpr = C % BC == 0
    pre = tiles.load_columns(pre_ptr + at * N, N)
    dots = tiles.zeros(N, BM, BC // V)
    for c in tl.range(0, C, BC, num_stages=STAGES):
        columns = c + tl.arange(0, BC)
        mask = (columns < C)[None, :]
        at_u = at[:, None] * C + columns[None, :]
        at_x = at[:, None] * (N * C) + columns[None, :]
        du = tiles.load(du_ptr + at_u, mask, EVEN)
        x = tiles.load_streams(x_ptr + at_x, mask, N, C, EVEN)
        if SUM:
            tiles.store(dx_ptr + at_u, tiles.weighted_sum(pre, x, N), exists, mask, EVEN)
        new = ()
        for i in tl.static_range(N):
            if not SUM:
                tiles.store(dx_ptr + at_x + i * C, pre[i] * du, exists, mask, EVEN)
            new = new + (dots[i] + tiles.partial(du * x[i], BM, BC, V),)
        dots = new
    for i in tl.static_range(N):
        tl.store(dpre_ptr + at * N + i, tl.sum(dots[i], 1), mask=exists)
