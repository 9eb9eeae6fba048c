"""Processes that talk to each other: over NCCL, one a GPU, where there are two or more; else two over gloo."""

from __future__ import annotations

import os
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

_TIMEOUT = 120  # seconds
_ELEMENTS = {"nccl": 32 * 2**20, "gloo": 2**18}  # bf16: 64 MiB and 0.5 MiB


def exchange() -> tuple[str, str, bool]:
    """Sums a tensor over all processes and passes one around the ring; all values are checked.

    Returns:
        name, what happened, whether it worked.
    """
    import torch
    import torch.multiprocessing as multiprocessing

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    backend, world = ("nccl", gpus) if gpus > 1 else ("gloo", 2)
    name = f"NCCL, {world} GPUs" if gpus > 1 else "gloo, two processes (NCCL needs two GPUs)"
    with tempfile.TemporaryDirectory() as folder:
        processes = multiprocessing.start_processes(
            _rank, (world, backend, folder), nprocs=world, join=False, start_method="spawn"
        )
        assert processes is not None
        deadline = time.monotonic() + _TIMEOUT
        try:
            while not processes.join(timeout=max(0.0, deadline - time.monotonic())):
                if time.monotonic() >= deadline:
                    return name, f"{_where(folder)}no answer after {_TIMEOUT} s: a process hangs", False
        except Exception as error:  # of the first process that failed
            last = [line for line in str(error).splitlines() if line.strip()]
            return name, _where(folder) + (last[-1] if last else type(error).__name__), False
        finally:
            for process in processes.processes:
                if process.is_alive():
                    process.kill()
        rates = [float((Path(folder) / f"rate{rank}").read_text()) for rank in range(world)]
        copies = (Path(folder) / "copies").read_text() if backend == "nccl" else ""
    return name, f"sum and ring exchange right; slowest neighbour {min(rates):.3g} GB/s one way{copies}", True


def _where(folder: str) -> str:
    """What was going on, if it was not NCCL."""
    return "NCCL works, --mhc-pipeline-transport copy-engine does not: " if (Path(folder) / "copying").exists() else ""


def _rank(rank: int, world: int, backend: str, folder: str) -> None:
    import torch
    import torch.distributed as dist

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    options: dict[str, Any] = {}
    if backend == "nccl":
        torch.cuda.set_device(device)
        options["device_id"] = device
    dist.init_process_group(
        backend,
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=_TIMEOUT),
        **options,
    )
    total = torch.full((1024,), float(rank + 1), device=device)
    dist.all_reduce(total)
    if not bool((total == world * (world + 1) / 2).all()):
        raise RuntimeError(f"rank {rank}: the sum over all ranks is wrong")
    right, left = (rank + 1) % world, (rank - 1) % world
    ours = torch.full((_ELEMENTS[backend],), float(rank + 1), dtype=torch.bfloat16, device=device)
    theirs = torch.zeros_like(ours)
    for _ in range(2):  # the first one sets the connection up
        theirs.zero_()
        dist.barrier()
        start = time.perf_counter()
        for request in dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, ours, right), dist.P2POp(dist.irecv, theirs, left)]
        ):
            request.wait()
        if backend == "nccl":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    if not bool((theirs == left + 1).all()):
        raise RuntimeError(f"rank {rank}: what rank {left} sent arrived wrong")
    (Path(folder) / f"rate{rank}").write_text(str(ours.nbytes / seconds / 1e9))
    if backend == "nccl":
        dist.barrier()
        (Path(folder) / "copying").touch()
        _copy(rank, left, right, ours, theirs, Path(folder))
    dist.destroy_process_group()


def _copy(rank: int, left: int, right: int, ours: Any, theirs: Any, folder: Path) -> None:
    """The ring once more by copy engines, as far as those serve its links."""
    import torch

    from mhc_megatron.pipeline.copies.connect import connect

    copies = connect({0: (right, left)}, lambda: timedelta(seconds=_TIMEOUT))
    theirs.zero_()
    # All are posted before any is waited for: what is sent waits for what this stream waits for.
    under_way = [end.receive(theirs) for end in copies.receivers.values()]
    under_way += [end.send(ours) for end in copies.senders.values()]
    for handle in under_way:
        handle.wait()
    if copies.receivers and not bool((theirs == left + 1).all()):
        raise RuntimeError(f"rank {rank}: what rank {left} sent by copy engine arrived wrong")
    torch.cuda.synchronize()
    if rank == 0:
        (folder / "copies").write_text(f"; pipelines: {copies.describe()}")
