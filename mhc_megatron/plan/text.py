"""A plan as a table for people."""

from __future__ import annotations

from typing import Any

GIB = 2**30


def render(plan: dict[str, Any]) -> str:
    """The text of a plan (`mhc_megatron.plan.report.plan`)."""
    lines = [*_head(plan), "", *_memory(plan), "", *_verdict(plan), "", *_kernels(plan)]
    lines += ["", *_expected(plan)]
    if "pipeline" in plan:
        lines += ["", *_pipeline(plan)]
    return "\n".join(lines)


def _head(plan: dict[str, Any]) -> list[str]:
    model, layout = plan["model"], plan["layout"]
    billions, active = model["parameters"] / 1e9, model["active_parameters"] / 1e9
    return [
        f"{model['layers']} layers, {billions:.2f}B parameters ({active:.2f}B active), {model['mhc_parameters'] / 1e6:.1f}M of "
        f"them mHC's; {layout['streams']} streams",
        f"{layout['world_size']} GPUs: TP {layout['tensor']}, PP {layout['pipeline']} x {layout['virtual_pipeline']} chunks, "
        f"EP {layout['expert']}, CP {layout['context']}, DP {layout['data']}; {layout['microbatches']} microbatches of "
        f"{layout['micro_batch']} x {layout['sequence']} tokens",
    ]


def _memory(plan: dict[str, Any]) -> list[str]:
    lines = [
        "GiB on one GPU of each stage:",
        "                        ------ always there -------    ----- activations, peak -----     ------ in all, peak ------",
        "stage layers in flight  parameters gradients optimizer  residual    mHC recompute  L_r   residual    mHC recompute",
    ]
    for stage in plan["stages"]:
        residual, mhc, recompute = (stage["modes"][mode] for mode in ("residual", "mhc", "recompute"))
        lines.append(
            f"{stage['stage']:5d} {stage['layers']:6d} {stage['in_flight']:9d}  "
            + _columns((10, stage["parameter_bytes"]), (9, stage["gradient_bytes"]), (9, stage["optimizer_bytes"]))
            + _columns((10, residual["activations"]), (6, mhc["activations"]), (9, recompute["activations"]))
            + f"{recompute['block_length'] or '-':>5} "
            + _columns((10, residual["total"]), (6, mhc["total"]), (9, recompute["total"]))
        )
    lines += _lengths(plan["stages"])
    for stage in plan["stages"]:
        automatic, chosen = stage["automatic_block_length"], stage["modes"]["recompute"]
        if automatic is not None and automatic["length"] != chosen["block_length"]:
            lines.append(
                f"stage {stage['stage']}: without --mhc-recompute-sublayers {automatic['length']} would be chosen; "
                f"{chosen['block_length']} takes {(chosen['activations'] - automatic['activations']) / GIB:+.2f} GiB"
            )
    return lines


def _lengths(stages: list[dict[str, Any]]) -> list[str]:
    """L_r as it is chosen, by the paper's formula, and with the least peak of all, with the activations' peaks."""
    lines = []
    for stage in stages:
        if (found := stage["automatic_block_length"]) is not None:
            peaks = {"chosen": ("length", "activations")}
            peaks |= {name: (name, f"{name}_activations") for name in ("formula", "optimum")}
            told = (f"{name} {found[of]} ({found[peak] / GIB:.2f} GiB)" for name, (of, peak) in peaks.items())
            lines.append(f"stage {stage['stage']}: L_r {', '.join(told)}")
    return lines


def _columns(*columns: tuple[int, float]) -> str:
    """Bytes in GiB, each with its column's width."""
    return " ".join(f"{value / GIB:{width}.2f}" for width, value in columns)


