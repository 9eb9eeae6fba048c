"""Block sizes of every kernel, by shape and architecture: fixed, so that the first call does not tune and every run has
the same bits.

Measured on an H200 (sm_90) with n = 4; see kernels/README.md. Other architectures get the same sizes, other n scaled ones.
"""

from __future__ import annotations

from typing import NamedTuple

from mhc_kernels.fused.launch import INTERPRET


class Rows(NamedTuple):
    """BM tokens by BC channels a tile, V neighbours summed in a thread, SPLIT programs share a row."""

    BM: int
    BC: int
    V: int
    SPLIT: int
    STAGES: int
    warps: int


def power_of_two(value: int, least: int = 1) -> int:
    """The smallest power of two >= value and least."""
    return max(least, 1 << max(0, value - 1).bit_length())


def _fit(config: Rows, t: int, c: int) -> Rows:
    if INTERPRET:  # cost follows the number of operations: few, big tiles
        config = Rows(64, 256, 8, 2, 1, 4)
    bc = min(config.BC, power_of_two(c, 16))
    split = max(1, min(config.SPLIT, c // bc))
    return config._replace(BC=bc, SPLIT=split)


def mix_project(n: int, c: int, t: int, itemsize: int) -> Rows:
    """Configuration of `mix_project_kernel`."""
    if itemsize == 4 or n > 4:
        return _fit(Rows(32, 32, 8, 2, 2, 8), t, c)
    return _fit(Rows(64, 64, 8, 2, 3, 8), t, c)


def aggregate(n: int, c: int, t: int, itemsize: int) -> Rows:
    """Configuration of `map_aggregate_kernel`, `mapping_backward_kernel` and the kernels of `aggregate`."""
    if n > 4 or itemsize == 4:
        return _fit(Rows(8, 128, 8, 1, 2, 4), t, c)
    return _fit(Rows(4, 512, 8, 1, 3, 4), t, c)


def stream_backward(n: int, c: int, t: int, itemsize: int) -> Rows:
    """Configuration of `stream_backward_kernel`."""
    if itemsize == 4 or n > 4:
        return _fit(Rows(16, 32, 8, 1, 2, 4), t, c)
    return _fit(Rows(16, 64, 4, 1, 3, 4), t, c)


def token_block(n: int) -> int:
    """Tokens a program (4 warps) of the mappings: a thread holds a quarter row of a token's n*n matrix or more."""
    if INTERPRET:
        return 64
    return 128 if n <= 4 else 16


def pack(n: int, c: int) -> int:
    """Channels a program of `pack_kernel`: tiles of 8192 elements at most."""
    padded = power_of_two(n * n + 2 * n + 1, 16) * power_of_two(n)
    return min(power_of_two(c), 256 if INTERPRET else max(1, 8192 // padded))


class MappingBackward(NamedTuple):
    """`mapping_backward_kernel`: BS tokens a program of the maps; BM tokens by BC channels a tile of du . x; chunks of
    CHUNK tokens; dphi LAG chunks later, BT tokens by BK columns a tile.
    """

    BS: int
    BM: int
    BC: int
    V: int
    STAGES: int
    CHUNK: int
    LAG: int
    BT: int
    BK: int
    PHI_STAGES: int
    warps: int


def mapping_backward(n: int, c: int, itemsize: int) -> MappingBackward:
    """Configuration of `mapping_backward_kernel`. A chunk of x is 10 MB or a little more: it has to stay in L2."""
    chunk = max(128, min(1024, power_of_two(10_000_000 // (n * c * itemsize)) // 2))
    config = MappingBackward(token_block(n), 2, 1024, 8, 1, chunk, 2, 64, 128, 3, 4)
    if itemsize == 4 or n > 5:
        config = config._replace(BC=256, STAGES=2, BT=32, BK=64, PHI_STAGES=2)
    if INTERPRET:
        config = config._replace(BM=64, BC=256, CHUNK=64, BT=64, BK=256, LAG=1)
    return config._replace(BC=min(config.BC, power_of_two(c, 16)), BK=min(config.BK, power_of_two(n * c, 16)))
