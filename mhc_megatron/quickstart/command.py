"""python -m mhc_megatron quickstart: train a small mHC MoE on real text, and see everything work."""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mhc_megatron.quickstart import data
from mhc_megatron.quickstart.jobs import (
    SAMPLE_SCRIPT,
    TRAIN_SCRIPT,
    Job,
    JobError,
    Losses,
    megatron_arguments,
    use_gpu,
)

_MODES = {"residual": [], "hc": ["--enable-mhc", "--mhc-mode=hc"], "mhc": ["--enable-mhc"]}
# The validation loss must be below the text's unigram entropy by this much (nats): more than byte frequencies was learned.
_LEARNED = 0.5
# Losses computed twice, before the kill and after the resume. Equal on a CPU; atomics reorder sums on a GPU in bf16.
_SAME_LOSS = {"cpu": 0.0, "gpu": 2e-3}


def add_parser(commands: Any) -> None:
    """Add the quickstart to the command line's sub-commands."""
    parser = commands.add_parser(
        "quickstart",
        help="train a small mHC MoE on real text, on a GPU if there is one, else the CPU (under 5 minutes on 2 cores)",
    )
    parser.add_argument("--folder", type=Path, default=Path("quickstart-run"), help="where data, logs, checkpoint go")
    parser.add_argument("--iterations", type=int, default=300, help="training iterations of each run (default: 300)")


def run(options: argparse.Namespace) -> int:
    """Run it; returns the exit status."""
    if options.iterations < 30:
        print(f"quickstart: --iterations must be >= 30, got {options.iterations}", file=sys.stderr)
        return 2
    quiet()
    try:
        claim(options.folder, "quickstart")
        return _Quickstart(options.folder.resolve(), options.iterations).run()
    except (JobError, FileExistsError, FileNotFoundError) as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 1


def quiet() -> None:
    """Megatron warns of every optional package it does without; the jobs' logs keep what matters."""
    warnings.simplefilter("ignore")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def claim(folder: Path, command: str) -> None:
    """An empty folder of our own; an earlier run's of this command is replaced, anything else is left alone."""
    marker = folder / f".mhc-megatron-{command}"
    if folder.exists() and any(folder.iterdir()):
        if not marker.exists():
            raise FileExistsError(f"{folder} exists and is not a {command}'s; name another one with --folder")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    marker.touch()


