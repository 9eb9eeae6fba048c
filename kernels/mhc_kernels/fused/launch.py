"""Launching a kernel with little host time: the compiled kernel is looked up by what it was compiled for and run directly.

Triton's own launch path inspects every argument at every call ; a boundary has six launches. The
direct path uses what Triton 3.6 has inside a compiled kernel; with any other release Triton's own path is taken.
"""

from __future__ import annotations

import os
import time
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs

from mhc_kernels.fused.workspace import Part

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
_DIRECT = triton.__version__.split(".")[:2] == ["3", "6"] and not INTERPRET
_ALIGNMENT = 16  # bytes; what Triton specialises pointers on


class CompileTimes:
    """Kernels built (or loaded from Triton's cache) by this process, and the seconds that took."""

    kernels = 0
    seconds = 0.0


class Launcher:
    """A kernel, and its compiled versions.

    Args:
        kernel: a ``triton.jit`` function whose run-time arguments come first, its constexpr arguments after them. The dtypes of
            its tensors must follow from those of the first two and the constexpr arguments.
        unaligned: the last so many tensors may be at any address (``do_not_specialize_on_alignment``): Megatron's gradient
            buffers have no gaps.
    """

    def __init__(self, kernel: Any, unaligned: int = 0):
        self.kernel = kernel
        self.aligned = -unaligned or None
        self._compiled: dict[tuple, Any] = {}
        self._built: set[tuple] = set()

    def __call__(
        self, grid: int | tuple[int, int], tensors: tuple[Tensor | Part, ...], scalars: tuple, meta: tuple, warps: int
    ) -> None:
        """Run on the current stream of the tensors' device. ``meta``: the constexpr arguments, in order."""
        device = tensors[0].get_device()
        blocks = (grid, 1, 1) if isinstance(grid, int) else (*grid, 1)
        if not _DIRECT or knobs.runtime.launch_enter_hook.calls:
            self._by_triton(device, blocks, tensors, scalars, meta, warps)
            return
        pointers = [tensor.data_ptr() for tensor in tensors]
        bits = 0
        for pointer in pointers[: self.aligned]:
            bits |= pointer
        key: tuple = (meta, warps, tensors[0].dtype, tensors[1].dtype, device, bits % _ALIGNMENT)
        if bits % _ALIGNMENT:  # rare: which of them are not aligned is part of what is compiled
            key = (*key, *[pointer % _ALIGNMENT for pointer in pointers[: self.aligned]])
        compiled = self._compiled.get(key)
        if compiled is None:
            self._compiled[key] = self._by_triton(device, blocks, tensors, scalars, meta, warps)
            return
        if device != torch._C._cuda_getDevice():
            with torch.cuda.device(device):
                self._run(compiled, blocks, device, (*pointers, *scalars, *meta))
        else:
            self._run(compiled, blocks, device, (*pointers, *scalars, *meta))

    @staticmethod
    def _run(compiled: Any, blocks: tuple[int, int, int], device: int, arguments: tuple) -> None:
        stream = torch._C._cuda_getCurrentRawStream(device)
        run = compiled._run
        if run.global_scratch_size or run.profile_scratch_size:
            run(*blocks, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments)
        else:
            run.launch(
                *blocks, stream, compiled.function, run.launch_cooperative_grid, run.launch_pdl, None, None,
                compiled.packed_metadata, None, None, None, *arguments,
            )  # fmt: skip

    def _by_triton(self, device: int, blocks: tuple, tensors: tuple, scalars: tuple, meta: tuple, warps: int) -> Any:
        started = time.perf_counter()
        tensors = tuple(t.tensor() if isinstance(t, Part) else t for t in tensors)
        if device >= 0:
            with torch.cuda.device(device):
                compiled = self.kernel[blocks](*tensors, *scalars, *meta, num_warps=warps)
        else:  # the interpreter
            compiled = self.kernel[blocks](*tensors, *scalars, *meta)
        built = (meta, warps, device, *[tensor.dtype for tensor in tensors[:2]])
        if built not in self._built:
            self._built.add(built)
            CompileTimes.kernels += 1
            CompileTimes.seconds += time.perf_counter() - started
        return compiled
