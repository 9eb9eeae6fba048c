"""Runs of the training script under the launcher, or alone, for tests of what it trains."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import tempfile

import psutil
import torch

from mhc_megatron.quickstart.jobs import TRAIN_SCRIPT
from tests.ranks import shared_gpu_environment

TIMEOUT = 300  # seconds, of a job; NCCL's is shorter, and its watchdog then says what hung


def train(arguments: list[str], processes: int, *, launcher: bool = True) -> dict[int, float]:
    """The losses of a run, by iteration: of the training script under the launcher, or alone."""
    shared = processes > torch.cuda.device_count()
    nodes = processes if shared else 1
    run = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc-per-node={processes // nodes}"]
    if shared:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        run += ["--master-addr=127.0.0.1", f"--master-port={port}"]
    else:
        run += ["--standalone"]  # it takes a port itself: a free one may not be free for long beside other tests
    job = [*(["-m", "mhc_megatron", "pretrain"] if launcher else []), str(TRAIN_SCRIPT), *arguments]
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(nodes)]
        started = []
        for node, log in enumerate(logs):
            environment = os.environ | (shared_gpu_environment(node) if shared else {})
            command = [*run, f"--node-rank={node}", *job]
            started.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True, env=environment))
            stack.callback(_end, started[-1])
        codes: list[int | str] = []
        for process in started:
            try:
                codes.append(process.wait(timeout=TIMEOUT))
            except subprocess.TimeoutExpired:
                codes.append("not finished")
        for log in logs:
            log.seek(0)
        output = "".join(log.read() for log in logs)
    assert codes == [0] * nodes, output[-3000:]
    return {int(i): float(x) for i, x in re.findall(r"iteration\s+(\d+)/\s*\d+ \|.*\| lm loss: (\S+)", output)}


def _end(process: subprocess.Popen) -> None:
    """The launcher and its workers, which would keep a shared GPU busy."""
    if process.poll() is None:
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:
            one.kill()
