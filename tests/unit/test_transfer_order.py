"""Megatron's own schedules, one rank after another, with recorded links: what is sent is received by the pass that needs it, and
nothing waits in a ring, whatever NCCL runs one after the other and wherever a rank waits for its whole GPU."""

from __future__ import annotations

import functools
import itertools
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from megatron.core.pipeline_parallel import schedules, utils
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from mhc_megatron import MHCConfig
from mhc_megatron.megatron_hooks.pipeline import REBINDINGS
from mhc_megatron.pipeline import split
from mhc_megatron.pipeline.communicator import StreamsCommunicator
from mhc_megatron.pipeline.links import BACKWARD, FORWARD, Arrival, Links, group_of
from mhc_megatron.pipeline.passes import Plan
from mhc_megatron.pipeline.sends import Sends
from mhc_megatron.pipeline.side_channel import SideChannel
from mhc_megatron.pipeline.state import pipeline_state, share_pipeline
from mhc_megatron.plan.order import Order, Place

HIDDEN, STREAMS = 8, 4
WIDE, NARROW = HIDDEN * STREAMS, HIDDEN + split.columns(STREAMS, torch.float32)


class Link(NamedTuple):
    direction: int
    sender: int
    receiver: int


class Event(NamedTuple):
    """What a rank does: "send", "receive", "wait" (for its receive or send with that number) or "compute": a part of a pass,
    or memory for it."""

    kind: str
    link: Link | None = None
    width: int = 0  # of what is sent or received
    number: int = -1
    at: tuple[int, int] | None = (
        None  # chunk of the whole model and microbatch of the pass that a send or wait is part of
    )


class Recorder:
    """Stands in for Links. Tells which pass it is called from: `at`."""

    def __init__(self, events: list[Event], rank: int, stages: int):
        self.events, self.rank, self.stages = events, rank, stages
        self.at: tuple[int, int] | None = None
        self.sends = Sends(), Sends()

    def send(self, direction: int, tensor: Tensor, more: bool = False) -> None:
        to = (self.rank + (1 if direction == FORWARD else -1)) % self.stages
        at = getattr(tensor, "at", self.at)  # streams may leave later than their pass
        work = SimpleNamespace(is_completed=lambda: False, wait=self._wait(len(self.events)))
        on_gpu: Any = SimpleNamespace(is_cuda=True)
        self.sends[direction].keep(work, on_gpu, more)
        self.events.append(Event("send", Link(direction, self.rank, to), tensor.shape[-1], at=at))

    def _wait(self, number: int) -> Callable[[], None]:
        return lambda: self.events.append(Event("wait", None, 0, number, self.at))

    def buffer(self, shape: Any, dtype: torch.dtype, requires_grad: bool = False) -> Tensor:
        self.events.append(Event("compute"))
        return torch.zeros(shape, dtype=dtype, requires_grad=requires_grad)

    def release(self) -> None:
        self.events.append(Event("compute"))
        for sends in self.sends:
            sends.release()

    def receive(self, direction: int, tensor: Any) -> Arrival:
        number = len(self.events)
        sender = (self.rank + (1 if direction == BACKWARD else -1)) % self.stages
        self.events.append(Event("receive", Link(direction, sender, self.rank), tensor.shape[-1], number))
        return Arrival(tensor, SimpleNamespace(wait=self._wait(number)))


class Chunk(torch.nn.Module):
    """Does to a SideChannel what a chunk's first and last mHC sublayers do, and nothing else."""

    def __init__(self, config: Any, stage: int, last_stage: int, recorder: Recorder):
        super().__init__()
        self.config, self.first, self.last, self.recorder, self.stage = (
            config,
            stage == 0,
            stage == last_stage,
            recorder,
            stage,
        )
        self.forwards, self.backwards = itertools.count(), itertools.count()
        self.events, self.model_type = recorder.events, None

    def set_input_tensor(self, tensors: list[Tensor]) -> None:
        self.input = tensors[0]

    def forward(self) -> Tensor:
        self.recorder.at = (self.stage, next(self.forwards))
        x = torch.zeros(1, requires_grad=True) if self.first else self.input
        channel = pipeline_state(self.config).channel
        if hasattr(x, split._ARRIVAL):
            getattr(x, split._ARRIVAL).wait()
        self.events.append(Event("compute"))
        width = WIDE
        if channel is not None and not self.last and channel.departs():
            streams: Any = torch.zeros(1, 1, WIDE)
            streams.at = self.recorder.at
            channel.send_streams(streams)
            width = NARROW
        self.events.append(Event("compute"))  # the last sublayer
        return _Pass.apply(x, self, width)


