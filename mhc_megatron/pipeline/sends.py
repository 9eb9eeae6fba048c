"""Sends that stop nothing when they are posted: what they send stays alive until it has gone.

A host is some passes ahead of its GPU and does not see a send complete until then; it would keep all that it has sent meanwhile,
n*C values a token each. So the GPU is told to wait for a send when the next one but one follows it, and the tensor is let go:
next to nothing is waited for in simulated steps (tests/unit/test_plan_schedule.py). What copy engines have sent is then free
for whatever is launched next. What NCCL has sent PyTorch's allocator keeps until it sees NCCL's stream there (`record_stream`),
or is short of memory.
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


PASSES_UNDER_WAY = 1
"""Of how many passes sends may be under way in one direction when the next pass's are about to be posted."""


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

    def release(self) -> None:
        """Let go of what has gone, and of what is older than the last passes, for which the current stream waits."""
        while self._under_way and self._under_way[0].work.is_completed():
            self._under_way.popleft()
        while sum(not send.more for send in self._under_way) > PASSES_UNDER_WAY:
            self._under_way.popleft().work.wait()
