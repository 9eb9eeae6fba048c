"""Pieces of one allocation, for launches: an allocation takes 3 us of host time, a view 2."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor


class Part:
    """A piece of a float32 tensor, as a contiguous array of its own shape and dtype; what a launch needs of a tensor."""

    __slots__ = ("_base", "_offset", "dtype", "shape")

    def __init__(self, base: Tensor, offset: int, shape: tuple[int, ...], dtype: torch.dtype):
        self._base, self._offset, self.shape, self.dtype = base, offset, shape, dtype

    def data_ptr(self) -> int:
        return self._base.data_ptr() + self._offset

    def get_device(self) -> int:
        return self._base.get_device()

    def tensor(self) -> Tensor:
        """The piece as a view."""
        step = self.dtype.itemsize
        start = self._offset // step
        return self._base.view(self.dtype)[start : start + math.prod(self.shape)].view(self.shape)


Shape = tuple[tuple[int, ...], torch.dtype]


def floats(*shapes: Shape) -> int:
    """Size of the float32 tensor that `divide` wants for these arrays."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes) // 4


def divide(base: Tensor, *shapes: Shape) -> Iterator[Part]:
    """The arrays, one after the other. All but the last have to have a multiple of 16 bytes: what Triton calls aligned."""
    offset = 0
    for shape, dtype in shapes:
        yield Part(base, offset, shape, dtype)
        offset += math.prod(shape) * dtype.itemsize
