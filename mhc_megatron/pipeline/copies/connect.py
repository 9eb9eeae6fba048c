"""Which links of a pipeline copy engines can serve, and both ends of those.

All ranks of the job take part at the same time, in four rounds: where each one is; over what a sender can reach the receiver;
the receivers' rings; and whether both ends have what they need. Both ends of a link come to the same answer.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from mhc_megatron.pipeline.copies import driver
from mhc_megatron.pipeline.copies.link import Receiver, Sender
from mhc_megatron.pipeline.copies.queues import why_dependent
from mhc_megatron.pipeline.copies.ring import Offer, Ring
from mhc_megatron.pipeline.copies.watchdog import Watchdog
from mhc_megatron.pipeline.nodes import machine

DIRECTIONS = (0, 1)  # forward, backward
_NAMES = ("forward", "backward")


class Copies(NamedTuple):
    """A rank's ends of links, by direction. ways, reasons: of the job's links, those that have copy engines, by what they copy
    through, and what kept the others from it."""

    senders: dict[int, Sender]
    receivers: dict[int, Receiver]
    ways: dict[str, int]
    reasons: dict[str, int]

    def describe(self) -> str:
        """For rank 0's log."""
        served, others = sum(self.ways.values()), sum(self.reasons.values())
        through = ", ".join(self.ways)
        why = "; ".join(f"{reason} ({count})" for reason, count in self.reasons.items())
        if not served:
            return f"NCCL moves the transfers, not copy engines: {why}"
        if not others:
            return f"copy engines move the transfers, through {through}"
        links = f"{served} of {served + others} links"
        return f"copy engines move the transfers of {links}, through {through}; NCCL those of the others: {why}"


class _Fact(NamedTuple):
    machine: str
    gpu: str
    reason: str | None


Neighbours = dict[int, tuple[int | None, int | None]]
"""By direction: the rank that this one sends to, and the one that it receives from."""


def connect(neighbours: Neighbours, timeout: timedelta, own: str | None = None) -> Copies:
    """Copy engines for this rank's links, where possible. own: a reason why not, of this rank."""
    streams: dict[tuple[str, int], torch.cuda.Stream] = {}
    fact = _Fact(machine(), "", own or _why_not())
    if fact.reason is None:
        fact = fact._replace(gpu=driver.bus_id())
        streams = {(end, direction): driver.urgent_stream() for end in ("send", "receive") for direction in DIRECTIONS}
        fact = fact._replace(reason=why_dependent(list(streams.values())))
    facts: list[_Fact] = _gather(fact)
    me = dist.get_rank()

    routes = {d: _route(facts[me], facts[to]) for d, (to, _) in neighbours.items() if to is not None}
    theirs: list[dict[int, tuple[str, str]]] = _gather(routes)
    offers: dict[int, Offer | str] = {}
    rings: dict[tuple[str, int], Ring] = {}
    for direction, (_, source) in neighbours.items():
        if source is not None and theirs[source][direction][0]:
            way = theirs[source][direction][0]

            def make(direction: int = direction, way: str = way) -> Offer:
                rings["receive", direction], offer = Ring.make(on_gpu=way == PEER)
                return offer

            offers[direction] = _attempt(make)
    offered: list[dict[int, Offer | str]] = _gather(offers)
    for direction, (to, _) in neighbours.items():
        if to is not None and routes[direction][0]:
            offer = offered[to][direction]

            def take(direction: int = direction, offer: Any = offer) -> None:
                rings["send", direction] = Ring.open(offer)

            failed = offer if isinstance(offer, str) else _attempt(take)
            if failed is not None:
                routes[direction] = ("", str(failed))
    agreed: list[dict[int, tuple[str, str]]] = _gather(routes)

    watchdog = Watchdog(timeout)
    senders, receivers = {}, {}
    for (end, direction), ring in rings.items():
        to, source = neighbours[direction]
        other = to if end == "send" else source
        ring.settle()
        if not agreed[me if end == "send" else _known(source)][direction][0]:
            continue
        name = f"{_NAMES[direction]} {'send to' if end == 'send' else 'receive from'} rank {other}"
        made = (ring, streams[end, direction], watchdog, name)
        if end == "send":
            senders[direction] = Sender(*made)
        else:
            receivers[direction] = Receiver(*made)
    ways: dict[str, int] = {}
    reasons: dict[str, int] = {}
    for row in agreed:
        for way, reason in row.values():
            counts, key = (ways, way) if way else (reasons, reason)
            counts[key] = counts.get(key, 0) + 1
    return Copies(senders, receivers, ways, reasons)


PEER, HOST = "the receiving GPU's memory", "host memory"


def _route(mine: _Fact, theirs: _Fact) -> tuple[str, str]:
    """What a sender copies through; or "" and why it does not."""
    if (reason := mine.reason or theirs.reason) is not None:
        return "", reason
    if mine.machine != theirs.machine:
        return "", "the stages are on different nodes"
    if mine.gpu == theirs.gpu:
        return "", "the stages share a GPU"
    reaches = driver.reaches(theirs.gpu)
    if reaches is None:
        return "", "one stage's process can't see the other one's GPU (CUDA_VISIBLE_DEVICES)"
    if reaches and os.environ.get("NCCL_P2P_DISABLE", "0") == "0":
        return PEER, ""
    if os.environ.get("NCCL_SHM_DISABLE", "0") != "0":
        return "", "NCCL_SHM_DISABLE: no shared memory, as asked for"
    return HOST, ""


def _why_not() -> str | None:
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return "there is no CUDA GPU"
    try:
        driver.bus_id()
    except (OSError, AttributeError, RuntimeError) as error:
        return f"the CUDA driver: {error}"
    return None


def _attempt(step: Callable[[], Any]) -> Any:
    """What it returns; the reason, if it fails."""
    try:
        return step()
    except (OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


def _gather(item: Any) -> list[Any]:
    rows: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(rows, item)
    return rows


def _known(rank: int | None) -> int:
    assert rank is not None
    return rank
