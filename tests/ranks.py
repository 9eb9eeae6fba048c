"""Megatron process groups inside pytest: this process alone, or forked ranks."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding
from megatron.core.pipeline_parallel import schedules
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

import mhc_megatron

# Several ranks on one GPU, over real NCCL: slow (they take turns), but all of the multi-GPU suite's results can be checked.
SHARE_GPU = os.environ.get("MHC_SHARE_GPU") == "1"
RANK_TIMEOUT = (
    300 if torch.cuda.is_available() else 120
)  # seconds; a rank that hangs prints its stack and fails the test


def has_gpus(count: int) -> bool:
    """Whether ``count`` ranks can run: a GPU each, or on shared ones if MHC_SHARE_GPU=1 asks for that."""
    found = torch.cuda.device_count()
    return found >= count or (SHARE_GPU and found > 0)


def shared_gpu_environment(rank: int) -> dict[str, str]:
    """What a rank needs to share a GPU: NCCL refuses two ranks on one GPU of one host, so each has a host of its own, and
    sockets between them."""
    return {"NCCL_HOSTID": f"rank-{rank}", "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}


@contextlib.contextmanager
def _groups(store: Path, rank: int, world: int, **layout: Any) -> Iterator[None]:
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        parallel_state.initialize_model_parallel(**layout)
        torch.manual_seed(1)
        model_parallel_cuda_manual_seed(1)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        # Groups that outlive this deadlock a rank forked later, when it lets go of them: their threads are not there.
        for embedding in (RotaryEmbedding, YarnRotaryEmbedding):
            embedding.forward.cache_clear()  # keyed by groups
        MTPLossLoggingHelper.tracker.clear()
        for name, value in list(vars(parallel_state).items()):
            if isinstance(value, dist.ProcessGroup):
                setattr(parallel_state, name, None)
        gc.collect()


@contextlib.contextmanager
def single_process(folder: Path) -> Iterator[None]:
    store = folder / "store"
    store.unlink(missing_ok=True)
    with _groups(store, 0, 1):
        yield
    store.unlink(missing_ok=True)


def _rank_main(
    rank: int, world: int, store: Path, function: Callable[..., None], layout: dict, kwargs: dict, hooked: bool
) -> None:
    gc.freeze()  # A failed test's frames hold groups; a rank that collects those crashes: it joins threads it has not.
    faulthandler.dump_traceback_later(RANK_TIMEOUT, exit=True, file=sys.stderr)
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        devices = torch.cuda.device_count()
        if world > devices and SHARE_GPU:
            os.environ.update(shared_gpu_environment(rank))
        torch.cuda.set_device(rank % devices if SHARE_GPU else rank)
    if hooked:
        mhc_megatron.enable()
    try:
        with _groups(store, rank, world, **layout):
            function(**kwargs)
    except Exception:
        traceback.print_exc()
        raise


def run_ranks(
    function: Callable[..., None], world: int, scratch: Path, layout: dict | None = None, **kwargs: Any
) -> None:
    """Run ``function(**kwargs)`` in ``world`` ranks with Megatron groups for ``layout``; raise if one fails.

    They are forked: quick, and they inherit the CPU host. With GPUs they are started afresh, as CUDA wants it.
    """
    store = scratch / "ranks"
    store.unlink(missing_ok=True)
    hooked = hasattr(schedules.P2PCommunicator, "__wrapped__")
    method = "spawn" if torch.cuda.is_available() else "fork"
    arguments = (world, store, function, layout or {}, kwargs, hooked)
    torch.multiprocessing.start_processes(_rank_main, arguments, nprocs=world, start_method=method)
