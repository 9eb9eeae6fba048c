"""Tuples of tiles: the n streams of a block of tokens, unrolled at compile time for any n.

A "tile" is ``[BM, BC]``: BM tokens, BC channels. Coefficients of a token are ``[BM, 1]``. Matrices are row-major tuples of
n*n coefficients, ``m[i * n + j]``: stream j into stream i.

Every load is followed by ``.to(float32)``: bf16 arithmetic is what Triton's interpreter can't do, and not what we want anyway.

Sums of products begin with an explicit fused multiply-add: of ``a * b + c * d`` a compiler may fuse either product, and takes one
here and another one there. Of a later term it fuses the only product (tests/unit/kernels/test_compiled.py looks). Streams and
sublayer inputs that the backward computes again have the bits of the forward.
"""

import triton
import triton.language as tl


@triton.jit
def load(pointers, mask, EVEN: tl.constexpr):
    """One tile as float32; columns outside the mask are 0 (no mask at all if EVEN)."""
    if EVEN:
        tile = tl.load(pointers).to(tl.float32)
    else:
        tile = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    return tile


@triton.jit
def store(pointers, tile, exists, mask, EVEN: tl.constexpr):
    """One tile in the array's dtype; ``exists``: ``[BM]``, which rows are tokens."""
    tile = tile.to(pointers.dtype.element_ty)
    if EVEN:
        tl.store(pointers, tile, mask=exists[:, None])
    else:
        tl.store(pointers, tile, mask=exists[:, None] & mask)


@triton.jit
def load_streams(pointers, mask, N: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr):
    """The N streams; ``pointers`` is stream 0's tile."""
    tiles = ()
    for i in tl.static_range(N):
        tiles = tiles + (load(pointers + i * C, mask, EVEN),)
    return tiles


@triton.jit
def load_rows(pointer, rows, step, columns, mask, EVEN: tl.constexpr):
    """Rows of a matrix with ``step`` elements a row, in its own dtype."""
    pointers = pointer + rows[:, None] * step + columns[None, :]
    if EVEN:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=mask, other=0.0)
    return tile


@triton.jit
def descending(program, count):
    """The other way round: the last of ``count`` programs starts first.

    Kernels that read the streams one after the other take turns in their direction, so that each finds in the L2 cache what the
    one before touched last (and the sublayer around them, too, which goes upwards).
    """
    return count - 1 - program


@triton.jit
def take_turns(FIRST):
    """This program's number among the FIRST programs of one kind or among the others, and whether it is of the one kind.

    The two kinds are spread evenly over the grid: the one computes while the other waits for the memory. That pays where
    there are many of both; where there are few of the first kind, they had better start first.
    """
    program = tl.program_id(0).to(tl.int64)
    count = tl.num_programs(0)
    before = program * FIRST // count
    is_first = (program + 1) * FIRST // count > before
    return tl.where(is_first, before, program - before).to(tl.int32), is_first


@triton.jit
def load_gamma(gamma_ptr, columns, C: tl.constexpr, CENTERED: tl.constexpr, EVEN: tl.constexpr):
    """A norm's weight ``[1, BC]``; 1 + it if CENTERED."""
    gamma = load(gamma_ptr + columns, columns < C, EVEN)[None, :]
    if CENTERED:
        gamma += 1.0
    return gamma


@triton.jit
def load_columns(pointers, COUNT: tl.constexpr):
    """COUNT neighbouring float32 values of each token, as ``[BM, 1]`` each."""
    values = ()
    for k in tl.static_range(COUNT):
        values = values + (tl.load(pointers + k)[:, None],)
    return values


@triton.jit
def mix_streams(m, p, x, y, N: tl.constexpr):
    """``x'_i = p_i y + sum_j m_ij x_j``."""
    out = ()
    for i in tl.static_range(N):
        total = tl.fma(m[i * N], x[0], p[i] * y)
        for j in tl.static_range(1, N):
            total += m[i * N + j] * x[j]
        out = out + (total,)
    return out


