"""The benchmarks of a training step run to their ends; small, on the CPU, where its times mean nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(script: str, arguments: str, results: Path) -> str:
    """The benchmark's output."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), "--tiny", *arguments.split(), "--json", str(results)],
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


def test_monitor(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    output = run("monitor.py", "--tokens 64 --sequence 32 --layers 2 --steps 2 --interval 50", results)
    written = json.loads(results.read_text())
    assert written["ms"].keys() == {"without", "not due", "monitored"}
    assert f"one monitored step in 50: {written['percent']:+.3f} % of the step time" in output
