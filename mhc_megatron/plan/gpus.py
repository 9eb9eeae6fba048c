"""GPUs that a run may be planned for: data-sheet numbers, and the memory that PyTorch finds there."""

from __future__ import annotations

from dataclasses import dataclass

# Of the data sheet's bandwidth, what a copy reaches: 4.40 of 4.8 TB/s on an H200 (kernels/README.md); assumed for the others.
COPY_SHARE = 0.91


@dataclass(frozen=True)
class Gpu:
    """memory: GiB. bandwidth: bytes per second of its memory. flops: dense bf16 operations per second. Both of the data sheet."""

    name: str
    memory: float
    bandwidth: float
    flops: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 79.1, 2.04e12, 312e12),
        Gpu("h100", 79.1, 3.35e12, 989e12),
        Gpu("h200", 139.8, 4.8e12, 989e12),
        Gpu("b200", 178.3, 8.0e12, 2250e12),
    )
}
