"""mHC operations on PyTorch tensors. Knows nothing of Megatron."""

from mhc_kernels.norm import RMSNorm
from mhc_kernels.ops import aggregate, boundary, connect, head, mappings, mix, sinkhorn

__all__ = ["RMSNorm", "aggregate", "boundary", "connect", "head", "mappings", "mix", "sinkhorn"]
