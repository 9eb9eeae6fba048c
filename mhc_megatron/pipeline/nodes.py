"""Whether pipeline transfers leave a node: they cross a network then, slower than what connects its GPUs."""

from __future__ import annotations

import os
from itertools import pairwise

import torch.distributed as dist
from megatron.core import parallel_state

# Ranks of a node: torchrun's, Slurm's (with --ntasks-per-node), Open MPI's.
VARIABLES = ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE", "OMPI_COMM_WORLD_LOCAL_SIZE")


def leaves_node() -> bool | None:
    """Whether this rank's pipeline has neighbouring stages on two nodes; None where that is not known.

    Nodes hold equal numbers of ranks, in order. The same for all ranks of a pipeline. Known once Megatron's process groups are
    there, where one of `VARIABLES` says how many ranks a node has.
    """
    size = next((value for value in map(os.environ.get, VARIABLES) if value), "")
    group = parallel_state.get_pipeline_model_parallel_group(check_initialized=False)
    if not size.isdigit() or int(size) == 0 or group is None:
        return None
    nodes = [rank // int(size) for rank in dist.get_process_group_ranks(group)]
    return any(a != b for a, b in pairwise(nodes))
