"""Sends that nobody waits for: what they send stays alive until it has gone, and no longer than to the next exchange."""

from __future__ import annotations

from collections import deque
from typing import Any

from torch import Tensor


class NoWait:
    """Stands for the handle of a send whose tensor somebody else keeps: the compute stream need not stop for it."""

    def wait(self) -> None:
        """Return at once."""


class Sends:
    """Tensors under way in one direction, each with the handle of its send: they arrive in order."""

    def __init__(self) -> None:
        self._under_way: deque[tuple[Any, Tensor]] = deque()

    def __len__(self) -> int:
        return len(self._under_way)

    def keep(self, work: Any, tensor: Tensor) -> None:
        """Hold ``tensor`` until ``work``, its send, is complete."""
        earlier = len(self._under_way)
        self._under_way.append((work, tensor))
        if tensor.is_cuda:
            return  # letting go may wait for the GPU (without a caching allocator): `release`, when nothing is being posted
        for _ in range(earlier):  # gloo tells that a send is complete only if asked to wait for it
            self._under_way.popleft()[0].wait()

    def release(self) -> None:
        """Let go of what has gone."""
        while self._under_way and self._under_way[0][0].is_completed():
            self._under_way.popleft()
