"""Transfers between neighbouring pipeline stages, each direction for itself.

A link is one direction between two stages; its tensors go in the order in which they are posted. Where copy engines can serve it
(`copies`) and are wanted, they do. Every other link has a process
group (with NCCL: a communicator and a stream) of its own: NCCL runs what two ranks exchange in one group one after the other,
so that a transfer would wait for those posted before it in the other direction. A group holds one direction's links of all
stages, as each pair of them has one link there; but where two stages are each other's next one (an interleaved schedule on two
ranks), the link that closes the ring has another group. And where NCCL is connected eagerly (``init_process_group(device_id=)``)
a group is one communicator for all its stages, not one a pair: then no stage has two links in one group, or its sends would
wait for receives posted before them, in a ring for ever.
"""

from __future__ import annotations

import logging
import weakref
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.utils import log_single_rank
from torch import Tensor

from mhc_megatron.pipeline.copies.connect import Copies, connect
from mhc_megatron.pipeline.sends import Sends

_logger = logging.getLogger(__name__)

FORWARD, BACKWARD = 0, 1
_MAX_CTAS = 8
"""Of thread blocks of a transfer whose receive is posted ahead (`side_channel`), unless the pipeline group has a limit of its own
or NCCL_MAX_CTAS is set. Over NVLink NCCL would take more: 336 MB then take 1.0 ms instead of 1.4, and matrix products beside a
receive that waits a quarter longer instead of a thirteenth (benchmarks/README.md, links)."""


class Arrival(NamedTuple):
    """A tensor being received."""

    tensor: Tensor
    work: Any

    def wait(self) -> Tensor:
        """The tensor, ready for what is launched on the current stream from now on."""
        self.work.wait()
        return self.tensor


class Links:
    """Both directions' links of one pipeline stage to its neighbours. `of` makes them for a pipeline group, once.

    Collective over all ranks of the job: they make their first ones at the same time.

    Args:
        group: the pipeline-parallel group.
        wraps: whether the last stage sends to the first (interleaved schedules).
        ahead: whether receives are posted long before what they receive is sent.
        transport: ``nccl``, or ``copy-engine``: copy engines serve the links that they can serve.
    """

    _made: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[tuple[bool, bool, str], Links]] = (
        weakref.WeakKeyDictionary()
    )

    def __init__(self, group: dist.ProcessGroup, wraps: bool, ahead: bool, transport: str):
        self._ranks = dist.get_process_group_ranks(group)
        self._stage, self._stages = group.rank(), group.size()
        self.copies = Copies({}, {}, {}, {})
        if transport == "copy-engine" and _uses_nccl(group):
            whole = weakref.ref(group)
            self.copies = connect(self._neighbours(wraps), lambda: _timeout(whole()))
            _report(self.copies.describe(asked=True))
        elif transport == "copy-engine":
            _report("--mhc-pipeline-transport copy-engine has no effect: the pipeline group's backend is not NCCL")
        # [direction][number that group_of gives the sending stage]
        apart = {group_of(sender, self._stages, wraps, _eager()) for sender in range(self._stages)}
        self._wraps = wraps
        self._groups = [[_like(group, ahead) for _ in apart] for _ in (FORWARD, BACKWARD)]
        self.sends = (Sends(), Sends())
        self._connect(wraps)

    @classmethod
    def of(cls, group: dist.ProcessGroup, wraps: bool, ahead: bool, transport: str) -> Links:
        """This rank's links of a pipeline group."""
        made = cls._made.setdefault(group, {})
        key = (wraps, ahead, transport)
        if key not in made:
            made[key] = cls(group, *key)
        return made[key]

    def send(self, direction: int, tensor: Tensor, more: bool = False) -> None:
        """Send to the next stage (FORWARD) or the previous one, as soon as what is launched now is done. Nobody waits.

        more: another tensor of the same pass follows.
        """
        if (sender := self.copies.senders.get(direction)) is not None:
            self.sends[direction].keep(sender.send(tensor), tensor, more)
            return
        group, to = self._link(direction, self._stage)
        self.sends[direction].keep(dist.isend(tensor, self._ranks[to], group), tensor, more)

    def buffer(self, shape: tuple[int, ...], dtype: torch.dtype, requires_grad: bool = False) -> Tensor:
        """What `receive` takes. Make all that are needed before anything is posted: where memory is short, PyTorch gives some
        back to CUDA, which waits for all that is under way on the GPU."""
        return torch.empty(shape, dtype=dtype, device=torch.cuda.current_device(), requires_grad=requires_grad)

    def receive(self, direction: int, tensor: Tensor) -> Arrival:
        """Receive from the previous stage (FORWARD) or the next one."""
        if (receiver := self.copies.receivers.get(direction)) is not None:
            return Arrival(tensor, receiver.receive(tensor))
        sender = (self._stage + (1 if direction == BACKWARD else -1)) % self._stages
        group, _ = self._link(direction, sender)
        return Arrival(tensor, dist.irecv(tensor, self._ranks[sender], group))

    def release(self) -> None:
        """Let go of what has been sent, but for the last pass's (`Sends`). Before anything is posted, as `buffer`."""
        for sends in self.sends:
            sends.release()

    def _link(self, direction: int, sender: int) -> tuple[dist.ProcessGroup, int]:
        """The group and the receiving stage of a sending one."""
        number = group_of(sender, self._stages, self._wraps, _eager())
        return self._groups[direction][number], (sender + (-1 if direction == BACKWARD else 1)) % self._stages

    def _neighbours(self, wraps: bool) -> dict[int, tuple[int | None, int | None]]:
        """For each direction the rank that is sent to, and the one that is received from."""
        found: dict[int, tuple[int | None, int | None]] = {}
        for direction, step in ((FORWARD, 1), (BACKWARD, -1)):
            stages = (self._stage + step, self._stage - step)
            to, source = (self._ranks[k % self._stages] if wraps or 0 <= k < self._stages else None for k in stages)
            found[direction] = (to, source)
        return found

    def _connect(self, wraps: bool) -> None:
        """Use every link once, in an order in which no two stages wait for each other: NCCL connects two ranks at their first
        transfer, and blocks both until then."""
        for direction in (FORWARD, BACKWARD):
            for sender in range(self._stages):
                if sender == (0 if direction == BACKWARD else self._stages - 1) and not wraps:
                    continue  # the link that closes the ring
                _, receiver = self._link(direction, sender)
                if self._stage == sender and direction not in self.copies.senders:
                    self.send(direction, torch.zeros(1, device=torch.cuda.current_device()))
                elif self._stage == receiver and direction not in self.copies.receivers:
                    self.receive(direction, self.buffer((1,), torch.float32)).wait()


