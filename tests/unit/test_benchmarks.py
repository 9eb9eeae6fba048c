"""The benchmark of a training step runs to its end; small, on the CPU, where its times mean nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "overhead.py"


def test_overhead(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    arguments = "--tiny --tokens 64 --sequence 32 --layers 2 3 --steps 2".split()
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments, "--json", str(results)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    written = json.loads(results.read_text())["results"]
    assert written.keys() == {"2", "3"}
    for kinds in written.values():
        assert kinds.keys() == {"residual", "hc", "reference", "mhc", "recompute"}
        assert all(kind["low_ms"] <= kind["step_ms"] <= kind["high_ms"] for kind in kinds.values())
    assert "GiB that a layer adds" in done.stdout
