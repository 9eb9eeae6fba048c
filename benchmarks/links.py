"""What a transfer between two GPUs and computation beside it cost each other, by NCCL's settings or by copy engines.

    torchrun --nproc-per-node 2 benchmarks/links.py [--settings default ctas=1-4 high-priority:cga=1] [--json FILE]

The link is NCCL's choice and the environment's (`pipeline.py` says how). For every setting (default: NCCL's own, not the 8 CTAs
of `mhc_megatron.pipeline.links`; copy-engine: `mhc_megatron.pipeline.copies`), over a group each: the time of a transfer from
GPU 0 to GPU 1 alone, and of two at once, one each way; each with nothing beside it, beside matrix products, and beside
additions that are bound by memory; how much longer the computation takes for it. And how much longer it takes beside a receive
that waits: of something that nobody has sent yet, as a pipeline schedule posts it ahead.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import nccl_settings
import torch
import torch.distributed as dist

from mhc_megatron.pipeline.copies.connect import Copies, connect

Load = Callable[[], Any]
Link = Any
"""A process group, or `mhc_megatron.pipeline.copies.connect.Copies`."""


def links(setting: str) -> tuple[Link, Link]:
    """Two of both ranks, for either direction, connected."""
    made: list[Link] = []
    if setting == "copy-engine":
        other = 1 - dist.get_rank()
        ends = [(other, None), (None, other)] if other else [(None, other), (other, None)]
        copies = connect(dict(enumerate(ends)), lambda: timedelta(minutes=1))
        if copies.reasons:
            raise SystemExit(f"copy-engine: {', '.join(copies.reasons)}")
        if dist.get_rank() == 0:
            print(f"copy-engine: through {', '.join(copies.ways)}")
        return copies, copies
    for sender in (0, 1):
        options = dist.ProcessGroupNCCL.Options()
        for part in setting.split(":"):
            if part != "default":
                nccl_settings.apply(options, part)
        made.append(dist.new_group([0, 1], pg_options=options))
        _move(torch.zeros(1, device="cuda"), made[-1], sender).wait()
    torch.cuda.synchronize()
    return made[0], made[1]


def _move(tensor: torch.Tensor, group: Link, sender: int) -> Any:
    if isinstance(group, Copies):
        return (
            group.senders[sender].send(tensor) if dist.get_rank() == sender else group.receivers[sender].receive(tensor)
        )
    if dist.get_rank() == sender:
        return dist.isend(tensor, 1 - sender, group)
    return dist.irecv(tensor, sender, group)


class Side:
    """A tensor and a stream for a direction."""

    def __init__(self, megabytes: int, sender: int):
        self.tensor = torch.zeros(megabytes * 2**19, dtype=torch.bfloat16, device="cuda")
        self.stream, self.sender = torch.cuda.Stream(), sender

    def start(self, group: Link, begin: torch.cuda.Event) -> Callable[[], float]:
        """Move it once ``begin`` has happened. Returns what gives the milliseconds, after synchronisation."""
        since, until = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self.stream):
            begin.wait()
            since.record()
            _move(self.tensor, group, self.sender).wait()
            until.record()
        return lambda: since.elapsed_time(until)


def loads(milliseconds: float) -> dict[str, Load]:
    """Computation of a kind that takes about this long."""
    a, b = (torch.randn(16384, 2560, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    weight = torch.randn(2560, 6144, dtype=torch.bfloat16, device="cuda")
    wide = torch.empty(16384, 6144, dtype=torch.bfloat16, device="cuda")
    big = torch.zeros(2**28, dtype=torch.bfloat16, device="cuda")

    def products() -> None:
        torch.mm(a, weight, out=wide)
        torch.mm(wide, weight.t(), out=b)

    found: dict[str, Load] = {"nothing": partial(_repeat, products, 0)}
    for name, once in {"matrix products": products, "additions": lambda: big.add_(1)}.items():
        for _ in range(3):
            once()
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(10):
            once()
        torch.cuda.synchronize()
        times = max(1, round(milliseconds / ((time.perf_counter() - started) * 100)))
        counts: list[Any] = [None, None]
        dist.all_gather_object(counts, times)  # the same on both
        found[name] = partial(_repeat, once, counts[0])
    return found


def _repeat(once: Load, times: int) -> None:
    for _ in range(times):
        once()


def beside(load: Load, start: Callable[[torch.cuda.Event], list[Callable[[], float]]]) -> tuple[float, float]:
    """Milliseconds: of the slowest transfer, and of the computation."""
    torch.cuda.synchronize()
    dist.barrier()
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    moved = start(begin)
    load()
    end.record()
    torch.cuda.synchronize()
    return max([one() for one in moved], default=0.0), begin.elapsed_time(end)


def _start(pairs: list[tuple[Side, Link]], begin: torch.cuda.Event) -> list[Callable[[], float]]:
    return [side.start(group, begin) for side, group in pairs]


def _worst(value: float) -> float:
    both = torch.tensor([value], device="cuda")
    dist.all_reduce(both, dist.ReduceOp.MAX)
    return both.item()


def measure(setting: str, megabytes: int, computing: dict[str, Load], repeats: int) -> list[dict[str, Any]]:
    """A row a load; times in ms, the slower GPU's."""
    groups = links(setting)
    sides = [Side(megabytes, sender) for sender in (0, 1)]
    rows = []
    for name, load in computing.items():
        alone = median(beside(load, lambda _: [])[1] for _ in range(repeats))
        row: dict[str, Any] = {"setting": setting, "beside": name, "load_ms": _worst(alone)}
        for ways in (1, 2):
            start = partial(_start, list(zip(sides, groups, strict=True))[:ways])
            found = [beside(load, start) for _ in range(repeats + 1)][1:]
            row[f"ways_{ways}_ms"] = _worst(median(moved for moved, _ in found))
            row[f"ways_{ways}_longer_ms"] = _worst(median(took for _, took in found) - alone)
        row["waiting_longer_ms"] = _worst(median(waiting(load, groups[0], sides[0]) for _ in range(repeats)) - alone)
        rows.append(row)
    return rows


