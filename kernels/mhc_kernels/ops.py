"""The public operations: check the arguments, choose the backend, run it.

Every one takes ``backend="auto" | "triton" | "reference"`` (`mhc_kernels.backend`). The Triton kernels compute mappings
in float32, keep streams in their own dtype and want contiguous tensors; results have the same bits from run to run on
the same shapes.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from mhc_kernels import reference
from mhc_kernels.backend import check_contiguous, check_same_device, resolve_backend
from mhc_kernels.norm import FUSED_NORM_STREAMS, RMSNorm
from mhc_kernels.recompute_block import RecomputePlace


def _use_triton(backend: str, x: Tensor) -> bool:
    return resolve_backend(backend, x.shape[-2], x.shape[-1], x.dtype, x.device) == "triton"


@cache
def _functions() -> Any:
    from mhc_kernels.fused import functions  # not before it is needed: it imports triton

    return functions


def sinkhorn(logits: Tensor, iterations: int = 20, *, backend: str = "auto") -> Tensor:
    """Project ``exp(logits)`` towards the doubly stochastic matrices. See `mhc_kernels.reference.sinkhorn`."""
    reference.check_sinkhorn(logits, iterations)
    # C has no meaning here; 16 is one that the kernels take.
    if resolve_backend(backend, logits.shape[-1], 16, logits.dtype, logits.device) == "reference":
        return reference.sinkhorn(logits, iterations)
    check_contiguous(logits=logits)
    return _functions().Sinkhorn.apply(logits, iterations, 0.0)


def _settings(iterations: int, eps: float, profile: str, mode: str) -> Any:
    return _functions().Settings(iterations, eps, eps if profile == "deepseek-v4" else 0.0, mode == "hc")


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
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """The three mappings of a sublayer from its streams. See `mhc_kernels.reference.mappings`."""
    reference.check_mappings(x, phi, alpha, bias, iterations, profile, mode)
    if not _use_triton(backend, x):
        return reference.mappings(x, phi, alpha, bias, iterations=iterations, eps=eps, profile=profile, mode=mode)
    check_contiguous(x=x, phi=phi, alpha=alpha, bias=bias)
    settings = _settings(iterations, eps, profile, mode)
    return _functions().Mappings.apply(x.flatten(-2), phi.float(), alpha.float(), bias.float(), settings)


def aggregate(x: Tensor, pre: Tensor, *, backend: str = "auto") -> Tensor:
    """``u = H_pre @ x``. See `mhc_kernels.reference.aggregate`."""
    reference.check_streams("pre", pre, x.shape[:-1])
    if not _use_triton(backend, x):
        return reference.aggregate(x, pre)
    check_contiguous(x=x, pre=pre)
    return _functions().Aggregate.apply(x.flatten(-2), pre.float())


def _unflatten(x: Tensor, n: int, flat: bool) -> Tensor:
    """x as [..., n, C]."""
    if not flat:
        return x
    if x.shape[-1] % n:
        raise ValueError(f"x must be [..., n*C] with n = {n} streams, got {list(x.shape)}")
    return x.unflatten(-1, (n, x.shape[-1] // n))


def _same_form(streams: Tensor, x: Tensor) -> Tensor:
    return streams if streams.shape == x.shape else streams.view_as(x)


def _float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float32 else tensor.float()


_TRITON_CALLS: dict[tuple, Any] = {}
"""Settings of the calls of `boundary` and `connect` that passed all checks and go to Triton, by what was checked: they are
in every layer."""


def _remember(key: tuple, settings: Any) -> None:
    if not torch.compiler.is_compiling():
        if len(_TRITON_CALLS) >= 4096:  # sequences of many lengths
            _TRITON_CALLS.clear()
        _TRITON_CALLS[key] = settings


def mix(
    x: Tensor,
    res: Tensor,
    post: Tensor,
    y: Tensor,
    bias: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    recompute: RecomputePlace | None = None,
    flat: bool = False,
    backend: str = "auto",
) -> Tensor:
    """``x' = H_res @ x + outer(H_post, dropout(y + bias))``. See `mhc_kernels.reference.mix`.

    recompute: x's place in a block: x is kept only if it is the first. flat: x and x' are ``[..., n*C]``, as Megatron carries
    them between layers.
    """
    streams = _unflatten(x, post.shape[-1], flat)
    reference.check_mix(streams, res, post, y, bias, dropout_p)
    if not _use_triton(backend, streams):
        _check_recompute(recompute, "reference")
        return _same_form(reference.mix(streams, res, post, y, bias, dropout_p=dropout_p), x)
    recompute = _check_recompute(recompute, "triton")
    check_contiguous(x=x, res=res, post=post, y=y, bias=bias)
    seed = _functions().new_seed(x.device) if dropout_p > 0 else None
    out = _functions().Mix.apply(
        streams.flatten(-2),
        _float32(res),
        _float32(post),
        _cast(y, x),
        _cast(bias, x),
        seed,
        float(dropout_p),
        recompute,
    )
    return _same_form(out, x)


def _check_recompute(recompute: RecomputePlace | None, backend: str) -> RecomputePlace | None:
    """The place, if there will be a backward.

    Raises:
        ValueError: where its streams can't be left out.
    """
    if recompute is None or not torch.is_grad_enabled():
        return None
    if backend != "triton" or torch.compiler.is_compiling():
        why = "the reference backend" if backend != "triton" else "torch.compile"
        raise ValueError(f"recompute: not with {why}, where autograd decides what is kept; pass None")
    return recompute


def _cast(tensor: Tensor | None, x: Tensor) -> Tensor | None:
    """In the streams' dtype, in which the kernels read y and its bias."""
    return tensor if tensor is None or tensor.dtype == x.dtype else tensor.to(x.dtype)