def _verdict(plan: dict[str, Any]) -> list[str]:
    gpu, peak = plan["gpu"], plan["peak"] / GIB
    room = (gpu["memory"] - gpu["reserve"]) / GIB
    room_text = f"{gpu['memory'] / GIB:.1f} GiB less {gpu['reserve'] / GIB:.1f} for CUDA, NCCL and fragmentation"
    if plan["fits"]:
        return [f"Fits ({plan['mode']}): {peak:.1f} GiB of {room:.1f} ({room_text})."]
    lines = [f"DOES NOT FIT ({plan['mode']}): {peak:.1f} GiB, and {room:.1f} are there ({room_text})."]
    found = plan["changes"]
    lines.append(
        "Any one of these would do:"
        if found and found[0]["fits"]
        else "No single change is enough; the peak with each:"
    )
    return [*lines, *(f"  {change['peak'] / GIB:7.1f} GiB  {change['arguments']}" for change in found)]


def _kernels(plan: dict[str, Any]) -> list[str]:
    gpu = plan["gpu"]
    lines = [
        f"mHC's kernels, one microbatch (estimates for {gpu['name']}; compute at {gpu['utilization']:.0%} of its peak):",
        "stage   mHC GB  with recompute     ms  instead of   compute ms   overhead  with recompute",
    ]
    for stage in plan["stages"]:
        mhc, again, compute = stage["modes"]["mhc"], stage["modes"]["recompute"], stage["compute_seconds"]
        lines.append(
            f"{stage['stage']:5d} {mhc['kernel_bytes'] / 1e9:8.2f} {again['kernel_bytes'] / 1e9:15.2f} "
            f"{mhc['kernel_seconds'] * 1e3:6.1f} {mhc['replaced_seconds'] * 1e3:11.1f} {compute * 1e3:12.1f} "
            f"{_overhead(mhc, compute):+9.1f}% {_overhead(again, compute):+14.1f}%"
        )
    return lines


def _overhead(mode: dict[str, Any], compute: float) -> float:
    """Per cent of the compute: the kernels, less what residual connections would have taken."""
    return (mode["kernel_seconds"] - mode["replaced_seconds"]) / compute * 100 if compute else 0.0


def _expected(plan: dict[str, Any]) -> list[str]:
    """One line a link speed."""
    name = "mHC with recompute" if plan["mode"] == "recompute" else "mHC"
    lines = []
    for step in plan["expected_step"]:
        where = "" if step["link"] is None else f" at {step['link'] / 1e9:.0f} GB/s"
        transfers = "" if step["link"] is None else f", exposed transfers ({step['kind']}) {step['exposed'] * 1e3:+.1f}"
        lines.append(
            f"Expected step{where}: residual {step['residual'] * 1e3:.1f} ms, {name} {step['mhc'] * 1e3:.1f} ms "
            f"({step['mhc'] / step['residual'] - 1:+.1%}): kernels {step['kernels'] * 1e3:+.1f}{transfers}"
        )
    return lines


def _pipeline(plan: dict[str, Any]) -> list[str]:
    boundary = plan["boundary"]
    mib = {name: value / 2**20 for name, value in boundary.items()}
    lines = [
        f"A pipeline boundary, one microbatch and direction: residual {mib['residual']:.1f} MiB, wide {mib['wide']:.1f}, where "
        f"split {mib['split']:.1f} + {mib['split_side']:.1f} of streams apart.",
        "Simulated step, mHC's kernels in all but the residual one, and how much of its communication is exposed (ms):",
        *_simulated(plan["pipeline"]),
    ]
    if larger := plan.get("larger_groups"):
        peaks = f"peak {larger['peak'] / GIB:.1f} GiB instead of {plan['peak'] / GIB:.1f}"
        if not larger["fits"]:
            peaks += ", which DOES NOT FIT"
        lines += [f"With {larger['arguments']} ({peaks}):", *_simulated(larger["pipeline"])]
    return lines


def _simulated(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["link GB/s" + "".join(f"{kind:>22}" for kind in dict.fromkeys(row["kind"] for row in rows))]
    for link in dict.fromkeys(row["link"] for row in rows):
        own = [row for row in rows if row["link"] == link]
        cells = "".join(f"{row['step'] * 1e3:12.1f} ({row['exposed'] * 1e3:7.1f})" for row in own)
        lines.append(f"{link / 1e9:9.0f}{cells}")
    return lines
