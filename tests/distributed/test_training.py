"""Whole training jobs through the launcher: an unmodified script, Megatron's pretrain, checkpoints, real text."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint import FileSystemReader

from mhc_megatron.cpu import MEGATRON_ARGUMENTS
from mhc_megatron.dry_run import parse
from mhc_megatron.plan.block_length import choose_block_length
from mhc_megatron.plan.run import Run
from mhc_megatron.quickstart import data
from mhc_megatron.quickstart.jobs import TRAIN_SCRIPT, Job

MODEL = """
--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32
--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear
--untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0
--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 32 --moe-layer-freq [0]+[1]*3 --moe-aux-loss-coeff 0
--moe-token-dispatcher-type alltoall --micro-batch-size 2 --global-batch-size 8 --lr 1e-2 --lr-decay-style constant
--clip-grad 1.0 --log-interval 1 --eval-interval 1000 --eval-iters 2 --num-workers 0 --ckpt-format torch_dist
--tokenizer-type NullTokenizer --vocab-size 264 --make-vocab-size-divisible-by 1 --split 90,10,0
--use-distributed-optimizer
""".split()
RESHARDABLE = ["--dist-ckpt-optim-fully-reshardable"]
ITERATIONS = 8

PP2_VPP2 = "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1".split()
EP2 = "--expert-model-parallel-size 2".split()
TP2_SP = "--tensor-model-parallel-size 2 --sequence-parallel".split()

# Losses of the same float32 run under another layout, over ITERATIONS steps: rounding grows as the runs go on.
ACROSS_LAYOUTS = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    data.prepare(folder)
    return folder


def arguments(folder: Path) -> list[str]:
    text = [f"--data-path={folder / 'text'}", f"--data-cache-path={folder / 'cache'}"]
    return [*MODEL, *MEGATRON_ARGUMENTS, *text, f"--train-iters={ITERATIONS}"]


def command(folder: Path, *further: str, processes: int = 1, script: Path = TRAIN_SCRIPT) -> list[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}"]
    run += ["-m", "mhc_megatron", "pretrain", "--cpu", str(script)]
    return [*run, *arguments(folder), *further]


def train(folder: Path, *further: str, **options: Any) -> dict[int, float]:
    """Run a job to its end; its training losses by iteration, ``-1`` for the validation loss at the end."""
    done = subprocess.run(command(folder, *further, **options), capture_output=True, text=True, timeout=300)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-4000:]
    losses = {int(i): float(x) for i, x in re.findall(r"iteration\s+(\d+)/\s*\d+ \|.*\| lm loss: (\S+)", output)}
    validation = re.findall(r"validation loss at iteration \d+ on validation set \| lm loss value: (\S+)", output)
    if losses and min(losses) > 1:
        # Megatron logs the second iteration after a start as the average of the first two.
        first = min(losses)
        losses[first + 1] = 2 * losses[first + 1] - losses[first]
    else:
        losses[2] = 2 * losses[2] - losses[1]
    if validation:
        losses[-1] = float(validation[-1])
    return losses


def fail(folder: Path, *further: str, **options: Any) -> str:
    """Run a job that must fail before it trains; its output."""
    done = subprocess.run(command(folder, *further, **options), capture_output=True, text=True, timeout=300)
    output = done.stdout + done.stderr
    assert done.returncode != 0
    assert "iteration        1/" not in output
    return output


def close(ours: dict[int, float], expected: dict[int, float], tolerance: float) -> None:
    assert ours.keys() <= expected.keys()
    assert ours
    for iteration, loss in ours.items():
        assert loss == pytest.approx(expected[iteration], rel=tolerance), f"iteration {iteration}"


@pytest.fixture(scope="module")
def mhc(folder: Path) -> dict[int, float]:
    """An uninterrupted mHC run in one process, with checkpoints of iteration 4 and 8."""
    losses = train(folder, "--enable-mhc", *RESHARDABLE, f"--save={folder / 'mhc'}", "--save-interval=4")
    # The runs below start from the one of iteration 4.
    (folder / "mhc" / "latest_checkpointed_iteration.txt").write_text("4")
    assert losses[ITERATIONS] < losses[1] - 1
    return losses


@pytest.fixture(scope="module")
def stock(folder: Path) -> dict[int, float]:
    """The same run without mHC, its checkpoint of iteration 4 in folder/stock."""
    losses = train(folder, *RESHARDABLE, f"--save={folder / 'stock'}", "--save-interval=4")
    (folder / "stock" / "latest_checkpointed_iteration.txt").write_text("4")
    return losses


def test_mhc_trains_differently_from_the_same_start(mhc: dict[int, float], stock: dict[int, float]) -> None:
    assert mhc[1] == pytest.approx(stock[1], rel=1e-5)
    assert abs(mhc[ITERATIONS] - stock[ITERATIONS]) > 1e-4


@pytest.mark.parametrize("bf16", [[], ["--bf16"]], ids=["float32", "bf16"])
def test_killed_and_resumed(folder: Path, bf16: list[str]) -> None:
    """SIGKILL after a checkpoint; the resumed run has the uninterrupted one's losses, to every printed digit."""
    name = "killed" + "".join(bf16)
    job = ["--enable-mhc", *bf16, f"--save={folder / name}", f"--load={folder / name}", "--save-interval=4"]
    killed = Job(folder / f"{name}.log", TRAIN_SCRIPT, [*arguments(folder), *job], gpu=False)
    assert max(killed.run(lambda iteration, loss: iteration < 6).training) == 6
    resumed = train(folder, *job)
    assert min(i for i in resumed if i > 0) == 5
    close(resumed, train(folder, "--enable-mhc", *bf16), 1e-6)


