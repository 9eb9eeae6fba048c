"""patches/ on a GPU: a training script on a patched copy of Megatron, without the launcher, against the launcher."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from mhc_megatron.monitor import records
from mhc_megatron.quickstart import data
from mhc_megatron.quickstart.jobs import megatron_arguments
from tests.distributed.test_patches import PATCHES, SITE, git_apply
from tests.gpu.test_two_gpus import train
from tests.ranks import has_gpus

pytestmark = pytest.mark.gpu

ITERATIONS, SAVED = 6, 2
LAYOUTS = {
    1: [],
    2: ["--pipeline-model-parallel-size=2", "--num-layers-per-virtual-pipeline-stage=1"],
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("patched")
    shutil.copytree(SITE / "megatron", tree / "megatron")
    if shutil.which("git"):
        git_apply(tree, *PATCHES)
    elif shutil.which("patch"):  # right for the release's own files: patches/README.md
        for patch in PATCHES:
            subprocess.run(["patch", "-p1", "-i", patch], cwd=tree, check=True)
    else:
        pytest.skip("needs git or patch")
    return tree


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    text = data.prepare(tmp_path_factory.mktemp("text"))
    return [
        *megatron_arguments(text, ITERATIONS, gpu=True),
        "--global-batch-size=32",
        "--lr-warmup-iters=0",
        "--eval-iters=0",
    ]


def without_launcher(tree: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], gpus: int) -> dict[int, float]:
    with monkeypatch.context() as patched:
        patched.setenv("PYTHONPATH", os.pathsep.join([str(tree), os.environ.get("PYTHONPATH", "")]))
        return train(arguments, gpus, launcher=False)


@pytest.mark.parametrize("gpus", LAYOUTS)
def test_trains_as_under_the_launcher(
    gpus: int, tree: Path, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Continued without the launcher from a checkpoint of the launcher's: its losses, as nearly as it has them itself."""
    if torch.cuda.is_available() and not has_gpus(gpus):
        pytest.skip(f"needs {gpus} CUDA GPUs (or MHC_SHARE_GPU=1)")
    job = [*arguments, *LAYOUTS[gpus], "--enable-mhc", "--mhc-init=paper", "--mhc-monitor-interval=4"]
    saving, theirs, ours = [f"--save-interval={SAVED}"], tmp_path / "launcher", tmp_path / "patched"
    whole = train([*job, f"--save={theirs}", *saving], gpus)
    again = train([*job, f"--mhc-monitor-dir={tmp_path / 'again'}"], gpus)
    (theirs / "latest_checkpointed_iteration.txt").write_text(str(SAVED))
    losses = without_launcher(
        tree, monkeypatch, [*job, f"--load={theirs}", f"--save={ours}", "--save-interval=6"], gpus
    )
    print(f"launcher {whole}\nagain    {again}\npatched  {losses}")
    assert list(losses) == list(range(SAVED + 1, ITERATIONS + 1))
    del losses[SAVED + 2]  # logged as the average of the first two after a start
    # 0 where the kernels are deterministic: then every printed digit has to be the same.
    noise = max(abs(whole[i] - again[i]) for i in whole)
    for iteration, loss in losses.items():
        assert abs(loss - whole[iteration]) <= 3 * noise, f"iteration {iteration}"
    assert (ours / "latest_checkpointed_iteration.txt").read_text() == str(ITERATIONS)
    assert [[r["iteration"] for r in records.read(run).monitored] for run in (theirs, ours)] == [[1, 4], [4]]


def test_stock_without_the_flag(tree: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [train(arguments, 1) for _ in range(2)]
    losses = without_launcher(tree, monkeypatch, arguments, 1)
    noise = max(abs(a - b) for a, b in zip(*(run.values() for run in runs), strict=True))
    print(f"launcher {runs}\npatched {losses}")
    assert losses.keys() == runs[0].keys()
    for iteration, loss in losses.items():
        assert abs(loss - runs[0][iteration]) <= 3 * noise, f"iteration {iteration}"
