"""Block sizes of every kernel, by n, C, dtype and shared memory: fixed, so that the first call does not tune and every run
has the same bits.

Chosen on an H200 (sm_90) in bf16 with n = 4, 2 and 8, see kernels/README.md; A100 (sm_80) and later data-centre GPUs take the
same ones where their shared memory holds them. The others are for GPUs with less of it: neither measured nor run.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from triton import next_power_of_2

from mhc_kernels.fused.launch import INTERPRET
from mhc_kernels.fused.library import Sizes, cdiv


@cache
def _shared_memory(device: int) -> int:
    """Bytes that one program may have; an H200's where there is no GPU (fake tensors, the interpreter)."""
    if device < 0 or not torch.cuda.is_available():
        return 232448
    properties: Any = torch.cuda.get_device_properties(device)  # PyTorch's stub lacks the attribute
    return properties.shared_memory_per_block_optin


class Rows(NamedTuple):
    """BM tokens by BC channels a tile, V neighbours summed in a thread, SPLIT programs share a row; SWAP: phi x^T for x phi^T.

    shared: bytes of shared memory that it takes at most, where that may be too much.
    """

    BM: int
    BC: int
    V: int
    SPLIT: int
    STAGES: int
    warps: int
    SWAP: bool = False
    shared: int = 0


def _fit(s: Sizes, c: int, *candidates: Rows) -> Rows:
    """The first one for which there is shared memory, for rows of c channels."""
    memory = _shared_memory(s.device)
    config = next((candidate for candidate in candidates if candidate.shared <= memory), candidates[-1])
    if INTERPRET:  # cost follows the number of operations: few, big tiles
        config = Rows(64, 256, 8, 2, 1, 4)
    bc = min(config.BC, max(16, next_power_of_2(c)))
    return config._replace(BC=bc, SPLIT=max(1, min(config.SPLIT, c // bc)))


def mix_project(s: Sizes) -> Rows:
    """Configuration of `mix_project_kernel`."""
    if s.wide:  # the mix alone
        return _fit(s, s.c, Rows(2, 512, 8, 1, 3, 4) if s.bf16 else Rows(8, 64, 8, 1, 2, 4))
    if not s.bf16:
        return _fit(s, s.c, Rows(32, 32, 8, 2, 2, 8))
    if s.n <= 2:
        large, small = Rows(64, 128, 8, 2, 3, 8, True, 180224), Rows(64, 64, 8, 2, 2, 8, True)
        return _fit(s, s.c, large, small)
    large, middle, small = Rows(64, 64, 8, 2, 3, 8), Rows(64, 64, 8, 2, 2, 8), Rows(64, 32, 8, 2, 2, 8)
    return _fit(s, s.c, large._replace(shared=188416), middle._replace(shared=114688), small)


def project(s: Sizes) -> Rows:
    """Configuration of `project_kernel`; BC columns of the n*C."""
    if not s.bf16:
        return _fit(s, s.n * s.c, Rows(32, 32, 8, 2, 2, 8))
    return _fit(s, s.n * s.c, Rows(128, 64, 8, 2, 4, 8, shared=172032), Rows(128, 64, 8, 2, 2, 8))


def aggregate(s: Sizes) -> Rows:
    """Configuration of `map_aggregate_kernel` and the kernels of `aggregate`."""
    return _fit(s, s.c, Rows(4, 256, 8, 1, 3 if s.bf16 else 2, 4) if s.wide or not s.bf16 else Rows(4, 512, 8, 1, 3, 4))


def stream_backward(s: Sizes) -> Rows:
    """Configuration of `stream_backward_kernel`."""
    if not s.bf16:
        return _fit(s, s.c, Rows(16, 32, 8, 1, 2, 4))
    if s.wide:
        return _fit(s, s.c, Rows(1, 256, 8, 1, 3, 1))
    return _fit(s, s.c, Rows(16, 64, 4 if s.n > 2 else 2, 1, 3, 4))


def mapping_backward(s: Sizes, normalises: bool) -> Rows:
    """Configuration of `mapping_backward_kernel`. With a norm, a thread holds all tokens of its channels: sums over them
    need no other thread."""
    if s.wide or not s.bf16:
        return _fit(s, s.c, Rows(8, 128, 8, 1, 3, 4))
    return _fit(s, s.c, Rows(4, 512, 8, 1, 3, 2) if normalises else Rows(16, 128, 8, 1, 3, 4))


REDUCE_BLOCK = 8192 if INTERPRET else 2048  # elements of dphi a program adds up


GAMMA_BLOCK = 256 if INTERPRET else 64  # channels of a norm's weight whose gradient a program adds up


def token_block(n: int) -> int:
    """Tokens a program of the mappings: their n*n matrices are in its registers."""
    if INTERPRET:
        return 64
    return 64 if n <= 4 else 32


def token_block_backward(n: int, warps: int) -> int:
    """As `token_block`, in the backward, where the sums of all iterations are in registers as well."""
    if INTERPRET:
        return 64
    return 16 * warps if n <= 4 else 4


def pack(padded_rows: int, padded_streams: int, c: int) -> int:
    """Channels a program of `pack_kernel`: tiles of 2048 elements, to have enough programs."""
    return min(next_power_of_2(c), 256 if INTERPRET else max(1, 2048 // (padded_rows * padded_streams)))


class Columns(NamedTuple):
    """BM tokens by BK columns a tile; PARTS programs share the tokens."""

    BM: int
    BK: int
    PARTS: int
    STAGES: int
    warps: int


def phi_backward(s: Sizes) -> Columns:
    """Configuration of `phi_backward_kernel`: as many parts as fill 132 multiprocessors evenly."""
    k = s.n * s.c
    programs = 264
    if INTERPRET:
        return Columns(64, min(256, max(16, next_power_of_2(k))), 2, 1, 4)
    if not s.bf16:
        config = Columns(32, 64, 1, 2, 4)
    elif not s.wide:
        config = Columns(64, 128, 1, 3, 4)
    else:
        config, programs = Columns(64, 64, 1, 3 if _shared_memory(s.device) >= 114688 else 2, 4), 1280
    parts = max(1, min(16, programs // cdiv(k, config.BK)))
    return config._replace(BK=min(config.BK, max(16, next_power_of_2(k))), PARTS=parts)
