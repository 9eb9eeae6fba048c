"""The definition of every mHC operation in plain PyTorch: any device, any float dtype, any n >= 1.

This file is the oracle of every test and the backend on a CPU. Section and equation numbers are those of
"mHC: Manifold-Constrained Hyper-Connections", arXiv 2512.24880.

Shapes and axes, everywhere in this project:

* ``x [..., n, C]`` are the ``n`` residual streams of one token, each ``C`` wide.
* ``H_res[i, j]`` carries stream ``j`` INTO stream ``i`` (``x' = H_res @ x``): row ``i`` sums what stream ``i`` receives.
* phi's rows, and the entries of bias, are ``pre | post | res``, with res row-major: entry ``i * n + j``.

Mappings are computed and returned in float32 (float64 when x or phi is float64), whatever the dtype of the streams:
bf16 mappings leave the manifold (row sums wrong by 3e-3).
"""

from __future__ import annotations

import torch
from torch import Tensor

PROFILES = ("paper", "deepseek-v4")
MODES = ("mhc", "hc")


def _mapping_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _tokens_last(matrices: Tensor) -> Tensor:
    """[..., n, n] -> [n, n, T]: reductions over n then run across tokens (8 x faster than over a last axis of n)."""
    n = matrices.shape[-1]
    return matrices.reshape(-1, n, n).permute(1, 2, 0).contiguous()


def sinkhorn(logits: Tensor, iterations: int = 20) -> Tensor:
    """Project ``exp(logits)`` towards the doubly stochastic matrices (section 4.2, Eq. 9).

    ``M <- T_r(T_c(M))``, ``iterations`` times: columns are normalised first, rows last, so rows sum to 1 to rounding
    and the truncation error sits in the column sums (the backward gain).

    Computed in float64 in the log domain: the result is the definition's at the given number of iterations for any
    finite logits, +-1e4 included, where ``exp`` would under- or overflow.

    Args:
        logits: ``[..., n, n]``, any float dtype; ``[i, j]`` is stream j into stream i.
        iterations: number of column + row normalisations, >= 1.

    Returns:
        ``[..., n, n]``, float32 (float64 for float64 logits).

    Raises:
        ValueError: if iterations < 1 or logits are not square.
    """
    check_sinkhorn(logits, iterations)
    log_m = _tokens_last(logits.double())
    for _ in range(iterations):
        log_m = torch.log_softmax(torch.log_softmax(log_m, dim=0), dim=1)
    return log_m.exp().permute(2, 0, 1).reshape(logits.shape).to(_mapping_dtype(logits))


def sinkhorn_deepseek_v4(logits: Tensor, iterations: int = 20, eps: float = 1e-6) -> Tensor:
    """The Sinkhorn of DeepSeek-V4's public inference code: softmax + eps, then eps in every denominator.

    That code stores the matrix transposed; in this project's axes (``[i, j]``: stream j into stream i) its softmax
    normalises columns and rows follow, so the order is the paper's.

    Args:
        logits: ``[..., n, n]``, any float dtype.
        iterations: number of column + row normalisations, >= 1; the softmax is the first column normalisation.
        eps: added to the softmax and to every denominator.

    Returns:
        ``[..., n, n]``, float32 (float64 for float64 logits). Rows sum to 1 up to about eps.
    """
    check_sinkhorn(logits, iterations)
    m = torch.softmax(_tokens_last(logits.to(_mapping_dtype(logits))), dim=0) + eps
    m = m / (m.sum(1, keepdim=True) + eps)
    for _ in range(iterations - 1):
        m = m / (m.sum(0, keepdim=True) + eps)
        m = m / (m.sum(1, keepdim=True) + eps)
    return m.permute(2, 0, 1).reshape(logits.shape)


def _projection(x: Tensor, phi: Tensor, eps: float) -> Tensor:
    """``rsqrt(mean(x^2) + eps) * (phi @ flatten(x))``, one RMS over all n*C values: [..., rows of phi]."""
    dtype = _mapping_dtype(x, phi)
    flat = x.flatten(-2).to(dtype)
    # Scaling after the product is the same number as normalising x first (Eq. 5), and reads x once.
    scale = torch.rsqrt(flat.square().mean(-1, keepdim=True) + eps)
    with torch.autocast(flat.device.type, enabled=False):
        return scale * (flat @ phi.to(dtype).t())


