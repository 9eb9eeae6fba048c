"""The example launchers without training: dry runs of every size, bad input, Slurm's part."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mhc_megatron import MHCConfig
from mhc_megatron.quickstart import data
from mhc_megatron.residual.hyper_connection import MHC_PARAMETER
from tests import models
from tests.examples import EXAMPLES, environment, launch

# arXiv 2512.24880, table 5: total and active parameters, learning rate, batch, steps.
PAPER = {
    "3b": (2.97e9, 612e6, "8.6e-4", 320, 30000),
    "9b": (9.18e9, 1.66e9, "5.9e-4", 512, 50000),
    "27b": (27.0e9, 4.14e9, "4.0e-4", 1280, 50000),
}
ONLY_TEXT = {"MOCK_DATA": "0", "TOKENIZER_TYPE": "NullTokenizer"}
UNITS = {"B": 1e9, "M": 1e6}


def flags(output: str, script: str) -> dict[str, str]:
    """Flag -> value of the printed command."""
    (line,) = [line for line in output.splitlines() if "mhc_megatron pretrain" in line]
    words = shlex.split(line)
    found = {}
    for word, following in zip(words, [*words[1:], "--"], strict=True):
        if word.startswith("--"):
            name, _, value = word.partition("=")
            found[name] = value or ("" if following.startswith("--") else following)
    return found


def parameters(output: str) -> tuple[float, float]:
    numbers = re.search(r"([\d.]+)([BM]) parameters, ([\d.]+)([BM]) active", output)
    assert numbers, output
    return float(numbers[1]) * UNITS[numbers[2]], float(numbers[3]) * UNITS[numbers[4]]


@pytest.mark.parametrize(
    ("size", "script", "mode"),
    [
        ("3b", "torchrun.sh", "mhc"),
        ("9b", "torchrun.sh", "hc"),
        ("27b", "torchrun.sh", "mhc"),
        ("9b", "torchrun.sh", "mhc"),
        ("3b", "slurm.sh", "mhc"),
        ("9b", "slurm.sh", "mhc"),
        ("27b", "slurm.sh", "residual"),
    ],
)
def test_dry_run(size: str, script: str, mode: str) -> None:
    """Megatron accepts the command as it is, for 64 GPUs, and the model is the paper's."""
    done = launch(size, script=script, DRY_RUN=1, MOCK_DATA=1, MODE=mode)
    output = done.stdout
    assert done.returncode == 0, output + done.stderr
    assert "accepts these arguments on 64 GPUs" in output
    total, active, rate, batch, steps = PAPER[size]
    assert parameters(output) == pytest.approx((total, active), rel=0.02)
    given = flags(output, script)
    assert given["--lr"] == rate
    assert float(given["--min-lr"]) == pytest.approx(float(rate) / 10)
    assert (given["--global-batch-size"], given["--train-iters"]) == (str(batch), str(steps))
    assert ("--enable-mhc" in given) == (mode != "residual")
    assert given.get("--mhc-mode", "residual") == mode
    layers = [layer for chunk in re.findall(r"stage \d+: layers (.*)", output) for layer in _expand(chunk)]
    assert sorted(layers) == list(range(1, int(given["--num-layers"]) + 1))
    assert "Fits (" in output, "the defaults must fit 8 nodes of 8 H100-80GB"
    if script == "slurm.sh":
        assert "srun --nodes 8 --ntasks-per-node 1 --kill-on-bad-exit=1" in output


def _expand(chunks: str) -> list[int]:
    ranges = [part.split("-") for part in chunks.split(" | ") if part != "none"]
    return [layer for first, *last in ranges for layer in range(int(first), int((last or [first])[0]) + 1)]


def test_dry_run_fails_on_what_mhc_refuses() -> None:
    done = launch(
        "3b", DRY_RUN=1, MOCK_DATA=1, PP=2, VPP=1, PIPELINE_LAYOUT="Et*12|mL", EXTRA_ARGS="--mtp-num-layers 1"
    )
    assert done.returncode == 1
    assert "mtp_num_layers (1): the last pipeline chunk has no decoder layer" in done.stderr


