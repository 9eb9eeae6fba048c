"""The peak memory of every pipeline stage: what it holds all the time, and the peak of its activations (`peak`)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mhc_megatron.config import MHCConfig
from mhc_megatron.plan.activations import chunk_pass
from mhc_megatron.plan.block_length import choose_block_length
from mhc_megatron.plan.operations import stream_bytes
from mhc_megatron.plan.parameters import Count, StaticMemory, rank_count, static_memory
from mhc_megatron.plan.peak import peak, stage_order
from mhc_megatron.plan.run import Run

# Transformer Engine's and PyTorch's cuBLAS workspaces, which PyTorch's allocator holds (an estimate: 32 MiB each, several
# streams).
WORKSPACES = 192 * 2**20


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one rank of a pipeline stage.

    static: parameters, gradients, optimizer. activations: the peak of what its passes keep and need. in_flight:
    microbatches (times chunks) whose activations it holds at most. buffers: received pipeline tensors. block_length: L_r,
    None without --mhc-recompute.
    """

    stage: int
    layers: int
    count: Count
    static: StaticMemory
    activations: float
    in_flight: int
    buffers: float
    block_length: int | None

    @property
    def total(self) -> float:
        """The peak of memory that PyTorch has allocated."""
        return self.static.total + self.activations + self.buffers + WORKSPACES


def stage_memory(run: Run, stage: int) -> StageMemory:
    """The memory of one stage's ranks, in the run as it is configured."""
    chunks = run.chunks()[stage]
    length = block_length(run, stage)
    activations, in_flight = peak(stage_order(run, stage), [chunk_pass(run, chunk, length) for chunk in chunks])
    count = rank_count(run, chunks)
    layers = sum(chunk.layers for chunk in chunks)
    # One tensor that a neighbour has sent ahead, a direction; without interleaving, of split transfers' streams another one.
    # (With it as well, but in the warm-up alone: the last one has been used when the first backward pass comes.) With groups
    # larger than the pipeline is long, the last stage's results wait on the first one until the group has passed there;
    # gradients likewise.
    split = run.mhc is not None and run.communication == "split"
    tensors = 3 if split and run.chunks_per_stage == 1 else 2
    if run.chunks_per_stage > 1 and stage in (0, run.stages - 1):
        tensors += max(0, run.group - run.stages)
    buffers = tensors * stream_bytes(run) if run.stages > 1 else 0
    return StageMemory(stage, layers, count, static_memory(run, count), activations, in_flight, buffers, length)


def block_length(run: Run, stage: int) -> int | None:
    """L_r of a stage as training will have it: given, or chosen (`choose_block_length`); None where all streams are kept."""
    if run.mhc is None or not run.mhc.recompute or run.config.recompute_granularity == "full":
        return None
    if run.mhc.recompute_sublayers:
        return min(run.mhc.recompute_sublayers, max(1, *(2 * chunk.layers for chunk in run.chunks()[stage])))
    return choose_block_length(run, stage).length


def variant(run: Run, mode: str) -> Run:
    """The same run as ``residual``, ``mhc`` (all streams kept) or ``recompute`` (mHC with --mhc-recompute, L_r automatic)."""
    if mode == "residual":
        return replace(run, mhc=None)
    mhc = run.mhc or MHCConfig()
    recompute = mode == "recompute"
    sublayers = mhc.recompute_sublayers if recompute and mhc.recompute else 0
    return replace(run, mhc=replace(mhc, recompute=recompute, recompute_sublayers=sublayers))
