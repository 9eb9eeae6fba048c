"""Which implementation runs: Triton kernels on CUDA, the reference elsewhere."""

from __future__ import annotations

import importlib.util
import os
import warnings
from functools import cache

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "reference")
MAX_STREAMS = 8  # the kernels keep a token's n*n matrix in registers
_STREAM_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@cache
def _why_no_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    import triton  # not before a kernel is wanted

    found = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return f"the Triton kernels need triton >= 3.4, not {triton.__version__}" if found < (3, 4) else None


# torch.compile calls these two instead of tracing what they call.
@torch.compiler.assume_constant_result
def _no_triton() -> str | None:
    return _why_no_triton()


@torch.compiler.assume_constant_result
def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not_triton(streams: int, width: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the Triton kernels can't run streams ``[..., streams, width]`` of this dtype there; None if they can."""
    if device.type != "cuda" and not (device.type == "cpu" and _interpreted()):
        return f"the Triton kernels need a CUDA device, not {device.type!r} (or TRITON_INTERPRET=1, which is slow)"
    if (reason := _no_triton()) is not None:
        return reason
    return why_not_streams(streams, width, dtype)


def why_not_streams(streams: int, width: int, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels can't run such streams on any device; None if they can."""
    if not 1 <= streams <= MAX_STREAMS:
        return f"the Triton kernels take 1 to {MAX_STREAMS} streams, not n = {streams}"
    if width % 16:
        return f"the Triton kernels need C to be a multiple of 16, not {width}"
    if dtype not in _STREAM_DTYPES:
        return f"the Triton kernels take bf16, fp16 or fp32 streams, not {dtype}"
    return None


def resolve_backend(backend: str, streams: int, width: int, dtype: torch.dtype, device: torch.device) -> str:
    """``triton`` or ``reference`` for streams ``[..., streams, width]`` of this dtype on this device.

    ``auto`` is Triton wherever its kernels can run. On a CUDA device where they can't it warns, once, and says why.

    Raises:
        ValueError: for an unknown name; for ``triton`` where its kernels can't run, with the reason.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if backend == "reference":
        return backend
    reason = why_not_triton(streams, width, dtype, device)
    if reason is None and (backend == "triton" or device.type == "cuda"):
        return "triton"
    if backend == "triton":
        raise ValueError(f"backend 'triton': {reason}; use backend 'reference'")
    if device.type == "cuda":
        _warn_once(str(reason))
    return "reference"


@cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"mhc_kernels: {reason}; the slow reference runs instead", stacklevel=4)


def check_contiguous(**tensors: Tensor | None) -> None:
    """Raises ValueError naming the first tensor that is not contiguous."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous for the Triton kernels, got strides {tensor.stride()} for shape "
                f"{tuple(tensor.shape)}; call {name}.contiguous()"
            )


def check_same_device(*, x: Tensor, **tensors: Tensor | None) -> None:
    """Raises ValueError naming the first tensor that is on another device than x."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}: move them to one device")