def mappings(
    x: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    *,
    iterations: int = 20,
    eps: float = 1e-6,
    profile: str = "paper",
    mode: str = "mhc",
) -> tuple[Tensor, Tensor, Tensor]:
    """The three mappings of one sublayer, from its streams (section 4.2, Eq. 7 and 8).

    ``mhc``, profile ``paper``: ``H_pre = sigmoid(.)``, ``H_post = 2 sigmoid(.)``, ``H_res = sinkhorn(.)`` of
    ``alpha * mix + bias``. ``deepseek-v4``: the same with ``H_pre = sigmoid(.) + eps`` and `sinkhorn_deepseek_v4`.
    ``hc`` (unconstrained, arXiv 2409.19606): ``alpha * tanh(mix) + bias`` for all three.

    Args:
        x: ``[..., n, C]``, any float dtype.
        phi: ``[n*n + 2n, n*C]``, rows ``pre | post | res``.
        alpha: ``[3]``, for pre, post, res.
        bias: ``[n*n + 2n]``.
        iterations: Sinkhorn iterations (unused in mode ``hc``).
        eps: inside the RMS; in profile ``deepseek-v4`` also the eps of sigmoid and Sinkhorn.
        profile: ``paper`` or ``deepseek-v4``.
        mode: ``mhc`` or ``hc``.

    Returns:
        ``(pre [..., n], post [..., n], res [..., n, n])``, float32 (float64 if x or phi is).

    Raises:
        ValueError: on shapes that do not fit together, or an unknown profile or mode.
    """
    n = x.shape[-2]
    check_mappings(x, phi, alpha, bias, iterations, profile, mode)
    mix = _projection(x, phi, eps)
    alpha, bias = alpha.to(mix.dtype), bias.to(mix.dtype)
    mix_pre, mix_post, mix_res = mix.split([n, n, n * n], dim=-1)
    b_pre, b_post, b_res = bias.split([n, n, n * n])
    if mode == "hc":
        pre = alpha[0] * torch.tanh(mix_pre) + b_pre
        post = alpha[1] * torch.tanh(mix_post) + b_post
        res = alpha[2] * torch.tanh(mix_res) + b_res
        return pre, post, res.unflatten(-1, (n, n))
    pre = torch.sigmoid(alpha[0] * mix_pre + b_pre)
    post = 2 * torch.sigmoid(alpha[1] * mix_post + b_post)
    logits = (alpha[2] * mix_res + b_res).unflatten(-1, (n, n))
    if profile == "deepseek-v4":
        return pre + eps, post, sinkhorn_deepseek_v4(logits, iterations, eps)
    return pre, post, sinkhorn(logits, iterations)


