"""A step of a pipeline to be simulated (`mhc_megatron.plan.simulation`): its schedule, times, transfers and links."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mhc_megatron.plan.order import Compute, Order

CONTENTION = 0.09
"""`Schedule.contention` where NCCL's kernels move the data. It fits what `benchmarks/pipeline.py` measured on two H100s over
shared memory (`benchmarks/simulated.py`); matrix products take most of it (`benchmarks/README.md`)."""

COPY_CONTENTION = 0.02
"""The same where copy engines do (`mhc_megatron.pipeline.copies`); it fits what was measured through host memory."""

Times = float | Sequence[Sequence[float]]


@dataclass(frozen=True)
class Schedule:
    """A step to be simulated.

    Args:
        stages, microbatches, chunks, group, overlap, warmup_flush, send_waits: `mhc_megatron.plan.order.Order`.
        forward, backward: seconds of one pass of a microbatch through a chunk: one number, or ``[stage][chunk]``.
        transfer: bytes of the schedule's own tensor, a microbatch, boundary and direction.
        side: bytes of streams that cross apart from the schedule's own tensor (split); 0: none.
        forward_share, backward_share: the last sublayer's part of a pass's time: what the streams hide behind.
        bandwidth: bytes per second and direction; latency: seconds.
        contention: by how much longer a rank's computation takes beside a transfer of its own that moves, 0.1: by a tenth; beside
            several by as much for each.
    """

    stages: int
    microbatches: int
    forward: Times
    backward: Times
    transfer: float
    bandwidth: float
    chunks: int = 1
    group: int | None = None
    overlap: bool = True
    warmup_flush: bool = False
    send_waits: bool = True
    side: float = 0
    forward_share: float = 0
    backward_share: float = 0
    latency: float = 0
    contention: float = 0

    @property
    def order(self) -> Order:
        """Its instructions."""
        return Order(
            self.stages,
            self.microbatches,
            self.chunks,
            self.group,
            self.overlap and self.chunks > 1,
            self.warmup_flush,
            self.send_waits,
        )

    def seconds(self, rank: int, compute: Compute) -> float:
        """Of one pass."""
        times = self.forward if compute.forward else self.backward
        return float(times) if isinstance(times, int | float) else times[rank][compute.chunk]


def exchange(kind: str, hidden: float, streams: int, tokens: float) -> dict[str, float | bool]:
    """What crosses a boundary with one kind of communication, as fields of a `Schedule`.

    kind: ``residual`` (C a token), ``wide-stock`` (n*C, as stock Megatron would send it), ``wide`` (n*C, no send waits),
    ``split`` (C and H_post, n float32, on the schedule; n*C apart from it). hidden: bytes of C values of all ``tokens`` of a
    microbatch.

    Raises:
        ValueError: for another kind.
    """
    if kind == "residual":
        return {"transfer": hidden, "send_waits": True}
    if kind in ("wide", "wide-stock"):
        return {"transfer": streams * hidden, "send_waits": kind == "wide-stock"}
    if kind == "split":
        return {"transfer": hidden + 4 * streams * tokens, "side": streams * hidden, "send_waits": False}
    raise ValueError(f"no kind of pipeline communication {kind!r}; residual, wide-stock, wide and split exist")