@pytest.mark.parametrize("layout", [PP2_VPP2, TP2_SP], ids=["pp2-vpp2", "tp2-sp"])
def test_resume_under_another_layout(folder: Path, mhc: dict[int, float], layout: list[str]) -> None:
    """Parameters and optimizer state of a one-process run, continued under another layout, and back."""
    there = folder / "-".join(["there", *layout[::2]])
    moved = [*layout, *RESHARDABLE, "--enable-mhc", "--load", str(folder / "mhc"), "--no-load-rng"]
    ours = train(folder, *moved, f"--save={there}", "--save-interval=6", processes=2)
    close(ours, mhc, ACROSS_LAYOUTS)
    (there / "latest_checkpointed_iteration.txt").write_text("6")
    back = train(folder, *RESHARDABLE, "--enable-mhc", f"--load={there}", "--no-load-rng")
    close(back, mhc, ACROSS_LAYOUTS)


def test_load_under_expert_parallelism(folder: Path, mhc: dict[int, float]) -> None:
    """Parameters move between expert-parallel sizes; Megatron 0.19's optimizer state does not, with or without mHC

    (it keeps one optimizer for EP 1, two for EP > 1).
    """
    load = ["--enable-mhc", f"--load={folder / 'mhc'}", "--no-load-optim", "--no-load-rng"]
    ours = train(folder, *EP2, *load, processes=2)
    assert ours[5] == pytest.approx(mhc[5], rel=1e-5)


def test_residual_checkpoint_continued_with_mhc(folder: Path, stock: dict[int, float]) -> None:
    """With the preserving initialisation an mHC model starts as the same function: the same loss to 1e-5."""
    start = ["--finetune", f"--load={folder / 'stock'}"]
    plain, ours = train(folder, *start), train(folder, *start, "--enable-mhc")
    assert ours[1] == pytest.approx(plain[1], rel=1e-5)
    assert plain[1] < stock[1] - 0.5, "the checkpoint was not loaded"
    pretrained = train(
        folder, "--enable-mhc", f"--load={folder / 'none'}", f"--pretrained-checkpoint={folder / 'stock'}"
    )
    assert pretrained[1] == pytest.approx(plain[1], rel=1e-5)


