"""Which of a rank's pipeline transfers are split, and which of those may start before the schedule's own.

In an interleaved schedule with ``overlap_p2p_comm`` a transfer of the steady state has a whole pass of time. What is exposed are
the first microbatches on their way forward and the last ones on their way back: a group of each (as many microbatches as pass a
chunk in a row; Megatron's own last group may be smaller) is split. The others go as one tensor, which has fewer bytes and keeps
nothing beside. All transfers are split where a schedule waits for every one: 1F1B, interleaved without overlap, evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Rank(NamedTuple):
    """A rank's part in an interleaved or plain schedule.

    table: microbatch and chunk of each of its forward passes, in order (Megatron's `get_schedule_table`); of its backward
    passes chunks count from the other end. warm_up: forward passes before the first backward one. group: microbatches that
    pass a chunk in a row. overlap, flush: ``overlap_p2p_comm`` and ``overlap_p2p_comm_warmup_flush``.
    """

    stage: int
    stages: int
    chunks: int
    table: Sequence[tuple[int, int]]
    warm_up: int
    group: int
    overlap: bool
    flush: bool
    forward_only: bool


class Plan(NamedTuple):
    """Of one rank and schedule.

    early: how many passes' streams leave before the schedule's own tensor, the first ones; None: all of them. ahead: how many
    receives, the first ones, may be posted before the schedule's own; from the one after receive number late on, they are posted
    when the backward pass between is nearly over (None: all at once). Whether it is split, in order (None: all of them): sends,
    receives: of activations; gradients: that are received; returns: that are sent.
    """

    early: int | None = None
    ahead: int = 0
    sends: tuple[bool, ...] | None = None
    receives: tuple[bool, ...] | None = None
    gradients: tuple[bool, ...] | None = None
    returns: tuple[bool, ...] | None = None
    late: int | None = None


def unknown(ring: bool, last: bool) -> Plan:
    """For a schedule of which nothing is known. ring: whether it is interleaved; last: whether this is the last stage."""
    return Plan(early=0 if ring and last else None)


def plan(rank: Rank) -> Plan:
    """The plan of a rank: `mhc_megatron.pipeline.side_channel` says why streams may leave early, and receives be posted ahead."""
    first, last, ring = rank.stage == 0, rank.stage == rank.stages - 1, rank.chunks > 1
    final, split = rank.chunks - 1, _split(rank)
    sends = tuple(m in split for m, chunk in rank.table if not (last and chunk == final))
    receives = tuple(m in split for m, chunk in rank.table if not (first and chunk == 0))
    gradients = tuple(m in split for m, chunk in rank.table if not (last and chunk == 0))
    returns = tuple(m in split for m, chunk in rank.table if not (first and chunk == final))
    if not ring:
        late = None if rank.forward_only else rank.warm_up
        return Plan(None, len(receives), sends, receives, gradients, returns, late)
    warm_up = 0 if rank.flush else rank.warm_up
    ahead = 0 if first or rank.flush else min(len(receives), warm_up + 1)
    return Plan(warm_up if last else None, ahead, sends, receives, gradients, returns)


def _split(rank: Rank) -> range | set[int]:
    """The microbatches whose transfers are split."""
    count = len(rank.table) // rank.chunks
    if rank.chunks == 1 or not rank.overlap or rank.forward_only:
        return range(count)
    return {*range(rank.group), *range(count - rank.group, count)}
