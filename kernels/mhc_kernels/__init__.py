"""mHC operations on PyTorch tensors. Knows nothing of Megatron."""

from mhc_kernels.add_output import add_output_, output_gradients
from mhc_kernels.norm import RMSNorm
from mhc_kernels.ops import aggregate, boundary, connect, head, mappings, mix, sinkhorn
from mhc_kernels.recompute_block import RecomputePlace, recompute
from mhc_kernels.recompute_input import free_until_backward

__all__ = [
    "RMSNorm",
    "RecomputePlace",
    "add_output_",
    "aggregate",
    "boundary",
    "connect",
    "free_until_backward",
    "head",
    "mappings",
    "mix",
    "output_gradients",
    "recompute",
    "sinkhorn",
]
