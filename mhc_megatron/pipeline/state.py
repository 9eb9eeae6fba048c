"""What the model chunks of a rank and the pipeline schedule share: how wide the streams are, and how they are sent."""

from __future__ import annotations

import logging
import os
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron.core.pipeline_parallel.utils import is_pp_last_stage, is_vp_last_stage
from megatron.core.utils import log_single_rank

from mhc_megatron.config import MHCConfig
from mhc_megatron.pipeline.nodes import leaves_node

if TYPE_CHECKING:
    from mhc_megatron.pipeline.side_channel import SideChannel

_logger = logging.getLogger(__name__)
_ATTRIBUTE = "mhc_pipeline"
_AUTO_TRANSPORT = "nccl"  # copy engines were faster where they ran, which was not everywhere yet (README.md)


class Running(NamedTuple):
    """A pipelined schedule."""

    microbatches: int
    forward_only: bool


class PipelineState:
    """Kept on Megatron's TransformerConfig, which the chunks and the schedule have in common.

    num_streams: n. split: whether streams travel apart from the last sublayer's output. links: whether transfers go over links
    of their own (`pipeline.links`) instead of Megatron's; transport: what moves those. channel: what split streams travel on;
    the schedule's communicator sets it. running: the schedule that is, if that is known. announces: whether chunks tell when
    their backward comes to their first layer (those of one layer don't).
    """

    def __init__(self, num_streams: int, split: bool, links: bool = True, transport: str = "nccl"):
        self.num_streams, self.split, self.links, self.transport = num_streams, split, links, transport
        self.channel: SideChannel | None = None
        self.running: Running | None = None
        self.announces = False

    def __deepcopy__(self, memo: dict) -> PipelineState:
        return self  # process groups can't be copied, and a copied config is of the same pipeline


def share_pipeline(config: Any, mhc_config: MHCConfig) -> PipelineState:
    """The state on ``config``, made if it is not there; rank 0 says what was chosen.

    Raises:
        ValueError: if another model with this config has another number of streams.
    """
    state = pipeline_state(config)
    if state is None:
        several = config.pipeline_model_parallel_size > 1
        links = several and communication(mhc_config, config) != "wide-stock"
        transport = transport_of(mhc_config)
        state = PipelineState(mhc_config.num_streams, splits(mhc_config, config), links, transport)
        if several and not links and transport == "copy-engine":
            _report("--mhc-pipeline-transport copy-engine has no effect: the transfers are Megatron's own")
        setattr(config, _ATTRIBUTE, state)
    elif state.num_streams != mhc_config.num_streams:
        raise ValueError(
            f"num_streams={mhc_config.num_streams}, but a model with the same TransformerConfig already has "
            f"{state.num_streams} streams; use one MHCConfig for all its chunks, or a TransformerConfig of its own"
        )
    return state


def pipeline_state(config: Any) -> PipelineState | None:
    """The state that a model has left on its config; None for a model without mHC."""
    state: PipelineState | None = getattr(config, _ATTRIBUTE, None)
    return state


def transport_of(mhc_config: MHCConfig) -> str:
    """What moves transfers over links of their own: ``nccl`` or ``copy-engine``."""
    asked = mhc_config.pipeline_transport
    return _AUTO_TRANSPORT if asked == "auto" else asked


def communication(mhc_config: MHCConfig, config: Any, leaves: bool | None = None) -> str:
    """How streams travel between pipeline stages: ``split``, ``wide`` or ``wide-stock`` (Megatron's own transfers).

    leaves: whether transfers leave a machine, for a pipeline that is not there yet (`leaves_node`).
    """
    asked = mhc_config.pipeline_comm
    if mhc_config.num_streams == 1 or asked == "wide-stock" or why_not_own_links(config) is not None:
        return "wide-stock"
    if asked == "auto":
        asked, _ = choose(config, leaves)
    return "split" if asked == "split" and why_not_split(config) is None else "wide"


