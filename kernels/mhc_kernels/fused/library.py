"""How an operator gets into ``torch.library`` (namespace ``mhc_kernels``), and the sizes that all of them share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mhc_kernels.fused.configs import power_of_two
from mhc_kernels.fused.launch import INTERPRET

_LIBRARY = torch.library.Library("mhc_kernels", "DEF")


def operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Define an operator: the decorated function on CUDA (under Triton's interpreter on the CPU), ``fake`` for shapes."""
    name = schema.split("(")[0]
    _LIBRARY.define(schema)
    torch.library.register_fake(f"mhc_kernels::{name}", fake, lib=_LIBRARY)

    def implement(function: Callable[..., Any]) -> Callable[..., Any]:
        _LIBRARY.impl(name, function, "CUDA")
        if INTERPRET:
            _LIBRARY.impl(name, function, "CPU")
        return getattr(torch.ops.mhc_kernels, name).default

    return implement


class Sizes:
    """Sizes of one call on streams x ``[..., n*C]``.

    t: tokens; rows: R = n*n + 2n projected values; padded_rows: RP, a power of two > R (one more column holds the sum
    of squares);
    padded_streams: P, a power of two >= n;
    padded_totals, padded_pre: RT, NT, for rows + 3 and n + 1 sums.
    """

    __slots__ = (
        "bf16", "c", "dot32", "itemsize", "n", "padded_pre", "padded_rows", "padded_streams", "padded_totals", "rows", "t"
    )  # fmt: skip

    def __init__(self, x: Tensor, n: int):
        self.n = n
        self.c = x.shape[-1] // n
        self.t = math.prod(x.shape[:-1])
        self.rows = n * n + 2 * n
        self.padded_rows = power_of_two(self.rows + 1, 16)
        self.padded_streams = power_of_two(n)
        self.padded_totals = power_of_two(self.rows + 3)
        self.padded_pre = power_of_two(n + 1)
        self.itemsize = x.element_size()
        self.bf16 = x.dtype == torch.bfloat16
        # The interpreter keeps bf16 as uint16: there the same values are multiplied in float32.
        self.dot32 = not self.bf16 or INTERPRET

    @property
    def width(self) -> int:
        """Columns of phi in the products: bf16 hi | lo, or float32."""
        return 2 * self.padded_rows if self.bf16 else self.padded_rows

    @property
    def product_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float32


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)