class _Quickstart:
    def __init__(self, folder: Path, iterations: int):
        self.folder, self.iterations, self.gpu = folder, iterations, use_gpu()
        self.started = time.monotonic()
        self.runs: dict[str, Losses] = {}

    def say(self, message: str) -> None:
        print(f"[{time.monotonic() - self.started:5.0f} s] {message}", flush=True)

    def run(self) -> int:
        where = "GPU, bf16" if self.gpu else "CPU, float32 (CUDA calls redirected: mhc_megatron/cpu.py)"
        self.say(f"Megatron on the {where}; logs and checkpoint in {self.folder}")
        self.text = data.prepare(self.folder)
        self.say(
            f"text: {self.text.documents} modules of the Python standard library, {self.text.tokens:,} bytes, "
            "90 % training, 10 % validation"
        )
        self.arguments = megatron_arguments(self.text, self.iterations, gpu=self.gpu)
        # Two cores, two single-threaded lanes; a GPU takes them as well.
        with ThreadPoolExecutor(2 if (os.cpu_count() or 1) > 1 else 1) as lanes:
            mhc = lanes.submit(self.train_mhc)
            others = lanes.submit(self.train_others)
            resumed_equal = mhc.result()
            others.result()
        sample = self.sample()
        picture = self.folder / "loss.png"
        from mhc_megatron.quickstart.picture import draw

        draw({name: self.runs[name] for name in _MODES}, self.text.unigram_entropy, picture)
        return self.report(sample, picture, resumed_equal)

    def job(self, name: str, mode: str, *extra: str) -> Job:
        return Job(self.folder / f"{name}.log", TRAIN_SCRIPT, [*self.arguments, *_MODES[mode], *extra], self.gpu)

    def train_others(self) -> None:
        for mode in ("residual", "hc"):
            self.runs[mode] = self.job(mode, mode).run()
            self.say(f"{mode}: done, validation loss {_last(self.runs[mode].validation):.3f}")

    def train_mhc(self) -> float:
        """Train, kill it after its first checkpoint, resume; the largest difference of losses computed twice."""
        save_at = self.iterations // 2
        kill_at = save_at + min(10, save_at)
        checkpoint = [f"--save={self.folder / 'checkpoint'}", f"--load={self.folder / 'checkpoint'}"]
        checkpoint += [f"--save-interval={save_at}"]

        def progress(iteration: int, loss: float) -> bool:
            if iteration % max(1, self.iterations // 12) == 0:
                self.say(f"mhc: iteration {iteration:4d} of {self.iterations}, loss {loss:.3f}")
            return True

        def until_killed(iteration: int, loss: float) -> bool:
            progress(iteration, loss)
            return iteration < kill_at

        first = self.job("mhc-killed", "mhc", *checkpoint).run(until_killed)
        self.say(f"mhc: checkpoint of iteration {save_at} is saved; killed the run at iteration {kill_at}, resuming")
        second = self.job("mhc-resumed", "mhc", *checkpoint).run(progress)
        # Megatron logs the second iteration after a start as the average of the first two.
        twice = sorted(first.training.keys() & second.training.keys() - {save_at + 2})
        if not twice or min(twice) <= save_at:
            raise JobError(
                f"the resumed run did not start after iteration {save_at} (see {self.folder}/mhc-resumed.log)"
            )
        self.runs["mhc"] = Losses(first.training | second.training, first.validation | second.validation)
        difference = max(abs(first.training[i] - second.training[i]) for i in twice)
        self.say(
            f"mhc: iterations {twice[0]} to {twice[-1]} ran before the kill and again after the resume: "
            f"their losses differ by at most {difference:g}"
        )
        return difference

    def sample(self) -> str:
        arguments = [*self.arguments, *_MODES["mhc"], f"--load={self.folder / 'checkpoint'}", "--no-load-optim"]
        job = Job(self.folder / "sample.log", SAMPLE_SCRIPT, [*arguments, "--prompt=def "], self.gpu)
        job.run()
        text = job.log.read_text()
        return text.partition("--- sample ---\n")[2].partition("\n--- end of sample ---")[0]

    def report(self, sample: str, picture: Path, resumed: float) -> int:
        entropy, validation = self.text.unigram_entropy, _last(self.runs["mhc"].validation)
        print(f"\nA sample of the mHC model's text after {self.iterations} iterations:\n{sample}\n")
        print(f"{'':10} {'training loss':>14} {'validation loss':>16}   (nats a byte; training: mean of the last 20)")
        for name in _MODES:
            last = list(self.runs[name].training.values())[-20:]
            print(f"{name:10} {sum(last) / len(last):14.3f} {_last(self.runs[name].validation):16.3f}")
        print(f"\nunigram entropy of the text {entropy:.3f}, validation loss of mHC {validation:.3f}")
        print(f"picture: {picture}\ncheckpoint: {self.folder / 'checkpoint'}")
        self.say("done")
        failures = []
        if not validation < entropy - _LEARNED:
            failures.append(f"the validation loss is not {_LEARNED} below the unigram entropy: nothing was learned")
        allowed = _SAME_LOSS["gpu" if self.gpu else "cpu"]
        if resumed > allowed:
            failures.append(f"losses after the resume differ by {resumed:g}, more than {allowed:g}")
        for failure in failures:
            print(f"quickstart: FAILED: {failure}", file=sys.stderr)
        return 1 if failures else 0


def _last(by_iteration: dict[int, float]) -> float:
    return by_iteration[max(by_iteration)]
