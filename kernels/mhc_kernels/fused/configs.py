"""Block sizes of every kernel, by n, C and dtype: fixed, so that the first call does not tune and every run has the same bits.

Chosen on an H200 (sm_90) in bf16 with n = 4 and 2, and roughly for 8; see kernels/README.md. Every architecture gets them.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from triton import next_power_of_2

from mhc_kernels.fused.launch import INTERPRET
from mhc_kernels.fused.library import cdiv


class Rows(NamedTuple):
    """BM tokens by BC channels a tile, V neighbours summed in a thread, SPLIT programs share a row; SWAP: phi x^T for x phi^T."""

    BM: int
    BC: int
    V: int
    SPLIT: int
    STAGES: int
    warps: int
    SWAP: bool = False


def _fit(config: Rows, c: int) -> Rows:
    if INTERPRET:  # cost follows the number of operations: few, big tiles
        config = Rows(64, 256, 8, 2, 1, 4)
    bc = min(config.BC, max(16, next_power_of_2(c)))
    split = max(1, min(config.SPLIT, c // bc))
    return config._replace(BC=bc, SPLIT=split)


@cache
def mix_project(n: int, c: int, bf16: bool) -> Rows:
    """Configuration of `mix_project_kernel`."""
    if not bf16:
        return _fit(Rows(32, 32, 8, 2, 2, 8) if n <= 4 else Rows(8, 64, 8, 1, 2, 4), c)
    if n > 4:  # the mix alone
        return _fit(Rows(4, 256, 8, 1, 3, 4), c)
    if n <= 2:
        return _fit(Rows(64, 128, 8, 2, 3, 8, SWAP=True), c)
    return _fit(Rows(64, 64, 8, 2, 3, 8), c)


@cache
def project(n: int, c: int, bf16: bool) -> Rows:
    """Configuration of `project_kernel`; BC columns of the n*C."""
    return _fit(Rows(128, 64, 8, 2, 4, 8) if bf16 else Rows(32, 32, 8, 2, 2, 8), n * c)


@cache
def aggregate(n: int, c: int, bf16: bool) -> Rows:
    """Configuration of `map_aggregate_kernel` and the kernels of `aggregate`."""
    if n > 4 or not bf16:
        return _fit(Rows(4, 256, 8, 1, 2, 4), c)
    return _fit(Rows(4, 512, 8, 1, 3, 4), c)


@cache
def stream_backward(n: int, c: int, bf16: bool) -> Rows:
    """Configuration of `stream_backward_kernel`."""
    if not bf16:
        return _fit(Rows(16, 32, 8, 1, 2, 4), c)
    if n > 4:
        return _fit(Rows(2, 64, 4, 1, 3, 1), c)
    return _fit(Rows(16, 64, 4, 1, 3, 4), c)


@cache
def mapping_backward(n: int, c: int, bf16: bool) -> Rows:
    """Configuration of `mapping_backward_kernel`."""
    if n > 4 or not bf16:
        return _fit(Rows(8, 128, 8, 1, 3, 4), c)
    return _fit(Rows(16, 128, 8, 1, 3, 4), c)


REDUCE_BLOCK = 8192 if INTERPRET else 2048  # elements of dphi a program adds up


def token_block(n: int) -> int:
    """Tokens a program of the mappings: their n*n matrices are in its registers."""
    if INTERPRET:
        return 64
    return 64 if n <= 4 else 32


def token_block_backward(n: int) -> int:
    """As `token_block`, in the backward, where the sums of all iterations are in registers as well."""
    if INTERPRET:
        return 64
    return 64 if n <= 4 else 4


def pack(padded_rows: int, padded_streams: int, c: int) -> int:
    """Channels a program of `pack_kernel`: tiles of 8192 elements at most."""
    return min(next_power_of_2(c), 256 if INTERPRET else max(1, 8192 // (padded_rows * padded_streams)))


class Columns(NamedTuple):
    """BM tokens by BK columns a tile; the tokens in PARTS ranges."""

    BM: int
    BK: int
    PARTS: int
    STAGES: int
    warps: int


@cache
def phi_backward(n: int, c: int, bf16: bool) -> Columns:
    """Configuration of `phi_backward_kernel`: as many parts as are resident at once on 132 multiprocessors."""
    config = Columns(64, 128, 1, 3, 4)
    resident = 264
    if not bf16:
        config = Columns(32, 64, 1, 2, 4)
    elif n > 4:
        config, resident = Columns(64, 128, 1, 3, 8), 640
    if INTERPRET:
        return Columns(64, min(256, max(16, next_power_of_2(n * c))), 2, 1, 4)
    blocks = cdiv(n * c, config.BK)
    return config._replace(
        BK=min(config.BK, max(16, next_power_of_2(n * c))), PARTS=max(1, min(16, resident // blocks))
    )
