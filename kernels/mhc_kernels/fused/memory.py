"""Uninitialised tensors with little host time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_quick = getattr(getattr(getattr(torch._C, "_dynamo", None), "guards", None), "_empty_strided_cuda", None)
"""What inductor's generated code calls: on the current device, past the dispatcher. A private name of PyTorch; where it is
missing, the public one is called."""


class Form(NamedTuple):
    """Of a contiguous tensor: what `allocator` wants to know."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


def form(shape: tuple[int, ...], dtype: torch.dtype) -> Form:
    """The form of a contiguous tensor."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return Form(tuple(shape), tuple(reversed(strides)), dtype)


def allocator(like: Tensor) -> Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor]:
    """A function of a `Form`'s fields that makes an uninitialised tensor on the device of ``like``.

    Call it only behind PyTorch's dispatcher, or where nothing listens there (`library.operator`). Under
    ``torch.use_deterministic_algorithms`` memory is filled as PyTorch's own functions fill it.
    """
    device = like.get_device()
    if (
        _quick is not None
        and device >= 0
        and not torch._C._get_deterministic_algorithms()
        and device == torch._C._cuda_getDevice()
    ):
        return _quick
    return functools.partial(_public, like.device)


def empty_like(*tensors: Tensor) -> list[Tensor]:
    """``torch.empty_like`` of contiguous tensors on one device, where an `allocator` may be called."""
    new = allocator(tensors[0])
    return [
        new(tuple(tensor.shape), tensor.stride(), tensor.dtype) for tensor in tensors
    ]  # no torch.Size: _quick checks


def _public(
    device: torch.device, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype
) -> Tensor:  # fmt: skip
    return torch.empty_strided(shape, strides, dtype=dtype, device=device)
