"""python -m mhc_megatron doctor: what is installed here and whether it works, as a page for a bug report."""
