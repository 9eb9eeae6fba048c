"""Pipeline transfers between stages of one machine by the GPUs' copy engines, which take no multiprocessor from computation."""
