"""The 27B launcher, unedited, on two CPU processes with an interleaved pipeline and real text: killed, restarted, disk full."""

from __future__ import annotations

import shutil
import signal
import socket
from pathlib import Path

import pytest

from mhc_megatron.quickstart import data
from tests.examples import SMALL, Run, launch

STEPS, SAVED = 6, 3
SETTINGS = {
    **{"CPU": 1, "NNODES": 1, "GPUS_PER_NODE": 2, "PP": 2, "VPP": 2, "EP": 1, "NUM_LAYERS": 4},
    **{"SEQ_LEN": 32, "VOCAB_SIZE": 264, "MICRO_BATCH": 2, "GLOBAL_BATCH": 8, "LEARNING_RATE": "1e-2"},
    **{"TRAIN_STEPS": STEPS, "SAVE_INTERVAL": SAVED, "LOG_INTERVAL": 1, "EVAL_ITERS": 0, "WARMUP_STEPS": 0},
    **{"TOKENIZER_TYPE": "NullTokenizer", "SPLIT": "90,10,0", "EXTRA_ARGS": SMALL},
}


def settings_of(folder: Path) -> dict[str, object]:
    return {**SETTINGS, "DATA_PATH": folder / "text", "DATA_CACHE": folder / "cache", "CHECKPOINTS": folder / "run"}


def start(folder: Path, before: str = "", **settings: object) -> Run:
    return Run("27b", before, **{**settings_of(folder), **settings})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    data.prepare(folder)
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[int, float]:
    """Losses of an uninterrupted run; its checkpoint of iteration SAVED stays in folder/run."""
    run = start(folder).until()
    assert run.process.returncode == 0, run.output[-4000:]
    losses = dict(run.losses)
    assert losses[STEPS] < losses[1] - 0.5
    shutil.rmtree(folder / "run" / f"iter_{STEPS:07}")
    (folder / "run" / "latest_checkpointed_iteration.txt").write_text(str(SAVED))
    return losses


@pytest.fixture(scope="module")
def full_disk(folder: Path, whole: dict[int, float]) -> Run:
    """That run, continued where there is no room for its next checkpoint: files can't grow beyond 200 KiB."""
    return start(folder, "ulimit -f 200;").until()


def test_full_disk(folder: Path, full_disk: Run) -> None:
    """The job ends, says what it could not save and what is left, and still names the checkpoint before."""
    assert full_disk.process.returncode != 0
    assert "File too large" in full_disk.output
    assert f"the checkpoint of iteration {STEPS} could not be saved to {folder / 'run'} (" in full_disk.output
    assert f"That of iteration {SAVED} is whole and the one that is loaded: make room" in full_disk.output
    assert (folder / "run" / "latest_checkpointed_iteration.txt").read_text() == str(SAVED)


def killed(folder: Path, restarts: int, after: int, save_interval: int = SAVED) -> tuple[Run, str]:
    """A run from iteration SAVED on two "nodes" with a launcher each, a rank of the second killed after an iteration, to its end;
    and the second launcher's exit status. Nothing outlives it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    two_nodes = {
        "NNODES": 2,
        "GPUS_PER_NODE": 1,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": port,
        "MAX_RESTARTS": restarts,
        "SAVE_INTERVAL": save_interval,
    }
    status = folder / f"status-{restarts}"
    second = f'(NODE_RANK=1 bash "$0" "$1"; echo $? > {status}) &'
    run = start(folder, second, **two_nodes).until(after)
    run.rank(1).send_signal(signal.SIGKILL)
    run.until()
    assert run.left_behind() == []
    run.until()
    return run, status.read_text().strip()


@pytest.fixture(scope="module")
def not_restarted(folder: Path, full_disk: Run) -> tuple[Run, str]:
    return killed(folder, restarts=0, after=SAVED + 1)


def test_killed_rank_without_restarts(folder: Path, not_restarted: tuple[Run, str]) -> None:
    """Both launchers end, as failures, and leave the checkpoint: the next test goes on from it."""
    run, second = not_restarted
    assert run.process.returncode != 0
    assert second not in ("", "0")
    assert [iteration for iteration, _ in run.losses][:1] == [SAVED + 1]
    assert run.losses[-1][0] < STEPS
    assert (folder / "run" / "latest_checkpointed_iteration.txt").read_text() == str(SAVED)


def test_killed_rank_is_restarted(
    folder: Path, whole: dict[int, float], full_disk: Run, not_restarted: tuple[Run, str]
) -> None:
    """SIGKILL of a rank that has saved: both launchers start again, and the loss curve is the uninterrupted one.

    They begin where a full disk and a killed rank ended runs; what those left behind is no hindrance. (After its first save a
    rank has processes of its own, which outlive it when it is killed: the launcher ends them.)
    """
    again = SAVED + 1
    run, second = killed(folder, restarts=1, after=again + 1, save_interval=SAVED - 1)
    assert second == "0"
    assert "SIGTERM to what the job has left behind" in run.output
    assert run.process.returncode == 0, run.output[-4000:]
    starts = [n for n, (iteration, _) in enumerate(run.losses) if iteration == again + 1]
    assert len(starts) == 2, "not restarted from the checkpoint"
    for losses in (run.losses[: starts[1]], run.losses[starts[1] :], full_disk.losses):
        for n, (iteration, loss) in enumerate(losses):
            # Megatron logs the second iteration after a start as the average of the first two.
            expected = whole[iteration] if n != 1 else (whole[iteration - 1] + whole[iteration]) / 2
            assert loss == pytest.approx(expected, rel=1e-6)
    assert run.losses[-1][0] == STEPS
    assert (folder / "run" / "latest_checkpointed_iteration.txt").read_text() == str(STEPS)
    # Once more, by a caller that reads all output before it asks for the process: a finished run ends well.
    finished = launch("27b", **settings_of(folder))
    assert finished.returncode == 0, finished.stderr[-4000:]
