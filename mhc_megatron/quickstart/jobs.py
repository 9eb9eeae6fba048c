"""The quickstart's training jobs: their command lines, a process each, and the losses read from their logs."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mhc_megatron.cpu import MEGATRON_ARGUMENTS as CPU_ARGUMENTS
from mhc_megatron.quickstart.data import VOCABULARY, Text

TRAIN_SCRIPT = Path(__file__).with_name("train.py")
SAMPLE_SCRIPT = Path(__file__).with_name("sample.py")

MODEL = """
--num-layers 4 --hidden-size 128 --num-attention-heads 4 --seq-length 128 --max-position-embeddings 128
--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear
--untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0
--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 128 --moe-shared-expert-intermediate-size 128
--moe-layer-freq [0]+[1]*3 --moe-token-dispatcher-type alltoall --moe-aux-loss-coeff 1e-2
""".split()

OPTIMIZATION = """
--micro-batch-size 8 --global-batch-size 8 --lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine --lr-warmup-iters 20
--weight-decay 0.1 --clip-grad 1.0 --seed 1234 --use-distributed-optimizer
--log-interval 1 --eval-interval 50 --eval-iters 8 --num-workers 0 --ckpt-format torch_dist
""".split()

# No fusions that need extensions which the megatron-core package does not have.
GPU_ARGUMENTS = """
--bf16 --no-gradient-accumulation-fusion --no-persist-layer-norm --no-rope-fusion --no-masked-softmax-fusion
""".split()

_ITERATION = re.compile(r"iteration\s+(\d+)/\s*\d+ \|.*\| lm loss: (\S+)")
_VALIDATION = re.compile(r"validation loss at iteration (\d+).*\| lm loss value: (\S+)")


class JobError(RuntimeError):
    """A job that failed, with the end of its log."""


@dataclass
class Losses:
    """By iteration: training loss of its batch, validation loss where it was evaluated. Nats a token."""

    training: dict[int, float] = field(default_factory=dict)
    validation: dict[int, float] = field(default_factory=dict)


def use_gpu() -> bool:
    """Whether this machine has a CUDA GPU."""
    import torch

    return torch.cuda.is_available()


def megatron_arguments(text: Text, iterations: int, *, gpu: bool) -> list[str]:
    """The Megatron arguments that all jobs share."""
    return [*MODEL, *OPTIMIZATION, *data_arguments(text), *host_arguments(gpu), f"--train-iters={iterations}"]


def data_arguments(text: Text) -> list[str]:
    """Where the text is and how many tokens there are; 90 % are for training."""
    data = ["--tokenizer-type=NullTokenizer", f"--vocab-size={VOCABULARY}", "--make-vocab-size-divisible-by=2"]
    return [*data, f"--data-path={text.prefix}", f"--data-cache-path={text.prefix}-cache", "--split=90,10,0"]


def host_arguments(gpu: bool) -> list[str]:
    """What the GPU, or the CPU in its place, needs."""
    return [*GPU_ARGUMENTS, f"--transformer-impl={transformer_implementation()}"] if gpu else list(CPU_ARGUMENTS)


def transformer_implementation() -> str:
    """Megatron's ``--transformer-impl`` on this machine's GPU: Transformer Engine where it is installed."""
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError:
        return "local"
    return "transformer_engine"


@dataclass
class Job:
    """One Megatron process under the launcher, its output in ``log``."""

    log: Path
    script: Path
    arguments: list[str]
    gpu: bool
    losses: Losses = field(default_factory=Losses)

    def run(self, on_iteration: Callable[[int, float], bool] = lambda iteration, loss: True) -> Losses:
        """Run to the end, or kill it (SIGKILL) as soon as ``on_iteration(iteration, loss)`` returns False.

        Raises:
            JobError: if the process fails.
        """
        launcher = [sys.executable, "-m", "mhc_megatron", "pretrain", *([] if self.gpu else ["--cpu"])]
        process = subprocess.Popen(
            [*launcher, str(self.script), *self.arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, **_single_process_environment()},
        )
        killed = False
        try:
            for line in self._lines(process):
                if match := _VALIDATION.search(line):
                    self.losses.validation[int(match[1])] = float(match[2])
                elif match := _ITERATION.search(line):
                    iteration, loss = int(match[1]), float(match[2])
                    self.losses.training[iteration] = loss
                    if not on_iteration(iteration, loss):
                        process.send_signal(signal.SIGKILL)
                        killed = True
                        break
        finally:
            if process.poll() is None and not killed:
                process.kill()
            process.wait()
        if process.returncode != 0 and not killed:
            tail = "".join(self.log.read_text().splitlines(keepends=True)[-25:])
            raise JobError(f"{self.log.stem} failed (exit status {process.returncode}); the end of {self.log}:\n{tail}")
        return self.losses

    def _lines(self, process: subprocess.Popen[str]) -> Iterator[str]:
        assert process.stdout is not None
        with open(self.log, "a") as log:
            for line in process.stdout:
                log.write(line)
                log.flush()
                yield line


def _single_process_environment() -> dict[str, str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "ignore",
    }
