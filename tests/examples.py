"""The example launchers as the tests run them: unedited, with settings in the environment."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import subprocess
import sys
import threading
import time
import uuid
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
        self.output = ""
        self.losses: list[tuple[int, float]] = []
        self._mark = uuid.uuid4().hex
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment(**settings) | {"MHC_TEST_RUN": self._mark},
        )
        # Read by a thread: a process that outlives the job keeps the pipe open, and its reader waiting.
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)

    def until(self, iteration: int | None = None, silence: float = 200) -> Run:
        """Read on until this iteration is logged, or to the end.

        Raises:
            TimeoutError: when nothing has been said for so many seconds. The job is ended.
        """
        heard = time.monotonic()
        while True:
            try:
                line = self._lines.get(timeout=1)
            except queue.Empty:
                if self.process.poll() is not None:
                    return self
                if time.monotonic() - heard > silence:
                    there = "; ".join(self.left_behind(0))
                    raise TimeoutError(f"nothing said for {silence} s; there were {there}") from None
                continue
            heard = time.monotonic()
            self.output += line
            print(line, end="", flush=True)  # how far it has come, with pytest -s
            if found := _ITERATION.search(line):
                self.losses.append((int(found[1]), float(found[2])))
                if self.losses[-1][0] == iteration:
                    return self

    def rank(self, number: int) -> psutil.Process:
        """The process of this rank (not one that writes a checkpoint for it)."""
        of = {p: _rank(p) for p in psutil.Process(self.process.pid).children(recursive=True)}
        ranks = {p.pid for p, rank in of.items() if rank is not None}
        (found,) = [p for p, rank in of.items() if rank == str(number) and p.ppid() not in ranks]
        return found

    def left_behind(self, seconds: float = 15) -> list[str]:
        """Command lines of processes that have outlived the job by so long; they are ended."""
        until = time.monotonic() + seconds
        while (left := self.processes()) and time.monotonic() < until:
            time.sleep(0.5)
        described = [describe(process) for process in left]
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        return described

    def processes(self) -> list[psutil.Process]:
        """All of the job, also those whose parents have ended."""
        return [p for p in psutil.process_iter() if _environment(p).get("MHC_TEST_RUN") == self._mark]


def describe(process: psutil.Process) -> str:
    """What it is, and what it does."""
    try:
        return f"{process.pid} of {process.ppid()}, rank {_rank(process)}, {process.status()}: {' '.join(process.cmdline())}"
    except psutil.Error as error:
        return str(error)


def _rank(process: psutil.Process) -> str | None:
    return _environment(process).get("RANK")


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:  # it has ended, or does not let itself be read
        return {}
