"""What to change when a run does not fit: each change is planned as the run itself is, and those that fit are told, the
cheapest first."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from mhc_megatron.plan.memory import stage_memory
from mhc_megatron.plan.run import Run


@dataclass(frozen=True)
class Change:
    """Arguments to add or change, and the highest peak of any stage then, in bytes."""

    arguments: str
    peak: float


def highest_peak(run: Run) -> float:
    """Of all stages, in bytes."""
    return max(stage_memory(run, stage).total for stage in range(run.stages))


def changes(run: Run) -> list[Change]:
    """Single changes to a run with what they lead to, from the one that costs least time to the one that costs most."""
    found = []
    for arguments, changed in _candidates(run):
        try:
            found.append(Change(arguments, highest_peak(changed)))
        except (AssertionError, ValueError, ZeroDivisionError):
            continue  # Megatron would refuse that layout
    return found


def _candidates(run: Run) -> Iterator[tuple[str, Run]]:
    yield from _cheaper_recompute(run)
    yield from _other_layouts(run)
    if run.config.recompute_granularity != "full":
        full = _with(run, recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
        if run.mhc is not None:  # --mhc-recompute has nothing to do then
            full = replace(full, mhc=replace(run.mhc, recompute=False, recompute_sublayers=0))
        yield "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1", full


def _cheaper_recompute(run: Run) -> Iterator[tuple[str, Run]]:
    config, mhc = run.config, run.mhc
    streams = mhc is not None and not mhc.recompute and config.recompute_granularity != "full"
    again = replace(mhc, recompute=True) if mhc is not None and streams else None
    if again is not None:
        yield "--mhc-recompute", replace(run, mhc=again)
    modules = ["moe_act"] if config.num_moe_experts and config.moe_grouped_gemm else []
    modules += ["mla_up_proj"] if config.multi_latent_attention else []
    if config.recompute_granularity is None and modules:
        flags = f"--recompute-granularity selective --recompute-modules {' '.join(modules)}"
        selective = _with(run, recompute_granularity="selective", recompute_modules=modules)
        yield flags, selective
        if again is not None:
            yield f"--mhc-recompute {flags}", replace(selective, mhc=again)


def _other_layouts(run: Run) -> Iterator[tuple[str, Run]]:
    """On the same GPUs: more expert, tensor or pipeline parallelism, smaller microbatches. Twice as much of it."""
    config = run.config
    twice = replace(run, microbatches=2 * run.microbatches)
    experts = 2 * config.expert_model_parallel_size
    if config.num_moe_experts and config.num_moe_experts % experts == 0 and _divides(run, run.stages * experts):
        yield f"--expert-model-parallel-size {experts}", _with(run, expert_model_parallel_size=experts)
    if run.micro_batch % 2 == 0:
        half = run.micro_batch // 2
        yield f"--micro-batch-size {half}", replace(twice, micro_batch=half)
    tensor = 2 * run.tensor
    heads = config.num_attention_heads if config.multi_latent_attention else config.num_query_groups
    if not config.num_moe_experts and heads % tensor == 0 and run.world_size % (tensor * run.stages) == 0:
        divided = _with(twice, tensor_model_parallel_size=tensor, sequence_parallel=True)
        divided.config.expert_tensor_parallel_size = tensor
        yield f"--tensor-model-parallel-size {tensor} --sequence-parallel", divided
    stages, pieces = 2 * run.stages, 2 * run.stages * run.chunks_per_stage
    even = config.pipeline_model_parallel_layout is None and len({c.layers for s in run.chunks() for c in s}) == 1
    if even and config.num_layers % pieces == 0 and _divides(run, stages * config.expert_model_parallel_size):
        flags = f"--pipeline-model-parallel-size {stages}"
        if run.chunks_per_stage > 1:
            flags += f" --num-layers-per-virtual-pipeline-stage {config.num_layers // pieces}"
        yield flags, _with(twice, pipeline_model_parallel_size=stages, microbatch_group_size_per_vp_stage=stages)


def _divides(run: Run, parts: int) -> bool:
    """Whether a multiple of ``parts`` times the tensor-parallel sizes makes up the world."""
    return run.world_size % (parts * max(run.tensor, run.expert_tensor)) == 0


def _with(run: Run, **settings: Any) -> Run:
    config = copy.copy(run.config)
    for name, value in settings.items():
        setattr(config, name, value)
    return replace(run, config=config)


def fitting(found: list[Change], limit: Callable[[float], bool]) -> list[Change]:
    """The changes whose peak ``limit`` accepts."""
    return [change for change in found if limit(change.peak)]
