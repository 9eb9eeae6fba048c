"""Which links of a pipeline copy engines can serve, and both ends of those.

All ranks of the job take part at the same time, in five rounds: where each one is; over what a sender can reach the receiver;
the receivers' rings; whether both ends have what they need; and whether a trial transfer arrives. Both ends of a link come to
the same answer, and an error of one rank is its reason not to use them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from mhc_megatron.pipeline.copies import driver
from mhc_megatron.pipeline.copies.link import Receiver, Sender
from mhc_megatron.pipeline.copies.queues import late, why_dependent
from mhc_megatron.pipeline.copies.ring import Offer, Ring
from mhc_megatron.pipeline.copies.watchdog import Watchdog
from mhc_megatron.pipeline.nodes import machine

DIRECTIONS = (0, 1)  # forward, backward
_NAMES = ("forward", "backward")
PEER, HOST = "the receiving GPU's memory", "host memory"
_PATIENT = timedelta(minutes=2)
_TRIAL = 6 * 2**20  # int32 of a trial transfer: 24 MiB, in several pieces

Neighbours = dict[int, tuple[int | None, int | None]]
"""By direction: the rank that this one sends to, and the one that it receives from."""


class Copies(NamedTuple):
    """A rank's ends of links, by direction. ways, reasons: of the job's links, those that have copy engines, by what they copy
    through, and what kept the others from it."""

    senders: dict[int, Sender]
    receivers: dict[int, Receiver]
    ways: dict[str, int]
    reasons: dict[str, int]

    def describe(self, asked: bool = False) -> str:
        """For rank 0's log. asked: whether copy engines were asked for."""
        served, others = sum(self.ways.values()), sum(self.reasons.values())
        through = ", ".join(self.ways)
        why = "; ".join(f"{reason} ({count})" for reason, count in self.reasons.items())
        if not others:
            return f"copy engines move the transfers, through {through}"
        if served:
            links = f"{served} of {served + others} links"
            return f"copy engines move the transfers of {links}, through {through}; NCCL those of the others: {why}"
        wish = "--mhc-pipeline-transport copy-engine was asked for, but " if asked else ""
        return f"{wish}NCCL moves the transfers, not copy engines: {why}"


class _Fact(NamedTuple):
    machine: str
    gpu: str = ""
    reason: str = ""


class _Route(NamedTuple):
    """How a sender gets to the receiver: what it copies through, or why it does not."""

    way: str = ""
    reason: str = ""


def connect(neighbours: Neighbours, timeout: Callable[[], timedelta]) -> Copies:
    """Copy engines for this rank's links, where possible.

    Args:
        timeout: how long a transfer may take, asked whenever one is started.
    """
    me = dist.get_rank()
    prepared = _attempt(_prepare)
    fact, streams = (_Fact(machine(), reason=prepared), {}) if isinstance(prepared, str) else prepared
    facts: list[_Fact] = _gather(fact)

    sends = {d: to for d, (to, _) in neighbours.items() if to is not None}
    receives = {d: source for d, (_, source) in neighbours.items() if source is not None}
    routes: dict[int, _Route] = {}
    for direction, to in sends.items():
        found = _attempt(lambda to=to: _route(facts[me], facts[to]))  # type: ignore[misc]
        routes[direction] = _Route(reason=found) if isinstance(found, str) else found
    wished: list[dict[int, _Route]] = _gather(routes)

    rings: dict[tuple[str, int], Ring] = {}
    wanted = {d: wished[source][d].way for d, source in receives.items() if wished[source][d].way}
    offers, descriptors = _make_rings(wanted, rings)
    offered: list[dict[int, Offer | str]] = _gather(offers)
    routes |= _open_rings({d: offered[to][d] for d, to in sends.items() if routes[d].way}, rings)
    agreed: list[dict[int, _Route]] = _gather(routes)
    for descriptor in descriptors:
        os.close(descriptor)

    generous = [_PATIENT]  # a trial that fails is no reason to end the run
    watchdog = Watchdog(lambda: max([timeout(), *generous]))
    senders = {
        d: Sender(rings["send", d], streams["send", d], watchdog, f"{_NAMES[d]} send to rank {to}")
        for d, to in sends.items()
        if agreed[me][d].way
    }
    receivers = {
        d: Receiver(rings["receive", d], streams["receive", d], watchdog, f"{_NAMES[d]} receive from rank {source}")
        for d, source in receives.items()
        if agreed[source][d].way
    }
    failed: list[dict[str, str]] = _gather(_try(senders, receivers, rings))
    generous.clear()
    for direction in list(senders):
        if reason := failed[me].get(f"send {direction}") or failed[sends[direction]].get(f"receive {direction}"):
            routes[direction] = _Route(reason=reason)
            del senders[direction], rings["send", direction]
    final: list[dict[int, _Route]] = _gather(routes)
    for direction in list(receivers):  # whose memory the senders have let go of by now
        if not final[receives[direction]][direction].way:
            del receivers[direction]
    rows = [route for row in final for route in row.values()]
    ways = Counter(route.way for route in rows if route.way)
    reasons = Counter(route.reason for route in rows if not route.way)
    return Copies(senders, receivers, dict(ways), dict(reasons))


