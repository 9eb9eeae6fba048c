"""The benchmarks of a training step run to their ends; small, on the CPU, where its times mean nothing."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from megatron.core.pipeline_parallel import schedules

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(script: str, arguments: str, results: Path, processes: int = 1) -> str:
    """The benchmark's output."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    )
    done = subprocess.run(
        [sys.executable, *launcher, str(BENCHMARKS / script), "--tiny", *arguments.split(), "--json", str(results)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_overhead(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    output = run("overhead.py", "--tokens 64 --sequence 32 --layers 2 3 --steps 2", results)
    written = json.loads(results.read_text())["results"]
    assert written.keys() == {"2", "3"}
    for kinds in written.values():
        assert kinds.keys() == {"residual", "hc", "reference", "mhc", "recompute"}
        assert all(kind["low_ms"] <= kind["step_ms"] <= kind["high_ms"] for kind in kinds.values())
    assert "GiB that a layer adds" in output


def test_overhead_with_the_experts_divided(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    arguments = "--tokens 64 --sequence 32 --layers 2 --steps 2 --kinds residual,mhc,recompute:3"
    output = run("overhead.py", arguments, results, processes=2)
    written = json.loads(results.read_text())
    assert written["settings"]["gpus"] == 2
    assert written["results"]["2"]["recompute:3"]["block_length"] == 3
    assert output.count("27b, 2 layers") == 1


def test_monitor(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    output = run("monitor.py", "--tokens 64 --sequence 32 --layers 2 --steps 2 --interval 50", results)
    written = json.loads(results.read_text())
    assert written["ms"].keys() == {"without", "not due", "monitored"}
    assert f"one monitored step in 50: {written['percent']:+.3f} % of the step time" in output


def test_pipeline(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    arguments = "--vpp 1 2 --layers 4 --microbatches 4 --sequence 16 --steps 1"
    output = run("pipeline.py", arguments, results, processes=2)
    written = json.loads(results.read_text())["results"]
    assert written.keys() == {"1", "2"}
    for kinds in written.values():
        assert kinds.keys() == {"residual", "wide-stock", "wide", "split"}
    assert "PP2 x VPP2" in output


def _pipeline_benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("benchmarks_pipeline", BENCHMARKS / "pipeline.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    return benchmark


def test_pipeline_is_timed_as_users_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Split transfers with the schedules' hooks, without which no receive is posted ahead; a residual model with none."""
    benchmark = _pipeline_benchmark(monkeypatch)
    schedule = "forward_backward_pipelining_{}_interleaving"
    names = ("P2PCommunicator", schedule.format("with"), schedule.format("without"))
    for kind, hooked in {"residual": False, "wide-stock": False, "wide": True, "split": True}.items():
        with benchmark._communicator(kind):
            assert {hasattr(getattr(schedules, name), "__wrapped__") for name in names} == {hooked}, kind
        assert not any(hasattr(getattr(schedules, name), "__wrapped__") for name in names)


def test_margin_of_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Is in Transformer Engine's environment variable while that kind runs, and is taken back."""
    benchmark = _pipeline_benchmark(monkeypatch)
    name = "NVTE_EXT_MARGIN_SM"
    monkeypatch.setenv(name, "2")
    for kind, expected in {"residual": "2", "wide:ctas=1-4:margin=8": "8", "residual:margin=12": "12"}.items():
        _, margin, settings = benchmark._parts(kind)
        assert settings == (["ctas=1-4"] if "ctas" in kind else [])
        with benchmark._margin(margin):
            assert os.environ[name] == expected
        assert os.environ[name] == "2"
    assert benchmark._check_kinds(["residual:margin=8", "wide:margin=8:cga=1"]) is None
    assert "margin=some is no number" in benchmark._check_kinds(["wide:margin=some"])


def test_transfers_are_matched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data moves from when the later end is there; what one rank computes beside counts once."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from matched import Moved, Rank, describe, longer, match, slowed, union

    assert union([(3.0, 4.0), (0.0, 1.0), (0.5, 2.0)]) == [(0.0, 2.0), (3.0, 4.0)]
    first = Rank({7: [(0.0, 10.0), (20.0, 24.0)], 8: [(0.0, 1.0)]}, [(0.0, 7.0)], {"product": 5.0, "norm": 2.0})
    second = Rank({7: [(6.0, 10.0), (18.0, 24.0)], 8: []}, [(5.0, 8.0), (21.0, 22.0)], {"product": 7.5, "copy": 1.0})
    assert match(first, second) == {7: [Moved(4.0, 6.0, 2.0), Moved(4.0, 2.0, 1.0)]}
    assert describe(first, second) == (
        "    stream 7: 2 transfers, moving 4.00 ms (4.00 to 4.00), 38% of that beside computation; waiting 4.00, 8 in all"
    )
    assert longer(second, first, 1) == "+2.5 ms to 5.0 product; -1.0 all others"
    assert slowed(second, first) == "computes 4.0 ms, 7.0 without transfers (-3.0); not in 13.0, 0.0 ms"


@pytest.mark.skipif(not dist.is_nccl_available(), reason="needs a PyTorch with NCCL")
def test_settings_of_nccl_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import nccl_settings

    options = dist.ProcessGroupNCCL.Options()
    before = nccl_settings.keep(options)
    for setting in ("high-priority", "ctas=2-4", "cga=1"):
        assert not nccl_settings.wrong(setting)
        nccl_settings.apply(options, setting)
    assert nccl_settings.keep(options) == (True, 2, 4, 1)
    with pytest.raises(ValueError, match=r"ctas4 is neither"):
        nccl_settings.apply(options, "ctas4")
    nccl_settings.restore(options, before)
    assert nccl_settings.keep(options) == before


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("narrow", "choose from"),
        ("residual:ctas=1-4", "only wide and split"),
        ("split:ctas=4", "MIN-MAX"),
        ("wide:cga=", "cga=N"),
        ("split", None),
    ],
)
def test_kinds_of_the_pipeline_benchmark(kind: str, says: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = _pipeline_benchmark(monkeypatch)._check_kinds([kind])
    assert wrong is None if says is None else says in wrong
