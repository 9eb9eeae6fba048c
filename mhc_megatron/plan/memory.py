"""The peak memory of every pipeline stage: what it holds all the time, and the activations of the microbatches in flight.

The stage's passes are played in Megatron's own order (`order`): a forward pass leaves its activations behind, the backward pass
of the same microbatch and chunk takes them away, and the peak is that of the worst pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from mhc_megatron.config import MHCConfig
from mhc_megatron.plan.activations import Pass, chunk_pass
from mhc_megatron.plan.operations import stream_bytes
from mhc_megatron.plan.order import Compute, Order, Place
from mhc_megatron.plan.parameters import Count, StaticMemory, rank_count, static_memory
from mhc_megatron.plan.run import Chunk, Run
from mhc_megatron.residual.recompute import automatic_length, microbatches_in_flight

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
    length = block_length(run, stage, chunks)
    activations, in_flight = _peak(run, stage, [chunk_pass(run, chunk, length) for chunk in chunks])
    count = rank_count(run, chunks)
    layers = sum(chunk.layers for chunk in chunks)
    # One tensor that a neighbour has sent ahead, a direction; of split transfers' streams another one.
    tensors = 3 if run.mhc is not None and run.mhc.pipeline_comm == "split" else 2
    buffers = tensors * stream_bytes(run) if run.stages > 1 else 0
    return StageMemory(stage, layers, count, static_memory(run, count), activations, in_flight, buffers, length)


def block_length(run: Run, stage: int, chunks: Iterable[Chunk]) -> int | None:
    """L_r of a stage as training will choose it: given, or the one that needs the least memory
    (`mhc_megatron.residual.recompute`)."""
    if run.mhc is None or not run.mhc.recompute or run.config.recompute_granularity == "full":
        return None
    sublayers = max(1, 2 * max(chunk.layers for chunk in chunks))
    if run.mhc.recompute_sublayers:
        return min(run.mhc.recompute_sublayers, sublayers)
    place = Place(run.stages, run.chunks_per_stage, stage)
    return automatic_length(sublayers, microbatches_in_flight(run.group, place))


def best_block_length(run: Run, stage: int) -> tuple[int, float]:
    """The L_r with the lowest peak of a stage's activations, and that peak; with --mhc-recompute, whatever the run has."""
    chunks = run.chunks()[stage]
    sublayers = max(1, 2 * max(chunk.layers for chunk in chunks))
    peaks = {}
    for length in range(1, sublayers + 1):
        peaks[length] = _peak(run, stage, [chunk_pass(run, chunk, length) for chunk in chunks])[0]
    best = min(peaks, key=lambda length: (peaks[length], length))
    return best, peaks[best]


def variant(run: Run, mode: str) -> Run:
    """The same run as ``residual``, ``mhc`` (all streams kept) or ``recompute`` (mHC with --mhc-recompute, L_r automatic)."""
    if mode == "residual":
        return replace(run, mhc=None)
    mhc = run.mhc or MHCConfig()
    recompute = mode == "recompute"
    sublayers = mhc.recompute_sublayers if recompute and mhc.recompute else 0
    return replace(run, mhc=replace(mhc, recompute=recompute, recompute_sublayers=sublayers))


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


def _peak(run: Run, stage: int, passes: list[Pass]) -> tuple[float, int]:
    """The peak over a step, and how many passes are in flight at most."""
    held = peak = 0.0
    in_flight = most = 0
    # The order of passes repeats itself after some microbatches; a step of thousands need not be played.
    enough = min(run.microbatches, 4 * max(run.group, run.stages) * run.chunks_per_stage)
    whole = run.group * (enough // run.group) or run.microbatches
    order = run_order(replace(run, microbatches=run.microbatches if whole > run.microbatches else whole))
    for instruction in order.instructions(stage):
        if not isinstance(instruction, Compute):
            continue
        chunk = passes[instruction.chunk]
        if instruction.forward:
            peak = max(peak, held + chunk.forward)
            held += chunk.kept
            in_flight += 1
        else:
            held -= chunk.kept
            peak = max(peak, held + chunk.backward)
            in_flight -= 1
        most = max(most, in_flight)
    return peak, most
