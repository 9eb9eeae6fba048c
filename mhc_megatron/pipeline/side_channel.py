"""When streams travel, on the same links as the schedule's own tensors (`passes`: for which of them).

On every link a pass's streams come before its y, and y's gradient before the streams' one: what is needed first. One queue
for both, so that no more kernels of NCCL stand on the GPU and wait for their other end than with wide transfers: each takes
multiprocessors from the computation.

Streams leave before the chunk's last sublayer runs, and a receive of them is posted one transfer ahead of the schedule's own:
the schedule posts a receive only after the pass that precedes it, and the streams would start no earlier than what follows
them. This holds one tensor more. Where a backward pass is between, the receive is posted when that comes to the chunk's first
layer (`split.announce`): until the streams are sent, NCCL's kernel would take multiprocessors from it for nothing.

**Waiting for the whole GPU.** Much may do so in the middle of a pass: CUDA where it loads a kernel, at its first launch (a
MoE's tokens may ask for another matrix product at any step); PyTorch's allocator where memory is short; a timer. So nothing
may be under way that ends only when this rank goes on. 1F1B fulfils that, posting ahead included: there is an order of all
stages' passes in which each waits for earlier ones alone.

In an interleaved schedule the last stage sends to the first, and where each stage's streams are under way until the next one's
pass is over, all of them may wait in a ring, for ever (as seen with NCCL). In the warm-up it is open, as the first stage posts
its receives after the passes that precede them; there transfers are exposed. Later the last
stage's streams leave with the schedule's own tensor (`send_held`), and nothing is posted ahead (`passes.plan`).

tests/unit/test_transfer_order.py plays this for every pass of every rank.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from mhc_megatron.pipeline.links import BACKWARD, FORWARD, Arrival, Links
from mhc_megatron.pipeline.passes import Plan


class SideChannel:
    """One schedule's streams on ``links``."""

    def __init__(self, links: Links, plan: Plan):
        self.links, self._plan = links, plan
        self._passes = self._receives = self._gradient_receives = 0
        self._ahead: Arrival | None = None
        self._late: Tensor | None = None
        """For what is to be received ahead, but not yet."""
        self._leaving: deque[Tensor | None] = deque()
        """Of split passes whose result the schedule has not sent yet: the streams; None if they have left."""
        self._gradients: deque[Tensor] = deque()

    def departs(self) -> bool:
        """Whether the result of the pass that runs is split. Once a pass whose result is sent."""
        self._passes += 1
        return _at(self._plan.sends, self._passes - 1)

    def send_streams(self, tensor: Tensor) -> None:
        """Send ``H_res @ x`` to the next stage: now, or when the schedule sends the pass's result."""
        held = self._plan.early is not None and self._passes > self._plan.early
        self._leaving.append(tensor if held else None)
        if not held:
            self.links.send(FORWARD, tensor, more=True)

    def send_held(self) -> None:
        """The schedule sends a pass's result next: what was held for it goes first.

        Raises:
            RuntimeError: if the schedule's sends and the forward passes are not one to one.
        """
        streams = _only(self._leaving, "streams")
        if streams is not None:
            self.links.send(FORWARD, streams, more=True)

    def splits_receive(self) -> bool:
        """Whether what the schedule receives next from the previous stage is split."""
        return _at(self._plan.receives, self._receives)

    def splits_gradient(self) -> bool:
        """Whether the gradient that the schedule receives next is split. Once a receive."""
        self._gradient_receives += 1
        return _at(self._plan.gradients, self._gradient_receives - 1)

    def buffers(self, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
        """For what `receive_streams` and then `receive_ahead` post."""
        now = self.splits_receive() and self._ahead is None and self._late is None
        later = self._receives + 1
        ahead = later < self._plan.ahead and _at(self._plan.receives, later)
        return [self.links.buffer(shape, dtype) for _ in range(now + ahead)]

    def receive_streams(self, buffers: list[Tensor]) -> Arrival:
        """Receive the previous stage's, before the schedule's own tensor."""
        self.post_ahead()
        arrival, self._ahead = self._ahead, None
        return self.links.receive(FORWARD, buffers.pop(0)) if arrival is None else arrival

    def receive_ahead(self, buffers: list[Tensor]) -> None:
        """After the schedule's own tensor, whether that is split or not: post what may be posted ahead, or note it for
        `post_ahead`."""
        self._receives += 1
        if buffers:
            self._late = buffers.pop()
            if self._plan.late is None or self._receives <= self._plan.late:
                self.post_ahead()

    def post_ahead(self) -> None:
        """Post the receive that was noted, if there is one."""
        buffer, self._late = self._late, None
        if buffer is not None:
            self._ahead = self.links.receive(FORWARD, buffer)

    def queue_gradient(self, tensor: Tensor) -> None:
        """Hand over the streams' gradient; it leaves after the schedule has sent y's: `send_gradient`."""
        self._gradients.append(tensor)

    def send_gradient(self) -> None:
        """Send the gradient that was handed over to the previous stage.

        Raises:
            RuntimeError: if the schedule's sends and the backward passes are not one to one.
        """
        gradient = _only(self._gradients, "gradients of streams")
        assert gradient is not None
        self.links.send(BACKWARD, gradient)

    def receive_gradient(self, buffer: Tensor) -> Arrival:
        """Receive the next stage's."""
        return self.links.receive(BACKWARD, buffer)


def _only(waiting: deque, what: str) -> Tensor | None:
    if len(waiting) != 1:
        raise RuntimeError(
            f"mHC: {len(waiting)} {what} where the pipeline schedule sends one; use --mhc-pipeline-comm wide, and report it"
        )
    found: Tensor | None = waiting.popleft()
    return found


def _at(split: tuple[bool, ...] | None, number: int) -> bool:
    if split is None:
        return True
    if number >= len(split):
        raise RuntimeError(
            f"mHC: a pipeline schedule of {len(split)} transfers of a kind, and one more; a model that runs outside a schedule "
            "needs --mhc-pipeline-comm wide; else report it"
        )
    return split[number]