def head(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Weights of the learned exit of profile ``deepseek-v4``: ``sigmoid(alpha * mix + bias) + eps``.

    Args:
        x: ``[..., n, C]``; phi: ``[n, n*C]``; alpha: ``[1]``; bias: ``[n]``; eps: as in `mappings`.

    Returns:
        ``[..., n]``, float32 (float64 if x or phi is); contract the streams with `aggregate`.
    """
    mix = _projection(x, phi, eps)
    return torch.sigmoid(alpha.to(mix.dtype) * mix + bias.to(mix.dtype)) + eps


def aggregate(x: Tensor, pre: Tensor) -> Tensor:
    """``u = H_pre @ x``: what the sublayer reads (Eq. 3).

    Args:
        x: ``[..., n, C]``, any float dtype.
        pre: ``[..., n]``, the mappings' dtype.

    Returns:
        ``[..., C]`` in x's dtype, accumulated in the mappings' dtype.
    """
    check_streams("pre", pre, x.shape[:-1])
    dtype = _mapping_dtype(x, pre)
    return (pre.to(dtype).unsqueeze(-1) * x.to(dtype)).sum(-2).to(x.dtype)


def mix(
    x: Tensor, res: Tensor, post: Tensor, y: Tensor, bias: Tensor | None = None, *, dropout_p: float = 0.0
) -> Tensor:
    """``x' = H_res @ x + outer(H_post, dropout(y + bias))``: the streams after the sublayer (Eq. 3).

    Args:
        x: ``[..., n, C]``, any float dtype.
        res: ``[..., n, n]``; ``[i, j]`` carries stream j into stream i.
        post: ``[..., n]``.
        y: ``[..., C]``, the sublayer's output.
        bias: ``[C]``, added to y first; None for none.
        dropout_p: probability of dropout on y + bias, as Megatron's bias-dropout-add has it; 0 for none.

    Returns:
        ``[..., n, C]`` in x's dtype, accumulated in the mappings' dtype.
    """
    check_mix(x, res, post, y, bias, dropout_p)
    dtype = _mapping_dtype(x, res, post)
    y = y.to(dtype)
    if bias is not None:
        y = y + bias.to(dtype)
    if dropout_p > 0:
        y = torch.nn.functional.dropout(y, dropout_p)
    with torch.autocast(x.device.type, enabled=False):
        mixed = torch.matmul(res.to(dtype), x.to(dtype))
    return (mixed + post.to(dtype).unsqueeze(-1) * y.unsqueeze(-2)).to(x.dtype)


def streams_of(bias: Tensor) -> int:
    """n of a mapping bias [n*n + 2n]."""
    rows, n = bias.shape[0], 0
    while n * n + 2 * n < rows:  # no math.isqrt: torch.compile has symbols here, and a root would be one as well
        n += 1
    return n


def check_sinkhorn(logits: Tensor, iterations: int) -> None:
    """Raises ValueError unless logits are [..., n, n] and iterations >= 1."""
    if logits.dim() < 2 or logits.shape[-1] != logits.shape[-2] or logits.shape[-1] < 1:
        raise ValueError(f"sinkhorn: logits must be [..., n, n] with n >= 1, got {tuple(logits.shape)}")
    _check_iterations(iterations)


def _check_iterations(iterations: int) -> None:
    if iterations < 1:
        raise ValueError(f"sinkhorn: iterations must be >= 1, got {iterations}")


def check_streams(name: str, tensor: Tensor, expected: tuple[int, ...] | torch.Size) -> None:
    """Raises ValueError unless the tensor has the shape that fits x."""
    if tensor.shape != torch.Size(expected):
        raise ValueError(f"{name} must be {list(expected)} to fit x [..., n, C], got {list(tensor.shape)}")


def check_mix(x: Tensor, res: Tensor, post: Tensor, y: Tensor, bias: Tensor | None, dropout_p: float) -> None:
    """Raises ValueError unless the arguments of `mix` fit together."""
    n, c = x.shape[-2:]
    check_streams("post", post, x.shape[:-1])
    check_streams("res", res, (*x.shape[:-1], n))
    check_streams("y", y, (*x.shape[:-2], c))
    if bias is not None:
        check_streams("bias", bias, (c,))
    if not 0 <= dropout_p < 1:
        raise ValueError(f"mix: dropout_p must be in [0, 1), got {dropout_p}")


def check_mappings(
    x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, iterations: int, profile: str, mode: str
) -> None:
    """Raises ValueError unless the arguments of `mappings` fit together."""
    _check_iterations(iterations)
    n, c = x.shape[-2:]
    if profile not in PROFILES:
        raise ValueError(f"mappings: profile must be one of {PROFILES}, got {profile!r}")
    if mode not in MODES:
        raise ValueError(f"mappings: mode must be one of {MODES}, got {mode!r}")
    rows = n * n + 2 * n
    expected = {"phi": (rows, n * c), "alpha": (3,), "bias": (rows,)}
    for name, tensor in (("phi", phi), ("alpha", alpha), ("bias", bias)):
        if tuple(tensor.shape) != expected[name]:
            raise ValueError(
                f"mappings: {name} must be {list(expected[name])} for x [..., n={n}, C={c}], got {list(tensor.shape)}"
            )