def test_dry_run_fails_on_what_megatron_refuses() -> None:
    done = launch("3b", DRY_RUN=1, MOCK_DATA=1, EXTRA_ARGS="--no-such-flag 3")
    assert done.returncode == 1
    assert done.stderr == "check: FAILED: unrecognized arguments: --no-such-flag 3\n"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"EXTRA_ARGS": "--fp8-format hybrid"}, "--fp8-format hybrid is not covered"),
        ({"EXTRA_ARGS": "--optimizer muon"}, "--optimizer muon is not covered"),
        ({"EXTRA_ARGS": "--mtp-num-layers 1"}, "--mtp-num-layers 1 is not covered"),
        ({"STREAMS": "9"}, "(the Triton kernels take 1 to 8 streams, not n = 9)"),
    ],
)
def test_dry_run_of_what_the_planner_does_not_cover(settings: dict[str, str], reason: str) -> None:
    done = launch("3b", DRY_RUN=1, MOCK_DATA=1, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "accepts these arguments on 64 GPUs" in done.stdout
    assert reason in done.stderr
    assert done.stdout.endswith("whether they fit into memory is not known.\n")
    assert ("mHC runs its slow reference" in done.stdout) == ("STREAMS" in settings)
    assert ("--mhc-recompute" in done.stdout) == ("STREAMS" not in settings), "without the kernels it has no effect"


def command(folder: Path, **settings: object) -> list[str]:
    """The words of the command that would run, by a Python that accepts everything."""
    accepts = folder / "accepts"
    accepts.write_text("#!/bin/sh\n")
    accepts.chmod(0o755)
    done = launch("3b", DRY_RUN=1, PYTHON=accepts, PRETRAIN_SCRIPT=__file__, **settings)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "mhc_megatron pretrain" in line]
    return shlex.split(line)


def test_arguments_on_several_lines(tmp_path: Path) -> None:
    given = "--weight-decay 0.2\n  --clip-grad 0.5\t--seed\n3\n"
    assert command(tmp_path, MOCK_DATA=1, EXTRA_ARGS=given)[-6:] == given.split()


def test_quotes_are_characters(tmp_path: Path) -> None:
    """As README.md says: a value can't have spaces."""
    words = command(tmp_path, MOCK_DATA=1, EXTRA_ARGS="--wandb-project \"a b\" '\\'")
    assert words[-4:] == ["--wandb-project", '"a', 'b"', "'\\'"]


def test_data_on_several_lines(tmp_path: Path) -> None:
    blend = f"0.3 {tmp_path / 'a'}\n0.7 {tmp_path / 'b'}\n"
    for name in ("a.bin", "a.idx", "b.bin", "b.idx"):
        (tmp_path / name).write_text("text")
    there = {"DATA_PATH": blend, "TOKENIZER_TYPE": "NullTokenizer"}
    words = command(tmp_path, **there)
    assert words[words.index("--data-path") + 1 :][:5] == [*blend.split(), "--split"]
    (tmp_path / "b.idx").unlink()
    assert f"DATA_PATH: {tmp_path / 'b'}.idx does not exist" in launch("3b", DRY_RUN=1, **there).stderr


def test_larger_groups() -> None:
    """Megatron accepts them, and they fit."""
    done = launch("27b", DRY_RUN=1, MOCK_DATA=1, MICROBATCH_GROUP=5)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "accepts these arguments on 64 GPUs" in done.stdout
    given = flags(done.stdout, "torchrun.sh")
    assert given["--microbatch-group-size-per-virtual-pipeline-stage"] == "5"
    assert "--overlap-p2p-communication-warmup-flush" in given


