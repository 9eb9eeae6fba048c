"""How many sublayers share the streams that are kept (``--mhc-recompute``; arXiv 2512.24880, section 4.3.2).

A block of L_r sublayers keeps its first streams; the backward computes the others again (`mhc_kernels.recompute`).
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches
from megatron.core.utils import log_single_rank

from mhc_kernels.recompute_block import can_tell_hooks
from mhc_megatron.config import MHCConfig

_logger = logging.getLogger(__name__)
_MANY = 10**6  # microbatches: more than any schedule's warm-up
_ATTRIBUTE = "mhc_planned_length"


@dataclass(frozen=True)
class PlannedLength:
    """L_r of this rank's chunks as the planner finds it (`mhc_megatron.megatron_hooks.planned`).

    Left on Megatron's TransformerConfig, where the model's modules look for it. length: None if the planner could not choose;
    then the formula does. sublayers: of the chunks that it is for. said: what rank 0 is told, or why there is none.
    """

    length: int | None
    sublayers: tuple[int, ...]
    said: str


def set_planned_length(config: Any, planned: PlannedLength) -> None:
    """Leave it on ``config`` for the models that will be built with it."""
    setattr(config, _ATTRIBUTE, planned)


def planned_length(config: Any) -> PlannedLength:
    """What was left there."""
    nothing = "the planner has no Megatron arguments here (mhc_megatron.enable() before they are parsed)"
    planned: PlannedLength = getattr(config, _ATTRIBUTE, PlannedLength(None, (), nothing))
    return planned


def streams_held(sublayers: int, in_flight: int, length: int) -> int:
    """At most, with blocks of so many sublayers; in units of n*C values a token.

    ``in_flight * ceil(L / L_r)`` are kept, and one microbatch's backward holds up to L_r more. The paper (section 4.3.2) counts
    n + 2 where this counts n for the latter: here the mappings are kept, and of the sublayers' inputs one at a time is back.
    """
    return in_flight * math.ceil(sublayers / length) + length


def automatic_length(sublayers: int, in_flight: int) -> int:
    """The L_r with the fewest `streams_held`: the paper's formula.

    Args:
        sublayers: L, of one pipeline chunk.
        in_flight: microbatches (with an interleaved schedule: times chunks) whose activations a rank holds at once.
    """
    return min(range(1, sublayers + 1), key=lambda length: (streams_held(sublayers, in_flight, length), length))


def microbatches_in_flight(group_size: int | None, place: Any = None) -> int:
    """How many forward passes a rank's 1F1B schedule, interleaved or not, is ahead of its backward passes at most, given
    microbatches enough.

    Args:
        group_size: ``microbatch_group_size_per_vp_stage``; None is Megatron's default, the stages.
        place: of the rank in the pipeline, as a P2PCommunicator has it; None: this process's.
    """
    if place is None:
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        chunks = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    else:
        stages, chunks = place.pp_group.size(), place.virtual_pipeline_model_parallel_size
    _, _, warm_up, _ = get_pp_rank_microbatches(_MANY, chunks or 1, group_size or stages, p2p_communicator=place)
    return warm_up + 1


def recomputes(mhc_config: MHCConfig, config: Any, triton: bool) -> bool:
    """Whether ``--mhc-recompute`` applies to this model; rank 0 says so if it was asked for and does not.

    Args:
        mhc_config, config: settings; Megatron's TransformerConfig.
        triton: whether the Triton kernels run: the reference keeps what autograd keeps.
    """
    if not mhc_config.recompute:
        return False
    if config.recompute_granularity == "full":
        _report("off: recompute_granularity 'full' keeps no streams inside a layer, and computes whole layers again")
        return False
    if not triton:
        _report("off: the reference backend keeps all streams")
        return False
    if not can_tell_hooks():
        _report(f"what sublayers read is kept: torch {torch.__version__} can't tell whether saved tensors are hooked")
    return True


def block_length(mhc_config: MHCConfig, sublayers: int, group_size: int | None, planned: PlannedLength) -> int:
    """L_r of a chunk: as given, as planned, or the formula's, which depends on the pipeline stage; rank 0 says what it takes."""
    if mhc_config.recompute_sublayers:
        length = min(mhc_config.recompute_sublayers, sublayers)
        _report(f"blocks of {length} sublayers, as asked for ({sublayers} in a row)")
        return length
    reason = planned.said
    if planned.length is not None:
        if sublayers in planned.sublayers:
            _report(reason)
            return min(planned.length, sublayers)
        reason = f"{sublayers} sublayers in a row are not what the planner made of Megatron's arguments"
    in_flight = microbatches_in_flight(group_size)
    length = automatic_length(sublayers, in_flight)
    _report(
        f"blocks of {length} sublayers by the formula ({sublayers} in a row, {in_flight} microbatches in flight): {reason}"
    )
    return length


@cache
def _report(choice: str) -> None:
    # At the level that Megatron shows by default.
    log_single_rank(_logger, logging.WARNING, f"mHC: recompute: {choice}")
