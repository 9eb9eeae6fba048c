"""mHC operations on PyTorch tensors. Knows nothing of Megatron."""

from mhc_kernels.ops import aggregate, head, mappings, mix, sinkhorn

__all__ = ["aggregate", "head", "mappings", "mix", "sinkhorn"]