def _make_rings(ways: dict[int, str], rings: dict[tuple[str, int], Ring]) -> tuple[dict[int, Offer | str], list[int]]:
    """The receivers' rings, by direction: offers of them, or what went wrong; and descriptors, to be closed later."""
    offers: dict[int, Offer | str] = {}
    descriptors = []
    for direction, way in ways.items():
        made = _attempt(lambda way=way: Ring.make(on_gpu=way == PEER))  # type: ignore[misc]
        if isinstance(made, str):
            offers[direction] = made
        else:
            rings["receive", direction], offers[direction], descriptor = made
            descriptors.append(descriptor)
    return offers, descriptors


def _open_rings(offers: dict[int, Offer | str], rings: dict[tuple[str, int], Ring]) -> dict[int, _Route]:
    """The senders' ends of rings, by direction: where there is none, why."""
    refused = {}
    for direction, offer in offers.items():
        opened = offer if isinstance(offer, str) else _attempt(lambda offer=offer: Ring.open(offer))  # type: ignore[misc]
        if isinstance(opened, str):
            refused[direction] = _Route(reason=opened)
        else:
            rings["send", direction] = opened
    return refused


@cache
def _streams() -> dict[tuple[str, int], torch.cuda.Stream] | str:
    """A stream for every end that a rank may have, for all of its pipelines; or what is wrong with them."""
    torch.cuda.synchronize()
    highest = driver.priorities()[0]
    streams = {(end, d): driver.make_stream(highest) for end in ("send", "receive") for d in DIRECTIONS}
    reason = why_dependent(list(streams.values()))
    return streams if reason is None else reason


def _prepare() -> tuple[_Fact, dict[tuple[str, int], torch.cuda.Stream]]:
    """What others have to know of this rank, and its links' streams."""
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return _Fact(machine(), reason="they need NVIDIA GPUs"), {}
    streams = _streams()
    if isinstance(streams, str):
        return _Fact(machine(), reason=streams), {}
    return _Fact(machine(), driver.bus_id()), streams


def _route(mine: _Fact, theirs: _Fact) -> _Route:
    if reason := mine.reason or theirs.reason:
        return _Route(reason=reason)
    if mine.machine != theirs.machine:
        return _Route(reason="the stages are on different nodes")
    if mine.gpu == theirs.gpu:
        return _Route(reason="the stages share a GPU")
    linked = driver.linked(theirs.gpu)
    if linked is None:
        return _Route(reason="one stage's process can't see the other one's GPU (CUDA_VISIBLE_DEVICES)")
    if linked and os.environ.get("NCCL_P2P_DISABLE", "0") == "0":
        return _Route(PEER)
    if os.environ.get("NCCL_SHM_DISABLE", "0") != "0":
        return _Route(reason="NCCL_SHM_DISABLE: no shared memory, as asked for")
    return _Route(HOST)


def _try(
    senders: dict[int, Sender], receivers: dict[int, Receiver], rings: dict[tuple[str, int], Ring]
) -> dict[str, str]:
    """Move numbers over every link, twice: by this rank's ends, what went wrong."""
    ends: dict[str, tuple[str, int]] = {
        **{f"receive {d}": ("receive", d) for d in receivers},
        **{f"send {d}": ("send", d) for d in senders},
    }
    tensors: dict[str, list[torch.Tensor]] = {}
    failed: dict[str, str] = {}
    try:
        # All memory, and every kernel once, before anything waits: either may wait for the GPU.
        numbers = {(d, turn): _numbers(d + 2 * turn) for d in DIRECTIONS for turn in range(2)} if ends else {}
        for name, (end, d) in ends.items():
            sent = [numbers[d, turn] for turn in range(2)]
            tensors[name] = sent if end == "send" else [torch.zeros_like(tensor) for tensor in sent]
            torch.equal(tensors[name][0], sent[0])
        torch.cuda.synchronize()
        handles = [
            (name, receivers[d].receive(t)) for name, (e, d) in ends.items() if e == "receive" for t in tensors[name]
        ]
        handles += [(name, senders[d].send(t)) for name, (e, d) in ends.items() if e == "send" for t in tensors[name]]
        for k in late([handle.done for _, handle in handles]):
            name = handles[k][0]
            failed[name] = "a trial transfer did not arrive"
            rings[ends[name]].give_up()
        torch.cuda.synchronize()
        for name, (_, d) in ends.items():
            if not all(torch.equal(tensor, numbers[d, turn]) for turn, tensor in enumerate(tensors[name])):
                failed.setdefault(name, "a trial transfer arrived wrong")
    except Exception as error:
        for place in ends.values():
            rings[place].give_up()
        torch.cuda.synchronize()  # before any of the tensors is freed
        failed = dict.fromkeys(ends, f"a trial transfer failed: {type(error).__name__}: {error}")
    return failed


def _numbers(seed: int) -> torch.Tensor:
    return torch.arange(1, _TRIAL + 1, dtype=torch.int32, device="cuda").mul_(2654435 + 2 * seed)


def _attempt(step: Callable[[], Any]) -> Any:
    """What it returns; the reason, if it fails: other ranks wait for an answer."""
    try:
        return step()
    except Exception as error:
        return f"{error}" if isinstance(error, OSError) else f"{type(error).__name__}: {error}"


def _gather(item: Any) -> list[Any]:
    rows: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(rows, item)
    return rows
