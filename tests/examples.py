"""The example launchers as the tests run them: unedited, with settings in the environment."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import psutil

EXAMPLES = Path(__file__).parent.parent / "examples"
# Every model of the examples, its widths reduced for a CPU.
SMALL = (
    "--hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 64 --num-experts 8 --moe-ffn-hidden-size 16 "
    "--moe-shared-expert-intermediate-size 32 --kv-lora-rank 16 --qk-head-dim 8 --qk-pos-emb-head-dim 8 --v-head-dim 8 "
    "--num-workers 0"
)
_ITERATION = re.compile(r"iteration\s+(\d+)/\s*\d+ \|.*\| lm loss: (\S+)")


def environment(**settings: object) -> dict[str, str]:
    """This process's environment without settings of a launcher, and these."""
    inherited = {name: value for name, value in os.environ.items() if name not in _settings()}
    root = EXAMPLES.parent
    paths = [str(root), str(root / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    inherited |= {"PYTHON": sys.executable, "PYTHONPATH": os.pathsep.join(paths)}
    return inherited | {name: str(value) for name, value in settings.items()}


def _settings() -> set[str]:
    scripts = [*EXAMPLES.glob("*.sh"), *EXAMPLES.glob("models/*.sh")]
    return {name for script in scripts for name in re.findall(r"\$\{([A-Z_]+):=", script.read_text())}


def launch(*arguments: str, script: str = "torchrun.sh", **settings: object) -> subprocess.CompletedProcess[str]:
    """Run a launcher to its end."""
    command = ["bash", str(EXAMPLES / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment(**settings), timeout=300)


class Run:
    """torchrun.sh in its own process, its losses read as it goes.

    before: shell commands to run first; there ``"$0" "$1"`` are the script and the size.
    """

    def __init__(self, size: str, before: str = "", **settings: object):
        command = ["bash", "-c", f'{before} exec bash "$0" "$1"', str(EXAMPLES / "torchrun.sh"), size]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(**settings)
        )
        self.output = ""
        self.losses: list[tuple[int, float]] = []

    def until(self, iteration: int | None = None) -> Run:
        """Read on until this iteration is logged, or to the end."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line
            print(line, end="")  # how far it has come, with pytest -s
            if found := _ITERATION.search(line):
                self.losses.append((int(found[1]), float(found[2])))
                if self.losses[-1][0] == iteration:
                    return self
        self.process.wait(timeout=60)
        return self

    def rank(self, number: int) -> psutil.Process:
        """The process of this rank (not one that writes a checkpoint for it)."""
        of = {p: _rank(p) for p in psutil.Process(self.process.pid).children(recursive=True)}
        ranks = {p.pid for p, rank in of.items() if rank is not None}
        (found,) = [p for p, rank in of.items() if rank == str(number) and p.ppid() not in ranks]
        return found


def _rank(process: psutil.Process) -> str | None:
    try:
        return process.environ().get("RANK")
    except psutil.Error:  # it has ended, or does not let itself be read
        return None
