"""What pipeline transfers of streams cost a training step on two GPUs, or on as many as there are processes: one a stage.

    torchrun --nproc-per-node 2 benchmarks/pipeline.py [--vpp 1 2 4] [--layers 8] [--microbatches 8] [--kinds ...]
                                                       [--group N] [--warmup-flush] [--json FILE] [--timeline PNG]

Kinds: residual; wide-stock (mHC, n*C values a token in Megatron's own transfers, its waits for sends included); wide (sends that
nobody waits for); split (`mhc_megatron.pipeline.split`). wide and split with other settings of NCCL for their links
(`nccl_settings`): ``split:high-priority``, ``wide:ctas=1-4``, ``split:high-priority:ctas=8-32:cga=1``; by copy engines
(`mhc_megatron.pipeline.copies`): ``wide:copy-engine``. Any kind with matrix
products on fewer multiprocessors, which leave some to transfers: ``residual:margin=8`` (Transformer Engine's NVTE_EXT_MARGIN_SM).

Layers of the paper's 27B shape, one dense and the others MoE with forced load balancing, Transformer Engine, bf16, forward and
backward by Megatron's schedule, no optimizer. A rank has 9 of the 72 experts, as with the example's EP 8, and all six choices
of its tokens fall on them: the same arithmetic. Experts have a capacity and are padded to it. (Else the host waits for the
counts of their tokens; with 4096 or 8192 tokens a microbatch the GPU then waits for the host most of the time, and hides any
transfer.) Python's garbage is collected between steps.

Exposed: a step's time minus that of the same step with transfers replaced by local copies: each one still sends one element,
so stages wait for each other as before, and copies the rest from a buffer of its own. (The copies make the difference too small:
of n streams of 16384 tokens, 336 MB, by about 0.2 ms a receive.) Without an interleaved schedule, residual and wide-stock have
Megatron's batched transfers, with its device synchronisation after each (``batch_p2p_sync``). All kinds are built in one process
and take turns in random order; a step and its twin with local copies follow each other. Medians, of the exposed time that of
these pairs' differences, and its quartiles.

The link is NCCL's choice, and the environment's: NVLink by default; shared memory with NCCL_P2P_DISABLE=1; sockets over
loopback with NCCL_P2P_DISABLE=1 NCCL_SHM_DISABLE=1 NCCL_SOCKET_IFNAME=lo. Its speed is measured and printed.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import random
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import nccl_settings
import torch
import torch.distributed as dist

KINDS = ("residual", "wide-stock", "wide", "split")
_MARGIN = "margin="
_COPY_ENGINE = "copy-engine"
_NOISE: dict[Any, torch.Tensor] = {}
"""What stands for received tensors, by size and dtype; made in the steps before those that are timed."""


class Run:
    """One kind's chunks on this rank, and its steps."""

    def __init__(self, kind: str, vpp: int, options: argparse.Namespace):
        from blocks import build_chunks

        self.name, self.options = kind, options
        self.kind, self.margin, self.link_settings = _parts(kind)
        self.copies = _COPY_ENGINE in kind.split(":")
        self.links: Any = weakref.WeakKeyDictionary()
        self.chunks, self.config = build_chunks(
            self.kind, options.stages, vpp, options.layers, options.experts, options.sequence, options.tiny,
            options.group, options.warmup_flush, "copy-engine" if self.copies else "nccl",
        )  # fmt: skip
        self.times: dict[bool, list[float]] = {False: [], True: []}
        device = "cuda" if torch.cuda.is_available() else "cpu"
        shape = (options.microbatch, options.sequence)
        self.ids = torch.randint(0, 256, shape, device=device)
        self.positions = torch.arange(options.sequence, device=device).expand(shape)
        mask = torch.ones(options.sequence, options.sequence, dtype=torch.bool, device=device).triu(1)[None, None]
        self.mask = mask if options.tiny else None  # Transformer Engine knows that it is causal

    def __call__(self, local: bool = False) -> float:
        """Milliseconds of one step, all ranks together. local: without the transfers."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        def forward_step(_: Any, model: torch.nn.Module) -> Any:
            output = model(self.ids, self.positions, self.mask, labels=self.ids)
            return output, lambda loss: (loss.float().mean(), {})

        several = len(self.chunks) > 1
        copies = _local_copies() if local else contextlib.nullcontext()
        with _communicator(self.kind), _links(self.links, self.link_settings), _margin(self.margin), copies:
            _synchronize()
            dist.barrier()
            started = time.perf_counter()
            get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=[iter(()) for _ in self.chunks] if several else iter(()),
                model=self.chunks if several else self.chunks[0],
                num_microbatches=self.options.microbatches,
                seq_length=self.options.sequence,
                micro_batch_size=self.options.microbatch,
                forward_only=False,
            )
            _synchronize()
            dist.barrier()
            elapsed = (time.perf_counter() - started) * 1e3
        for chunk in self.chunks:
            for parameter in chunk.parameters():
                parameter.grad = None
        gc.collect()
        return elapsed

    def peak_gib(self) -> float:
        """Peak of a step above what is allocated before it, on this rank."""
        if not torch.cuda.is_available():
            return float("nan")
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self()
        return (torch.cuda.max_memory_allocated() - before) / 2**30


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextlib.contextmanager
def _communicator(kind: str) -> Iterator[None]:
    """The schedules' communicator for a kind; for wide and split transfers, by the hooks of `mhc_megatron.enable`."""
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    from mhc_megatron.megatron_hooks.pipeline import REBINDINGS
    from mhc_megatron.pipeline.state import pipeline_state

    class WideAsStock(P2PCommunicator):
        """What Megatron does with tensors that are n times as wide."""

        def _communicate(self, *, tensor_shape: Any, **rest: Any) -> Any:
            if tensor_shape is not None:
                tensor_shape = (*tensor_shape[:-1], tensor_shape[-1] * pipeline_state(self.config).num_streams)
            return super()._communicate(tensor_shape=tensor_shape, **rest)

    if kind == "wide-stock":
        schedules.P2PCommunicator = WideAsStock
    elif kind != "residual":
        for rebinding in REBINDINGS:
            rebinding.apply()
    try:
        yield
    finally:
        for rebinding in REBINDINGS:
            rebinding.revert()
        schedules.P2PCommunicator = P2PCommunicator


