"""python -m mhc_megatron plan: memory, traffic and time of a launch, before its GPUs are asked for."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

from mhc_megatron.plan.gpus import GPUS

GIB = 2**30
_DESCRIPTION = (
    "Plan a run: what each pipeline stage needs of a GPU's memory with residual connections, with mHC and with --mhc-recompute, "
    "whether it fits, and what mHC moves and costs. Takes Megatron's arguments as the launch script has them. "
    "Exit status 0: it fits; 1: it does not; 2: Megatron or mHC refuses the arguments; 3: the planner does not cover them."
)


def add_parser(commands: Any) -> None:
    """Add the planner to the command line's sub-commands. Megatron's arguments stay for parse_known_args."""
    parser = commands.add_parser(
        "plan",
        help="memory, traffic and overhead of a model and layout, per pipeline stage, without a GPU",
        description=_DESCRIPTION,
        usage="python -m mhc_megatron plan [options] <Megatron arguments, with --enable-mhc and --mhc-* flags>",
        allow_abbrev=False,
    )
    parser.add_argument("--world-size", type=int, default=1, metavar="GPUS", help="GPUs of the run (default: 1)")
    parser.add_argument(
        "--gpus-per-node", type=int, default=8, metavar="GPUS",
        help="of a node: --mhc-pipeline-comm auto looks whether transfers leave it (default: 8)",
    )  # fmt: skip
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h100", help="the kind of GPU (default: h100)")
    parser.add_argument("--gpu-memory", type=float, metavar="GIB", help="its memory (default: that kind's)")
    parser.add_argument(
        "--reserve", type=float, default=4.0, metavar="GIB",
        help="of it, for the CUDA context, NCCL's buffers and fragmentation (default: 4)",
    )  # fmt: skip
    parser.add_argument(
        "--utilization", type=float, default=0.45, metavar="SHARE",
        help="of the GPU's peak that the model's compute is taken to reach, for times (default: 0.45)",
    )  # fmt: skip
    parser.add_argument(
        "--link-speeds", type=_speeds, default=(25.0, 50.0, 300.0), metavar="GB/S,...",
        help="between two stages, one direction: simulate the pipeline at these (default: 25,50,300: network cards of 200 and "
        "400 Gb/s, NVLink)",
    )  # fmt: skip
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the plan there as well; - for the output, alone"
    )


def _speeds(text: str) -> tuple[float, ...]:
    """Comma-separated GB/s."""
    try:
        speeds = tuple(float(speed) for speed in text.split(","))
    except ValueError:
        speeds = ()
    if not speeds or min(speeds) <= 0:
        raise argparse.ArgumentTypeError(f"GB/s above 0, separated by commas; got {text!r}")
    return speeds


def run(options: argparse.Namespace) -> int:
    """Plan; returns the exit status: 0 if it fits, 1 if not, 2 for arguments that are refused, 3 for what is not covered."""
    # Megatron warns of every optional package it does without.
    warnings.simplefilter("ignore")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    from mhc_megatron.dry_run import parse
    from mhc_megatron.plan.report import plan
    from mhc_megatron.plan.run import NotCoveredError, Run
    from mhc_megatron.plan.text import render

    gpu = GPUS[options.gpu]
    memory = gpu.memory if options.gpu_memory is None else options.gpu_memory
    try:
        _check(options, memory)
        args, config = parse(options.arguments, options.world_size)
        planned = Run.from_arguments(args, config, options.gpus_per_node)
        links = [speed * 1e9 for speed in options.link_speeds]
        result = plan(planned, gpu, memory * GIB, options.reserve * GIB, options.utilization, links)
    except ValueError as error:
        print(f"plan: {error}", file=sys.stderr)
        return 3 if isinstance(error, NotCoveredError) else 2
    text = json.dumps(result, indent=1)
    if options.json is not None and str(options.json) != "-":
        options.json.write_text(text)
    print(text if str(options.json) == "-" else render(result))
    return 0 if result["fits"] else 1


def _check(options: argparse.Namespace, memory: float) -> None:
    if options.world_size < 1:
        raise ValueError(f"--world-size must be at least 1, got {options.world_size}")
    if options.gpus_per_node < 1:
        raise ValueError(f"--gpus-per-node must be at least 1, got {options.gpus_per_node}")
    if not 0 <= options.reserve < memory:
        raise ValueError(f"--reserve must be less than the GPU's memory, {memory} GiB, got {options.reserve}")
    if not 0 < options.utilization <= 1:
        raise ValueError(f"--utilization must be between 0 and 1, got {options.utilization}")
