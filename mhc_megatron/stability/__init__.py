"""python -m mhc_megatron stability: what the constraint on H_res buys, measured."""
