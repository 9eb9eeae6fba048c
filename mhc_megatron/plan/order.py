"""What one pipeline rank does and when it communicates: Megatron-Core 0.19.2's 1F1B schedules, as a list of instructions.

The order of chunks and microbatches comes from Megatron's own tables; where sends and receives are posted and waited for follows
megatron.core.pipeline_parallel.schedules, forward_backward_pipelining_without_interleaving and _with_interleaving.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table

from mhc_megatron.pipeline import sends
from mhc_megatron.pipeline.passes import Plan, Rank, plan


class Place:
    """One rank's place in a pipeline, as Megatron's schedules ask a communicator for it.

    chunks: of a rank; 1 without an interleaved schedule.
    """

    def __init__(self, stages: int, chunks: int, rank: int):
        self.virtual_pipeline_model_parallel_size = chunks if chunks > 1 else None
        self.pp_group: Any = self
        self._stages, self._rank = stages, rank

    def size(self) -> int:
        """Stages."""
        return self._stages

    def rank(self) -> int:
        """Which one."""
        return self._rank


class Compute(NamedTuple):
    """The forward or backward pass of a microbatch through one of the rank's chunks."""

    forward: bool
    chunk: int
    microbatch: int


class Post(NamedTuple):
    """Start a transfer, without waiting. send or receive; forward: of activations (from the previous rank to the next)."""

    send: bool
    forward: bool


class Wait(NamedTuple):
    """Wait for the oldest transfer of this kind that was posted and not waited for, if there is one; with ``leave``,
    until so many of them are left."""

    send: bool
    forward: bool
    leave: int | None = None


Instruction = Compute | Post | Wait


@dataclass(frozen=True)
class Order:
    """A pipeline's shape.

    send_waits: whether forward sends are waited for before their output is freed, as 0.19 does with
    ``deallocate_pipeline_outputs``, and sends that a blocking call makes (without overlap they are one batch with receives);
    else sends are waited for two passes later (`mhc_megatron.pipeline.sends`).
    group: microbatches that pass a chunk in a row (None: the stages). overlap, warmup_flush: ``overlap_p2p_comm`` and
    ``overlap_p2p_comm_warmup_flush`` (interleaved schedules).

    Raises:
        ValueError: for microbatches that Megatron refuses with this shape.
    """

    stages: int
    microbatches: int
    chunks: int = 1
    group: int | None = None
    overlap: bool = True
    warmup_flush: bool = False
    send_waits: bool = True

    def __post_init__(self) -> None:
        group, rest = self.group or self.stages, self.microbatches % (self.group or self.stages)
        if self.chunks > 1 and (not self.stages <= group <= self.microbatches or 0 < rest < self.stages):
            raise ValueError(
                f"an interleaved schedule of {self.stages} stages takes groups of {self.stages} to {self.microbatches} "
                f"microbatches, and a last group of none or at least {self.stages}; "
                f"got {self.microbatches} microbatches in groups of {group}"
            )

    def instructions(self, rank: int) -> list[Instruction]:
        """Of one rank, in order."""
        rank_order = _Rank(self, rank)
        return list(rank_order.interleaved() if self.chunks > 1 else rank_order.plain())

    def split_plan(self, rank: int) -> Plan:
        """Of one rank's split transfers."""
        of_rank = _Rank(self, rank)
        group = (self.group or self.stages) if self.chunks > 1 else 1
        overlap = self.overlap and self.chunks > 1
        flush = overlap and self.warmup_flush
        return plan(Rank(rank, self.stages, self.chunks, of_rank.table, of_rank.warm_up, group, overlap, flush, False))


