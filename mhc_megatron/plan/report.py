"""The plan of a run as plain data: what `command` prints as a table and writes as JSON. Bytes and seconds; memory of one
rank a stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mhc_megatron.plan.advice import changes, fitting, highest_peak
from mhc_megatron.plan.block_length import choose_block_length, least_peak
from mhc_megatron.plan.gpus import Gpu
from mhc_megatron.plan.groups import larger_groups
from mhc_megatron.plan.memory import WORKSPACES, block_length, stage_memory, variant
from mhc_megatron.plan.parameters import active_count, model_count
from mhc_megatron.plan.peak import run_order
from mhc_megatron.plan.run import Run
from mhc_megatron.plan.schedule import CONTENTION, COPY_CONTENTION, Schedule, exchange
from mhc_megatron.plan.simulation import step_times
from mhc_megatron.plan.traffic import added_seconds, boundary_bytes, chunk_seconds, kernel_traffic

MODES = ("residual", "mhc", "recompute")
KINDS = ("residual", "wide-stock", "wide", "split")


def plan(
    run: Run, gpu: Gpu, memory: float, reserve: float, utilization: float, links: Sequence[float]
) -> dict[str, Any]:
    """The whole plan.

    Args:
        memory, reserve: bytes of a GPU; and of these, what PyTorch's allocator can't have (CUDA context, NCCL, fragmentation).
        utilization: share of the GPU's peak that the model's matrix products are assumed to reach.
        links: bytes per second and direction between two stages, to simulate the pipeline with.
    """
    asked = _mode(run)
    stages = [_stage(run, stage, gpu, utilization) for stage in range(run.stages)]
    peak = max(stage["modes"][asked]["total"] for stage in stages)
    room = memory - reserve
    whole, active = model_count(run), active_count(run)
    result: dict[str, Any] = {
        "model": {
            "parameters": whole.total,
            "active_parameters": active.total,
            "mhc_parameters": whole.mhc,
            "layers": run.config.num_layers,
        },
        "layout": _layout(run),
        "gpu": {**asdict(gpu), "memory": memory, "reserve": reserve, "utilization": utilization},
        "mode": asked,
        "stages": stages,
        "workspaces": WORKSPACES,
        "peak": peak,
        "fits": peak <= room,
        "changes": [],
        "expected_step": [],
    }
    if peak > room:
        found = changes(run)
        result["changes"] = [
            {**asdict(change), "fits": change.peak <= room} for change in fitting(found, lambda p: p <= room) or found
        ]
    if run.stages > 1:
        result["boundary"] = boundary_bytes(run if run.mhc is not None else variant(run, "mhc"))
        result["pipeline"] = simulated(run, gpu, utilization, links)
        result["expected_step"] = [_expected(result["pipeline"], link, run.communication) for link in links]
        result["larger_groups"] = _larger_groups(run, gpu, utilization, links, room)
    else:
        rows = simulated(run, gpu, utilization, [min(links)])  # nothing crosses a link
        result["expected_step"] = [{**_expected(rows, min(links), "wide"), "link": None}]
    return result


def _expected(rows: Sequence[dict[str, Any]], link: float, kind: str) -> dict[str, Any]:
    """A step with mHC beside the residual one, and where the difference comes from."""
    residual, mhc = (next(row for row in rows if (row["link"], row["kind"]) == (link, k)) for k in ("residual", kind))
    return {
        "link": link,
        "kind": kind,
        "residual": residual["step"],
        "mhc": mhc["step"],
        "kernels": mhc["free"] - residual["free"],
        "exposed": mhc["exposed"] - residual["exposed"],
    }


def _larger_groups(
    run: Run, gpu: Gpu, utilization: float, links: Sequence[float], room: float
) -> dict[str, Any] | None:
    """The groups of microbatches that fit and expose least on the slowest link; the smallest ones, if none fit."""
    candidates = [(*larger, highest_peak(larger[1])) for larger in larger_groups(run)]
    if not candidates:
        return None
    kind = "residual" if run.mhc is None else run.communication

    def exposed(candidate: tuple[str, Run, float]) -> float:
        (row,) = simulated(candidate[1], gpu, utilization, [min(links)], [kind])
        return row["exposed"]

    fit = [candidate for candidate in candidates if candidate[2] <= room]
    arguments, changed, peak = min(fit, key=exposed) if fit else candidates[0]
    pipeline = simulated(changed, gpu, utilization, links)
    return {"arguments": arguments, "peak": peak, "fits": peak <= room, "pipeline": pipeline}


def simulated(
    run: Run, gpu: Gpu, utilization: float, links: Sequence[float], kinds: Sequence[str] = KINDS
) -> list[dict[str, Any]]:
    """A simulated step of the run's pipeline with each kind of communication, at some link speeds.

    All but the residual one have mHC's kernels: with recompute, if the run has it.
    """
    wide = run if run.mhc is not None else variant(run, "mhc")
    passes = {False: _passes(variant(run, "residual"), gpu, utilization), True: _passes(wide, gpu, utilization)}
    order = run_order(run)
    rows = []
    for bandwidth in links:
        for kind in kinds:
            hidden = boundary_bytes(run)["residual"]
            crossing = exchange(kind, hidden, wide.streams, run.residual_tokens)
            times = passes[kind != "residual"]
            schedule = Schedule(
                stages=run.stages,
                microbatches=run.microbatches,
                forward=[[chunk.forward for chunk in stage] for stage in times],
                backward=[[chunk.backward for chunk in stage] for stage in times],
                bandwidth=bandwidth,
                chunks=run.chunks_per_stage,
                group=run.group,
                overlap=order.overlap,
                warmup_flush=order.warmup_flush,
                # Streams hide behind the smallest last sublayer's share.
                forward_share=min(chunk.forward_share for stage in times for chunk in stage),
                backward_share=min(chunk.backward_share for stage in times for chunk in stage),
                contention=COPY_CONTENTION if run.copies and kind in ("wide", "split") else CONTENTION,
                **crossing,  # type: ignore[arg-type]
            )
            step, free = step_times(schedule)
            rows.append({"link": bandwidth, "kind": kind, "step": step, "free": free, "exposed": step - free})
    return rows


@dataclass(frozen=True)
class _Passes:
    """Seconds of a chunk's two passes, and the last sublayer's share of each."""

    forward: float
    backward: float
    forward_share: float
    backward_share: float


def _passes(run: Run, gpu: Gpu, utilization: float) -> list[list[_Passes]]:
    """Of every stage's chunks, mHC's kernels included."""
    placed: list[list[_Passes]] = []
    for stage, chunks in enumerate(run.chunks()):
        length = block_length(run, stage)
        placed.append([])
        for chunk in chunks:
            forward, backward, last = chunk_seconds(run, chunk, gpu, utilization)
            more = added_seconds(run, chunk, gpu, length)
            whole = forward + more[0], backward + more[1]
            shares = [
                last * own / total if total else 0.0 for own, total in zip((forward, backward), whole, strict=True)
            ]
            placed[-1].append(_Passes(*whole, *shares))
    return placed


def _mode(run: Run) -> str:
    if run.mhc is None:
        return "residual"
    return "recompute" if run.mhc.recompute and run.config.recompute_granularity != "full" else "mhc"


def _layout(run: Run) -> dict[str, Any]:
    config = run.config
    return {
        "world_size": run.world_size,
        "tensor": run.tensor,
        "pipeline": run.stages,
        "virtual_pipeline": run.chunks_per_stage,
        "context": config.context_parallel_size,
        "expert": config.expert_model_parallel_size,
        "data": run.data // config.context_parallel_size,
        "micro_batch": run.micro_batch,
        "microbatches": run.microbatches,
        "sequence": run.sequence,
        "streams": run.streams,
    }


def _lengths(run: Run, stage: int) -> dict[str, Any]:
    """L_r of a stage: chosen, by the formula, with the least peak."""
    optimum, activations = least_peak(run, stage)
    return {**asdict(choose_block_length(run, stage)), "optimum": optimum, "optimum_activations": activations}


def _stage(run: Run, stage: int, gpu: Gpu, utilization: float) -> dict[str, Any]:
    chunks = run.chunks()[stage]
    memory = stage_memory(run, stage)
    modes = {}
    for mode in MODES:
        changed = variant(run, mode)
        of_mode = stage_memory(changed, stage)
        traffic = kernel_traffic(changed, chunks, of_mode.block_length)
        kernels, replaced = traffic.seconds(gpu)
        modes[mode] = {
            "activations": of_mode.activations,
            "static": of_mode.static.total,
            "total": of_mode.total,
            "block_length": of_mode.block_length,
            "kernel_bytes": traffic.moved,
            "kernel_seconds": kernels,
            "replaced_seconds": replaced,
        }
    full = run.config.recompute_granularity == "full"
    automatic = None if full else _lengths(variant(run, "recompute"), stage)
    seconds = [chunk_seconds(run, chunk, gpu, utilization) for chunk in chunks]
    return {
        "stage": stage,
        "layers": memory.layers,
        "parameters": memory.count.total,
        "parameter_bytes": memory.static.parameters,
        "gradient_bytes": memory.static.gradients,
        "optimizer_bytes": memory.static.optimizer,
        "buffers": memory.buffers,
        "in_flight": memory.in_flight,
        "compute_seconds": sum(forward + backward for forward, backward, _ in seconds),
        "automatic_block_length": automatic,
        "modes": modes,
    }
