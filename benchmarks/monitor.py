"""What a monitored step costs (--mhc-monitor-interval): its time against that of the same step unmonitored.

    python benchmarks/monitor.py [--shape 27b|dense|v3] [--tokens 16384] [--layers N] [--steps 20] [--interval 100] [--json FILE]
    torchrun --nproc-per-node 2 benchmarks/monitor.py [--vpp 2] [the same, 27b alone]

One mHC block, forward + backward of one microbatch on one GPU, Transformer Engine, bf16, no optimizer, and everything that a
monitored step does: sampling, statistics, JSONL, TensorBoard where it is installed. Three kinds of steps take turns in random
order: without a Monitor, with one on a step that is not due, on a step that is. Wall-clock medians of synchronised steps. The
cost is that of one monitored step spread over --interval steps; a real step has an optimizer and more microbatches, so its share
is smaller.

With several processes: a pipeline, one stage each, of 8 microbatches (as in `pipeline.py`), --tokens in each.
A monitored step then ends with a sum over the stages.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import os
import random
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from overhead import Step, start_megatron


def _seconds(step: Any, around: Any) -> float:
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), around:
        step()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def _built(options: argparse.Namespace) -> tuple[Any, Any]:
    """The model, or this stage's chunks of it, and what runs a step."""
    if options.stages > 1:
        from megatron.core import parallel_state
        from pipeline import Run

        parallel_state.set_virtual_pipeline_model_parallel_world_size(options.vpp if options.vpp > 1 else None)
        run = Run("wide", options.vpp, options)
        return run.chunks, run
    from blocks import KINDS, build

    model = build(options.shape, KINDS["mhc"], options.layers, options.sequence, options.tiny, {})
    return model, Step(model, options.tokens, options.sequence)


def measure(options: argparse.Namespace, folder: str) -> dict[str, float]:
    """Median milliseconds by kind of step."""
    from mhc_megatron import MHCConfig, Monitor

    model, step = _built(options)
    monitor = Monitor(model, MHCConfig(monitor_interval=2), folder=folder, tensorboard=_tensorboard(folder))
    kinds: dict[str, Any] = {
        "without": contextlib.nullcontext,
        "not due": lambda: monitor.step(3),
        "monitored": lambda: monitor.step(2),
    }
    for around in (*kinds.values(), *kinds.values()):
        _seconds(step, around())
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    order, shuffle = list(kinds), random.Random(0)
    gc.disable()
    for _ in range(options.steps):
        shuffle.shuffle(order)
        for kind in order:
            times[kind].append(_seconds(step, kinds[kind]()) * 1e3)
        gc.collect()
    gc.enable()
    return {kind: median(values) for kind, values in times.items()}


def _tensorboard(folder: str) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("TensorBoard is not installed: its writer is not in the times")
        return None
    return SummaryWriter(folder)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("27b", "dense", "v3"), default="27b")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--sequence", type=int, default=4096)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--vpp", type=int, default=1, help="chunks of each stage, with several processes")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--interval", type=int, default=100)
    parser.add_argument("--tiny", action="store_true", help="small sizes, local modules: to try the benchmark on a CPU")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    options.stages = int(os.environ.get("WORLD_SIZE", "1"))
    if options.stages > 1:
        from pipeline import start

        if options.shape != "27b":
            parser.error("--shape: a pipeline is of 27b layers")
        options.layers = options.layers or 2 * options.stages * options.vpp
        options.experts = 4 if options.tiny else 9
        options.microbatches, options.microbatch = 8, options.tokens // options.sequence
        options.group, options.warmup_flush = options.stages, False
        start(options)
    else:
        start_megatron(options.tiny)
        from blocks import LAYERS

        options.layers = options.layers or LAYERS[options.shape]
    with tempfile.TemporaryDirectory() as folder:
        times = measure(options, folder)
    if torch.distributed.get_rank() == 0:
        _show(times, options)
    torch.distributed.destroy_process_group()


def _show(times: dict[str, float], options: argparse.Namespace) -> None:
    extra = times["monitored"] - times["without"]
    share = extra / options.interval / times["without"] * 100
    pipeline = f", PP{options.stages} x VPP{options.vpp}, 8 microbatches" if options.stages > 1 else ""
    print(f"{options.shape}, {options.layers} layers, {options.tokens} tokens{pipeline}; median step in ms")
    for kind, ms in times.items():
        print(f"{kind:10} {ms:9.2f}  {ms - times['without']:+8.2f}")
    print(f"one monitored step in {options.interval}: {share:+.3f} % of the step time")
    if options.json:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        settings = {**vars(options), "json": str(options.json), "device": device, "torch": torch.__version__}
        options.json.write_text(json.dumps({"settings": settings, "ms": times, "percent": share}, indent=1))


if __name__ == "__main__":
    main()
