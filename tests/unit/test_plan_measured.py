"""The planner's activations against the peaks that `benchmarks/overhead.py` has measured on GPUs (benchmarks/results)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from mhc_megatron.plan.activations import chunk_pass
from mhc_megatron.plan.run import Run
from mhc_megatron.residual.recompute import automatic_length

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
GIB = 2**30


def benchmark_run(shape: str, kind: str, layers: int, settings: dict[str, Any]) -> Run:
    """A block of benchmarks/overhead.py."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        from blocks import of_kind, planned_run
    finally:
        sys.path.remove(str(BENCHMARKS))
    return planned_run(shape, of_kind(kind), layers, settings["sequence"], settings["tokens"])


def _length(kind: str, layers: int, result: dict[str, Any]) -> int | None:
    """L_r of a result; the formula's where it does not say."""
    return result.get("block_length", automatic_length(2 * layers, 1)) if kind.startswith("recompute") else None


MEASURED = [
    (path.stem, layers, kind)
    for path in sorted((BENCHMARKS / "results").glob("h[12]00_*.json"))
    for layers, kinds in json.loads(path.read_text())["results"].items()
    for kind, result in kinds.items()
    if kind != "reference" and "peak_gib" in result  # the reference keeps what autograd keeps: not planned
]


@pytest.mark.parametrize(("name", "layers", "kind"), MEASURED)
def test_measured_peaks(name: str, layers: str, kind: str) -> None:
    """The planner has to be within 10 %."""
    recorded = json.loads((BENCHMARKS / "results" / f"{name}.json").read_text())
    settings = recorded["settings"]
    run = benchmark_run(settings["shape"], kind, int(layers), settings)
    (chunk,) = run.chunks()[0]
    result = recorded["results"][layers][kind]
    passes = chunk_pass(run, chunk, _length(kind, int(layers), result))
    predicted = max(passes.forward, passes.backward) / GIB
    measured = result["peak_gib"]
    print(
        f"{name} {layers} {kind}: {predicted:.2f} GiB planned, {measured:.2f} measured ({predicted / measured - 1:+.1%})"
    )
    assert predicted == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("h100_27b_planned", 4),
        ("h100_27b_depth", 8),
        ("h100_27b_padded_2", 5),
        ("h100_27b_depth_2", 4),
        ("h100_27b_4096_2", 5),
        ("h100_dense", 4),
        ("h100_dense_kinds", 4),
    ],
)
def test_measured_peaks_with_the_planners_blocks(name: str, layers: int) -> None:
    """To 0.5 %. Of 4 and 8 layers the peak is in the last layer's second sublayer, whose streams alone are kept (a new block
    begins there): those that came into the layer are there as well while it runs forward, as Megatron's block holds them."""
    recorded = json.loads((BENCHMARKS / "results" / f"{name}.json").read_text())
    result = recorded["results"][str(layers)]["recompute"]
    run = benchmark_run(recorded["settings"]["shape"], "recompute", layers, recorded["settings"])
    passes = chunk_pass(run, run.chunks()[0][0], result["block_length"])
    assert max(passes.forward, passes.backward) / GIB == pytest.approx(result["peak_gib"], rel=5e-3)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("h200_27b_memory", 4),
        ("h200_27b_memory", 8),
        ("h100_dense", 4),
        pytest.param(
            "h100_27b_planned",
            4,
            marks=pytest.mark.xfail(strict=True, reason="0.08 GiB too little: residual 0.04 too much"),
        ),
    ],
)
def test_measured_increment_of_mhc(name: str, layers: int) -> None:
    """What mHC and its recompute (of the dense block in a block of seven) add to the residual model's peak: to 5 %."""
    recorded = json.loads((BENCHMARKS / "results" / f"{name}.json").read_text())
    results = recorded["results"][str(layers)]
    peaks: dict[str, float] = {}
    for kind in ("residual", "mhc", "recompute"):
        run = benchmark_run(recorded["settings"]["shape"], kind, layers, recorded["settings"])
        passes = chunk_pass(run, run.chunks()[0][0], _length(kind, layers, results[kind]))
        peaks[kind] = max(passes.forward, passes.backward) / GIB
    for kind in ("mhc", "recompute"):
        ours, theirs = (of[kind] - of["residual"] for of in (peaks, {k: r["peak_gib"] for k, r in results.items()}))
        print(f"{name}, {layers} layers, {kind}: +{ours:.2f} GiB planned, +{theirs:.2f} measured")
        assert ours == pytest.approx(theirs, rel=0.05), kind