class _Rank:
    def __init__(self, order: Order, rank: int):
        self.order, self.rank, self.chunks = order, rank, order.chunks
        self.first, self.last = rank == 0, rank == order.stages - 1
        group = order.group or order.stages
        if self.chunks > 1:
            self.table = get_schedule_table(order.microbatches, self.chunks, group)
        else:
            self.table = [(microbatch, 0) for microbatch in range(order.microbatches)]
        counts = get_pp_rank_microbatches(
            order.microbatches, self.chunks, group, p2p_communicator=Place(order.stages, self.chunks, rank)
        )
        self.total, self.all_in_warm_up, self.warm_up, self.remaining = counts

    def compute(self, number: int, forward: bool) -> Compute:
        microbatch, chunk = self.table[number]
        return Compute(forward, chunk if forward else self.chunks - 1 - chunk, microbatch)

    def ends(self, number: int, forward: bool) -> bool:
        """Whether this pass's result goes nowhere: the loss, or the embedding's gradient."""
        chunk = self.compute(number, forward).chunk
        return self.last and chunk == self.chunks - 1 if forward else self.first and chunk == 0

    def starts(self, number: int, forward: bool) -> bool:
        """Whether this pass's input comes from nowhere."""
        chunk = self.compute(number, forward).chunk
        return self.first and chunk == 0 if forward else self.last and chunk == self.chunks - 1

    def receives(self, number: int, forward: bool) -> bool:
        """Whether something is received beside pass ``number``, for a later one."""
        leads = self.first if forward else self.last
        if not leads:
            return True
        if number < self.order.stages - 1:
            return False
        # What the pipeline's other end, so many passes behind, has just finished.
        chunk = self.compute(number - (self.order.stages - 1), forward).chunk
        return chunk != (self.chunks - 1 if forward else 0)

    def exchange(self, *posts: Post | None) -> Iterator[Instruction]:
        """A call that blocks: everything is posted together and waited for; sends only if they are at all."""
        posted = [post for post in posts if post is not None]
        yield from self._earlier_sends()
        yield from posted
        for post in posted:
            if not post.send or self.order.send_waits:
                yield Wait(*post)

    def _earlier_sends(self) -> Iterator[Instruction]:
        """Where sends are not waited for when they are posted."""
        if not self.order.send_waits:
            yield Wait(True, True, leave=sends.PASSES_UNDER_WAY)
            yield Wait(True, False, leave=sends.PASSES_UNDER_WAY)

    def plain(self) -> Iterator[Instruction]:
        receive_forward, send_forward = _unless(self.first, Post(False, True)), _unless(self.last, Post(True, True))
        receive_backward, send_backward = _unless(self.last, Post(False, False)), _unless(self.first, Post(True, False))
        for number in range(self.warm_up):
            yield from self.exchange(receive_forward)
            yield self.compute(number, True)
            yield from self.exchange(send_forward)
        if self.remaining:
            yield from self.exchange(receive_forward)
        for number in range(self.remaining):
            yield self.compute(number + self.warm_up, True)
            yield from self.exchange(send_forward, receive_backward)
            yield self.compute(number, False)
            yield from self.exchange(send_backward, receive_forward if number < self.remaining - 1 else None)
        for number in range(self.remaining, self.total):
            yield from self.exchange(receive_backward)
            yield self.compute(number, False)
            yield from self.exchange(send_backward)

    def interleaved(self) -> Iterator[Instruction]:
        if not self.first:
            yield from self.exchange(Post(False, True))
        for number in range(self.warm_up):
            yield from self._warm_up(number)
        for number in range(self.remaining):
            yield from self._steady(number)
        if self.all_in_warm_up and not self.last:
            yield from self.exchange(Post(False, False))
        for number in range(self.remaining, self.total):
            yield from self._cool_down(number)
        yield Wait(True, False, leave=0)

    def _warm_up(self, number: int) -> Iterator[Instruction]:
        order = self.order
        flush, steady_follows = order.warmup_flush, number == self.warm_up - 1 and not self.all_in_warm_up
        if flush and number and not self.starts(number, True):
            yield Wait(False, True)
        receive = _unless(number == self.total - 1 or not self.receives(number, True), Post(False, True))
        if flush and not self.first and receive is not None:
            yield from self._earlier_sends()
            yield receive
        yield self.compute(number, True)
        send = _unless(self.ends(number, True), Post(True, True))
        receive_backward = _unless(self.last, Post(False, False))
        if not flush:
            together = receive_backward if steady_follows and not order.overlap else None
            yield from self.exchange(send, receive, together)
        else:
            yield from self._send(True, send, receive if self.first else None)
        if order.overlap and steady_follows and receive_backward is not None:
            yield from self._earlier_sends()
            yield receive_backward

    def _steady(self, number: int) -> Iterator[Instruction]:
        forward, order = number + self.warm_up, self.order
        ahead = number < self.remaining - 1 and self.receives(forward, True)
        receive_forward, send_forward = (
            _unless(not ahead, Post(False, True)),
            _unless(self.ends(forward, True), Post(True, True)),
        )
        receive_backward = _unless(not self.receives(number, False), Post(False, False))
        send_backward = _unless(self.ends(number, False), Post(True, False))
        if not order.overlap:
            yield self.compute(forward, True)
            yield self.compute(number, False)
            yield from self.exchange(send_forward, send_backward, receive_forward, receive_backward)
            return
        if not self.starts(forward, True):
            yield Wait(False, True)
        yield self.compute(forward, True)
        yield from self._send(True, send_forward, receive_forward)
        if not self.starts(number, False):
            yield Wait(False, False)
        yield self.compute(number, False)
        yield from self._send(False, send_backward, receive_backward)

    def _cool_down(self, number: int) -> Iterator[Instruction]:
        flush = self.order.warmup_flush
        if number and not self.starts(number, False):
            yield Wait(False, False)
        receive = _unless(number == self.total - 1 or not self.receives(number, False), Post(False, False))
        if flush and not self.last and receive is not None:
            yield from self._earlier_sends()
            yield receive
        yield self.compute(number, False)
        send = _unless(self.ends(number, False), Post(True, False))
        if flush:
            yield from self._send(False, send, receive if self.last else None)
        else:
            yield from self.exchange(send, receive)

    def _send(self, forward: bool, send: Post | None, receive: Post | None) -> Iterator[Instruction]:
        """A call that does not block. Its send is waited for at the next such call; a forward one at once, if sends wait."""
        posted = [post for post in (send, receive) if post is not None]
        yield from self._earlier_sends()
        yield from posted
        if self.order.send_waits:
            yield Wait(True, forward, leave=1 if send is not None and not forward else 0)


def _unless(condition: bool, post: Post) -> Post | None:
    return None if condition else post
