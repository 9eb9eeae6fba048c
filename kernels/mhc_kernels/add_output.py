"""``x' = H_res @ x + outer(H_post, y)`` where ``H_res @ x`` is there first and y comes later: no autograd, in place."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from mhc_kernels.backend import check_contiguous, check_same_device, resolve_backend
from mhc_kernels.reference import check_streams


@cache
def _kernels() -> Any:
    from mhc_kernels.fused import single  # not before it is needed: it imports triton

    return single


def add_output_(x: Tensor, post: Tensor, y: Tensor, *, backend: str = "auto") -> None:
    """``x += outer(post, y)``, the products and sums in float32 whatever the streams' dtype (Eq. 3's second term).

    Args:
        x: ``[..., n*C]``; changed.
        post: ``[..., n]``, float32.
        y: ``[..., C]``, x's dtype.
        backend: as of the operations (`mhc_kernels.backend`). The kernels want contiguous tensors.

    Raises:
        ValueError: for shapes, dtypes and devices that do not fit; for an x that wants a gradient.
    """
    n = post.shape[-1]
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("add_output_ has no derivative: give it a tensor without requires_grad, or use mix()")
    if _on_triton(x, post, y, backend):
        check_contiguous(x=x, post=post, y=y)
        _kernels().add_output_(x, post, y)
        return
    x.unflatten(-1, (n, -1)).addcmul_(post.unsqueeze(-1), y.unsqueeze(-2))


def output_gradients(g: Tensor, post: Tensor, y: Tensor, dy: Tensor, dpost: Tensor, *, backend: str = "auto") -> None:
    """The gradients of `add_output_` by y and post, written into ``dy`` (y's form) and ``dpost`` (post's).

    Args:
        g: ``[..., n*C]``, the gradient of what x has become; it is x's own as well.
        post, y, backend: as there.

    Raises:
        ValueError: as there.
    """
    n = post.shape[-1]
    for name, ours, of in (("dy", dy, y), ("dpost", dpost, post)):
        if (ours.shape, ours.dtype, ours.device) != (of.shape, of.dtype, of.device):
            raise ValueError(
                f"{name} must be {of.dtype} {list(of.shape)} on {of.device}, got {ours.dtype} {list(ours.shape)}"
            )
    if _on_triton(g, post, y, backend):
        check_contiguous(g=g, post=post, y=y, dy=dy, dpost=dpost)
        _kernels().add_output_backward(g, post, y, dy, dpost)
        return
    rows = g.unflatten(-1, (n, -1)).float()
    dy.copy_((post.unsqueeze(-1) * rows).sum(-2))
    torch.sum(rows * y.float().unsqueeze(-2), -1, out=dpost)


def _on_triton(x: Tensor, post: Tensor, y: Tensor, backend: str) -> bool:
    *tokens, width = x.shape
    n = post.shape[-1]
    if width % n:
        raise ValueError(f"x must be n*C values a token, and post n; got {width} and {n}")
    check_streams("post", post, (*tokens, n))
    check_streams("y", y, (*tokens, width // n))
    for name, found, dtype in (("post", post.dtype, torch.float32), ("y", y.dtype, x.dtype)):
        if found != dtype:
            raise ValueError(f"{name} must be {dtype} beside streams of {x.dtype}, got {found}")
    check_same_device(x=x, post=post, y=y)
    return resolve_backend(backend, n, width // n, x.dtype, x.device) == "triton"
