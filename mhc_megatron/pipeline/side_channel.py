"""Where streams travel beside the schedule's own transfers.

On every link, streams go in the order of the schedule's own tensors: a stage's forward passes (backward passes) come in the
order in which it sends their results, and the receiver posts its receives in the order of the schedule's.

A receive of streams is posted one transfer ahead of the schedule's own, if it is known how many there will be: in a warm-up, and
without an interleaved schedule always, the schedule posts a receive only after the pass that precedes it, and the streams would
start no earlier than what follows them. This holds one tensor more.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from mhc_megatron.pipeline.links import BACKWARD, FORWARD, Arrival, Links

_AHEAD = 1


class SideChannel:
    """One schedule's streams on ``links``.

    receives: how many receives of streams this rank's schedule posts in all; None if that is not known.
    """

    def __init__(self, links: Links, receives: int | None):
        self.links = links
        self._left = receives
        self._arriving: deque[Arrival] = deque()
        self._gradients: deque[Tensor] = deque()

    def send_streams(self, tensor: Tensor) -> None:
        """Send ``H_res @ x`` to the next stage."""
        self.links.send(FORWARD, tensor)

    def receive_streams(self, shape: tuple[int, ...], dtype: torch.dtype) -> Arrival:
        """Receive the previous stage's, and post what may be posted ahead."""
        if self._left is None:
            return self.links.receive(FORWARD, shape, dtype)
        while self._left and len(self._arriving) <= _AHEAD:
            self._arriving.append(self.links.receive(FORWARD, shape, dtype))
            self._left -= 1
        return self._arriving.popleft()

    def queue_gradient(self, tensor: Tensor) -> None:
        """Hand over the streams' gradient; it leaves after the schedule has sent y's: `send_gradient`."""
        self._gradients.append(tensor)

    def send_gradient(self) -> None:
        """Send the gradient that was handed over to the previous stage.

        Raises:
            RuntimeError: if the schedule's sends and the backward passes are not one to one.
        """
        if len(self._gradients) != 1:
            raise RuntimeError(
                f"mHC: {len(self._gradients)} gradients of streams where the pipeline schedule sends one; use "
                "--mhc-pipeline-comm wide, and report it"
            )
        self.links.send(BACKWARD, self._gradients.popleft())

    def receive_gradient(self, shape: tuple[int, ...], dtype: torch.dtype) -> Arrival:
        """Receive the next stage's."""
        return self.links.receive(BACKWARD, shape, dtype)
