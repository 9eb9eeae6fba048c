"""What mHC costs a training step: time and memory of a transformer block with it over the same block without.

    python benchmarks/overhead.py [--shape 27b|dense|v3] [--tokens 16384] [--layers N ...] [--kinds residual,mhc,...]
                                  [--profile] [--json FILE]
    torchrun --nproc-per-node 2 benchmarks/overhead.py ...

Forward + backward of one microbatch on one GPU, Transformer Engine, bf16, no optimizer. All kinds are built in one process and
take turns, step by step, in random order (a GPU runs faster after a step that heats it less): medians, and the quartiles
beside them. "over" is the median, over the turns, of a step's time over that of the first kind in the same turn; with recompute,
the time over that without as well. With --padded experts have one capacity: the host waits for no counts of tokens, and the
GPU seldom for the host. Memory is the peak of a step above what is allocated before it (gradients of the parameters included).
With several --layers, the memory that a layer adds is the slope between the first and the last.

Kinds: residual; hc; reference, mhc: by the reference and by the kernels; recompute: with --mhc-recompute and the block length
that training gets, the planner's (with --tiny: the formula's); recompute:N: with blocks of N sublayers.

Under torchrun the experts are divided among the GPUs, each of which has tokens of its own; the numbers are rank 0's. --profile
then also gives the time of the communication, and how much of it ran while a kernel of mHC did.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import time
from collections import defaultdict
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch


class Step:
    """One model's training step, its times (ms: forward, backward on the GPU; forward, backward of the host) and its peak."""

    def __init__(self, model: torch.nn.Module, tokens: int, sequence: int):
        self.model, self.on_gpu = model, torch.cuda.is_available()
        device = "cuda" if self.on_gpu else "cpu"
        random = torch.Generator(device).manual_seed(torch.distributed.get_rank())  # other tokens on every rank
        self.ids = torch.randint(0, 256, (max(1, tokens // sequence), sequence), device=device, generator=random)
        self.positions = torch.arange(sequence, device=device).expand_as(self.ids)
        mask = torch.ones(sequence, sequence, dtype=torch.bool, device=device).triu(1)[None, None]
        self.mask = None if self.on_gpu else mask  # Transformer Engine knows that it is causal
        self.times: list[tuple[float, ...]] = []

    def __call__(self) -> tuple[float, ...]:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)] if self.on_gpu else []
        host = []

        self._meet()

        def mark(number: int) -> None:
            host.append(time.perf_counter() * 1e3)
            if marks:
                marks[number].record()

        mark(0)
        loss = self.model(self.ids, self.positions, self.mask, labels=self.ids).float().mean()
        mark(1)
        loss.backward()
        mark(2)
        forward, backward = host[1] - host[0], host[2] - host[1]
        self._drop_gradients()
        if not marks:
            return forward, backward, forward, backward
        torch.cuda.synchronize()
        return marks[0].elapsed_time(marks[1]), marks[1].elapsed_time(marks[2]), forward, backward

    def _meet(self) -> None:
        """All ranks begin at the same time: none's communication waits for another one to begin."""
        if torch.distributed.get_world_size() > 1:
            from megatron.core.parallel_state import get_data_parallel_group_gloo

            torch.distributed.barrier(group=get_data_parallel_group_gloo())  # of the hosts: no kernel of NCCL's

    def _drop_gradients(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None

    def peak_gib(self) -> float:
        """Peak of a step above what is allocated before it."""
        if not self.on_gpu:
            return float("nan")
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self()
        return (torch.cuda.max_memory_allocated() - before) / 2**30


def _summary(step: Step) -> dict[str, Any]:
    totals = [forward + backward for forward, backward, *_ in step.times]
    low, _, high = quantiles(totals, n=4) if len(totals) > 1 else (totals[0],) * 3
    names = ("forward_ms", "backward_ms", "host_forward_ms", "host_backward_ms")
    parts = {name: median(column) for name, column in zip(names, zip(*step.times, strict=True), strict=True)}
    return {"step_ms": median(totals), "low_ms": low, "high_ms": high, **parts}


def _over(step: Step, other: Step) -> float:
    """How much longer a step takes than another kind's in the same turn: the median of the ratios, less one."""
    return median(sum(a[:2]) / sum(b[:2]) for a, b in zip(step.times, other.times, strict=True)) - 1


def measure(options: argparse.Namespace, layers: int) -> dict[str, dict[str, Any]]:
    """Times and peaks of all kinds, and their kernels with --profile."""
    from blocks import PADDED, build, of_kind, planned_run

    from mhc_megatron.plan.block_length import choose_block_length

    more = {**(PADDED if options.padded else {}), "moe_shared_expert_overlap": options.shared_expert_overlap}
    steps: dict[str, Step] = {}
    results: dict[str, dict[str, Any]] = defaultdict(dict)
    for kind in options.kinds:
        mhc_config = of_kind(kind)
        if kind == "recompute" and not options.tiny:
            run = planned_run(options.shape, mhc_config, layers, options.sequence, options.tokens)
            mhc_config = of_kind(f"recompute:{choose_block_length(run, 0).length}")
        if mhc_config is not None and mhc_config.recompute_sublayers:
            results[kind]["block_length"] = mhc_config.recompute_sublayers
        model = build(options.shape, mhc_config, layers, options.sequence, options.tiny, more)
        steps[kind] = Step(model, options.tokens, options.sequence)
    for kind, step in steps.items():
        for _ in range(2):
            step()
        results[kind]["peak_gib"] = step.peak_gib()
    order, shuffle = list(steps.values()), random.Random(0)  # the same order on all ranks
    gc.disable()  # as Megatron's --manual-gc; else one kind or another pays for all of them
    for _ in range(options.steps):
        shuffle.shuffle(order)
        for step in order:
            step.times.append(step())
        gc.collect()
    gc.enable()
    for kind, step in steps.items():
        results[kind] |= {**_summary(step), "over": _over(step, steps[options.kinds[0]])}
        if kind.startswith("recompute") and "mhc" in steps:
            results[kind]["over_mhc"] = _over(step, steps["mhc"])
    if options.profile:
        for kind, step in steps.items():
            results[kind] |= kernels(step)
    return results


def kernels(step: Step) -> dict[str, Any]:
    """Kernels of one step: launches, milliseconds of all and of mHC's own, and the longest by name."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
    table: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            table[event.name][0] += event.device_time / 1e3
            table[event.name][1] += 1
    own = {name: entry for name, entry in table.items() if name in _own_kernels()}
    communication, beside = _communication(profiler, set(own))
    longest = sorted(table.items(), key=lambda item: -item[1][0])[:20]
    return {
        "launches": int(sum(count for _, count in table.values())),
        "kernels_ms": sum(ms for ms, _ in table.values()),
        "communication_ms": communication,
        "communication_beside_mhc_ms": beside,
        "mhc_kernels_ms": sum(ms for ms, _ in own.values()),
        "mhc_kernels": dict(sorted(own.items(), key=lambda item: -item[1][0])),
        "longest": dict(longest),
    }


def _communication(profiler: Any, own: set[str]) -> tuple[float, float]:
    """ms in which NCCL's kernels ran, and of that in which a kernel of mHC did as well."""
    from matched import union

    spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for event in profiler.profiler.kineto_results.events():
        if "CUDA" in str(event.device_type()) and (event.name() in own or "nccl" in event.name().lower()):
            start = event.start_ns() / 1e6
            spans[event.name() in own].append((start, start + event.duration_ns() / 1e6))
    ours, theirs = union(spans[True]), union(spans[False])
    beside = sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in ours for b in theirs)
    return sum(end - start for start, end in theirs), beside


def _own_kernels() -> set[str]:
    from triton import JITFunction

    from mhc_kernels.fused import backward, forward, mapping_backward, pack, phi_backward, single_backward

    modules = (backward, forward, mapping_backward, pack, phi_backward, single_backward)
    return {f.fn.__name__ for module in modules for f in vars(module).values() if isinstance(f, JITFunction)}


def show(options: argparse.Namespace, layers: int, results: dict[str, dict[str, Any]]) -> None:
    """Print one table."""
    print(f"\n{options.shape}, {layers} layers, {options.tokens} tokens in sequences of {options.sequence}; ms, GiB")
    print("kind            step  (quartiles)     over  forward backward  host f  host b    peak    over")
    base = results.get("residual", next(iter(results.values())))
    for kind, r in results.items():
        print(
            f"{kind:10s} {r['step_ms']:9.2f}  ({r['low_ms']:.1f}-{r['high_ms']:.1f}) {r['over'] * 100:+7.2f}% "
            f"{r['forward_ms']:8.2f} {r['backward_ms']:8.2f} {r['host_forward_ms']:7.1f} {r['host_backward_ms']:7.1f} "
            f"{r['peak_gib']:7.2f} {r['peak_gib'] - base['peak_gib']:+7.2f}",
            flush=True,
        )
    for kind, r in results.items():
        if "over_mhc" in r:
            print(
                f"{kind} over mhc: {r['over_mhc'] * 100:+.2f}%, blocks of {r.get('block_length', 'automatic')} sublayers"
            )
        if "launches" in r:
            print(
                f"{kind}: {r['launches']} launches, kernels {r['kernels_ms']:.2f} ms, mHC's {r['mhc_kernels_ms']:.2f}; "
                f"communication {r['communication_ms']:.2f} ms, {r['communication_beside_mhc_ms']:.2f} of it beside mHC's kernels"
            )
            named = r["longest"] | r["mhc_kernels"]
            for name, (ms, count) in sorted(named.items(), key=lambda item: -item[1][0]):
                print(f"    {ms:8.2f} ms {count:5.0f}  {name[:90]}")


def start_megatron(tiny: bool) -> None:
    """Megatron's process groups, with the experts divided among all processes; on a CPU only if tiny."""
    if not torch.cuda.is_available():
        if not tiny:
            raise SystemExit("this benchmark needs a GPU; --tiny runs it on the CPU, to try it")
        from mhc_megatron import cpu

        cpu.install()
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29577"), ("RANK", "0"), ("WORLD_SIZE", "1")):
        os.environ.setdefault(name, value)
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    parallel_state.initialize_model_parallel(expert_model_parallel_size=torch.distributed.get_world_size())
    model_parallel_cuda_manual_seed(0)


def _write(options: argparse.Namespace, results: dict[int, Any]) -> None:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    settings = {**vars(options), "json": options.json.name, "device": device, "torch": torch.__version__}
    settings["gpus"] = torch.distributed.get_world_size()
    options.json.write_text(json.dumps({"settings": settings, "results": results}, indent=1))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("27b", "dense", "v3"), default="27b")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--sequence", type=int, default=4096)
    parser.add_argument("--layers", type=int, nargs="+")
    parser.add_argument(
        "--kinds", type=lambda s: s.split(","), default=["residual", "hc", "reference", "mhc", "recompute"]
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--padded", action="store_true", help="experts padded to one capacity")
    parser.add_argument(
        "--shared-expert-overlap", action="store_true", help="shared experts beside the experts' communication"
    )
    parser.add_argument("--profile", action="store_true", help="one step of each kind under PyTorch's profiler")
    parser.add_argument("--tiny", action="store_true", help="small sizes, local modules: to try the benchmark on a CPU")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    start_megatron(options.tiny)
    from blocks import LAYERS, of_kind

    try:
        for kind in options.kinds:
            of_kind(kind)
    except ValueError as error:
        parser.error(f"--kinds: {error}")
    first_rank = torch.distributed.get_rank() == 0

    counts = options.layers or [LAYERS[options.shape]]
    everything: dict[int, dict[str, dict[str, Any]]] = {}
    for layers in counts:
        everything[layers] = measure(options, layers)
        if first_rank:
            show(options, layers, everything[layers])
            if options.json:  # after each: a run may be cut off
                _write(options, everything)
        gc.collect()
    if len(counts) > 1 and first_rank:
        first, last = counts[0], counts[-1]
        print("GiB that a layer adds to the peak:")
        for kind in options.kinds:
            slope = (everything[last][kind]["peak_gib"] - everything[first][kind]["peak_gib"]) / (last - first)
            print(f"    {kind:10s} {slope:.3f}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
