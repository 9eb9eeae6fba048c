"""The peak of a pipeline stage's activations: its passes, played in Megatron's own order (`order`).

A forward pass leaves its activations behind, the backward pass of the same microbatch and chunk takes them away, and the peak is
that of the worst pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mhc_megatron.plan.activations import Pass
from mhc_megatron.plan.order import Compute, Order
from mhc_megatron.plan.run import Run


def run_order(run: Run) -> Order:
    """The instructions of the run's pipeline."""
    config = run.config
    return Order(
        run.stages,
        run.microbatches,
        run.chunks_per_stage,
        run.group,
        bool(config.overlap_p2p_comm),
        bool(config.overlap_p2p_comm_warmup_flush),
        bool(config.deallocate_pipeline_outputs),
    )


def stage_order(run: Run, stage: int) -> list[Compute]:
    """A stage's passes in order, as many of them as the peak takes.

    They repeat themselves after some microbatches, and a step of thousands need not be played.
    """
    enough = min(run.microbatches, 4 * max(run.group, run.stages) * run.chunks_per_stage)
    whole = run.group * (enough // run.group) or run.microbatches
    order = run_order(replace(run, microbatches=min(whole, run.microbatches)))
    return [instruction for instruction in order.instructions(stage) if isinstance(instruction, Compute)]


def peak(order: Sequence[Compute], passes: Sequence[Pass]) -> tuple[float, int]:
    """The peak in bytes, and how many passes are in flight at most.

    Args:
        order: `stage_order`.
        passes: of the stage's chunks.
    """
    held = highest = 0.0
    in_flight = most = 0
    for compute in order:
        chunk = passes[compute.chunk]
        if compute.forward:
            highest = max(highest, held + chunk.forward)
            held += chunk.kept
            in_flight += 1
        else:
            held -= chunk.kept
            highest = max(highest, held + chunk.backward)
            in_flight -= 1
        most = max(most, in_flight)
    return highest, most