@triton.jit
def weighted_sum(w, x, N: tl.constexpr):
    """``sum_i w_i x_i``."""
    total = w[0] * x[0]
    if N > 1:
        total = tl.fma(w[1], x[1], total)
    for i in tl.static_range(2, N):
        total += w[i] * x[i]
    return total


@triton.jit
def read_again(pre, x, rho, gamma_ptr, columns, dtype: tl.constexpr, N: tl.constexpr, C: tl.constexpr,
    NORM: tl.constexpr, CENTERED: tl.constexpr, EVEN: tl.constexpr):  # fmt: skip
    """u of streams x with the bits that the forward stored, from the weights pre; NORM: rho, 1 / rms(u), is known."""
    u = weighted_sum(pre, x, N)
    if NORM:
        gamma = load_gamma(gamma_ptr, columns, C, CENTERED, EVEN)
        u = u.to(dtype).to(tl.float32) * rho * gamma  # it was stored before it was normalised
    return u


@triton.jit
def zeros(COUNT: tl.constexpr, BM: tl.constexpr, W: tl.constexpr):
    """COUNT accumulators ``[BM, W]``."""
    z = tl.zeros((BM, W), tl.float32)
    out = ()
    for _ in tl.static_range(COUNT):
        out = out + (z,)
    return out


@triton.jit
def partial(tile, BM: tl.constexpr, BC: tl.constexpr, V: tl.constexpr):
    """``[BM, BC] -> [BM, BC // V]``: sums of V neighbours, which one thread holds: no shuffles inside the loop.

    The one cross-lane sum comes after the loop (a ``tl.sum`` per tile made the backward 6 times slower).
    """
    return tl.sum(tl.reshape(tile, (BM, BC // V, V)), axis=2)


@triton.jit
def interleave(x, N: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr):
    """N tiles ``[BM, BC] -> [BM, BC * P]``, P the power of two >= N; stream order within a channel is bit-reversed.

    One dot per tile then has all streams in its K axis. `pack.py` lays phi out to match. Missing streams are zeros.
    """
    if N == 1:
        out = x[0]
    elif N == 2:
        out = tl.reshape(tl.join(x[0], x[1]), (BM, 2 * BC))
    else:
        tl.static_assert(N <= 4)
        y = x + (tl.zeros_like(x[0]),)
        out = tl.reshape(tl.join(tl.join(y[0], y[1]), tl.join(y[2], y[3])), (BM, 4 * BC))
    return out


@triton.jit
def separate(t, N: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr):
    """The inverse of `interleave`: a tuple of P tiles, the last P - N of them without meaning."""
    if N == 1:
        out = (t,)
    elif N == 2:
        a, b = tl.split(tl.reshape(t, (BM, BC, 2)))
        out = (a, b)
    else:
        tl.static_assert(N <= 4)
        a, b = tl.split(tl.reshape(t, (BM, BC, 2, 2)))
        a0, a1 = tl.split(a)
        b0, b1 = tl.split(b)
        out = (a0, a1, b0, b1)
    return out


@triton.jit
def keep_scale(seed_ptr, rows, columns, C: tl.constexpr, p, DROPOUT: tl.constexpr):
    """Dropout's factor for y: 0 or 1 / (1 - p), a function of (seed, token, channel), so that the backward finds it again."""
    if DROPOUT:
        offset = rows[:, None].to(tl.int32) * C + columns[None, :]
        scale = tl.where(tl.rand(tl.load(seed_ptr), offset) >= p, 1.0 / (1.0 - p), 0.0)
    else:
        scale = 1.0
    return scale


@triton.jit
def load_output(
    y_ptr,
    bias_ptr,
    seed_ptr,
    rows,
    columns,
    at,
    mask,
    p,
    C: tl.constexpr,
    BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    EVEN: tl.constexpr,
):
    """The sublayer's output as the mix takes it: ``dropout(y + bias)``; and dropout's factor."""
    y = load(y_ptr + at, mask, EVEN)
    if BIAS:
        b = load(bias_ptr + columns, columns < C, EVEN)
        y += b[None, :]
    scale = keep_scale(seed_ptr, rows, columns, C, p, DROPOUT)
    if DROPOUT:
        y *= scale
    return y, scale