def group_of(sender: int, stages: int, wraps: bool, eager: bool) -> int:
    """Which of a direction's groups holds the link that a stage sends on: 0, 1 or 2.

    eager: whether no stage may have two links in a group; else no pair of stages may.
    """
    if not eager and not (wraps and stages == 2):
        return 0
    return 2 if wraps and stages % 2 and sender == stages - 1 else sender % 2


def _eager() -> bool:
    """Whether new process groups get one NCCL communicator at once, instead of one a pair of ranks at their first transfer."""
    return getattr(dist.group.WORLD, "bound_device_id", None) is not None


def _report(choice: str) -> None:
    log_single_rank(_logger, logging.WARNING, f"mHC: pipeline: {choice}")  # the level that Megatron shows by default


def _options(group: dist.ProcessGroup) -> Any:
    return getattr(group._get_backend(torch.device(torch.cuda.current_device())), "options", None)


def _uses_nccl(group: dist.ProcessGroup) -> bool:
    nccl = getattr(dist, "ProcessGroupNCCL", None)  # absent in a CPU build
    return nccl is not None and isinstance(_options(group), nccl.Options)


def _timeout(group: dist.ProcessGroup | None) -> timedelta:
    timeout: timedelta | None = None if group is None else getattr(_options(group), "_timeout", None)
    return timedelta(minutes=10) if timeout is None else timeout


def _like(group: dist.ProcessGroup, ahead: bool) -> dist.ProcessGroup:
    """Another group of the same ranks. All ranks of the job make theirs, each one those of all: PyTorch numbers groups."""
    rows: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(rows, dist.get_process_group_ranks(group))
    theirs = _options(group)
    made = {row: dist.new_group(row, **_settings(theirs, ahead)) for row in dict.fromkeys(map(tuple, rows))}
    return made[tuple(dist.get_process_group_ranks(group))]


def _settings(theirs: Any, ahead: bool) -> dict[str, Any]:
    """Arguments of `dist.new_group` for a group with the options of another one's backend: its timeout, so that a lost peer ends
    the run as it does in Megatron; with NCCL, what ``--nccl-communicator-config-path`` and ``--high-priority-stream-groups`` say
    of pipeline groups."""
    timeout: timedelta | None = getattr(theirs, "_timeout", None)
    nccl = getattr(dist, "ProcessGroupNCCL", None)  # absent in a CPU build
    if nccl is None or not isinstance(theirs, nccl.Options):
        return {"timeout": timeout}
    options = nccl.Options(is_high_priority_stream=theirs.is_high_priority_stream)
    options.config, options._timeout = theirs.config, theirs._timeout
    if ahead and options.config.max_ctas < 0:  # not set
        options.config.max_ctas = max(_MAX_CTAS, options.config.min_ctas)
    return {"timeout": timeout, "pg_options": options}
