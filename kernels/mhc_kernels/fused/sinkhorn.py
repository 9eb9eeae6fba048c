"""Sinkhorn in registers (section 4.2, Eq. 9): ``[BS, P, P]`` tiles of BS tokens' matrices, forward and exact backward.

P is the power of two >= N; the entries beyond N are kept at 0, and the sums of such rows and columns at 1.

The first column + row normalisation is done on logits, in float64 differences: there a row may be e^-100 of its
neighbours. After it every row sum and column sum lies in [1 / n^2, n^2], so the other iterations are plain float32
products; nothing can overflow or lose a row.

The backward follows the same steps in reverse. For a normalisation ``m' = m / sum(m)`` and G the gradient with respect to
``log m'``, the gradient with respect to ``log m`` is ``G - m' * sum(G)``: only m' is needed, and going back
``m = m' * sum`` gives it from the sums alone, which the unrolled forward leaves in registers.
"""

import triton
import triton.language as tl


@triton.jit
def row_index(P: tl.constexpr):
    """i of ``m[:, i, j]``, the stream that receives."""
    return tl.arange(0, P)[None, :, None]


@triton.jit
def column_index(P: tl.constexpr):
    """j of ``m[:, i, j]``, the stream that sends."""
    return tl.arange(0, P)[None, None, :]


@triton.jit
def places(T, N: tl.constexpr, P: tl.constexpr, BS: tl.constexpr):
    """Where this program's matrices are in an array ``[T, N*N]``, ``[BS, P, P]``; and which of them exist."""
    rows = (tl.program_id(0) * BS + tl.arange(0, BS))[:, None, None]
    i = row_index(P)
    j = column_index(P)
    return rows.to(tl.int64) * (N * N) + i * N + j, (rows < T) & (i < N) & (j < N)


@triton.jit
def _exists(N: tl.constexpr, P: tl.constexpr):
    return (row_index(P) < N) & (column_index(P) < N)


@triton.jit
def _sums(m, axis: tl.constexpr, eps, N: tl.constexpr, P: tl.constexpr):
    """Sums over rows (axis 1) or columns (axis 2) + eps, ``[BS, P]``; 1 for those beyond N."""
    s = tl.sum(m, axis) + eps
    if N < P:
        s = tl.where(tl.arange(0, P)[None, :] < N, s, 1.0)
    return s


@triton.jit
def softmax_columns(logits, N: tl.constexpr, P: tl.constexpr):
    """The first column normalisation: ``exp(l_ij) / sum_i exp(l_ij)``; entries may underflow to 0."""
    e = tl.exp(logits - tl.max(logits, 1)[:, None, :])
    if N < P:
        e = tl.where(_exists(N, P), e, 0.0)
    return e / _sums(e, 1, 0.0, N, P)[:, None, :]


@triton.jit
def _first_iteration(logits, N: tl.constexpr, P: tl.constexpr):
    """Columns, then rows, of exp(logits)."""
    top = tl.max(logits, 1)
    e = tl.exp(logits - top[:, None, :])
    if N < P:
        e = tl.where(_exists(N, P), e, 0.0)
    # In this order: beside a large maximum the logarithm would be lost.
    d = logits.to(tl.float64) - top.to(tl.float64)[:, None, :]
    d -= tl.log(_sums(e, 1, 0.0, N, P)).to(tl.float64)[:, None, :]
    if N < P:
        d = tl.where(_exists(N, P), d, -1e300)
    m = tl.exp((d - tl.max(d, 2)[:, :, None]).to(tl.float32))
    if N < P:
        m = tl.where(_exists(N, P), m, 0.0)
    return m / _sums(m, 2, 0.0, N, P)[:, :, None]


@triton.jit
def _first_iteration_eps(logits, eps, N: tl.constexpr, P: tl.constexpr):
    """Profile deepseek-v4: softmax over columns + eps, then rows over (sum + eps)."""
    q = softmax_columns(logits, N, P) + eps
    if N < P:
        q = tl.where(_exists(N, P), q, 0.0)
    return q / _sums(q, 2, eps, N, P)[:, :, None]


@triton.jit
def _start(logits, EPS: tl.constexpr, N: tl.constexpr, P: tl.constexpr):
    """The logits, with what lies beyond N out of the way, and the matrix after the first iteration."""
    if N < P:  # float32's lowest: the maximum is one of the logits, however low they are
        logits = tl.where(_exists(N, P), logits, -3.4028234663852886e38)
    if EPS > 0:
        m = _first_iteration_eps(logits, EPS, N, P)
    else:
        m = _first_iteration(logits, N, P)
    return logits, m


@triton.jit
def forward(logits, ITERATIONS: tl.constexpr, EPS: tl.constexpr, N: tl.constexpr, P: tl.constexpr):
    """H_res ``[BS, P, P]`` from logits (anything finite beyond N). EPS > 0: profile deepseek-v4."""
    logits, m = _start(logits, EPS, N, P)
    for _ in tl.range(1, ITERATIONS):
        m = m * (1.0 / _sums(m, 1, EPS, N, P))[:, None, :]
        m = m * (1.0 / _sums(m, 2, EPS, N, P))[:, :, None]
    return m


@triton.jit
def backward(logits, dm, ITERATIONS: tl.constexpr, EPS: tl.constexpr, N: tl.constexpr, P: tl.constexpr):
    """The gradient with respect to the logits, given that of the result (both 0 beyond N)."""
    logits, m = _start(logits, EPS, N, P)
    columns = ()
    rows = ()
    for _ in tl.static_range(1, ITERATIONS):
        s = _sums(m, 1, EPS, N, P)
        m = m * (1.0 / s)[:, None, :]
        columns = columns + (s,)
        s = _sums(m, 2, EPS, N, P)
        m = m * (1.0 / s)[:, :, None]
        rows = rows + (s,)
    g = dm * m
    for k in tl.static_range(1, ITERATIONS):
        g -= m * tl.sum(g, 2)[:, :, None]
        m = m * rows[ITERATIONS - 1 - k][:, :, None]
        g -= m * tl.sum(g, 1)[:, None, :]
        m = m * columns[ITERATIONS - 1 - k][:, None, :]
    g -= m * tl.sum(g, 2)[:, :, None]
    p = softmax_columns(logits, N, P)
    if EPS > 0:
        g = g * p / (p + EPS)
    return g - p * tl.sum(g, 1)[:, None, :]
