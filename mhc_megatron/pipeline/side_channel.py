"""Where streams travel beside the schedule's own transfers.

On every link, streams go in the order of the schedule's own tensors: a stage's forward passes (backward passes) come in the
order in which it sends their results, and the receiver posts its receives in the order of the schedule's.

Without an interleaved schedule, a receive of streams is posted one transfer ahead of the schedule's own, if it is known how many
there will be: the schedule posts a receive only after the pass that precedes it, and the streams would start no earlier than
what follows them. This holds one tensor more.

**Kernels that are loaded late.** CUDA loads a kernel when it is first launched (a MoE's tokens may ask for another matrix product
at any step), and that waits for all that is under way on the GPU, transfers too. So nothing may be under way that ends only when
this rank goes on. 1F1B fulfils that, posting ahead included. In an interleaved schedule each of two ranks may be in the middle of
a pass whose streams the other one receives after its own pass: if both load a kernel then, both wait for ever. So there

* nothing is posted ahead: what is received then may depend on the pass that this rank is in;
* the streams leave with the schedule's own tensor (`holds`), unless kernels are loaded at the start (CUDA_MODULE_LOADING=EAGER),
  and also then in a schedule's first run: `state.holds_streams`.

tests/unit/test_transfer_order.py plays this for every pass of every rank.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from mhc_megatron.pipeline.links import BACKWARD, FORWARD, Arrival, Links


class SideChannel:
    """One schedule's streams on ``links``.

    receives: how many receives of streams this rank's schedule posts in all; None if that is not known. ahead: how many of them
    are posted before the schedule's own. holds: whether streams leave only with the schedule's own tensor.
    """

    def __init__(self, links: Links, receives: int | None, ahead: int = 1, holds: bool = False):
        self.links, self._ahead, self._holds = links, ahead, holds
        self._left = receives
        self._arriving: deque[Arrival] = deque()
        self._held: deque[Tensor] = deque()
        self._gradients: deque[Tensor] = deque()

    def send_streams(self, tensor: Tensor) -> None:
        """Send ``H_res @ x`` to the next stage: now, or with the pass's result."""
        if self._holds:
            self._held.append(tensor)
        else:
            self.links.send(FORWARD, tensor)

    def send_held(self) -> None:
        """The schedule sends a pass's result: what was held goes, too."""
        while self._held:
            self.links.send(FORWARD, self._held.popleft())

    def receive_streams(self, shape: tuple[int, ...], dtype: torch.dtype) -> Arrival:
        """Receive the previous stage's, and post what may be posted ahead."""
        if self._left is None:
            return self.links.receive(FORWARD, shape, dtype)
        while self._left and len(self._arriving) <= self._ahead:
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
