"""The public operations: check the backend, run it.

One backend exists today, the reference; ``auto`` is the name to use, so that fused kernels are picked up when they come.
"""

from __future__ import annotations

from torch import Tensor

from mhc_kernels import reference

BACKENDS = ("auto", "triton", "reference")


def resolve_backend(backend: str) -> str:
    """The backend that ``backend`` stands for in this release: ``reference``.

    Raises:
        ValueError: for an unknown name, and for ``triton``, which this release does not have.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if backend == "triton":
        raise ValueError("backend 'triton': this release has no Triton kernels yet; use 'auto' or 'reference'")
    return "reference"


def sinkhorn(logits: Tensor, iterations: int = 20, *, backend: str = "auto") -> Tensor:
    """See `mhc_kernels.reference.sinkhorn`."""
    resolve_backend(backend)
    return reference.sinkhorn(logits, iterations)


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
    """See `mhc_kernels.reference.mappings`."""
    resolve_backend(backend)
    return reference.mappings(x, phi, alpha, bias, iterations=iterations, eps=eps, profile=profile, mode=mode)


def aggregate(x: Tensor, pre: Tensor, *, backend: str = "auto") -> Tensor:
    """See `mhc_kernels.reference.aggregate`."""
    resolve_backend(backend)
    return reference.aggregate(x, pre)


def mix(
    x: Tensor, res: Tensor, post: Tensor, y: Tensor, bias: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """See `mhc_kernels.reference.mix`."""
    resolve_backend(backend)
    return reference.mix(x, res, post, y, bias)


def head(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, *, eps: float = 1e-6, backend: str = "auto") -> Tensor:
    """See `mhc_kernels.reference.head`."""
    resolve_backend(backend)
    return reference.head(x, phi, alpha, bias, eps=eps)
