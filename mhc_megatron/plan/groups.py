"""An interleaved schedule that leaves transfers more time: larger groups of microbatches, and a warm-up that overlaps them.

With as many microbatches in a group as there are stages (Megatron's default), the first stage needs what the last one has just
made: each warm-up transfer is waited for. With more of them it has some passes of time, if ``overlap_p2p_comm_warmup_flush`` lets
it. That takes memory: more microbatches are in flight.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

from mhc_megatron.plan.peak import run_order
from mhc_megatron.plan.run import Run


def larger_groups(run: Run) -> Iterator[tuple[str, Run]]:
    """Arguments to add, and the run with them: groups up to twice the stages, those that Megatron takes."""
    if run.chunks_per_stage == 1 or not run.config.overlap_p2p_comm:
        return
    for group in range(max(run.group, run.stages) + 1, 2 * run.stages + 1):
        config = copy.copy(run.config)
        config.microbatch_group_size_per_vp_stage, config.overlap_p2p_comm_warmup_flush = group, True
        changed = replace(run, config=config)
        try:
            run_order(changed)
        except ValueError:
            continue
        yield (
            f"--microbatch-group-size-per-virtual-pipeline-stage {group} --overlap-p2p-communication-warmup-flush",
            changed,
        )
