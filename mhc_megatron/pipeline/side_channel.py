"""Where streams travel beside the schedule's own transfers.

On every link, streams go in the order of the schedule's own tensors: a stage's forward passes (backward passes) come in the
order in which it sends their results, and the receiver posts its receives in the order of the schedule's.

Streams leave before the chunk's last sublayer runs. Without an interleaved schedule a receive of them is posted one transfer
ahead of the schedule's own, if it is known how many there will be: the schedule posts a receive only after the pass that precedes
it, and the streams would start no earlier than what follows them. This holds one tensor more.

**Waiting for the whole GPU.** Much may do so in the middle of a pass: CUDA where it loads a kernel, at its first launch (a
MoE's tokens may ask for another matrix product at any step); PyTorch's allocator where memory is short; a timer. So nothing
may be under way that ends only when this rank goes on. 1F1B fulfils that, posting ahead included: there is an order of all
stages' passes in which each waits for earlier ones alone. In an interleaved schedule the last stage sends to the first, and
where each stage's streams are under way until the next one's pass is over, all of them may wait in a ring, for ever (as seen
with NCCL). So the link that closes the ring is not used in the middle of a pass: the last stage's streams leave with the
schedule's own tensor (`send_held`). And no receive is posted ahead: with ``overlap_p2p_comm`` the schedule's own are early
enough for that to close a ring, too. (Without it, one could be; that is not done.)

tests/unit/test_transfer_order.py plays this for every pass of every rank.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from mhc_megatron.pipeline.links import BACKWARD, FORWARD, Arrival, Links

_AHEAD = 1


class SideChannel:
    """One schedule's streams on ``links``.

    receives: how many receives of streams this rank's schedule posts in all; None if that is not known, or none may be posted
    ahead. holds: whether this rank's streams leave with the schedule's own tensor.
    """

    def __init__(self, links: Links, receives: int | None, holds: bool = False):
        self.links, self._holds = links, holds
        self._left = receives
        self._arriving: deque[Arrival] = deque()
        self._held: deque[Tensor] = deque()
        self._gradients: deque[Tensor] = deque()

    def send_streams(self, tensor: Tensor) -> None:
        """Send ``H_res @ x`` to the next stage: now, or when the schedule sends the pass's result."""
        if self._holds:
            self._held.append(tensor)
        else:
            self.links.send(FORWARD, tensor)

    def send_held(self) -> None:
        """The schedule sends a pass's result: what was held for it goes, too.

        Raises:
            RuntimeError: if the schedule's sends and the forward passes are not one to one.
        """
        if self._holds:
            streams = _only(self._held, "streams")
            self.links.send(FORWARD, streams)

    def buffers(self, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
        """For what the next `receive_streams` posts."""
        count = 1 if self._left is None else min(self._left, _AHEAD + 1 - len(self._arriving))
        return [self.links.buffer(shape, dtype) for _ in range(count)]

    def receive_streams(self, buffers: list[Tensor]) -> Arrival:
        """Receive the previous stage's, and post what may be posted ahead."""
        self._arriving.extend(self.links.receive(FORWARD, buffer) for buffer in buffers)
        if self._left is not None:
            self._left -= len(buffers)
        return self._arriving.popleft()

    def queue_gradient(self, tensor: Tensor) -> None:
        """Hand over the streams' gradient; it leaves after the schedule has sent y's: `send_gradient`."""
        self._gradients.append(tensor)

    def send_gradient(self) -> None:
        """Send the gradient that was handed over to the previous stage.

        Raises:
            RuntimeError: if the schedule's sends and the backward passes are not one to one.
        """
        gradient = _only(self._gradients, "gradients of streams")
        self.links.send(BACKWARD, gradient)

    def receive_gradient(self, buffer: Tensor) -> Arrival:
        """Receive the next stage's."""
        return self.links.receive(BACKWARD, buffer)


def _only(waiting: deque[Tensor], what: str) -> Tensor:
    if len(waiting) != 1:
        raise RuntimeError(
            f"mHC: {len(waiting)} {what} where the pipeline schedule sends one; use --mhc-pipeline-comm wide, and report it"
        )
    return waiting.popleft()
