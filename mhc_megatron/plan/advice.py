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
    config = run.config
    if run.mhc is not None and not run.mhc.recompute and config.recompute_granularity != "full":
        yield "--mhc-recompute", replace(run, mhc=replace(run.mhc, recompute=True))
    if config.recompute_granularity is None:
        modules = ["moe_act"] if config.num_moe_experts and config.moe_grouped_gemm else []
        modules += ["mla_up_proj"] if config.multi_latent_attention else []
        if modules:
            names = " ".join(modules)
            flags = f"--recompute-granularity selective --recompute-modules {names}"
            selective = _with(run, recompute_granularity="selective", recompute_modules=modules)
            yield flags, selective
            if run.mhc is not None and not run.mhc.recompute:
                yield f"--mhc-recompute {flags}", replace(selective, mhc=replace(run.mhc, recompute=True))
    experts = 2 * config.expert_model_parallel_size
    if config.num_moe_experts and config.num_moe_experts % experts == 0 and _divides(run, run.expert_tensor * experts):
        yield f"--expert-model-parallel-size {experts}", _with(run, expert_model_parallel_size=experts)
    if run.micro_batch % 2 == 0:
        half = run.micro_batch // 2
        yield f"--micro-batch-size {half}", replace(run, micro_batch=half, microbatches=2 * run.microbatches)
    stages = 2 * run.stages
    expert = run.expert_tensor * config.expert_model_parallel_size
    if config.pipeline_model_parallel_layout is None and run.world_size % (stages * max(run.tensor, expert)) == 0:
        deeper = _with(run, pipeline_model_parallel_size=stages, microbatch_group_size_per_vp_stage=stages)
        yield f"--pipeline-model-parallel-size {stages}", replace(deeper, microbatches=2 * run.microbatches)
    if config.recompute_granularity != "full":
        full = _with(run, recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
        if run.mhc is not None:  # --mhc-recompute has nothing to do then
            full = replace(full, mhc=replace(run.mhc, recompute=False, recompute_sublayers=0))
        yield "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1", full


def _divides(run: Run, experts: int) -> bool:
    return run.world_size % (experts * run.stages) == 0


def _with(run: Run, **settings: Any) -> Run:
    config = copy.copy(run.config)
    for name, value in settings.items():
        setattr(config, name, value)
    return replace(run, config=config)


def fitting(found: list[Change], limit: Callable[[float], bool]) -> list[Change]:
    """The changes whose peak ``limit`` accepts."""
    return [change for change in found if limit(change.peak)]
