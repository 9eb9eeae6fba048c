"""Launching kernels with little host time.

A `Plan` has the launches of one operator for given sizes and options. Its first run goes through Triton, which inspects every
argument, compiles what is missing and returns the compiled kernels; later runs hand the CUDA driver the arrays' addresses and
nothing else (`direct`). That relies on what Triton 3.6 has inside a compiled kernel; with any other release, and on AMD GPUs,
every run goes through Triton.
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs

from mhc_kernels.fused.direct import DirectLaunches, Launch, UnsupportedError

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
_DIRECT = triton.__version__.split(".")[:2] == ["3", "6"] and torch.version.hip is None and not INTERPRET
_ALIGNMENT = 16  # bytes; what Triton specialises pointers on


class CompileTimes:
    """Kernels built (or loaded from Triton's cache) by this process, and the seconds that took."""

    kernels = 0
    seconds = 0.0
    _built: set[tuple] = set()

    @classmethod
    def add(cls, what: tuple, seconds: float) -> None:
        """Count the kernel ``what``, unless it was there before."""
        if what not in cls._built:
            cls._built.add(what)
            cls.kernels += 1
            cls.seconds += seconds


class Part(NamedTuple):
    """A contiguous array inside one of an operator's tensors (float32): fewer allocations, and no views."""

    base: str
    offset: int  # bytes
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def end(self) -> int:
        """Bytes up to its end."""
        return self.offset + math.prod(self.shape) * self.dtype.itemsize

    def view(self, base: Tensor) -> Tensor:
        """The array as a tensor."""
        first, end = self.offset // self.dtype.itemsize, self.end // self.dtype.itemsize
        return base.view(self.dtype)[first:end].view(self.shape)


def divide(base: str, **arrays: tuple[tuple[int, ...], torch.dtype]) -> dict[str, Part]:
    """Arrays (shape, dtype) one after the other in ``base``, each at a multiple of 16 bytes."""
    parts, offset = {}, 0
    for name, (shape, dtype) in arrays.items():
        parts[name] = Part(base, -(-offset // _ALIGNMENT) * _ALIGNMENT, shape, dtype)
        offset = parts[name].end
    return parts


class Step(NamedTuple):
    """One launch. arrays: the names of what the kernel takes; after them scalars, then meta, its constexpr arguments."""

    kernel: Any
    grid: tuple[int, int, int]
    arrays: tuple[str, ...]
    scalars: tuple
    meta: tuple
    warps: int


class Plan:
    """The launches of one operator, in order.

    Args:
        tensors: names of what `run` gets.
        steps: the launches.
        parts: arrays inside those tensors.
        unchecked: of these tensors, the last ones, the alignment is not looked at: they were just allocated, or the kernels take
            them at any address (``do_not_specialize_on_alignment``; Megatron's gradient buffers have no gaps).
        absent: names that `run` gets None for, with what stands in for each: kernels want an address for every array.
    """

    def __init__(
        self, tensors: tuple[str, ...], steps: Sequence[Step], parts: dict[str, Part] | None = None,
        unchecked: tuple[str, ...] = (), absent: dict[str, str] | None = None,
    ):  # fmt: skip
        self._absent, self._steps, self._parts = absent or {}, tuple(steps), parts or {}
        self._names = tuple(name for name in tensors if name not in self._absent)
        self._checked = sum(name not in unchecked for name in self._names)
        self._places = {name: place for place, name in enumerate(self._names)}
        offsets = []
        for name, part in self._parts.items():  # a part hides a tensor of its name
            place = self._names.index(part.base)
            if part.offset:
                offsets.append((place, part.offset))
                place = len(self._names) + len(offsets) - 1
            self._places[name] = place
        self._offsets = tuple(offsets)
        """Of parts that don't start where a tensor does: its place, bytes."""
        self._places |= {name: self._places[other] for name, other in self._absent.items() if name not in self._parts}
        self._direct: dict[int, DirectLaunches | None] = {}
        """By device; None: its kernels can't be launched that way."""
        self.floats: dict[str, int] = {}
        """Sizes of the tensors that hold parts."""
        for part in self._parts.values():
            self.floats[part.base] = max(self.floats.get(part.base, 0), -(-part.end // 4))

    def run(self, device: int, *tensors: Tensor | None) -> None:
        """Launch on the current stream of the device with this index, where the tensors are."""
        addresses = [tensor.data_ptr() for tensor in tensors if tensor is not None]
        bits = 0
        for address in addresses[: self._checked]:
            bits |= address
        aligned = not bits % _ALIGNMENT
        direct = self._direct.get(device)
        if (
            direct is None
            or not aligned
            or device != torch._C._cuda_getDevice()
            or knobs.runtime.launch_enter_hook.calls
        ):
            self._by_triton(device, [tensor for tensor in tensors if tensor is not None], aligned)
            return
        addresses += [addresses[index] + offset for index, offset in self._offsets]
        direct.run(addresses, torch._C._cuda_getCurrentRawStream(device))

    def _by_triton(self, device: int, tensors: Sequence[Tensor], aligned: bool) -> None:
        arrays = dict(zip(self._names, tensors, strict=True))
        arrays |= {name: arrays[other] for name, other in self._absent.items()}
        for name, part in self._parts.items():
            arrays[name] = part.view(arrays[part.base])
        if INTERPRET:
            for step in self._steps:
                self._build(step, arrays, device)
            return
        with torch.cuda.device(device):
            kernels = [self._build(step, arrays, device) for step in self._steps]
            if _DIRECT and aligned and device not in self._direct:
                self._direct[device] = self._prepare(kernels)

    def _build(self, step: Step, arrays: dict[str, Tensor], device: int) -> Any:
        started = time.perf_counter()
        own = [arrays[name] for name in step.arrays]
        options = {} if INTERPRET else {"num_warps": step.warps}
        compiled = step.kernel[step.grid](*own, *step.scalars, *step.meta, **options)
        dtypes = tuple(array.dtype for array in own)
        CompileTimes.add((step.kernel, step.meta, step.warps, device, dtypes), time.perf_counter() - started)
        return compiled

    def _prepare(self, kernels: list[Any]) -> DirectLaunches | None:
        launches = [
            Launch(kernel, step.grid, tuple(self._places[name] for name in step.arrays), (*step.scalars, *step.meta))
            for kernel, step in zip(kernels, self._steps, strict=True)
        ]
        try:
            return DirectLaunches(launches, len(self._names) + len(self._offsets))
        except UnsupportedError as error:
            _warn_once(str(error))
            return None


@cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"mhc_kernels: {reason}; its launches go through Triton, which takes more host time", stacklevel=5)