def connect(
    x: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    *,
    iterations: int = 20,
    eps: float = 1e-6,
    profile: str = "paper",
    mode: str = "mhc",
    norm: RMSNorm | None = None,
    accumulate: bool = False,
    flat: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mappings and aggregation of the first sublayer of a chain: ``(x, u, post, res)``.

    Equal to `mappings` and `aggregate`. Use the x that it returns, not the one passed in, for what follows: then both
    gradients of x meet in one kernel instead of in an addition over n*C values.

    Args:
        norm: of u, in the same pass (n <= 4; else after it).
        accumulate: add the gradients of phi, alpha and bias to their ``main_grad`` (float32, where they have one) and set
            ``grad_added_to_main_grad``, as Megatron's gradient accumulation fusion does. Triton only.
        flat: x is ``[..., n*C]``, and so is what comes back.
        The others: as in `mappings`.

    Returns:
        x ``[..., n, C]``, u ``[..., C]`` in x's dtype, post ``[..., n]`` and res ``[..., n, n]``, float32.
    """
    key = (
        "connect",
        backend,
        flat,
        iterations,
        eps,
        profile,
        mode,
        x.dtype,
        x.get_device(),  # an index: quicker to hash than a device
        phi.get_device(),
        alpha.get_device(),
        bias.get_device(),
        x.shape,
        phi.shape,
        alpha.shape,
        bias.shape,
        _norm_key(norm),
    )
    settings = None if torch.compiler.is_compiling() else _TRITON_CALLS.get(key)
    if settings is None:
        streams = _unflatten(x, reference.streams_of(bias), flat)
        reference.check_mappings(streams, phi, alpha, bias, iterations, profile, mode)
        check_same_device(x=x, phi=phi, alpha=alpha, bias=bias)
        _check_norm(norm, x, streams.shape[-1])
        if not _use_triton(backend, streams):
            pre, post, res = reference.mappings(
                streams, phi, alpha, bias, iterations=iterations, eps=eps, profile=profile, mode=mode
            )
            u = reference.aggregate(streams, pre)
            return x, u if norm is None else norm(u), post, res
        settings = _settings(iterations, eps, profile, mode)
        _remember(key, settings)
    check_contiguous(x=x, phi=phi, alpha=alpha, bias=bias)
    own = (_float32(phi), _float32(alpha), _float32(bias))
    fused, later = _split_norm(norm, reference.streams_of(bias))
    out, u, post, res = _functions().apply_connect(x if flat else x.flatten(-2), *own, settings, accumulate, *fused)
    return _same_form(out, x), u if later is None else later(u), post, res


def _norm_key(norm: RMSNorm | None) -> Any:
    return None if norm is None else (norm.weight.shape, norm.weight.dtype, norm.weight.device, norm.eps, norm.centered)


def _check_norm(norm: RMSNorm | None, x: Tensor, width: int) -> None:
    if norm is not None:
        norm.check(width)
        check_same_device(x=x, norm_weight=norm.weight)


def _split_norm(norm: RMSNorm | None, n: int) -> tuple[tuple[Tensor | None, Any], RMSNorm | None]:
    """The kernels' arguments for a norm, and what is left to do after them (they have no room for it if n > 4)."""
    functions = _functions()
    if norm is None or n > FUSED_NORM_STREAMS:
        return (None, functions.NO_NORM), norm
    check_contiguous(norm_weight=norm.weight)
    return (norm.weight, functions.Norm(norm.eps, norm.centered)), None


def boundary(
    x: Tensor,
    res: Tensor,
    post: Tensor,
    y: Tensor,
    bias: Tensor | None,
    next_phi: Tensor,
    next_alpha: Tensor,
    next_bias: Tensor,
    *,
    dropout_p: float = 0.0,
    iterations: int = 20,
    eps: float = 1e-6,
    profile: str = "paper",
    mode: str = "mhc",
    norm: RMSNorm | None = None,
    accumulate: bool = False,
    recompute: RecomputePlace | None = None,
    flat: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What happens between two sublayers, in one step: `mix` of the first, `connect` of the second.

    Args:
        x, res, post, y, bias, dropout_p: as in `mix`.
        next_phi, next_alpha, next_bias, iterations, eps, profile, mode, norm, accumulate: as in `connect`.
        recompute: x's place in a block whose streams the backward computes again (`mhc_kernels.recompute`). Triton only.
        flat: x and x' are ``[..., n*C]``.

    Returns:
        ``(x' [..., n, C], u [..., C], post [..., n], res [..., n, n])``: u is what the second sublayer reads, from x'.
    """
    key = (
        "boundary", backend, flat, iterations, eps, profile, mode, dropout_p,
        x.dtype, y.dtype, x.get_device(), res.get_device(), post.get_device(), y.get_device(),
        next_phi.get_device(), next_alpha.get_device(), next_bias.get_device(), x.shape, res.shape, post.shape, y.shape,
        None if bias is None else (bias.shape, bias.get_device()), next_phi.shape, next_alpha.shape, next_bias.shape,
        _norm_key(norm),
    )  # fmt: skip
    settings = None if torch.compiler.is_compiling() else _TRITON_CALLS.get(key)
    if settings is None:
        streams = _unflatten(x, post.shape[-1], flat)
        reference.check_mix(streams, res, post, y, bias, dropout_p)
        reference.check_mappings(streams, next_phi, next_alpha, next_bias, iterations, profile, mode)
        check_same_device(x=x, res=res, post=post, y=y, next_phi=next_phi, next_alpha=next_alpha, next_bias=next_bias)
        if bias is not None:
            check_same_device(x=x, bias=bias)
        _check_norm(norm, x, streams.shape[-1])
        if not _use_triton(backend, streams):
            _check_recompute(recompute, "reference")
            out = _same_form(reference.mix(streams, res, post, y, bias, dropout_p=dropout_p), x)
            kwargs: dict[str, Any] = {"iterations": iterations, "eps": eps, "profile": profile, "mode": mode}
            return connect(out, next_phi, next_alpha, next_bias, **kwargs, norm=norm, flat=flat, backend="reference")
        settings = _settings(iterations, eps, profile, mode)
        _remember(key, settings)
    check_contiguous(
        x=x, res=res, post=post, y=y, bias=bias, next_phi=next_phi, next_alpha=next_alpha, next_bias=next_bias
    )
    seed = _functions().new_seed(x.device) if dropout_p > 0 else None
    own = (_float32(next_phi), _float32(next_alpha), _float32(next_bias))
    fused, later = _split_norm(norm, post.shape[-1])
    out, u, post, res = _functions().apply_boundary(
        x if flat else x.flatten(-2), _float32(res), _float32(post), _cast(y, x), _cast(bias, x), seed, float(dropout_p),
        *own, settings, accumulate, *fused, None if recompute is None else _check_recompute(recompute, "triton"),
    )  # fmt: skip
    return _same_form(out, x), u if later is None else later(u), post, res


def head(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, *, eps: float = 1e-6, backend: str = "auto") -> Tensor:
    """See `mhc_kernels.reference.head`, which runs on every device: a model has one, at its end."""
    resolve_backend(backend, x.shape[-2], x.shape[-1], torch.float32, x.device)
    return reference.head(x, phi, alpha, bias, eps=eps)
