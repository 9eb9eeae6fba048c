"""A sublayer's output added to streams that H_res has mixed already, in place: for split pipeline transfers, where the two come
apart. 2n + 1 units of C elements a token; the gradients (`single_backward.aggregate_backward_kernel`) are n + 2.
"""

import triton
import triton.language as tl

from mhc_kernels.fused import tiles


@triton.jit(do_not_specialize=["T"])
def add_output_kernel(
    x_ptr,
    post_ptr,
    y_ptr,
    T,
    N: tl.constexpr,
    C: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    STAGES: tl.constexpr,
):
    """x [T, N, C] += post [T, N] y [T, C]."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    exists = rows < T
    at = tl.minimum(rows, T - 1).to(tl.int64)
    EVEN: tl.constexpr = C % BC == 0
    post = tiles.load_columns(post_ptr + at * N, N)
    for c in tl.range(0, C, BC, num_stages=STAGES):
        columns = c + tl.arange(0, BC)
        mask = (columns < C)[None, :]
        at_x = at[:, None] * (N * C) + columns[None, :]
        y = tiles.load(y_ptr + at[:, None] * C + columns[None, :], mask, EVEN)
        x = tiles.load_streams(x_ptr + at_x, mask, N, C, EVEN)
        for i in tl.static_range(N):
            tiles.store(x_ptr + at_x + i * C, tl.fma(post[i], y, x[i]), exists, mask, EVEN)
