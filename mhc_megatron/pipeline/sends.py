"""Sends that stop nothing when they are posted: what they send stays alive until it has gone.

A host is some passes ahead of its GPU and does not see a send complete until then; it would keep all that it has sent meanwhile,
n*C values a token each. So the GPU is told to wait for a send when the next one but one follows it: in time it has long gone
(tests/unit/test_plan_schedule.py), and its memory is free for what is launched from then on.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

from torch import Tensor


class NoWait:
    """Stands for the handle of a send whose tensor somebody else keeps: the compute stream need not stop for it."""

    def wait(self) -> None:
        """Return at once."""


class _Send(NamedTuple):
    work: Any
    tensor: Tensor
    more: bool


def passes_under_way(stages: int, group: int) -> int:
    """How many passes' sends may be under way in one direction when others are about to be sent.

    One; and with groups of microbatches larger than the pipeline is long, those that the other end takes only when the group has
    passed there.

    Args:
        stages: of the pipeline.
        group: microbatches that pass a chunk in a row; without an interleaved schedule 1.
    """
    return 1 + max(0, group - stages)


class Sends:
    """Tensors under way in one direction, each with the handle of its send: they arrive in order."""

    def __init__(self) -> None:
        self._under_way: deque[_Send] = deque()

    def __len__(self) -> int:
        return len(self._under_way)

    def keep(self, work: Any, tensor: Tensor, more: bool = False) -> None:
        """Hold ``tensor`` until ``work``, its send, is complete, or what is launched next waits for it.

        more: another tensor of the same pass follows.
        """
        earlier = len(self._under_way)
        self._under_way.append(_Send(work, tensor, more))
        if tensor.is_cuda:
            return  # letting go may wait for the GPU (without a caching allocator): `release`, when nothing is being posted
        for _ in range(earlier):  # gloo tells that a send is complete only if asked to wait for it
            self._under_way.popleft().work.wait()

    def release(self, passes: int) -> None:
        """Let go of what has gone, and have the current stream wait for what is older than the last ``passes`` passes."""
        while self._under_way and self._under_way[0].work.is_completed():
            self._under_way.popleft()
        while sum(not send.more for send in self._under_way) > passes:
            self._under_way.popleft().work.wait()
