"""From a projected value to a mapping's entry, and back: sigmoids (mode mhc) or tanh (mode hc), with alpha and bias."""

import triton
import triton.language as tl


@triton.jit
def tanh(v):
    return 2.0 * tl.sigmoid(2.0 * v) - 1.0


@triton.jit
def gate(a, alpha, bias, r, scale, offset, HC: tl.constexpr):
    """``scale * sigmoid(alpha * r * a + bias) + offset``; mode hc: ``alpha * tanh(r * a) + bias``."""
    if HC:
        h = alpha * tanh(r * a) + bias
    else:
        h = scale * tl.sigmoid(alpha * (r * a) + bias) + offset
    return h


@triton.jit
def gate_backward(dh, a, alpha, bias, r, scale, HC: tl.constexpr):
    """Given dh: the gradients of a, of r, and this token's terms of those of alpha and bias."""
    if HC:
        t = tanh(r * a)
        dz = dh * alpha * (1.0 - t * t)
        dalpha = dh * t
        dbias = dh
    else:
        s = tl.sigmoid(alpha * (r * a) + bias)
        dbias = dh * scale * s * (1.0 - s)
        dalpha = dbias * (r * a)
        dz = dbias * alpha
    return dz * r, dz * a, dalpha, dbias


@triton.jit
def logit_backward(dl, a, alpha, r):
    """As `gate_backward`, for the logit ``alpha * r * a + bias`` that Sinkhorn takes."""
    dz = dl * alpha
    return dz * r, dz * a, dl * (r * a), dl