def test_residual_checkpoint_is_not_resumed_by_accident(folder: Path, stock: dict[int, float]) -> None:
    output = fail(folder, "--enable-mhc", f"--load={folder / 'stock'}")
    assert "to continue it with --enable-mhc add --finetune" in output


def test_checkpoint_with_other_settings(folder: Path, mhc: dict[int, float]) -> None:
    load = f"--load={folder / 'mhc'}"
    assert "was made with --mhc-num-streams 4, this run has 2" in fail(
        folder, "--enable-mhc", "--mhc-num-streams=2", load
    )
    assert "is an mHC model; add --enable-mhc" in fail(folder, load)


def test_use_checkpoint_args(folder: Path, mhc: dict[int, float]) -> None:
    close(train(folder, "--use-checkpoint-args", f"--load={folder / 'mhc'}", *RESHARDABLE), mhc, 1e-6)


def test_multi_token_prediction(folder: Path) -> None:
    """Starts at stock Megatron's losses, the MTP layers' too; goes on from a checkpoint under PP2 x VPP2; the monitor sees the
    decoder's layers alone."""
    mtp = ["--mtp-num-layers=2", "--mtp-loss-scaling-factor=0.5"]
    own = folder / "mtp"
    without = train_mtp(folder, *mtp, f"--save={folder / 'mtp-stock'}", "--save-interval=8")
    ours = train_mtp(folder, "--enable-mhc", *mtp, *RESHARDABLE, f"--save={own}", "--save-interval=4")
    assert ours[1] == pytest.approx(without[1], rel=1e-5)
    assert ours[ITERATIONS] != pytest.approx(without[ITERATIONS], rel=2e-5)
    for first, last in zip(ours[1], ours[ITERATIONS], strict=True):
        assert last < first - 1
    saved = FileSystemReader(own / f"iter_{ITERATIONS:07}").read_metadata().state_dict_metadata
    mappings = {key for key in saved if "hyper_connection" in key and "optimizer" not in key}
    assert sum("mtp.layers.1." in key for key in mappings) == 6, "two mHC inputs with three parameters each"
    first_record = json.loads((own / "mhc-monitor.jsonl").read_text().splitlines()[1])
    assert first_record["sublayers"] == [[layer, name] for layer in range(1, 5) for name in ("attention", "mlp")]
    (own / "latest_checkpointed_iteration.txt").write_text("4")
    again = train_mtp(folder, "--enable-mhc", *mtp, *PP2_VPP2, *RESHARDABLE, f"--load={own}", processes=2)
    assert min(again) == 5
    for iteration, losses in again.items():
        if iteration != 6:  # the average of two
            assert losses == pytest.approx(ours[iteration], rel=ACROSS_LAYOUTS)
    start = [*mtp, "--finetune", f"--load={folder / 'mtp-stock'}", "--train-iters=1"]
    plain, continued = train_mtp(folder, *start), train_mtp(folder, *start, "--enable-mhc")
    assert continued[1] == pytest.approx(plain[1], rel=1e-5)
    assert plain[1][2] < without[1][2] - 0.5, "the checkpoint was not loaded"


def train_mtp(folder: Path, *further: str, **options: Any) -> dict[int, list[float]]:
    """Run a job to its end: its loss and the losses of two MTP layers, by iteration."""
    done = subprocess.run(command(folder, *further, **options), capture_output=True, text=True, timeout=300)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-4000:]
    line = re.compile(r"iteration\s+(\d+)/\s*\d+ \|.*\| lm loss: (\S+).*\| mtp_1 loss: (\S+).*\| mtp_2 loss: (\S+)")
    return {int(found[0]): list(map(float, found[1:])) for found in line.findall(output)}