def waiting(load: Load, group: Link, side: Side) -> float:
    """Milliseconds of a computation on GPU 1 that has posted a receive. GPU 0 sends when it is done."""
    torch.cuda.synchronize()
    dist.barrier()
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    done: Any = None
    if dist.get_rank() == 1:
        done = side.start(group, begin)
        time.sleep(0.002)  # it waits on the GPU before there is anything else
        begin.record()
    load()
    end.record()
    if dist.get_rank() == 0:
        torch.cuda.synchronize()
        time.sleep(0.06)
        sent = torch.cuda.Event()
        sent.record()
        side.start(group, sent)
    torch.cuda.synchronize()
    return begin.elapsed_time(end) if done is not None else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--settings", nargs="+", default=["default", "ctas=1-1", "ctas=1-4", "ctas=8-32", "high-priority"]
    )
    parser.add_argument("--megabytes", type=int, default=320, help="of four streams of 16384 tokens of 2560 values")
    parser.add_argument("--milliseconds", type=float, default=40, help="of computation")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    computing = loads(options.milliseconds)
    rows = []
    if dist.get_rank() == 0:
        print(f"{torch.cuda.get_device_name()}, NCCL {torch.cuda.nccl.version()}, {options.megabytes} MiB", end=" ")
        print({k: v for k, v in os.environ.items() if k.startswith("NCCL_")})
        print(
            "setting          beside             ms  | one way  (load +) | both ways  (load +) | waiting: load +",
            flush=True,
        )
    for setting in options.settings:
        for row in measure(setting, options.megabytes, computing, options.repeats):
            rows.append(row)
            if dist.get_rank() == 0:
                print(
                    f"{setting:16s} {row['beside']:15s} {row['load_ms']:6.1f} | {row['ways_1_ms']:7.1f} "
                    f"{row['ways_1_longer_ms']:9.1f} | {row['ways_2_ms']:9.1f} {row['ways_2_longer_ms']:9.1f} | "
                    f"{row['waiting_longer_ms']:8.1f}",
                    flush=True,
                )
    if options.json and dist.get_rank() == 0:
        options.json.write_text(json.dumps(rows, indent=1))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
