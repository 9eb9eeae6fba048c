"""python -m mhc_megatron quickstart"""