def test_one_line_in_the_script(folder: Path, mhc: dict[int, float]) -> None:
    """`import mhc_megatron; mhc_megatron.enable()` instead of the launcher."""
    script = folder / "my_pretrain.py"
    stock_script = TRAIN_SCRIPT.read_text().replace("from __future__ import annotations", "")
    script.write_text(
        "from mhc_megatron import cpu; cpu.install()\nimport mhc_megatron; mhc_megatron.enable()\n" + stock_script
    )
    run = command(folder, "--enable-mhc")
    module = run.index("-m", 3)
    run[module : run.index(str(TRAIN_SCRIPT)) + 1] = [str(script)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    losses = [float(x) for x in re.findall(r"\| lm loss: (\S+)", done.stdout)]
    assert losses[-1] == pytest.approx(mhc[ITERATIONS], rel=1e-6)


def test_refusal_reaches_the_user(folder: Path) -> None:
    output = fail(folder, "--enable-mhc", "--fp32-residual-connection", "--bf16")
    assert "ValueError: mHC can't be used with --fp32-residual-connection" in output


def test_missing_script(tmp_path: Path) -> None:
    run = [sys.executable, "-m", "mhc_megatron", "pretrain", str(tmp_path / "none.py"), "--enable-mhc"]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no training script at" in done.stderr


def test_overlapped_parameter_gather(folder: Path) -> None:
    """Megatron gathers parameters while the forward runs and waits in hooks on the modules that own them."""
    bf16 = [
        "--enable-mhc",
        "--mhc-init=paper",
        "--bf16",
    ]  # float32 mHC parameters then have a buffer, and a gather, of their own
    plain = train(folder, *bf16, processes=2)
    overlapped = train(folder, *bf16, "--overlap-grad-reduce", "--overlap-param-gather", processes=2)
    close(overlapped, plain, 1e-6)


def test_recompute_takes_the_planners_block_length(folder: Path, hooks: None) -> None:
    """On each pipeline stage; rank 0 tells of both.

    The arguments say Transformer Engine, which the planner counts; the script builds local modules, which run here.
    """
    script, text = folder / "local_modules.py", TRAIN_SCRIPT.read_text()
    for old, new in {
        'get_args().transformer_impl == "transformer_engine"': "False",
        "gpt_config_from_args(args))": "local(gpt_config_from_args(args)))",
        'if __name__ == "__main__":': """
from mhc_megatron.residual import input as residual_input

block = residual_input.recompute

def told(length):
    print(f"stage {parallel_state.get_pipeline_model_parallel_rank()}: block of {length}", flush=True)
    return block(length)

def local(config):
    config.transformer.transformer_impl = "local"
    return config

if __name__ == "__main__":
    residual_input.recompute = told""",
    }.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    script.write_text(text)
    further = """
    --pipeline-model-parallel-size 2 --seq-length 8 --micro-batch-size 1 --global-batch-size 2 --train-iters 1 --eval-iters 0
    --vocab-size 4096 --transformer-impl transformer_engine
    --enable-mhc --mhc-recompute --mhc-backend triton --mhc-sinkhorn-iterations 2 --mhc-monitor-interval 0
    """.split()
    run = Run.from_arguments(*parse([*arguments(folder), *further], 2))
    expected = [choose_block_length(run, stage) for stage in range(2)]
    assert any(stage.length != stage.formula for stage in expected), "the formula would pass as well"

    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    job = command(folder, *further, processes=2, script=script)
    done = subprocess.run(job, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    taken = re.findall(r"stage (\d): block of (\d+)", done.stdout)
    assert set(taken) == {(str(number), str(stage.length)) for number, stage in enumerate(expected)}
    lengths = " | ".join(dict.fromkeys(str(stage.length) for stage in expected))
    said = re.findall("mHC: recompute: (.*)", done.stdout + done.stderr)
    assert len(said) == 1
    assert said[0].startswith(f"blocks of {lengths} sublayers in pipeline stages 0 to 1, by the planner's count ")