def _parts(kind: str) -> tuple[str, str | None, list[str]]:
    """Of a kind's name: what it is, its margin, and its links' settings."""
    base, *settings = kind.split(":")
    margins = [setting.removeprefix(_MARGIN) for setting in settings if setting.startswith(_MARGIN)]
    own = [s for s in settings if not s.startswith(_MARGIN) and s != _COPY_ENGINE]
    return base, margins[-1] if margins else None, own


@contextlib.contextmanager
def _margin(multiprocessors: str | None) -> Iterator[None]:
    """Transformer Engine asks the environment at every product."""
    name = "NVTE_EXT_MARGIN_SM"
    before = os.environ.get(name)
    if multiprocessors is not None:
        os.environ[name] = multiprocessors
    try:
        yield
    finally:
        if before is not None:
            os.environ[name] = before
        else:
            os.environ.pop(name, None)


@contextlib.contextmanager
def _links(made: Any, settings: list[str]) -> Iterator[None]:
    """Links of a kind's own, which have NCCL's settings from the pipeline group."""
    from megatron.core import parallel_state

    from mhc_megatron.pipeline.links import Links

    group = parallel_state.get_pipeline_model_parallel_group()
    before, Links._made = Links._made, made
    theirs: Any = None
    if settings:
        theirs = group._get_backend(torch.device(torch.cuda.current_device())).options
        kept = nccl_settings.keep(theirs)
        for setting in settings:
            nccl_settings.apply(theirs, setting)
    try:
        yield
    finally:
        Links._made = before
        if theirs is not None:
            nccl_settings.restore(theirs, kept)


