"""The quickstart itself, shorter: every file it promises, and refusal to touch a folder that is not its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path


def quickstart(*arguments: str) -> subprocess.CompletedProcess[str]:
    run = [sys.executable, "-m", "mhc_megatron", "quickstart", *arguments]
    return subprocess.run(run, capture_output=True, text=True, timeout=600)


def test_quickstart(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = quickstart("--folder", str(folder), "--iterations", "100")
    output = done.stdout
    assert done.returncode == 0, output + done.stderr
    assert (folder / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (folder / "checkpoint" / "latest_checkpointed_iteration.txt").read_text() == "100"
    assert "killed the run at iteration 60, resuming" in output
    assert "their losses differ by at most 0\n" in output
    entropy, validation = map(
        float, re.findall(r"unigram entropy of the text (\S+), validation loss of mHC (\S+)", output)[0]
    )
    assert validation < entropy - 0.5
    sample = output.partition("iterations:\n")[2].partition("\n\n")[0]
    assert sample.startswith("def ")
    assert len(sample) > 50


def test_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    done = quickstart("--folder", str(tmp_path))
    assert done.returncode == 1
    assert "is not a quickstart's; name another one with --folder" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_too_short() -> None:
    done = quickstart("--iterations", "5")
    assert done.returncode == 2
    assert "--iterations must be >= 30, got 5" in done.stderr
