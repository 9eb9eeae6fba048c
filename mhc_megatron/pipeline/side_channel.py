"""Where streams travel beside the schedule's own transfers.

Order: on every link from one stage to the next, and on every link back, tensors go in the order of the schedule's own transfers
there: a stage's forward passes (backward passes) come in the order in which it sends their results, and a receiver posts one
receive here for each of the schedule's. Links of their own: a process group a direction; where two stages are each other's next
one (an interleaved schedule on two ranks), another one for the link that closes the ring, since NCCL runs what two ranks
exchange in one group one after the other, and would wait for a send until its turn comes.
"""

from __future__ import annotations

import weakref
from collections import deque
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mhc_megatron.pipeline.sends import Sends


class Arrival(NamedTuple):
    """Streams, or their gradient, being received."""

    tensor: Tensor
    work: Any

    def wait(self) -> Tensor:
        """The tensor, ready for what is launched on the current stream from now on."""
        self.work.wait()
        return self.tensor


class SideChannel:
    """Both directions' links of one pipeline stage to its neighbours. `of` makes one for a pipeline group, once.

    Collective over all ranks of the job: they make their first one at the same time.

    Args:
        group: the pipeline-parallel group.
        wraps: whether the last stage sends to the first (interleaved schedules).
    """

    _made: weakref.WeakKeyDictionary[dist.ProcessGroup, SideChannel] = weakref.WeakKeyDictionary()

    def __init__(self, group: dist.ProcessGroup, wraps: bool):
        self._ranks = dist.get_process_group_ranks(group)
        self._stage, self._stages = group.rank(), group.size()
        parities = 2 if self._stages == 2 else 1
        # [direction][parity of the sending stage]
        self._groups = [[_like(group) for _ in range(parities)] for _ in range(2)]
        self.sends = Sends()
        self._gradients: deque[Tensor] = deque()
        self._connect(wraps)

    @classmethod
    def of(cls, group: dist.ProcessGroup, wraps: bool) -> SideChannel:
        """This rank's channel of a pipeline group."""
        channel = cls._made.get(group)
        if channel is None:
            channel = cls._made[group] = cls(group, wraps)
        return channel

    def send_streams(self, tensor: Tensor) -> None:
        """Send ``H_res @ x`` to the next stage, as soon as what is launched now is done."""
        self._send(tensor, 0)

    def receive_streams(self, shape: tuple[int, ...], dtype: torch.dtype) -> Arrival:
        """Receive the previous stage's."""
        return self._receive(shape, dtype, 0)

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
        self._send(self._gradients.popleft(), 1)

    def receive_gradient(self, shape: tuple[int, ...], dtype: torch.dtype) -> Arrival:
        """Receive the next stage's."""
        return self._receive(shape, dtype, 1)

    def _send(self, tensor: Tensor, direction: int) -> None:
        group, to = self._link(direction, self._stage)
        self.sends.keep(dist.isend(tensor, self._ranks[to], group), tensor)

    def _receive(self, shape: tuple[int, ...], dtype: torch.dtype, direction: int) -> Arrival:
        sender = (self._stage + (1 if direction else -1)) % self._stages
        group, _ = self._link(direction, sender)
        tensor = torch.empty(shape, dtype=dtype, device=torch.cuda.current_device())
        return Arrival(tensor, dist.irecv(tensor, self._ranks[sender], group))

    def _link(self, direction: int, sender: int) -> tuple[dist.ProcessGroup, int]:
        """The group and the receiving stage of a sending one."""
        groups = self._groups[direction]
        return groups[sender % len(groups)], (sender + (-1 if direction else 1)) % self._stages

    def _connect(self, wraps: bool) -> None:
        """Use every link once, in an order in which no two stages wait for each other: NCCL connects two ranks at their first
        transfer, and blocks both until then."""
        for direction in range(2):
            for sender in range(self._stages):
                _, receiver = self._link(direction, sender)
                if sender == (0 if direction else self._stages - 1) and not wraps:
                    continue  # the link that closes the ring
                if self._stage == sender:
                    self._send(torch.zeros(1, device=torch.cuda.current_device()), direction)
                elif self._stage == receiver:
                    self._receive((1,), torch.float32, direction).wait()


def _like(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """Another group of the same ranks. All ranks of the job make theirs, each one those of all: PyTorch numbers groups."""
    rows: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(rows, dist.get_process_group_ranks(group))
    made = {row: dist.new_group(row, timeout=_timeout(group)) for row in dict.fromkeys(map(tuple, rows))}
    return made[tuple(dist.get_process_group_ranks(group))]


def _timeout(group: dist.ProcessGroup) -> timedelta | None:
    """A group's own, so that a lost peer ends the run as it does without a side channel."""
    options = getattr(group._get_backend(torch.device(torch.cuda.current_device())), "options", None)
    timeout: timedelta | None = getattr(options, "_timeout", None)
    return timeout
