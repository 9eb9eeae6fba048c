"""Pipeline transfers between stages of one machine by copies of the CUDA driver's, not by NCCL's kernels.

Between GPUs, and between GPU and host, copy engines move the data, and take no multiprocessor from computation. (Where the
driver has the last copy of a transfer over NVLink done, which is within one GPU, is its choice.)
"""
