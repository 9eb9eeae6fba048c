"""The public operations: check the arguments, choose the backend, run it.

Every one takes ``backend="auto" | "triton" | "reference"`` (`mhc_kernels.backend`). The Triton kernels compute mappings
in float32, keep streams in their own dtype and want contiguous tensors; results have the same bits from run to run on
the same shapes.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mhc_kernels import reference
from mhc_kernels.backend import check_contiguous, check_same_device, resolve_backend
from mhc_kernels.norm import FUSED_NORM_STREAMS, RMSNorm
from mhc_kernels.recompute_block import RecomputePlace
from mhc_kernels.recompute_input import refill_of


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
    check_same_device(x=x, phi=phi, alpha=alpha, bias=bias)
    if not _use_triton(backend, x):
        return reference.mappings(x, phi, alpha, bias, iterations=iterations, eps=eps, profile=profile, mode=mode)
    check_contiguous(x=x, phi=phi, alpha=alpha, bias=bias)
    settings = _settings(iterations, eps, profile, mode)
    return _functions().Mappings.apply(x.flatten(-2), phi.float(), alpha.float(), bias.float(), settings)


def aggregate(x: Tensor, pre: Tensor, *, backend: str = "auto") -> Tensor:
    """``u = H_pre @ x``. See `mhc_kernels.reference.aggregate`."""
    reference.check_streams("pre", pre, x.shape[:-1])
    check_same_device(x=x, pre=pre)
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


class _Checked(NamedTuple):
    """A call of `boundary` or `connect` that passed all checks and goes to Triton."""

    setup: Any
    """What the kernels are told besides tensors (`fused.functions.Setup`)."""
    casts: bool
    """Whether some tensor is not of the dtype that the kernels read."""
    later: bool
    """Whether a norm comes after the kernels (they have no room for it if n > 4)."""


_CHECKED: dict[tuple, _Checked] = {}
"""By what was checked: the same calls are in every layer."""


def _checked(
    key: tuple, x: Tensor, n: int, flat: bool, norm: RMSNorm | None, mixes: bool, biased: bool, dropout_p: float, casts: bool,
    settings: Any, accumulate: bool,
) -> _Checked:  # fmt: skip
    """The call, remembered unless it is compiled. Its checks are done."""
    functions = _functions()
    fuses = norm is not None and n <= FUSED_NORM_STREAMS
    kernels_norm = functions.Norm(norm.eps, norm.centered) if norm is not None and fuses else functions.NO_NORM
    later = norm is not None and not fuses
    if torch.compiler.is_compiling():
        return _Checked(functions.Setup(float(dropout_p), settings, kernels_norm, accumulate, None), casts, later)
    shape = x.shape if flat else torch.Size((*x.shape[:-2], x.shape[-2] * x.shape[-1]))
    gamma = norm.weight.dtype if norm is not None and fuses else None
    mixing = (mixes, biased, dropout_p > 0, float(dropout_p))
    call = functions.forward_call(
        shape, n, x.dtype, x.get_device(), functions.ForwardOptions(*mixing, True, *settings, gamma, *kernels_norm)
    )
    if len(_CHECKED) >= 4096:  # sequences of many lengths
        _CHECKED.clear()
    setup = functions.Setup(float(dropout_p), settings, kernels_norm, accumulate, call)
    checked = _CHECKED[key] = _Checked(setup, casts, later)
    return checked


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
    check_same_device(x=x, res=res, post=post, y=y, bias=bias)
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
        accumulate,
        x.dtype,
        phi.dtype,
        alpha.dtype,
        bias.dtype,
        x.get_device(),  # an index: quicker to hash than a device
        phi.get_device(),
        alpha.get_device(),
        bias.get_device(),
        x.shape,
        phi.shape,
        alpha.shape,
        bias.shape,
        None if norm is None else _norm_key(norm),
    )
    checked = None if torch.compiler.is_compiling() else _CHECKED.get(key)
    if checked is None:
        n = reference.streams_of(bias)
        streams = _unflatten(x, n, flat)
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
        casts = not _all_float32(phi, alpha, bias)
        checked = _checked(key, x, n, flat, norm, False, False, 0.0, casts, settings, accumulate)
    if not (x.is_contiguous() and phi.is_contiguous() and alpha.is_contiguous() and bias.is_contiguous()):
        check_contiguous(x=x, phi=phi, alpha=alpha, bias=bias)
    if checked.casts:
        phi, alpha, bias = phi.float(), alpha.float(), bias.float()
    out, u, post, res = _functions().apply_connect(
        x if flat else x.flatten(-2), phi, alpha, bias, _weight(norm, checked.later), checked.setup
    )
    return _same_form(out, x), u if norm is None or not checked.later else norm(u), post, res


def _all_float32(*tensors: Tensor) -> bool:
    return all(tensor.dtype == torch.float32 for tensor in tensors)


def _weight(norm: RMSNorm | None, later: bool) -> Tensor | None:
    """What the kernels get of a norm."""
    if norm is None or later:
        return None
    check_contiguous(norm_weight=norm.weight)
    return norm.weight


def _norm_key(norm: RMSNorm) -> Any:
    weight = norm.weight
    return weight.shape, weight.dtype, weight.get_device(), norm.eps, norm.centered


def _check_norm(norm: RMSNorm | None, x: Tensor, width: int) -> None:
    if norm is not None:
        norm.check(width)
        check_same_device(x=x, norm_weight=norm.weight)


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
        "boundary", backend, flat, iterations, eps, profile, mode, accumulate, dropout_p,
        x.dtype, y.dtype, res.dtype, post.dtype, next_phi.dtype, next_alpha.dtype, next_bias.dtype,
        x.get_device(), res.get_device(), post.get_device(), y.get_device(),
        next_phi.get_device(), next_alpha.get_device(), next_bias.get_device(), x.shape, res.shape, post.shape, y.shape,
        None if bias is None else (bias.shape, bias.dtype, bias.get_device()), next_phi.shape, next_alpha.shape, next_bias.shape,
        None if norm is None else _norm_key(norm),
    )  # fmt: skip
    checked = None if torch.compiler.is_compiling() else _CHECKED.get(key)
    if checked is None:
        n = post.shape[-1]
        streams = _unflatten(x, n, flat)
        reference.check_mix(streams, res, post, y, bias, dropout_p)
        reference.check_mappings(streams, next_phi, next_alpha, next_bias, iterations, profile, mode)
        check_same_device(
            x=x, res=res, post=post, y=y, bias=bias, next_phi=next_phi, next_alpha=next_alpha, next_bias=next_bias
        )
        _check_norm(norm, x, streams.shape[-1])
        if not _use_triton(backend, streams):
            _check_recompute(recompute, "reference")
            out = _same_form(reference.mix(streams, res, post, y, bias, dropout_p=dropout_p), x)
            kwargs: dict[str, Any] = {"iterations": iterations, "eps": eps, "profile": profile, "mode": mode}
            return connect(out, next_phi, next_alpha, next_bias, **kwargs, norm=norm, flat=flat, backend="reference")
        settings = _settings(iterations, eps, profile, mode)
        same = y.dtype == x.dtype and (bias is None or bias.dtype == x.dtype)
        casts = not same or not _all_float32(res, post, next_phi, next_alpha, next_bias)
        checked = _checked(key, x, n, flat, norm, True, bias is not None, dropout_p, casts, settings, accumulate)
    if not (
        x.is_contiguous() and res.is_contiguous() and post.is_contiguous() and y.is_contiguous()
        and (bias is None or bias.is_contiguous())
        and next_phi.is_contiguous() and next_alpha.is_contiguous() and next_bias.is_contiguous()
    ):  # fmt: skip
        check_contiguous(
            x=x, res=res, post=post, y=y, bias=bias, next_phi=next_phi, next_alpha=next_alpha, next_bias=next_bias
        )
    functions = _functions()
    seed = functions.new_seed(x.device) if dropout_p > 0 else None
    refill = None if torch.compiler.is_compiling() else refill_of(y, x, post.shape[-1])
    if checked.casts:
        res, post, y, bias = res.float(), post.float(), y.to(x.dtype), _cast(bias, x)
        next_phi, next_alpha, next_bias = next_phi.float(), next_alpha.float(), next_bias.float()
    out, u, post, res = functions.apply_boundary(
        x if flat else x.flatten(-2), res, post, y, bias, seed, next_phi, next_alpha, next_bias,
        None if norm is None else _weight(norm, checked.later), checked.setup,
        None if recompute is None else _check_recompute(recompute, "triton"), refill,
    )  # fmt: skip
    return out if flat else _same_form(out, x), u if norm is None or not checked.later else norm(u), post, res


def head(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, *, eps: float = 1e-6, backend: str = "auto") -> Tensor:
    """See `mhc_kernels.reference.head`, which runs on every device: a model has one, at its end."""
    resolve_backend(backend, x.shape[-2], x.shape[-1], torch.float32, x.device)
    return reference.head(x, phi, alpha, bias, eps=eps)