def choose(config: Any, leaves: bool | None = None) -> tuple[str, str]:
    """What ``auto`` is for a pipeline, and why.

    As measured (benchmarks/README.md): in 1F1B, where a stage waits for what it receives, split makes a step shorter over a link
    with the speed of a network card; over NVLink, and in an interleaved schedule, wide does, or is as good with less in memory.
    """
    if config.virtual_pipeline_model_parallel_size is not None:
        return "wide", "an interleaved schedule has time for its transfers"
    leaves = leaves_node() if leaves is None else leaves
    if leaves is None:
        return "wide", "where the stages will be is not known"
    if not leaves:
        return "wide", "neighbouring stages are on one node"
    if (reason := why_not_split(config)) is not None:
        return "wide", reason
    return "split", "1F1B across nodes"


def splits(mhc_config: MHCConfig, config: Any) -> bool:
    """Whether pipeline transfers are split. The same on all ranks: by settings, CUDA_LAUNCH_BLOCKING and `leaves_node`."""
    if config.pipeline_model_parallel_size == 1 or mhc_config.num_streams == 1:
        return False
    asked, chosen = mhc_config.pipeline_comm, ""
    if asked == "wide-stock":
        _report(f"wide, {mhc_config.num_streams} streams in Megatron's own transfers, as asked for")
        return False
    if asked == "auto":
        asked, why = choose(config)
        chosen = f" (auto: {why})"
    if asked == "wide":
        reason = why_not_own_links(config)
        links = "links of their own" if reason is None else f"Megatron's own transfers: {reason}"
        if reason is not None and reason in chosen:
            chosen = " (auto)"
        _report(f"wide{chosen}, {mhc_config.num_streams} streams in the schedule's transfers, over {links}")
        return False
    reason = why_not_split(config)
    if reason is not None:
        _report(f"wide instead of split: {reason}")
        return False
    which = f"split{chosen}"
    if config.virtual_pipeline_model_parallel_size is not None and config.overlap_p2p_comm:
        which = "split for a step's first and last microbatches (a group of each) and in evaluation, else wide"
    _report(f"{which}: the streams while the last sublayer of a chunk runs, its output after it")
    return True


def why_not_split(config: Any) -> str | None:
    """What keeps a TransformerConfig's pipeline from split transfers; None if nothing does."""
    if config.recompute_granularity == "full":
        return "recompute_granularity 'full' runs a chunk's last sublayer twice, and it would send twice"
    return why_not_own_links(config)


def why_not_own_links(config: Any) -> str | None:
    """What leaves a TransformerConfig's pipeline transfers to Megatron, wide; None if nothing does."""
    if config.variable_seq_lengths:
        return "variable_seq_lengths: a tensor's size is not known before it arrives"
    if config.use_ring_exchange_p2p:
        return "use_ring_exchange_p2p has no links between two stages"
    if os.environ.get("CUDA_LAUNCH_BLOCKING") == "1":
        return "CUDA_LAUNCH_BLOCKING=1: a host that waits for a transfer can't start the next one"
    if config.pipeline_model_parallel_comm_backend == "ucc":
        return "pipeline_model_parallel_comm_backend 'ucc': its groups are Megatron's to make"
    return None


def sends_on(layer: Any, vp_stage: int | None) -> bool:
    """Whether the chunk that this layer is in hands its output to another one.

    layer: a TransformerLayer; vp_stage: its chunk's number on this rank, None without an interleaved schedule.
    """
    last_chunk = is_vp_last_stage(vp_stage, layer.config.virtual_pipeline_model_parallel_size)
    return not (last_chunk and is_pp_last_stage(layer.pg_collection.pp))


@cache
def _report(choice: str) -> None:
    # At the level that Megatron shows by default.
    log_single_rank(_logger, logging.WARNING, f"mHC: pipeline: {choice}")
