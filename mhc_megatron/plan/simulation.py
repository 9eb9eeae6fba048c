"""A simulation of a pipeline's step: how much of its communication compute hides.

Every rank runs its instructions (`order`) on one compute stream. A transfer begins when both ends have posted it and its
link is free (a link: one direction between two ranks; transfers take it in the order in which they are ready), and takes
latency + bytes / bandwidth. With split transfers (`mhc_megatron.pipeline`) two tensors cross a boundary: the streams, n*C, leave
before the last sublayer of a chunk runs, as far as `mhc_megatron.pipeline.passes` has it, and their gradient is needed only when
that sublayer's backward is over; transfers that it does not split carry n*C.

Computation beside a transfer takes longer (`mhc_megatron.plan.schedule.CONTENTION`): what is hidden is not free.

Not modelled: transfers that computation slows down, receives that wait (over NVLink they slow computation as well), the host,
data- and expert-parallel traffic (in the compute times), NCCL's choice of one stream for both directions of a pair.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from mhc_megatron.pipeline.passes import Plan
from mhc_megatron.plan.order import Compute, Instruction, Post, Wait
from mhc_megatron.plan.schedule import Schedule

_ENOUGH = 4  # groups of microbatches that have a warm-up, a steady state and a cool-down


@dataclass(frozen=True)
class Span:
    """One pass on one rank, in seconds from the step's start."""

    rank: int
    compute: Compute
    start: float
    end: float


@dataclass(frozen=True)
class Transfer:
    """One transfer between ranks. side: of streams, apart from the schedule's own."""

    source: int
    target: int
    forward: bool
    side: bool
    start: float
    end: float


@dataclass(frozen=True)
class Result:
    """A simulated step.

    step: its seconds. free: the same step with transfers that take no time. exposed: the difference. spans, transfers:
    what happened when.
    """

    step: float
    free: float
    spans: list[Span] = field(repr=False)
    transfers: list[Transfer] = field(repr=False)

    @property
    def exposed(self) -> float:
        return self.step - self.free

    def rank(self, rank: int) -> list[Span]:
        """One rank's passes in order."""
        return [span for span in self.spans if span.rank == rank]


def simulate(schedule: Schedule) -> Result:
    """Play a step.

    Raises:
        RuntimeError: if the schedule comes to a standstill (a receive without a send).
    """
    step, spans, transfers = _Simulation(schedule).run()
    free, _, _ = _Simulation(replace(schedule, transfer=0, side=0, latency=0)).run()
    return Result(step, free, spans, transfers)


def step_times(schedule: Schedule) -> tuple[float, float]:
    """Seconds of a step, and with transfers that take no time; as `simulate`, but of many microbatches quickly.

    In its steady state a pipeline repeats itself from one group of microbatches to the next: a long step is extrapolated
    from two shorter ones.
    """
    group = (schedule.group or schedule.stages) if schedule.chunks > 1 else schedule.stages
    groups, rest = divmod(schedule.microbatches, group)
    if groups <= 2 * _ENOUGH:
        result = simulate(schedule)
        return result.step, result.free
    short, longer = (simulate(replace(schedule, microbatches=k * _ENOUGH * group + rest)) for k in (1, 2))
    times = (groups / _ENOUGH) - 2  # how often the difference of the two comes on top
    step = longer.step + times * (longer.step - short.step)
    return step, longer.free + times * (longer.free - short.free)


class _Ends:
    """A transfer's two ends, as they are posted; ``done``: when it is over."""

    def __init__(self, source: int, target: int, forward: bool, side: bool, size: float):
        self.source, self.target, self.forward, self.side, self.size = source, target, forward, side, size
        self.posted = 0
        self.done: float | None = None
        self.waiting: list[int] = []


def _over(ends: _Ends) -> Iterator[_Ends]:
    while ends.done is None:
        yield ends


class _Computing:
    """What a rank computes: ``left`` seconds of it at ``since``, if nothing moves beside."""

    def __init__(self, left: float, since: float):
        self.left, self.since, self.pace = left, since, 0.0
        self.planned = 0
        """Which event ends it: the last one that was planned."""