@contextlib.contextmanager
def _local_copies() -> Iterator[None]:
    """Every transfer sends one element; what is received besides is copied from here."""
    from mhc_megatron.pipeline.copies.link import Receiver, Sender

    send, receive = dist.ProcessGroup.send, dist.ProcessGroup.recv
    copy_out, copy_in = Sender.send, Receiver.receive
    noise = _NOISE

    def first(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return [tensor.detach().view(-1)[:1] for tensor in tensors]

    def send_one(self: Any, tensors: list[torch.Tensor], *rest: Any, **named: Any) -> Any:
        return send(self, first(tensors), *rest, **named)

    def fill(tensor: torch.Tensor) -> None:
        key = (tensor.numel(), tensor.dtype)
        if key not in noise:
            noise[key] = torch.randn(tensor.numel(), device=tensor.device).to(tensor.dtype)
        tensor.detach().view(-1).copy_(noise[key])

    def receive_one(self: Any, tensors: list[torch.Tensor], *rest: Any, **named: Any) -> Any:
        for tensor in tensors:
            fill(tensor)
        return receive(self, first(tensors), *rest, **named)

    def copy_one(self: Receiver, tensor: torch.Tensor) -> Any:
        fill(tensor)
        return copy_in(self, *first([tensor]))

    dist.ProcessGroup.send, dist.ProcessGroup.recv = send_one, receive_one
    Sender.send = lambda self, tensor: copy_out(self, *first([tensor]))
    Receiver.receive = copy_one
    try:
        yield
    finally:
        dist.ProcessGroup.send, dist.ProcessGroup.recv = send, receive
        Sender.send, Receiver.receive = copy_out, copy_in


def link_speed(elements: int) -> float:
    """GB/s from rank 0 to rank 1 of a bf16 tensor."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensor = torch.zeros(elements, dtype=torch.bfloat16, device=device)
    times = []
    for _ in range(6):
        _synchronize()
        dist.barrier()
        started = time.perf_counter()
        if dist.get_rank() < 2:
            work = dist.isend(tensor, 1) if dist.get_rank() == 0 else dist.irecv(tensor, 0)
            work.wait()
        _synchronize()
        times.append(time.perf_counter() - started)
    return 2 * elements / median(times[1:]) / 1e9


def _check_kinds(kinds: list[str]) -> str | None:
    """What is wrong with --kinds."""
    for kind in kinds:
        base, margin, settings = _parts(kind)
        if base not in KINDS:
            return f"{kind}: choose from {', '.join(KINDS)}"
        if margin is not None and not margin.isdigit():
            return f"{kind}: {_MARGIN}{margin} is no number of multiprocessors"
        if (settings or _COPY_ENGINE in kind) and base not in ("wide", "split"):
            return f"{kind}: only wide and split have links of their own"
        if wrong := [setting for setting in settings if nccl_settings.wrong(setting)]:
            return (
                f"{kind}: {wrong[0]} is neither copy-engine nor high-priority nor ctas=MIN-MAX nor cga=N nor margin=N"
            )
    return None


def measure(vpp: int, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Step times of all kinds."""
    from megatron.core import parallel_state

    parallel_state.set_virtual_pipeline_model_parallel_world_size(vpp if vpp > 1 else None)
    runs = [Run(kind, vpp, options) for kind in options.kinds]
    results: dict[str, dict[str, Any]] = {}
    for run in runs:
        for local in (False, False, True):
            run(local)
        results[run.name] = {"peak_gib": run.peak_gib()}
    gc.collect()
    gc.freeze()  # a collection between steps has little to look at
    try:
        _time(runs, results, vpp, options)
    finally:
        gc.unfreeze()
    return results


def _time(runs: list[Run], results: dict[str, dict[str, Any]], vpp: int, options: argparse.Namespace) -> None:
    """Add step times to the results."""
    shuffle = random.Random(0)  # the same order on all ranks
    turns = list(runs)
    for _ in range(options.steps):
        shuffle.shuffle(turns)
        for run in turns:
            for local in shuffle.sample((False, True), 2):
                run.times[local].append(run(local))
    for run in runs:
        step, alone = median(run.times[False]), median(run.times[True])
        pairs = [a - b for a, b in zip(run.times[False], run.times[True], strict=True)]
        lower, exposed, upper = quantiles(pairs, n=4, method="inclusive") if len(pairs) > 1 else 3 * pairs
        own = {"exposed_ms": exposed, "exposed_quartiles_ms": (lower, upper)}
        results[run.name] |= {"step_ms": step, "local_ms": alone, **own}
    if options.timeline:
        for run in runs:
            _trace(
                run, options.timeline.with_name(f"{options.timeline.stem}_vpp{vpp}_{run.name.replace(':', '_')}.png")
            )


def _trace(run: Run, picture: Path) -> None:
    from matched import describe, longer, recorded, slowed
    from timeline import draw
    from torch.profiler import ProfilerActivity, profile

    seen: list[list[Any]] = []
    for local in (True, False):
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            run(local)
        seen.append([None] * dist.get_world_size())
        dist.all_gather_object(seen[-1], recorded(profiler))
    if dist.get_rank() == 0:
        busy = draw(profiler, picture, f"{run.name}, rank 0")
        print(f"{run.name}: rank 0 computes {busy:.0%} of a step (while a profiler watches)")
        for rank, (alone, own) in enumerate(zip(*seen, strict=True)):
            print(f"    rank {rank} {slowed(own, alone)}\n        {longer(own, alone)}")
        print(describe(*seen[1][:2]), flush=True)


def show(stages: int, vpp: int, results: dict[str, dict[str, Any]], speed: float, how: str) -> None:
    """Print one table. how: of an interleaved schedule."""
    print(f"\nPP{stages} x VPP{vpp}{how if vpp > 1 else ''}, link {speed:.1f} GB/s; ms, GiB on rank 0")
    print("kind            step   local copies   exposed   (quartiles)   of residual's     peak")
    base = results.get("residual", {}).get("exposed_ms", float("nan"))
    for kind, r in results.items():
        print(
            f"{kind:12s} {r['step_ms']:8.2f} {r['local_ms']:12.2f} {r['exposed_ms']:10.2f} "
            f"({r['exposed_quartiles_ms'][0]:6.2f} {r['exposed_quartiles_ms'][1]:6.2f}) {r['exposed_ms'] / base:10.2f} "
            f"{r['peak_gib']:11.2f}",
            flush=True,
        )


def _write(options: argparse.Namespace, results: dict[int, Any], speed: float) -> None:
    device = "CPU" if options.tiny else torch.cuda.get_device_name()
    keep = {k: v for k, v in vars(options).items() if k not in ("json", "timeline")}
    link = {k: v for k, v in os.environ.items() if k.startswith("NCCL_")}
    settings = {**keep, "device": device, "torch": torch.__version__, "environment": link, "gb_per_s": speed}
    options.json.write_text(json.dumps({"settings": settings, "results": results}, indent=1))


def start(options: argparse.Namespace) -> None:
    """Megatron's process groups: a stage a process."""
    if options.tiny:
        from mhc_megatron import cpu

        cpu.install()
    else:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    dist.init_process_group("gloo" if options.tiny else "nccl")
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=options.stages)
    model_parallel_cuda_manual_seed(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vpp", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--microbatch", type=int, default=4, help="sequences")
    parser.add_argument(
        "--group",
        type=int,
        help="of microbatches that pass a chunk in a row (interleaved); as many as stages by default",
    )
    parser.add_argument(
        "--warmup-flush",
        action="store_true",
        help="overlap_p2p_comm_warmup_flush: transfers of the warm-up overlap as well",
    )
    parser.add_argument("--experts", type=int, default=9, help="on a rank (--tiny: 4)")
    parser.add_argument("--sequence", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--kinds", type=lambda s: s.split(","), default=list(KINDS))
    parser.add_argument("--tiny", action="store_true", help="small sizes on the CPU, with gloo: to try the benchmark")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--timeline",
        type=Path,
        help="a picture a kind, of one step; how long the GPU computes in it, and how long without the transfers",
    )
    options = parser.parse_args()
    if wrong := _check_kinds(options.kinds):
        parser.error(f"--kinds {wrong}")
    if options.tiny:
        options.experts = 4
    if options.tiny and (options.timeline or any(":" in kind for kind in options.kinds)):
        parser.error("--timeline shows a GPU's work, and settings of a kind are NCCL's: not with --tiny")
    options.stages = int(os.environ.get("WORLD_SIZE", "1"))
    if options.stages < 2:
        parser.error("one process, no pipeline: start two or more with torchrun")
    options.group = options.group or options.stages
    rest = options.microbatches % options.group
    if max(options.vpp) > 1 and (
        not options.stages <= options.group <= options.microbatches or 0 < rest < options.stages
    ):
        parser.error(
            f"--group {options.group}: from {options.stages} stages to {options.microbatches} microbatches, without a last "
            f"group of fewer than {options.stages}"
        )
    for vpp in options.vpp:
        if options.layers % (options.stages * vpp):
            parser.error(
                f"--layers {options.layers} is not a multiple of {options.stages} stages x {vpp} chunks (--vpp)"
            )
    start(options)
    gc.disable()
    speed = link_speed(2**12 if options.tiny else 42 * 2**20)
    everything = {}
    for vpp in options.vpp:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        try:
            everything[vpp] = measure(vpp, options)
        except torch.OutOfMemoryError as error:
            print(f"PP{options.stages} x VPP{vpp}: {error}")
            continue
        if dist.get_rank() == 0:
            how = f" in groups of {options.group}{', warm-up overlapped' if options.warmup_flush else ''}"
            show(options.stages, vpp, everything[vpp], speed, how)
            if options.json:  # after each: a run may be cut off
                _write(options, everything, speed)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
