"""When streams travel, on the same links as the schedule's own tensors.

On every link a pass's streams come before its y, and y's gradient before the streams' one: what is needed first. One queue
for both, so that no more kernels of NCCL stand on the GPU and wait for their other end than with wide transfers: each takes
multiprocessors from the computation.

Streams leave before the chunk's last sublayer runs, and a receive of them is posted one transfer ahead of the schedule's own:
the schedule posts a receive only after the pass that precedes it, and the streams would start no earlier than what follows
them. This holds one tensor more.

**Waiting for the whole GPU.** Much may do so in the middle of a pass: CUDA where it loads a kernel, at its first launch (a
MoE's tokens may ask for another matrix product at any step); PyTorch's allocator where memory is short; a timer. So nothing
may be under way that ends only when this rank goes on. 1F1B fulfils that, posting ahead included: there is an order of all
stages' passes in which each waits for earlier ones alone.

In an interleaved schedule the last stage sends to the first, and where each stage's streams are under way until the next one's
pass is over, all of them may wait in a ring, for ever (as seen with NCCL). In the warm-up it is open, as the first stage posts
its receives after the passes that precede them; there transfers are exposed. Later a transfer has a whole pass of time:
the last stage's streams leave with the schedule's own tensor (`send_held`), and nothing is posted ahead (`limits`).

tests/unit/test_transfer_order.py plays this for every pass of every rank.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from mhc_megatron.pipeline.links import BACKWARD, FORWARD, Arrival, Links


class SideChannel:
    """One schedule's streams on ``links``.

    early: how many passes' streams leave before the schedule's own tensor, the first ones; None: all of them. ahead: how many
    receives, the first ones, may be posted before the schedule's own.
    """

    def __init__(self, links: Links, early: int | None, ahead: int):
        self.links, self._early, self._may_be_ahead = links, early, ahead
        self._passes = self._receives = 0
        self._ahead: Arrival | None = None
        self._leaving: deque[Tensor | None] = deque()
        """Of passes whose result the schedule has not sent yet: the streams; None if they have left."""
        self._gradients: deque[Tensor] = deque()

    def send_streams(self, tensor: Tensor) -> None:
        """Send ``H_res @ x`` to the next stage: now, or when the schedule sends the pass's result."""
        held = self._early is not None and self._passes >= self._early
        self._passes += 1
        self._leaving.append(tensor if held else None)
        if not held:
            self.links.send(FORWARD, tensor)

    def send_held(self) -> None:
        """The schedule sends a pass's result next: what was held for it goes first.

        Raises:
            RuntimeError: if the schedule's sends and the forward passes are not one to one.
        """
        streams = _only(self._leaving, "streams")
        if streams is not None:
            self.links.send(FORWARD, streams)

    def buffers(self, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
        """For what `receive_streams` and then `receive_ahead` post."""
        now = 0 if self._ahead is not None else 1
        count = now + (self._receives + now < self._may_be_ahead)
        return [self.links.buffer(shape, dtype) for _ in range(count)]

    def receive_streams(self, buffers: list[Tensor]) -> Arrival:
        """Receive the previous stage's, before the schedule's own tensor."""
        arrival, self._ahead = self._ahead, None
        return self._receive(buffers.pop(0)) if arrival is None else arrival

    def receive_ahead(self, buffers: list[Tensor]) -> None:
        """After the schedule's own tensor: post what may be posted ahead."""
        if buffers:
            self._ahead = self._receive(buffers.pop())

    def _receive(self, buffer: Tensor) -> Arrival:
        self._receives += 1
        return self.links.receive(FORWARD, buffer)

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


def limits(stages: int, stage: int, passes: int | None, warm_up: int, ring: bool) -> tuple[int | None, int]:
    """``early`` and ``ahead`` of a `SideChannel`.

    Args:
        passes: of the rank's schedule; None if that is not known.
        warm_up: how many of them come before the first backward pass.
        ring: whether the schedule is interleaved.
    """
    if passes is None:
        return (0 if ring and stage == stages - 1 else None), 0
    if not ring:
        return None, passes
    early = warm_up if stage == stages - 1 else None
    return early, 0 if stage == 0 else min(passes, warm_up + 1)