class _Pass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, chunk: Chunk, width: int) -> Tensor:
        ctx.chunk, ctx.form = chunk, x.shape
        return torch.zeros(1, 1, width)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        chunk, channel = ctx.chunk, pipeline_state(ctx.chunk.config).channel
        chunk.recorder.at = (chunk.stage, next(chunk.backwards))
        chunk.events.append(Event("compute"))  # the last sublayer
        if hasattr(gradient, split._ARRIVAL):
            getattr(gradient, split._ARRIVAL).wait()
        chunk.events.append(Event("compute"))
        if channel is not None and pipeline_state(chunk.config).announces:
            channel.post_ahead()  # as a second layer has it done
        chunk.events.append(Event("compute"))  # the first layer
        if channel is not None and not chunk.first and ctx.form[-1] == NARROW:
            of_streams: Any = torch.zeros(1, 1, WIDE)
            of_streams.at = chunk.recorder.at
            channel.queue_gradient(of_streams)
        return torch.zeros(ctx.form), None, None


class Shape(NamedTuple):
    stages: int
    chunks: int
    microbatches: int
    group: int | None
    overlap: bool
    flush: bool
    forward_only: bool
    comm: str


def shapes() -> list[Shape]:
    found = []
    for stages, chunks, only, comm in itertools.product((2, 3, 4), (1, 2, 3), (False, True), ("wide", "split")):
        if chunks == 1:
            found += [Shape(stages, 1, m, None, False, False, only, comm) for m in {1, 2, stages, 2 * stages + 1}]
            continue
        for m, group in (
            (stages, stages),
            (2 * stages, stages),
            (2 * stages + 1, stages + 1),
            (2 * stages, 2 * stages),
            (4 * stages, stages),
            (4 * stages + 3, stages + 1),  # a smaller last group
        ):
            for overlap, flush in (False, False), (True, False), (True, True):
                found.append(Shape(stages, chunks, m, group, overlap, flush, only, comm))
    return [*found, Shape(8, 1, 9, None, False, False, False, "split"), Shape(8, 2, 16, 8, True, True, False, "split")]


