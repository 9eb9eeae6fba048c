"""Whether pipeline transfers leave a machine: they cross a network then, slower than what connects its GPUs."""

from __future__ import annotations

import socket
import weakref
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

_known: weakref.WeakKeyDictionary[dist.ProcessGroup, bool] = weakref.WeakKeyDictionary()


def machine() -> str:
    """This machine's name; the same in all of its containers."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def leaves_node() -> bool | None:
    """Whether any pipeline of the job has neighbouring stages on two machines; None before Megatron's process groups are there.

    The same on all ranks. Collective over all of them, once for a pipeline group: they build their models at the same time.
    """
    group = parallel_state.get_pipeline_model_parallel_group(check_initialized=False)
    if group is None:
        return None
    if group not in _known:
        rows: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(rows, (machine(), dist.get_process_group_ranks(group)))
        machines = [name for name, _ in rows]
        _known[group] = any(_apart(machines, ranks) for _, ranks in rows)
    return _known[group]


def _apart(machines: Sequence[str], ranks: Sequence[int]) -> bool:
    return any(machines[a] != machines[b] for a, b in pairwise(ranks))
