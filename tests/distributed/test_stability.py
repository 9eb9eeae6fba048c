"""The stability experiment itself, tiny: it trains all runs, draws the report and fills its page."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from mhc_megatron.monitor.records import read
from mhc_megatron.stability.sizes import MODES

PAGE = Path(__file__).parents[2] / "docs" / "stability.md"


def stability(*arguments: str) -> subprocess.CompletedProcess[str]:
    run = [sys.executable, "-m", "mhc_megatron", "stability", *arguments]
    return subprocess.run(run, capture_output=True, text=True, timeout=600)


def test_stability(tmp_path: Path) -> None:
    page, folder = tmp_path / "stability.md", tmp_path / "run"
    page.write_text(PAGE.read_text())
    size = "--layers 2 --hidden 16 --heads 2 --sequence 32 --batch 2 --iterations 12".split()
    done = stability("--folder", str(folder), *size, "--page", str(page))
    assert done.returncode == 0, done.stdout + done.stderr
    runs = {name: read(folder / name) for name in MODES}
    assert [len(run.monitored) for run in runs.values()] == [0, 12, 12, 12]
    assert all(list(run.records) == list(range(1, 13)) for run in runs.values())
    text = page.read_text()
    for name, run in runs.items():
        row = re.search(rf"^\| {name} \| 12 \| (\S+) \|.*\| (\S+) \|$", text, re.MULTILINE)
        assert row, text
        assert float(row[1]) == round(run.records[12]["loss"], 4)
    pictures = re.findall(r"\]\((stability/\S+\.png)\)", text)
    assert len(pictures) == 3
    assert all((tmp_path / picture).stat().st_size > 10_000 for picture in pictures)
    # Filling it again replaces the results.
    assert text.count("| run | iteration |") == 1
    assert text.partition("<!-- results: begin -->")[0] == PAGE.read_text().partition("<!-- results: begin -->")[0]


def test_bad_size(tmp_path: Path) -> None:
    done = stability("--folder", str(tmp_path), "--layers", "0")
    assert done.returncode == 2
    assert "--layers must be > 0, got 0" in done.stderr