def record(shape: Shape, rank: int, monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    interleaved = shape.chunks > 1
    config = TransformerConfig(
        num_layers=shape.stages * shape.chunks,
        hidden_size=HIDDEN,
        num_attention_heads=1,
        pipeline_model_parallel_size=shape.stages,
        virtual_pipeline_model_parallel_size=shape.chunks if interleaved else None,
        microbatch_group_size_per_vp_stage=shape.group,
        pipeline_dtype=torch.float32,
        overlap_p2p_comm=shape.overlap,
        batch_p2p_comm=False,
        overlap_p2p_comm_warmup_flush=shape.flush,
        deallocate_pipeline_outputs=True,
    )
    state = share_pipeline(config, MHCConfig(num_streams=STREAMS, pipeline_comm=shape.comm))
    state.announces = bool(shape.microbatches % 2)  # chunks of one layer don't
    events: list[Event] = []
    recorder = Recorder(events, rank, shape.stages)

    def of(group: Any, wraps: bool, ahead: bool, transport: str) -> Recorder:
        assert ahead == (shape.comm == "split")
        assert transport == "nccl"
        return recorder

    monkeypatch.setattr(Links, "of", of)
    group = Place(shape.stages, shape.chunks, rank)
    alone = Place(1, 1, 0)
    groups = ProcessGroupCollection(tp=alone, cp=alone, pp=group)
    last = shape.stages * shape.chunks - 1
    chunks = [Chunk(config, i * shape.stages + rank, last, recorder) for i in range(shape.chunks)]
    name = "with" if interleaved else "without"
    original = getattr(schedules, f"forward_backward_pipelining_{name}_interleaving")

    @functools.wraps(original)
    def schedule(**arguments: Any) -> Any:
        """Makes its communicator when it runs, as Megatron's do without process groups of the caller's."""
        return original(**arguments, p2p_communicator=StreamsCommunicator(group, config), pg_collection=groups)

    (hook,) = [rebinding for rebinding in REBINDINGS if rebinding.name == original.__name__]
    hook.make(schedule)(
        forward_step_func=lambda _, chunk: (chunk(), lambda output: (output.sum(), {})),
        data_iterator=[None] * shape.chunks if interleaved else None,
        model=chunks if interleaved else chunks[0],
        num_microbatches=shape.microbatches,
        seq_length=1,
        micro_batch_size=1,
        forward_only=shape.forward_only,
    )
    assert state.running is None
    if state.channel is not None:
        if not shape.forward_only:  # the planner has no other steps
            order = Order(
                shape.stages,
                shape.microbatches,
                shape.chunks,
                shape.group,
                shape.overlap,
                shape.flush,
                send_waits=False,
            )
            planned = order.split_plan(rank)
            planned = planned if state.announces else planned._replace(late=None)
            assert state.channel._plan == planned, (shape, rank)
        counts = {"_passes": "sends", "_receives": "receives", "_gradient_receives": "gradients"}
        for done, planned in counts.items():
            expected = (
                0 if planned == "gradients" and shape.forward_only else len(getattr(state.channel._plan, planned))
            )
            assert getattr(state.channel, done) == expected, (shape, rank, planned)
        assert state.channel._ahead is None
        assert state.channel._late is None
        for queue in (state.channel._leaving, state.channel._gradients):
            assert not queue
    return events


def check_partners(ranks: list[list[Event]]) -> None:
    """Every transfer has two ends of one size, and streams end in the pass of the same microbatch, one chunk on."""
    sends: dict[Link, list[Any]] = defaultdict(list)
    receives: dict[Link, list[Any]] = defaultdict(list)
    for events in ranks:
        waits = {event.number: event.at for event in events if event.kind == "wait"}
        for event in events:
            if event.kind == "send":
                sends[event.link].append((event.width, event.at))
            elif event.kind == "receive":
                receives[event.link].append((event.width, waits[event.number]))
    assert sends.keys() == receives.keys()
    for link, sent in sends.items():
        step = 1 if link.direction == FORWARD else -1
        assert [width for width, _ in sent] == [width for width, _ in receives[link]], link
        apart = {number + (1 if step < 0 else -1) for number, (width, _) in enumerate(sent) if width == NARROW}
        for number in apart:  # beside what is narrow
            (width, (chunk, microbatch)), (_, at) = sent[number], receives[link][number]
            assert width == WIDE
            assert (chunk + step, microbatch) == at, link


def unfinished(
    ranks: list[list[Event]],
    stages: int,
    wraps: bool,
    eager: bool = False,
    one_queue: bool = False,
    waits: bool = False,
) -> int:
    """How many operations are never done, if each rank has a compute stream, and a stream for all of a communicator's transfers.

    A transfer starts when what its rank computes before it is done and its stream is free; it ends when its other end starts.
    one_queue: and when all that its rank has launched before has started (CUDA_DEVICE_MAX_CONNECTIONS=1). waits: whether every
    computation starts with the rank's host waiting for its whole GPU (a kernel that is loaded, memory given back, a timer).
    """
    queues: dict[Any, deque] = defaultdict(deque)  # of operations: name, what it needs, the transfer it is an end of
    for rank, events in enumerate(ranks):
        count: Counter = Counter()
        latest: dict[Any, Any] = {}  # of each stream; None: of the compute stream
        waited: Any = None
        for number, event in enumerate(events):
            link, name, needs = event.link, (rank, number), {latest.get(None), waited}
            if event.kind == "compute" and waits:
                needs.update((rank, earlier) for earlier in range(number))
                waited = name
            stream: Any = None
            transfer = None
            if link is not None:
                count[event.kind, link] += 1
                transfer = link, count[event.kind, link]
                group = link.direction, group_of(link.sender, stages, wraps, eager)
                stream = group if eager else (group, frozenset(link[1:]))
            elif event.kind == "wait":
                needs.add((rank, event.number))
            needs.add(latest.get(stream))
            latest[stream] = name
            queues[rank if one_queue else (rank, stream)].append((name, needs - {None}, transfer))
    done: set[Any] = set()
    started: dict[Any, set[Any]] = defaultdict(set)
    left = -1
    while left != (left := sum(map(len, queues.values()))):
        for queue in queues.values():
            while queue and queue[0][1] <= done:
                name, _, transfer = queue.popleft()
                started[transfer or name].add(name)
                if transfer is None or len(started[transfer]) == 2:
                    done |= started[transfer or name]
    return left


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Callable[[Shape], list[list[Event]]]:
    monkeypatch.setattr(utils, "get_pg_rank", lambda group: group.rank())
    monkeypatch.setattr(utils, "get_pg_size", lambda group: group.size())
    monkeypatch.setattr(torch.distributed, "get_global_rank", lambda group, rank: rank)
    return lambda shape: [record(shape, rank, monkeypatch) for rank in range(shape.stages)]


def test_transfers_meet(recorded: Callable) -> None:
    mixed = 0
    for shape in shapes():
        ranks = recorded(shape)
        try:
            check_partners(ranks)
        except AssertionError as error:
            raise AssertionError(shape) from error
        widths = [event.width for events in ranks for event in events if event.kind == "send"]
        mixed += 0 < 2 * widths.count(NARROW) < len(widths)
    assert mixed > 20, "of some transfers split and others not"


def test_more_passes_than_the_schedule_has_are_an_error() -> None:
    links: Any = None
    channel = SideChannel(links, Plan(sends=(True,), receives=()))
    assert channel.departs()
    with pytest.raises(RuntimeError, match="of 1 transfers of a kind, and one more"):
        channel.departs()
    with pytest.raises(RuntimeError, match="of 0 transfers of a kind, and one more"):
        channel.splits_receive()


def test_when_streams_leave(recorded: Callable) -> None:
    """Apart from the output: of all microbatches, or where transfers overlap of the first and the last group. Then before a
    pass's last sublayer runs; from the last stage of a ring, once its warm-up is over, just before the schedule's own tensor."""
    for shape in shapes():
        if shape.comm != "split":
            continue
        group = shape.group or shape.stages
        warm_up = 0 if shape.flush else (shape.chunks - 1) * group
        some = shape.overlap and not shape.forward_only
        split_ones = set(range(shape.microbatches))
        if some:
            split_ones = {*list(range(shape.microbatches))[:group], *list(range(shape.microbatches))[-group:]}
        for rank, events in enumerate(recorded(shape)):
            sends = [
                (place, event)
                for place, event in enumerate(events)
                if event.kind == "send" and event.link[0] == FORWARD
            ]
            closes = shape.chunks > 1 and rank == shape.stages - 1
            found: Counter = Counter()
            for number, (place, event) in enumerate(sends):
                if event.width != NARROW:
                    continue
                before, streams = sends[number - 1]
                passes = number - 1 - found.total()
                found[streams.at[1]] += 1
                held = all(between.kind != "compute" for between in events[before:place])
                may_be_early = not closes or passes < warm_up or (shape.forward_only and not shape.flush)
                assert held is not may_be_early, (shape, rank, passes)
            sending = shape.chunks - (rank == shape.stages - 1)
            assert found == dict.fromkeys(split_ones, sending) if sending else not found, (shape, rank)
            assert len(sends) == sending * (shape.microbatches + len(split_ones))


@pytest.mark.parametrize("stages", [2, 4])
def test_when_receives_are_posted_ahead(stages: int, recorded: Callable) -> None:
    """1F1B: those of the warm-up at once; the others in the middle of the backward pass before."""
    for rank, events in enumerate(recorded(Shape(stages, 1, 9, None, False, False, False, "split"))):
        streams = [
            place
            for place, event in enumerate(events)
            if event.kind == "receive" and event.link[0] == FORWARD and event.width == WIDE
        ]
        at_once = [events[place - 1].kind == "receive" for place in streams[1:]]
        warm_up = stages - 1 - rank
        assert at_once == ([True] * warm_up + [False] * (8 - warm_up) if rank else [])
        for place in streams[1 + warm_up :]:
            assert [events[place + step].kind for step in (-1, 1)] == ["compute", "compute"]


@pytest.mark.parametrize("waits", [False, True])
def test_no_rank_waits_for_ever(waits: bool, recorded: Callable) -> None:
    for shape in shapes():
        ranks = recorded(shape)
        for eager, one_queue in itertools.product((False, True), repeat=2):
            stuck = unfinished(ranks, shape.stages, shape.chunks > 1, eager, one_queue, waits)
            connected = "eagerly" if eager else "at the first transfer"
            assert not stuck, f"{shape}, NCCL connected {connected}, {'one queue' if one_queue else 'many queues'}"


@pytest.mark.parametrize("stages", range(2, 9))
@pytest.mark.parametrize("wraps", [False, True])
def test_no_stage_has_two_links_in_a_group_that_runs_them_one_by_one(stages: int, wraps: bool) -> None:
    for direction in (1, -1):
        links = [(sender, (sender + direction) % stages) for sender in range(stages)]
        if not wraps:
            links.remove((stages - 1, 0) if direction == 1 else (0, stages - 1))
        eager: Counter = Counter()
        lazy: Counter = Counter()
        for sender, receiver in links:
            lazy[group_of(sender, stages, wraps, False), frozenset((sender, receiver))] += 1
            for stage in (sender, receiver):
                eager[group_of(sender, stages, wraps, True), stage] += 1
        assert set(lazy.values()) == {1}
        assert set(eager.values()) == {1}


def test_two_stages_in_a_ring_have_four_groups() -> None:
    """gloo would not tell: it keeps what two ranks exchange apart by itself."""
    links = Links.__new__(Links)
    links._stages, links._wraps = 2, True
    links._groups = [["a", "b"], ["c", "d"]]
    assert {links._link(direction, sender)[0] for direction in (FORWARD, BACKWARD) for sender in (0, 1)} == set("abcd")


@pytest.mark.parametrize(
    ("ahead", "expected"), [(0, [1, 2, 3, 4]), (1, [1, 2, 3, 4]), (3, [2, 3, 3, 4]), (4, [2, 3, 4, 4])]
)
def test_one_receive_is_posted_ahead(ahead: int, expected: list[int]) -> None:
    """Each one ahead holds a tensor of n*C values a token."""
    events: list[Event] = []
    links: Any = Recorder(events, 1, 2)
    channel = SideChannel(links, Plan(ahead=ahead))
    posted = []
    for _ in range(4):
        buffers = channel.buffers((1,), torch.float32)
        channel.receive_streams(buffers)
        channel.receive_ahead(buffers)
        assert not buffers
        posted.append(sum(event.kind == "receive" for event in events))
    assert posted == expected


def test_nothing_is_posted_ahead_of_what_is_not_split() -> None:
    events: list[Event] = []
    links: Any = Recorder(events, 1, 2)
    channel = SideChannel(links, Plan(ahead=4, receives=(True, False, True, True)))
    posted = []
    for split_one in (True, False, True, True):
        assert channel.splits_receive() is split_one
        buffers = channel.buffers((1,), torch.float32)
        if split_one:
            channel.receive_streams(buffers)
        channel.receive_ahead(buffers)
        posted.append(sum(event.kind == "receive" for event in events))
    assert posted == [1, 2, 3, 3]
