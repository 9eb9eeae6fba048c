"""Launching kernels with little host time.

A `Plan` has the launches of one operator for given sizes and options. Its first run goes through Triton, which inspects every
argument, compiles what is missing and returns the compiled kernels; later runs hand them the arrays' addresses and nothing else.
The direct path uses what Triton 3.6 has inside a compiled kernel; with any other release, and on AMD GPUs, every run goes through
Triton.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs

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
    """Arrays (shape, dtype) one after the other in ``base``: all but the last have a multiple of 16 bytes."""
    parts, offset = {}, 0
    for name, (shape, dtype) in arrays.items():
        assert offset % _ALIGNMENT == 0, (name, offset)
        parts[name] = Part(base, offset, shape, dtype)
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
        unaligned: the last so many tensors may be at any address (``do_not_specialize_on_alignment``): Megatron's gradient
            buffers have no gaps.
    """

    def __init__(
        self, tensors: tuple[str, ...], steps: Sequence[Step], parts: dict[str, Part] | None = None, unaligned: int = 0
    ):
        self._names, self._steps, self._parts = tensors, tuple(steps), parts or {}
        self._aligned = len(tensors) - unaligned
        self._offsets = tuple((tensors.index(part.base), part.offset) for part in self._parts.values())
        self._ready: dict[int, list[tuple]] = {}
        self.floats: dict[str, int] = {}
        """Sizes of the tensors that hold parts."""
        for part in self._parts.values():
            self.floats[part.base] = max(self.floats.get(part.base, 0), part.end // 4)

    def run(self, *tensors: Tensor) -> None:
        """Launch on the current stream of the first tensor's device."""
        device = tensors[0].get_device()
        pointers = [tensor.data_ptr() for tensor in tensors]
        bits = 0
        for pointer in pointers[: self._aligned]:
            bits |= pointer
        aligned = not bits % _ALIGNMENT
        ready = self._ready.get(device)
        if (
            ready is None
            or not aligned
            or device != torch._C._cuda_getDevice()
            or knobs.runtime.launch_enter_hook.calls
        ):
            self._by_triton(device, tensors, aligned)
            return
        for index, offset in self._offsets:
            pointers.append(pointers[index] + offset)
        stream = torch._C._cuda_getCurrentRawStream(device)
        for launch, grid, compiled, take, rest in ready:
            launch(*grid, stream, *compiled, *take(pointers), *rest)

    def _by_triton(self, device: int, tensors: Sequence[Tensor], aligned: bool) -> None:
        arrays = dict(zip(self._names, tensors, strict=True))
        for name, part in self._parts.items():
            arrays[name] = part.view(arrays[part.base])
        places = {name: place for place, name in enumerate((*self._names, *self._parts))}
        ready, plain = [], True
        for step in self._steps:
            started = time.perf_counter()
            own = [arrays[name] for name in step.arrays]
            arguments = (*own, *step.scalars, *step.meta)
            if device >= 0:
                with torch.cuda.device(device):
                    compiled = step.kernel[step.grid](*arguments, num_warps=step.warps)
            else:  # the interpreter
                compiled = step.kernel[step.grid](*arguments)
            dtypes = tuple(array.dtype for array in own)
            CompileTimes.add((step.kernel, step.meta, step.warps, device, dtypes), time.perf_counter() - started)
            if _DIRECT:
                take = itemgetter(*(places[name] for name in step.arrays))
                ready.append((*_direct(compiled, step.grid), take, (*step.scalars, *step.meta)))
                plain = plain and not compiled._run.global_scratch_size and not compiled._run.profile_scratch_size
        if _DIRECT and aligned and plain:  # scratch: instrumented kernels
            self._ready[device] = ready


def _direct(compiled: Any, grid: tuple[int, int, int]) -> tuple[Any, tuple, tuple]:
    """The function that launches, the grid, and what comes after the stream and before the kernel's arguments."""
    run = compiled._run
    fixed = (
        compiled.function, run.launch_cooperative_grid, run.launch_pdl, None, None, compiled.packed_metadata, None, None, None,
    )  # fmt: skip
    return run.launch, grid, fixed