class _Streams:
    """A rank's split transfers, as far as it has come."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.of = {
            (True, True): plan.sends,
            (False, True): plan.receives,
            (True, False): plan.returns,
            (False, False): plan.gradients,
        }
        self.posted: Counter[tuple[bool, bool]] = Counter()
        self.used: Counter[bool] = Counter()  # by passes: of what was received, forward or not
        self.passes = 0  # whose result is sent
        self.splits = self.holds = self.ahead = False

    def split(self, send: bool, forward: bool, number: int) -> bool:
        """Whether that transfer of its kind is split."""
        known = self.of[send, forward]
        return known is None or known[number]

    def use(self, forward: bool) -> bool:
        """A pass takes what was received for it: whether that was split."""
        self.used[forward] += 1
        return self.split(False, forward, self.used[forward] - 1)

    def leave_early(self) -> bool:
        """A forward pass, whose result is sent: whether its streams leave before its last sublayer."""
        self.splits = self.split(True, True, self.passes)
        self.holds = self.plan.early is not None and self.passes >= self.plan.early
        self.passes += 1
        return self.splits and not self.holds


class _Simulation:
    def __init__(self, schedule: Schedule):
        self.schedule, self.now = schedule, 0.0
        # A rank goes on: after a wait (0), when its computation ends (`_Computing.planned`). A transfer begins to move (1), stops
        # (-1), is over (0).
        self.events: list[tuple[float, int, int | _Ends, int]] = []
        self.count = 0
        self.links: dict[tuple[int, int], float] = defaultdict(float)
        self.moving = [0] * schedule.stages
        self.computing: list[_Computing | None] = [None] * schedule.stages
        # What one end has posted and the other has not yet, by channel; and what a rank has not waited for yet, sends with
        # whether another tensor of the same pass follows.
        self.half: dict[tuple[int, int, bool, bool, bool], deque[_Ends]] = defaultdict(deque)
        self.receiving: dict[tuple[int, bool, bool], deque[_Ends]] = defaultdict(deque)
        self.sent: dict[tuple[int, bool], deque[tuple[_Ends, bool]]] = defaultdict(deque)
        self.spans: list[Span] = []
        self.transfers: list[Transfer] = []
        self.streams = [_Streams(schedule.order.split_plan(rank)) for rank in range(schedule.stages)]

    def run(self) -> tuple[float, list[Span], list[Transfer]]:
        stages = self.schedule.stages
        ranks = [self._rank(rank, self.schedule.order.instructions(rank)) for rank in range(stages)]
        ends = [-1.0] * stages
        for rank in range(stages):
            self._at(0.0, rank)
        while self.events:
            self.now, _, event, kind = heapq.heappop(self.events)
            if isinstance(event, _Ends):
                if kind:
                    self._moves(event, kind)
                    continue
                event.done = self.now
                for rank in event.waiting:
                    self._at(self.now, rank)
                continue
            if kind:
                computing = self.computing[event]
                if computing is None or computing.planned != kind:
                    continue  # planned anew since
                self.computing[event] = None
            try:
                wanted = next(ranks[event])
            except StopIteration:
                ends[event] = self.now
                continue
            if isinstance(wanted, _Ends):
                wanted.waiting.append(event)
            else:
                self.computing[event] = _Computing(wanted, self.now)
                self._pace(event)
        if min(ends) < 0:
            raise RuntimeError(f"the schedule stands still: ranks {[r for r in range(stages) if ends[r] < 0]} wait")
        return max(ends), self.spans, self.transfers

    def _at(self, time: float, event: int | _Ends, kind: int = 0) -> None:
        self.count += 1
        heapq.heappush(self.events, (time, self.count, event, kind))

    def _moves(self, ends: _Ends, change: int) -> None:
        """A transfer begins to move (1) or stops (-1)."""
        for rank in (ends.source, ends.target):
            self.moving[rank] += change
            self._pace(rank)

    def _pace(self, rank: int) -> None:
        """Plan the end of what a rank computes, if it does, by what moves beside it now."""
        computing, pace = self.computing[rank], 1 / (1 + self.schedule.contention * self.moving[rank])
        if computing is not None and pace != computing.pace:
            computing.left -= (self.now - computing.since) * computing.pace
            computing.since, computing.pace = self.now, pace
            computing.planned = self.count + 1
            self._at(self.now + computing.left / pace, rank, computing.planned)

    def _rank(self, rank: int, instructions: list[Instruction]) -> Iterator[float | _Ends]:
        """A rank's life: yields how long it computes, or the transfer that it waits for."""
        for instruction in instructions:
            if isinstance(instruction, Compute):
                start = self.now
                yield from self._compute(rank, instruction)
                self.spans.append(Span(rank, instruction, start, self.now))
            elif isinstance(instruction, Post):
                posted = self._posted(rank, *instruction)
                for number, (side, size) in enumerate(posted, 1):
                    self._post(rank, *instruction, side, size, more=number < len(posted))
            else:
                yield from self._wait(rank, instruction)

    def _posted(self, rank: int, send: bool, forward: bool) -> list[tuple[bool, float]]:
        """What is posted with the schedule's own tensor, in order: whether it is streams apart from it, and bytes."""
        schedule, streams = self.schedule, self.streams[rank]
        if not schedule.side:
            return [(False, schedule.transfer)]
        number = streams.posted[send, forward]
        streams.posted[send, forward] += 1
        own, apart = (False, schedule.transfer), (True, schedule.side)
        if not streams.split(send, forward, number):
            posted = [(False, schedule.side)]
        elif not forward:
            posted = [own, apart]
        elif send:
            posted = [apart, own] if streams.holds else [own]  # else they have left
        else:
            posted = [own] if streams.ahead else [apart, own]
        if forward and not send:
            streams.ahead = number + 1 < streams.plan.ahead and streams.split(False, True, number + 1)
            posted += [apart] if streams.ahead else []
        return posted

    def _compute(self, rank: int, compute: Compute) -> Iterator[float | _Ends]:
        schedule, seconds = self.schedule, self.schedule.seconds(rank, compute)
        first = rank == 0 and compute.chunk == 0
        last = rank == schedule.stages - 1 and compute.chunk == schedule.chunks - 1
        streams = self.streams[rank]
        if not schedule.side:
            yield seconds
        elif compute.forward:
            if not first and streams.use(True):
                yield from self._receive(rank, forward=True, side=True)
            if not last and streams.leave_early():
                yield seconds * (1 - schedule.forward_share)
                self._post(rank, True, True, True, schedule.side, more=True)
                yield seconds * schedule.forward_share
            else:
                yield seconds
        elif not last and streams.use(False):
            yield seconds * schedule.backward_share
            yield from self._receive(rank, forward=False, side=True)
            yield seconds * (1 - schedule.backward_share)
        else:
            yield seconds

    def _wait(self, rank: int, wait: Wait) -> Iterator[_Ends]:
        if not wait.send:
            if self.receiving[rank, wait.forward, False]:
                yield from self._receive(rank, wait.forward, side=False)
            return
        sent = self.sent[rank, wait.forward]
        passes = sum(not more for _, more in sent)
        leave = max(0, passes - 1) if wait.leave is None else wait.leave
        while passes > leave:
            ends, more = sent.popleft()
            passes -= not more
            yield from _over(ends)

    def _receive(self, rank: int, forward: bool, side: bool) -> Iterator[_Ends]:
        yield from _over(self.receiving[rank, forward, side].popleft())

    def _post(self, rank: int, send: bool, forward: bool, side: bool, size: float, more: bool) -> None:
        """One end of a transfer; when it is the second one, the transfer begins as soon as its link is free. more: another one
        of the same pass follows."""
        stages = self.schedule.stages
        peer = (rank + 1 if send == forward else rank - 1) % stages
        source, target = (rank, peer) if send else (peer, rank)
        known = self.half[source, target, forward, side, not send]
        if known:
            ends = known.popleft()
        else:
            ends = _Ends(source, target, forward, side, size)
            self.half[source, target, forward, side, send].append(ends)
        if send:
            self.sent[rank, forward].append((ends, more))
        else:
            self.receiving[rank, forward, side].append(ends)
        ends.posted += 1
        if ends.posted == 2:
            self._start(ends)

    def _start(self, ends: _Ends) -> None:
        schedule, link = self.schedule, (ends.source, ends.target)
        start = max(self.now, self.links[link])
        busy = ends.size / schedule.bandwidth
        self.links[link] = start + busy
        if schedule.contention and busy:
            self._at(start, ends, 1)
            self._at(start + busy, ends, -1)
        end = start + busy + schedule.latency
        self.transfers.append(Transfer(ends.source, ends.target, ends.forward, ends.side, start, end))
        self._at(end, ends)
