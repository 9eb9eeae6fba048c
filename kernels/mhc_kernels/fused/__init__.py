"""Triton kernels of the mHC operations, forward and backward. Import `mhc_kernels`: there triton is optional."""
