"""Triton kernels of the mHC operations, forward and backward. Import `mhc_kernels`, not this package: triton is
optional there."""