@pytest.mark.parametrize(
    ("layout", "chunks"), [("Et*7|t*8|t*8|t*7L", 1), ("Ett|(tt|)*14L", 4), ("E|t*4|t*4|t*4|t*4|t*5|t*5|t*4,L", 2)]
)
def test_layout_says_how_many_chunks(layout: str, chunks: int) -> None:
    done = launch("27b", DRY_RUN=1, MOCK_DATA=1, PIPELINE_LAYOUT=layout)
    assert done.returncode in (0, 1), done.stdout + done.stderr  # whether it fits is not the question
    assert f"PP 4, VPP {chunks}, EP 8" in done.stdout
    assert "accepts these arguments on 64 GPUs" in done.stdout
    assert f"PP 4 x {chunks} chunks" in done.stdout, "the planner, which asks Megatron"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"MODE": "mch"}, "MODE must be one of: residual hc mhc; got 'mch'"),
        ({"RECOMPUTE": "some"}, "RECOMPUTE must be one of: none selective full; got 'some'"),
        ({"PP": "two"}, "PP must be a whole number >= 1, got 'two'"),
        ({"PP": "08"}, "PP must be a whole number >= 1, got '08'"),
        ({"LEARNING_RATE": "high"}, "LEARNING_RATE must be a positive number, got 'high'"),
        ({"LEARNING_RATE": "0.0e-4"}, "LEARNING_RATE must be a positive number, got '0.0e-4'"),
        ({"LEARNING_RATE": "1..2"}, "LEARNING_RATE must be a positive number, got '1..2'"),
        ({"MHC_INIT": "same"}, "MHC_INIT must be one of: preserve paper; got 'same'"),
        ({"MHC_BACKEND": "cuda"}, "MHC_BACKEND must be one of: auto triton reference; got 'cuda'"),
        ({"PIPELINE_COMM": "narrow"}, "PIPELINE_COMM must be one of: auto wide split wide-stock; got 'narrow'"),
        ({"PIPELINE_LAYOUT": "garbage"}, "PIPELINE_LAYOUT=garbage is no layout: E, t, m and L"),
        ({"PIPELINE_LAYOUT": "Et*15|t*15L"}, "PIPELINE_LAYOUT=Et*15|t*15L has 2 chunks, not a multiple of PP=4"),
        (
            {"PIPELINE_LAYOUT": "Ett|(tt|)*14L", "VPP": 2},
            "has 4 chunks for each of PP=4 stages, but VPP=2; leave VPP out",
        ),
        ({"VPP": 1, "MICROBATCH_GROUP": 8}, "MICROBATCH_GROUP=8 is of an interleaved pipeline"),
        ({"EP": "5", "GPUS_PER_NODE": 10}, "72 experts are not divisible by EP=5; choose a divisor of 72"),
        ({"EP": "64"}, "lower EP=64 or PP=4"),
        ({"TP": "3"}, "64 are not a multiple of TP x CP x PP = 3 x 1 x 4"),
        ({"VPP": "3"}, "NUM_LAYERS=30 can't be split into PP x VPP = 4 x 3 equal chunks, nor can NUM_LAYERS + 2"),
        ({"PP": "1"}, "VPP=4 needs a pipeline: set PP to 2 or more, or VPP=1"),
        ({"GLOBAL_BATCH": "100"}, "GLOBAL_BATCH=100 is not a multiple of MICRO_BATCH x data-parallel size = 2 x 16"),
        (
            {"GLOBAL_BATCH": "96"},
            "VPP=4 needs a number of microbatches that is a multiple of PP=4; GLOBAL_BATCH=96 makes 3",
        ),
        ({"MICROBATCH_GROUP": "3"}, "MICROBATCH_GROUP=3 must be from PP=4 to the 40 microbatches"),
        ({"MICROBATCH_GROUP": "6", "GLOBAL_BATCH": "256"}, "must not leave a last group of fewer than PP"),
        ({"MOCK_DATA": "0"}, "DATA_PATH is not set"),
        ({"MOCK_DATA": "0", "DATA_PATH": " \n"}, "DATA_PATH is not set"),
        ({**ONLY_TEXT, "DATA_PATH": "/no/text"}, "DATA_PATH: /no/text.bin does not exist"),
        ({**ONLY_TEXT, "DATA_PATH": "0.5 /no/a 0.5 /no/b"}, "DATA_PATH: /no/a.bin does not exist"),
        ({"MEGATRON": "/no/megatron", "NNODES": "1", "EP": "2"}, "no training script at /no/megatron/pretrain_gpt.py"),
        ({"PYTHON": "/bin/true_", "NNODES": "1", "EP": "2"}, "'/bin/true_' has no mhc_megatron"),
        ({"WARMUP_STEPS": "50000"}, "WARMUP_STEPS=50000 must be less than TRAIN_STEPS=50000"),
        ({"NODE_RANK": "8"}, "NODE_RANK=8 must be less than NNODES=8"),
        ({"DATA_PATH": ".", "MOCK_DATA": "2"}, "MOCK_DATA must be one of: 0 1; got '2'"),
        ({}, "MASTER_ADDR is not set: with NNODES=8"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input(settings: dict[str, str], message: str) -> None:
    """Named before anything is started: the variable, its value, the remedy."""
    done = launch("27b", **{"MOCK_DATA": "1", **settings})
    assert done.returncode == 2
    assert done.stderr.startswith("mhc-megatron: ")
    assert message in done.stderr
    assert not done.stdout


def test_missing_tokenizer(tmp_path: Path) -> None:
    for suffix in ("bin", "idx"):
        (tmp_path / f"text.{suffix}").write_text("text")
    there = {"MOCK_DATA": "0", "DATA_PATH": tmp_path / "text"}
    assert "TOKENIZER_MODEL is not set" in launch("27b", **there).stderr
    missing = launch("27b", **there, TOKENIZER_MODEL="/no/tokenizer")
    assert "TOKENIZER_MODEL: /no/tokenizer does not exist" in missing.stderr


def test_empty_data(tmp_path: Path) -> None:
    (tmp_path / "text.bin").touch()
    done = launch("27b", MOCK_DATA=0, DATA_PATH=tmp_path / "text", TOKENIZER_TYPE="NullTokenizer")
    assert done.returncode == 2
    assert f"DATA_PATH: {tmp_path / 'text'}.bin is empty; make the dataset again" in done.stderr


def test_dry_run_opens_the_data(tmp_path: Path) -> None:
    text = data.prepare(tmp_path).prefix
    there = {"DATA_PATH": text, "TOKENIZER_TYPE": "NullTokenizer"}
    size = text.with_name("text.bin").stat().st_size
    os.truncate(text.with_name("text.bin"), size - 1)
    done = launch("3b", DRY_RUN=1, **there)
    assert done.returncode == 1
    why = f"not a whole indexed dataset, make it again: the .bin file has {size - 1} bytes, its index asks for {size}"
    assert done.stderr == f"check: FAILED: --data-path {text}: {why}\n"


def test_unknown_size() -> None:
    assert "no model '4b': there is 27b 3b 9b in" in launch("4b").stderr
    assert "name a model" in launch().stderr


class TestSlurm:
    """slurm.sh under stand-ins for srun and scontrol, which record what they are told."""

    def submit(self, folder: Path, saved: int | str, status: int, **settings: object) -> tuple[int, str, str]:
        """Run it as batch job 77 whose training gets to iteration ``saved`` and ends with this status."""
        checkpoints = folder / "checkpoints"
        checkpoints.mkdir(exist_ok=True)
        (folder / "srun").write_text(
            f'#!/bin/sh\necho "$@" "MASTER=$MASTER_ADDR JOB=$JOB_ID GPUS=$GPUS_PER_NODE" > {folder}/srun.log\n'
            f"echo {saved} > {checkpoints}/latest_checkpointed_iteration.txt\nexit {status}\n"
        )
        (folder / "scontrol").write_text(
            f'#!/bin/sh\n[ "$1" = show ] && {{ echo node7; echo node8; exit; }}\necho "$@" >> {folder}/scontrol.log\n'
            '[ "$1" != "$REFUSED" ]\n'
        )
        for name in ("srun", "scontrol"):
            (folder / name).chmod(0o755)
        script = folder / "slurm_script"  # sbatch runs a copy
        script.write_text((EXAMPLES / "slurm.sh").read_text())
        env = environment(
            SLURM_JOB_ID=77,
            SLURM_SUBMIT_DIR=EXAMPLES.parent,
            SLURM_JOB_NUM_NODES=2,
            SLURM_GPUS_PER_NODE="h100:4",
            SRUN_ARGS="--export=ALL\n--label\n",
            SLURM_JOB_NODELIST="node[7-8]",
            CHECKPOINTS=checkpoints,
            TRAIN_STEPS=100,
            GLOBAL_BATCH=320,
            **{"MOCK_DATA": 1, **settings},
        )
        env["PATH"] = f"{folder}:{env['PATH']}"
        done = subprocess.run(["bash", str(script), "3b"], capture_output=True, text=True, env=env)
        log = folder / "scontrol.log"
        return done.returncode, done.stdout + done.stderr, log.read_text() if log.exists() else ""

    def test_failure_after_a_checkpoint_is_requeued(self, tmp_path: Path) -> None:
        status, output, told = self.submit(tmp_path, saved=40, status=1)
        assert status == 1
        assert "exit status 1 at iteration 40 of 100; requeued" in output
        assert told == "requeue 77\n"
        srun = (tmp_path / "srun.log").read_text()
        assert srun.startswith(
            "--nodes 2 --ntasks-per-node 1 --kill-on-bad-exit=1 --cpu-bind=none --export=ALL --label bash -c"
        )
        assert srun.endswith("3b MASTER=node7 JOB=77-0 GPUS=4\n")

    def test_failure_without_progress_is_not(self, tmp_path: Path) -> None:
        self.submit(tmp_path, saved=40, status=1)
        status, _, told = self.submit(tmp_path, saved=40, status=1)
        assert status == 1
        assert told == "requeue 77\n", "requeued a second time"

    def test_end_of_the_time_slice(self, tmp_path: Path) -> None:
        """EXIT_AFTER_MINUTES ends a run in good order: it goes on later."""
        status, _, told = self.submit(tmp_path, saved=60, status=0)
        assert (status, told) == (0, "requeue 77\n")

    def test_slurm_refuses_to_requeue(self, tmp_path: Path) -> None:
        """After sbatch --no-requeue."""
        status, output, _ = self.submit(tmp_path, saved=60, status=0, REFUSED="requeue")
        assert status == 0
        assert "Slurm does not requeue it (sbatch --no-requeue?): submit it again" in output

    def test_the_end(self, tmp_path: Path) -> None:
        assert self.submit(tmp_path, saved=100, status=0)[::2] == (0, "")

    def test_switched_off(self, tmp_path: Path) -> None:
        """Slurm's own requeueing as well."""
        assert self.submit(tmp_path, saved=40, status=1, REQUEUE=0)[::2] == (1, "update JobId=77 Requeue=0\n")

    def test_a_checkpoint_that_is_no_iteration(self, tmp_path: Path) -> None:
        """Megatron's "release", of a converted model: training goes on from 0."""
        assert self.submit(tmp_path, saved="release", status=1)[::2] == (1, "")
        status, output, told = self.submit(tmp_path, saved=40, status=1)
        assert (status, told) == (1, "requeue 77\n"), output

    def test_data_is_looked_for_on_the_nodes(self, tmp_path: Path) -> None:
        """This host may be outside of their container."""
        there = {"MOCK_DATA": 0, "DATA_PATH": "/only/there/text", "TOKENIZER_MODEL": "/only/there/tokenizer"}
        status, output, _ = self.submit(tmp_path, saved=100, status=0, **there)
        assert status == 0, output
        assert (tmp_path / "srun.log").exists()
        assert "/only/there/text.bin does not exist" in launch("3b", **there).stderr


def test_custom_model() -> None:
    """The documented command; its loss falls below the text's byte frequencies (about 3.2 nats)."""
    script = EXAMPLES / "custom_model.py"
    assert len(script.read_text().splitlines()) < 80
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", done.stdout)]
    assert losses[0] > 5
    assert losses[-1] < 3.2


@pytest.mark.usefixtures("one_process")
def test_custom_model_decays_no_mhc_parameter() -> None:
    groups = runpy.run_path(str(EXAMPLES / "custom_model.py"))["parameter_groups"]
    model = models.build(models.make_config(), MHCConfig(profile="deepseek-v4"))
    own, others = groups(model)
    assert {id(p) for p in own["params"]} == {id(p) for p in model.parameters() if hasattr(p, MHC_PARAMETER)}
    assert own["weight_decay"] == 0
    assert len(own["params"]) + len(others["params"]) == len(list(model.parameters()))
