"""The 27B launcher, unedited, on two GPUs and on one: fewer layers, real text, on two GPUs an interleaved pipeline; a rank is
killed and restarted. With MHC_SHARE_GPU=1 two "nodes", a launcher each, share one GPU.

At NUM_LAYERS=4 the model has 3.5B parameters and a checkpoint of about 49 GB; the run writes two of them (pytest's --basetemp
says where). NUM_LAYERS=2 halves it: on two GPUs the first chunk then is the embedding alone, the last one the loss.
"""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest
import torch

from mhc_megatron.quickstart import data
from tests.examples import Run
from tests.ranks import has_gpus, shared_gpu_environment

pytestmark = pytest.mark.gpu
LAYOUTS = {1: {"PP": 1, "VPP": 1}, 2: {"PP": 2, "VPP": 2}}
SAVED, STEPS = 6, 11
# Losses of the same steps before the kill and after the restart: atomics reorder sums in bf16.
SAME_LOSS = 2e-3


@pytest.mark.parametrize("gpus", LAYOUTS)
def test_27b(gpus: int, tmp_path: Path) -> None:
    if not has_gpus(gpus):
        pytest.skip(f"needs {gpus} GPUs (or MHC_SHARE_GPU=1)")
    data.prepare(tmp_path)
    settings = {
        **{"NNODES": 1, "GPUS_PER_NODE": gpus, "EP": 1, "NUM_LAYERS": os.environ.get("NUM_LAYERS", str(2 * gpus))},
        **LAYOUTS[gpus],
        **{"GLOBAL_BATCH": 8, "TRAIN_STEPS": STEPS, "SAVE_INTERVAL": SAVED, "LOG_INTERVAL": 1, "EVAL_ITERS": 0},
        **{"DATA_PATH": tmp_path / "text", "TOKENIZER_TYPE": "NullTokenizer", "SPLIT": "90,10,0"},
        **{"CHECKPOINTS": tmp_path / "checkpoints", "MAX_RESTARTS": 1},
    }
    other_node = ""
    if gpus > torch.cuda.device_count():
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        settings |= {"NNODES": 2, "GPUS_PER_NODE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        settings |= shared_gpu_environment(0)
        own = " ".join(f"{name}={value}" for name, value in shared_gpu_environment(1).items())
        other_node = f'{own} NODE_RANK=1 bash "$0" "$1" &'
    run = Run("27b", other_node, **settings).until(SAVED + 4)
    run.rank(gpus - 1).send_signal(signal.SIGKILL)
    run.until()
    print(f"the launcher ended with {run.process.returncode}", flush=True)
    left_behind = run.left_behind()
    print("\n".join(f"iteration {iteration:3}  loss {loss:.6f}" for iteration, loss in run.losses))
    assert run.process.returncode == 0, run.output[-4000:]
    assert left_behind == []
    starts = [n for n, (iteration, _) in enumerate(run.losses) if iteration == SAVED + 1]
    assert len(starts) == 2, "not restarted from the checkpoint"
    before, after = dict(run.losses[: starts[1]]), dict(run.losses[starts[1] :])
    assert list(after) == list(range(SAVED + 1, STEPS + 1))
    assert after[STEPS] < before[1] - 2
    # Megatron logs the second iteration after a start as the average of the first two.
    for iteration in before.keys() & after.keys() - {SAVED + 2}:
        assert after[iteration] == pytest.approx(before[iteration], abs=SAME_LOSS), f"iteration {iteration}"
