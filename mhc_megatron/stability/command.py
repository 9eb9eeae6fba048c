"""python -m mhc_megatron stability: a deep, narrow MoE as residual, HC and mHC on real text; the gains of each."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mhc_megatron.monitor import report, summary
from mhc_megatron.monitor.records import FILE, Run, numbers, read
from mhc_megatron.quickstart import data
from mhc_megatron.quickstart.command import claim, quiet
from mhc_megatron.quickstart.jobs import TRAIN_SCRIPT, Job, JobError, use_gpu
from mhc_megatron.stability.page import fill
from mhc_megatron.stability.sizes import CPU, GPU, MODES, Size

_GRADIENT_NORM = re.compile(r"iteration\s+(\d+)/.*\| grad norm: (\S+)")


def add_parser(commands: Any) -> None:
    """Add the experiment to the command line's sub-commands."""
    parser = commands.add_parser(
        "stability",
        help="the gains of HC and mHC in a deep, narrow MoE on real text, on a GPU if there is one, else smaller on the CPU",
    )
    parser.add_argument("--folder", type=Path, default=Path("stability-run"), help="where data, logs and report go")
    for field in dataclasses.fields(Size):
        parser.add_argument(
            f"--{field.name}",
            type=float if field.name == "lr" else int,
            help=f"default: {getattr(GPU, field.name)} on a GPU, {getattr(CPU, field.name)} on the CPU",
        )
    parser.add_argument("--jobs", type=int, help=f"runs at the same time (default: {len(MODES)} on a GPU, else 2)")
    parser.add_argument("--page", type=Path, help="put the results into this Markdown page (docs/stability.md)")


def run(options: argparse.Namespace) -> int:
    """Run it; returns the exit status."""
    gpu = use_gpu()
    given = {f.name: getattr(options, f.name) for f in dataclasses.fields(Size) if getattr(options, f.name) is not None}
    for name, value in given.items():
        if value <= 0:
            print(f"stability: --{name} must be > 0, got {value}", file=sys.stderr)
            return 2
    size = dataclasses.replace(GPU if gpu else CPU, **given)
    quiet()
    try:
        claim(options.folder, "stability")
        return _Experiment(options.folder.resolve(), size, gpu).run(
            options.jobs or (len(MODES) if gpu else 2), options.page
        )
    except (JobError, OSError, ValueError, ModuleNotFoundError) as error:
        print(f"stability: {error}", file=sys.stderr)
        return 1


class _Experiment:
    def __init__(self, folder: Path, size: Size, gpu: bool):
        self.folder, self.size, self.gpu = folder, size, gpu
        self.started = time.monotonic()
        self.validation: dict[str, float] = {}
        self.failed: list[str] = []

    def say(self, message: str) -> None:
        print(f"[{time.monotonic() - self.started:5.0f} s] {message}", flush=True)

    def run(self, jobs: int, page: Path | None) -> int:
        self.say(f"{'GPU, bf16' if self.gpu else 'CPU, float32'}: {self.size.describe()}; logs in {self.folder}")
        text = data.prepare(self.folder)
        self.arguments = self.size.arguments(text, gpu=self.gpu)
        with ThreadPoolExecutor(min(jobs, os.cpu_count() or 1)) as lanes:
            list(lanes.map(self.train, reversed(MODES)))  # the quickest last
        names = [name for name in MODES if (self.folder / name / FILE).exists()]
        if not names:
            raise JobError("no run got to its first monitored step")
        runs = [read(self.folder / name, name) for name in names]
        out = self.folder / "report"
        html = report.write(runs, out)
        table = self.table(runs)
        (self.folder / "results.md").write_text(table)
        print(f"\n{table}\nreport: {html}")
        if page is not None:
            fill(page, table, out)
            print(f"results are in {page}")
        self.say("done")
        return 1 if self.failed else 0

    def train(self, mode: str) -> None:
        """One run, its mhc-monitor.jsonl in ``folder/mode``; a failure does not end the others."""
        monitor = [f"--mhc-monitor-interval={self.size.interval}", f"--mhc-monitor-dir={self.folder / mode}"]
        arguments = [*self.arguments, *MODES[mode], *(monitor if mode != "residual" else [])]
        job = Job(self.folder / f"{mode}.log", TRAIN_SCRIPT, arguments, self.gpu)

        def progress(iteration: int, loss: float) -> bool:
            if iteration % max(1, self.size.iterations // 6) == 0:
                self.say(f"{mode:8} iteration {iteration:5d} of {self.size.iterations}, loss {loss:.3f}")
            return True

        try:
            losses = job.run(progress)
            self.validation[mode] = losses.validation[max(losses.validation)]
        except JobError as error:
            self.failed.append(mode)
            print(f"stability: {error}", file=sys.stderr)
        if mode == "residual":
            self.write_losses(job)

    def write_losses(self, job: Job) -> None:
        """The residual run's losses, at the iterations that the others monitor, for the report."""
        norms = {int(i): float(norm) for i, norm in _GRADIENT_NORM.findall(job.log.read_text())}
        due = [i for i in job.losses.training if i == 1 or i % self.size.interval == 0]
        losses = job.losses.training
        records = [{"iteration": i, "loss": numbers(losses[i]), "grad_norm": numbers(norms[i])} for i in due]
        if records:
            file = self.folder / "residual" / FILE
            file.parent.mkdir()
            file.write_text("".join(json.dumps(record) + "\n" for record in records))

    def table(self, runs: list[Run]) -> str:
        """The results as Markdown."""
        validation = [f"{self.validation[r.name]:.4f}" if r.name in self.validation else "failed" for r in runs]
        note = (
            f"{self.size.describe()}; {self.where()}. "
            "Gains: min to max of the absolute sums, means over tokens, at the last monitored iteration."
        )
        failed = f"\n\nFailed before the end: {', '.join(self.failed)}." if self.failed else ""
        return f"{summary.markdown(runs, validation_loss=validation)}\n{note}{failed}\n"

    def where(self) -> str:
        today = time.strftime("%d %B %Y").lstrip("0")
        if not self.gpu:
            return f"CPU, float32, {today}"
        import torch

        took = time.monotonic() - self.started
        return f"one {torch.cuda.get_device_name()}, bf16, {today}; {took:.0f} s for all runs"
