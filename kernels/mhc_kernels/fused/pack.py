"""phi as the kernels want it: float32 split into two bf16 terms, rows permuted to match `tiles.interleave` (n <= 4).

hi + lo keeps 16 bits of phi in bf16 tensor-core products: relative error 4e-6 of the projection, where TF32 has 2e-4, at TF32's
time. Streams that are not bf16 are multiplied in float32 (three TF32 products), from a float32 copy.
"""

import triton
import triton.language as tl


@triton.jit
def stream_of(q, N: tl.constexpr):
    """Which stream `tiles.interleave` puts at position q of a channel (bit reversal)."""
    if N <= 2:
        s = q
    else:
        s = (q & 1) * 2 + (q >> 1)
    return s


@triton.jit(do_not_specialize=["R"])
def pack_kernel(
    phi_ptr, forward_ptr, backward_ptr, R,
    C: tl.constexpr, N: tl.constexpr, P: tl.constexpr, RP: tl.constexpr, NW: tl.constexpr, LOW: tl.constexpr,
    BC: tl.constexpr, BF16: tl.constexpr,
):  # fmt: skip
    """`pack`, BC channels a program."""
    pack(phi_ptr, forward_ptr, backward_ptr, R, tl.program_id(0), C, N, P, RP, NW, LOW, BC, BF16)


@triton.jit
def pack(
    phi_ptr, forward_ptr, backward_ptr, R, program,
    C: tl.constexpr, N: tl.constexpr, P: tl.constexpr, RP: tl.constexpr, NW: tl.constexpr, LOW: tl.constexpr,
    BC: tl.constexpr, BF16: tl.constexpr,
):  # fmt: skip
    """phi [R, N*C] -> forward [C*P, NW], backward [RP, C*P].

    If BF16: forward is hi, and lo from column LOW; backward hi, or whole if it is float32. Else both are float32 (NW = RP).
    """
    k = program * (BC * P) + tl.arange(0, BC * P)
    c = k // P
    s = stream_of(k % P, N)
    r = tl.arange(0, RP)
    phi = tl.load(
        phi_ptr + r[:, None] * (N * C) + (s * C + c)[None, :],
        mask=(r[:, None] < R) & (s[None, :] < N) & (c[None, :] < C),
        other=0.0,
    )
    inside = (c < C)[None, :]
    if N == 2:  # the backward takes the streams one by one
        b = s * C + c
    else:
        b = k
    if BF16:
        hi = phi.to(tl.bfloat16)
        lo = (phi - hi.to(tl.float32)).to(tl.bfloat16)
        w = forward_ptr + k[None, :] * NW + r[:, None]
        if LOW < RP:  # then hi's padding would be lo's place; lo's is never read
            inside_low = inside & (r[:, None] < R)
        else:
            inside_low = inside
        tl.store(w, hi, mask=inside_low)
        tl.store(w + LOW, lo, mask=inside_low)
        if backward_ptr.dtype.element_ty == tl.float32:
            back = phi
        else:
            back = hi
        tl.store(backward_ptr + r[:, None] * (C * P) + b[None, :], back, mask=inside)
    else:
        tl.store(forward_ptr + k[None, :] * NW + r[:, None], phi, mask=inside)
        tl.store(backward_ptr + r[:, None] * (C * P) + b[None, :], phi, mask=inside)
