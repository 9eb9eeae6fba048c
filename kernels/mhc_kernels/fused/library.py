"""How an operator gets into ``torch.library`` (namespace ``mhc_kernels``), and the sizes that all of them share."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton import next_power_of_2

from mhc_kernels.fused.launch import INTERPRET

_LIBRARY = torch.library.Library("mhc_kernels", "DEF")


def cdiv(a: int, b: int) -> int:
    """``a / b``, rounded up. `triton.cdiv` inspects its arguments: too slow for every launch."""
    return -(-a // b)


def operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Define an operator: the decorated function on CUDA (under Triton's interpreter on the CPU), ``fake`` for shapes.

    Both may return None for some of several results: the operator then has an empty tensor there.

    What the decorator returns goes through PyTorch's dispatcher only where something may be listening there: in a
    compiler, and where arguments are `observed`. Else it calls the function, which saves the dispatcher's host time.
    """
    name = schema.split("(")[0]
    _LIBRARY.define(schema)
    torch.library.register_fake(f"mhc_kernels::{name}", _without_none(fake), lib=_LIBRARY)

    def implement(function: Callable[..., Any]) -> Callable[..., Any]:
        complete = _without_none(function)
        _LIBRARY.impl(name, complete, "CUDA")
        if INTERPRET:
            _LIBRARY.impl(name, complete, "CPU")
        op = getattr(torch.ops.mhc_kernels, name).default

        @functools.wraps(function)
        def call(*arguments: Any) -> Any:
            return op(*arguments) if torch.compiler.is_compiling() or observed(*arguments) else function(*arguments)

        return call

    return implement


def _without_none(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def complete(*arguments: Any) -> Any:
        results = function(*arguments)
        if results is None or isinstance(results, Tensor):
            return results
        like = next(result for result in results if result is not None)
        return tuple(like.new_empty(0) if result is None else result for result in results)

    return complete


def observed(*arguments: Any) -> bool:
    """Whether an operator's call has to go through the dispatcher: under a dispatch mode (fake tensors), for tensor
    subclasses."""
    return torch._C._len_torch_dispatch_stack() != 0 or not _PLAIN.issuperset(map(type, arguments))


_PLAIN = {Tensor, torch.nn.Parameter, type(None), float, int, bool}  # no tensor subclasses


class Sizes:
    """Sizes of one call on streams x ``[..., n*C]`` (`sizes`).

    - t: tokens; device: the GPU's index, -1 for the CPU; bf16: the streams' dtype; wide: n > 4.
    - rows: R = n*n + 2n projected values; padded_rows: RP, a power of two > R (one more column holds the sum of squares);
      padded_streams: P, a power of two >= n; padded_totals, padded_pre: RT, NT, for rows + 3 and n + 1 sums.
    - dot32: products with phi in float32, else bf16; product_dtype: of what goes into them; back_dtype: of phi as it is kept
      for the backward, which splits it itself if wide.
    - packed: (n, P, C) of phi as `pack_kernel` takes it; whole rows if wide. widths: its columns in the forward's product, or
      two of them (width: both), hi | lo if bf16; low: where lo starts.
    - sums_width: columns of the projection's partial sums; sums_low: where lo's start, if they are not added to hi's.
    - da_width: columns of da, the gradient of the projected values: bf16 hi, and lo da_low further (0: none); if wide, those
      of H_res first, without lo. partial_rows: rows of dphi's partial sums.
    - kept: float32 numbers that every forward leaves for its backward.
    """

    def __init__(self, t: int, c: int, n: int, dtype: torch.dtype, device: int):
        self.t, self.c, self.n, self.device = t, c, n, device
        self.rows = n * n + 2 * n
        self.padded_rows = max(16 if n == 1 else 32, next_power_of_2(self.rows + 1))
        self.padded_streams = next_power_of_2(n)
        self.padded_totals = next_power_of_2(self.rows + 3)
        self.padded_pre = next_power_of_2(n + 1)
        self.bf16 = dtype == torch.bfloat16
        # The interpreter keeps bf16 as uint16: there the same values are multiplied in float32.
        self.dot32 = not self.bf16 or INTERPRET
        self.product_dtype = torch.bfloat16 if self.bf16 else torch.float32
        self.wide = n > 4
        self.back_dtype = torch.float32 if self.wide else self.product_dtype
        self.widths = (2 * self.padded_rows if self.bf16 else self.padded_rows, 0)
        self.low, self.sums_width, self.sums_low = self.padded_rows, self.padded_rows, 0
        if self.wide and self.bf16:
            self.low = self.sums_low = self.rows
            first = next_power_of_2(2 * self.rows + 1) // 2
            self.widths = (first, max(16, next_power_of_2(2 * self.rows - first)) if 2 * self.rows > first else 0)
            self.sums_width = 2 * self.rows + 32 - 2 * self.rows % 32
        self.width = sum(self.widths)
        self.packed = (1, 1, n * c) if self.wide else (n, self.padded_streams, c)
        kept_phi = self.padded_rows * self.packed[1] * self.packed[2]
        self.kept = t * self.padded_rows + kept_phi * self.back_dtype.itemsize // 4
        self.partial_rows = self.rows if self.wide else self.padded_rows
        self.da_low = (2 * self.padded_streams if self.wide else self.padded_rows) if self.bf16 else 0
        self.da_width = self.da_low + (
            self.padded_streams**2 + 2 * self.padded_streams if self.wide else self.padded_rows
        )


_sizes = functools.lru_cache(1024)(Sizes)


def sizes_of(shape: tuple[int, ...], n: int, dtype: torch.dtype, device: int) -> Sizes:
    """`Sizes` of streams of this shape, ``[..., n*C]``."""
    return _sizes(math.prod(shape[:-1]), shape[-1] // n, n, dtype, device)


def sizes(x: Tensor, n: int) -> Sizes:
    """`Sizes` of streams x ``[..., n*C]``."""
    width = x.shape[-1]
    elements = x.numel()
    if type(elements) is int:
        return _sizes(elements // width, width // n, n, x.dtype, x.get_device())
    tokens = 1  # torch.compile's symbols: the number of tokens may stay one
    for dimension in range(x.dim() - 1):
        tokens *= x.shape[dimension]
    return Sizes(tokens, int(width) // n, n, x.dtype, x.get_device())
