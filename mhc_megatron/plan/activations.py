"""The memory of a chunk's forward and backward pass: what a microbatch leaves behind, and the peaks on the way.

Walks the operations: forward, each adds what it saves; backward, each needs its gradients and then lets go of what it
saved. Activation recompute (Megatron's, full or selective, and that of mHC's streams) is played as it happens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mhc_megatron.plan.operations import BOUNDARY, Operation, chunk_operations, recompute_modules, stream_bytes
from mhc_megatron.plan.run import Chunk, Run


@dataclass(frozen=True)
class Pass:
    """Bytes of one microbatch in one chunk.

    kept: from the end of its forward pass to its backward pass. forward, backward: the peaks of the two, with what is kept.
    """

    kept: float
    forward: float
    backward: float


@dataclass(frozen=True)
class _Segment:
    """Operations that are recomputed together (``source``: what is kept instead), or not at all (None)."""

    operations: list[Operation]
    source: float | None = None

    @property
    def saved(self) -> float:
        return sum(operation.saved for operation in self.operations)

    @property
    def kept(self) -> float:
        return self.saved if self.source is None else self.source


def chunk_pass(run: Run, chunk: Chunk, block_length: int | None = None) -> Pass:
    """The passes of one chunk. block_length: L_r of ``--mhc-recompute``, None without."""
    segments = _segments(run, chunk, chunk_operations(run, chunk, block_length))
    kept = sum(segment.kept for segment in segments)
    return Pass(kept, _forward(segments), _backward(segments, kept, run))


def _segments(run: Run, chunk: Chunk, layers: list[list[Operation]]) -> list[_Segment]:
    if run.config.recompute_granularity == "full":
        return _full(run, chunk, layers)
    chosen = recompute_modules(run.config)
    segments: list[_Segment] = []
    group: str | None = None
    for operation in _flat(layers):
        own = next((name for name in reversed(operation.modules) if name in chosen), None)
        if segments and own == group:
            segments[-1].operations.append(operation)
        else:
            # What MoE and shared experts read is the norm's output, and counted there; with mHC's recompute nobody keeps it.
            counted = own in ("moe", "shared_experts") or (operation.name == "norm" and operation.reads_again)
            source = 0 if counted else operation.source
            segments.append(_Segment([operation], None if own is None else source))
        group = own
    return segments


def _full(run: Run, chunk: Chunk, layers: list[list[Operation]]) -> list[_Segment]:
    """Layers are recomputed in groups of recompute_num_layers (uniform), or the first ones one by one (block)."""
    config, streams = run.config, stream_bytes(run)
    head, body = (layers[:1], layers[1:]) if chunk.embedding else ([], layers)
    body, tail = (body[:-1], body[-1:]) if chunk.loss else (body, [])
    count = config.recompute_num_layers or 1
    if config.recompute_method == "block":
        segments = [_Segment(layer, streams if i < count else None) for i, layer in enumerate(body)]
    else:
        segments = [_Segment(_flat(body[i : i + count]), streams) for i in range(0, len(body), count)]
    return [*(_Segment(end) for end in head), *segments, *(_Segment(end) for end in tail)]


def _flat(layers: Iterable[list[Operation]]) -> list[Operation]:
    return [operation for layer in layers for operation in layer]


def _forward(segments: list[_Segment]) -> float:
    live = peak = current = 0.0  # current: a sublayer's own streams, which the backward will compute again
    for segment in segments:
        live += segment.source or 0
        for operation in segment.operations:
            if operation.streams is not None:
                current = operation.streams[0] if operation.streams[1] else 0.0
            peak = max(peak, live + current + operation.saved + operation.output + operation.forward)
            if segment.source is None:
                live += operation.saved
    return max(peak, live)


def _backward(segments: list[_Segment], kept: float, run: Run) -> float:
    live = peak = kept
    gradients = 0.0
    fused = run.gradients == "main" and run.config.gradient_accumulation_fusion
    for segment in reversed(segments):
        if segment.source is not None:
            live += segment.saved - segment.source  # the first operation saves what was kept
        for operation in reversed(segment.operations):
            streams, place, length = operation.streams or (0, 0, 0)
            ends = operation.name == BOUNDARY
            if place and place == length - 1 and not ends:  # the block's last sublayer brings all of its streams back
                live += place * streams
            needed = operation.carried + operation.source + operation.output + operation.backward
            peak = max(peak, live + gradients + needed + (0 if fused else operation.weight))
            live -= operation.saved + (streams if place and ends else 0)
            if run.gradients == "plain":
                gradients += operation.weight
    return max(peak, live + gradients)
