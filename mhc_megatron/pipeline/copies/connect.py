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
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from mhc_megatron.pipeline.copies import driver
from mhc_megatron.pipeline.copies.link import Receiver, Sender
from mhc_megatron.pipeline.copies.queues import complete, why_dependent
from mhc_megatron.pipeline.copies.ring import Offer, Ring
from mhc_megatron.pipeline.copies.watchdog import Watchdog
from mhc_megatron.pipeline.nodes import machine

DIRECTIONS = (0, 1)  # forward, backward
_NAMES = ("forward", "backward")
PEER, HOST = "the receiving GPU's memory", "host memory"
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
    offers: dict[int, Offer | str] = {}
    descriptors = []
    for direction, source in receives.items():
        if way := wished[source][direction].way:
            ring = _attempt(lambda way=way: Ring.make(on_gpu=way == PEER))  # type: ignore[misc]
            if isinstance(ring, str):
                offers[direction] = ring
            else:
                rings["receive", direction], offers[direction], descriptor = ring
                descriptors.append(descriptor)
    offered: list[dict[int, Offer | str]] = _gather(offers)
    for direction, to in sends.items():
        if routes[direction].way:
            offer = offered[to][direction]
            ring = offer if isinstance(offer, str) else _attempt(lambda offer=offer: Ring.open(offer))  # type: ignore[misc]
            if isinstance(ring, str):
                routes[direction] = _Route(reason=ring)
            else:
                rings["send", direction] = ring
    agreed: list[dict[int, _Route]] = _gather(routes)
    for descriptor in descriptors:
        os.close(descriptor)

    watchdog = Watchdog(timeout)
    senders: dict[int, Sender] = {}
    receivers: dict[int, Receiver] = {}
    for (end, direction), ring in rings.items():
        if end == "send" and agreed[me][direction].way:
            name = f"{_NAMES[direction]} send to rank {sends[direction]}"
            senders[direction] = Sender(ring, streams[end, direction], watchdog, name)
        elif end == "receive" and agreed[receives[direction]][direction].way:
            name = f"{_NAMES[direction]} receive from rank {receives[direction]}"
            receivers[direction] = Receiver(ring, streams[end, direction], watchdog, name)
    failed: list[dict[str, str]] = _gather(_try(senders, receivers, rings))
    for direction in list(senders):
        if reason := failed[me].get(f"send {direction}") or failed[sends[direction]].get(f"receive {direction}"):
            del senders[direction]
            routes[direction] = _Route(reason=reason)
    for direction in list(receivers):
        source = receives[direction]
        if failed[source].get(f"send {direction}") or failed[me].get(f"receive {direction}"):
            del receivers[direction]
    final: list[dict[int, _Route]] = _gather(routes)
    rows = [route for row in final for route in row.values()]
    ways = Counter(route.way for route in rows if route.way)
    reasons = Counter(route.reason for route in rows if not route.way)
    return Copies(senders, receivers, dict(ways), dict(reasons))


def _prepare() -> tuple[_Fact, dict[tuple[str, int], torch.cuda.Stream]]:
    """What others have to know of this rank, and its links' streams."""
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return _Fact(machine(), reason="they need NVIDIA GPUs"), {}
    highest = driver.priorities()[0]
    streams = {(end, d): driver.make_stream(highest) for end in ("send", "receive") for d in DIRECTIONS}
    reason = why_dependent(list(streams.values()))
    if reason is not None:
        for stream in streams.values():
            driver.destroy_stream(stream)
        return _Fact(machine(), reason=reason), {}
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
    failed: dict[str, str] = {}
    checks = []
    for direction, receiver in receivers.items():
        found = [torch.zeros(_TRIAL, dtype=torch.int32, device="cuda") for _ in range(2)]
        handles = [receiver.receive(tensor) for tensor in found]
        checks.append((f"receive {direction}", "receive", direction, handles, found))
    for direction, sender in senders.items():
        sent = [_numbers(direction + 2 * turn) for turn in range(2)]
        handles = [sender.send(tensor) for tensor in sent]
        checks.append((f"send {direction}", "send", direction, handles, []))
    for name, end, direction, handles, _ in checks:
        if not complete([handle.done for handle in handles]):
            failed[name] = "a trial transfer did not arrive"
            rings[end, direction].give_up()
    torch.cuda.synchronize()
    for name, _, direction, _, found in checks:
        if any(not torch.equal(tensor, _numbers(direction + 2 * turn)) for turn, tensor in enumerate(found)):
            failed.setdefault(name, "a trial transfer arrived wrong")
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
