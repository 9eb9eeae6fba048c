"""A sublayer's output added to streams that H_res has mixed already, in place; and the gradients by output and weights.

For split pipeline transfers, where the two come apart. Units of C elements a token: n + 1 + n forward, n + 1 + 1 backward.
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


@triton.jit(do_not_specialize=["T"])
def add_output_backward_kernel(
    g_ptr, post_ptr, y_ptr, dy_ptr, dpost_ptr, T,
    N: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """g [T, N, C], post [T, N], y [T, C] -> dy [T, C] = sum_i post_i g_i, dpost [T, N] = g_i . y."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    exists = rows < T
    at = tl.minimum(rows, T - 1).to(tl.int64)
    EVEN: tl.constexpr = C % BC == 0
    post = tiles.load_columns(post_ptr + at * N, N)
    dots = tiles.zeros(N, BM, BC // V)
    for c in tl.range(0, C, BC, num_stages=STAGES):
        columns = c + tl.arange(0, BC)
        mask = (columns < C)[None, :]
        at_y = at[:, None] * C + columns[None, :]
        y = tiles.load(y_ptr + at_y, mask, EVEN)
        g = tiles.load_streams(g_ptr + at[:, None] * (N * C) + columns[None, :], mask, N, C, EVEN)
        tiles.store(dy_ptr + at_y, tiles.weighted_sum(post, g, N), exists, mask, EVEN)
        new = ()
        for i in tl.static_range(N):
            new = new + (dots[i] + tiles.partial(g[i] * y, BM, BC, V),)
        dots = new
    for i in tl.static_range(N):
        tl.store(dpost_ptr + at * N + i, tl.sum(dots[i], 1), mask=exists)
