"""Training on two GPUs (or four) through the launcher, with NCCL and Transformer Engine, under every layout two GPUs allow.

With MHC_SHARE_GPU=1 and fewer GPUs: a "node" a process, and they share one.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from mhc_megatron.quickstart import data
from mhc_megatron.quickstart.jobs import megatron_arguments
from tests.gpu.launched import train
from tests.ranks import has_gpus

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not has_gpus(2), reason="needs two CUDA GPUs (or MHC_SHARE_GPU=1)"),
]

ITERATIONS = 6
LAYOUTS = {
    "tp2-sp": "--tensor-model-parallel-size 2 --sequence-parallel",
    "tp2-sp-mhc-recompute": "--tensor-model-parallel-size 2 --sequence-parallel --mhc-recompute",
    "ep2": "--expert-model-parallel-size 2",
    "pp2": "--pipeline-model-parallel-size 2",
    "pp2-vpp2": "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
    "pp2-split": "--pipeline-model-parallel-size 2 --mhc-pipeline-comm split",
    "pp2-vpp2-split": "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 --mhc-pipeline-comm split",
    "pp2-vpp2-split-mhc-recompute": "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 "
    "--mhc-pipeline-comm split --mhc-recompute",
    "pp2-vpp2-mhc-recompute": "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 --mhc-recompute",
    "cp2": "--context-parallel-size 2",
    "pp2-vpp2-recompute": "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 "
    "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
}
ON_FOUR = {
    "pp2-tp2-sp-split": LAYOUTS["pp2-split"] + " " + LAYOUTS["tp2-sp"],
    "pp2-vpp2-ep2-split": LAYOUTS["pp2-vpp2-split"] + " " + LAYOUTS["ep2"],
}


def prepared(folder: Path, further: list[str]) -> list[str]:
    """Arguments of runs from one start: Megatron's own initialisation depends on the layout."""
    shared = [*megatron_arguments(data.prepare(folder), ITERATIONS, gpu=True), "--enable-mhc", *further]
    start = folder / "start"
    # 264 tokens: no padding under TP.
    shared += ["--vocab-size=264", "--make-vocab-size-divisible-by=1", "--global-batch-size=32", "--lr-warmup-iters=0"]
    shared += ["--distributed-timeout-minutes=2"]
    train([*shared, f"--save={start}", "--save-interval=1", "--train-iters=1"], 1)
    return [*shared, f"--load={start}", "--finetune"]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return prepared(tmp_path_factory.mktemp("two-gpus"), ["--moe-grouped-gemm"])


@pytest.fixture(scope="module")
def one_gpu(arguments: list[str]) -> dict[int, float]:
    return train(arguments, 1)


@pytest.fixture(scope="module")
def local_arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return prepared(tmp_path_factory.mktemp("two-gpus-local"), ["--transformer-impl=local"])


@pytest.fixture(scope="module")
def local_one_gpu(local_arguments: list[str]) -> dict[int, float]:
    return train(local_arguments, 1)


@pytest.fixture(scope="module")
def dense_arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return prepared(tmp_path_factory.mktemp("two-gpus-dense"), ["--transformer-impl=local", "--moe-layer-freq=[0]*4"])


@pytest.fixture(scope="module")
def mla_arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    sizes = "--q-lora-rank 32 --kv-lora-rank 32 --qk-head-dim 16 --qk-pos-emb-head-dim 16 --v-head-dim 16"
    further = ["--moe-grouped-gemm", "--multi-latent-attention", *sizes.split(), "--rope-type=rope"]
    return prepared(tmp_path_factory.mktemp("two-gpus-mla"), further)


@pytest.fixture(scope="module")
def mla_one_gpu(mla_arguments: list[str]) -> dict[int, float]:
    return train(mla_arguments, 1)


@pytest.mark.parametrize("layout", [*LAYOUTS, *ON_FOUR])
def test_layout_equals_one_gpu(layout: str, arguments: list[str], one_gpu: dict[int, float]) -> None:
    """bf16: the first loss differs by rounding, later ones by what training makes of it."""
    processes = 4 if layout in ON_FOUR else 2
    if not has_gpus(processes):
        pytest.skip(f"needs {processes} CUDA GPUs (or MHC_SHARE_GPU=1)")
    compare(layout, train([*arguments, *{**LAYOUTS, **ON_FOUR}[layout].split()], processes), one_gpu)


@pytest.mark.parametrize("layout", ["tp2-sp-mhc-recompute", "ep2", "pp2-vpp2-split-mhc-recompute"])
def test_latent_attention(layout: str, mla_arguments: list[str], mla_one_gpu: dict[int, float]) -> None:
    """The attention of the paper's models."""
    compare(layout, train([*mla_arguments, *LAYOUTS[layout].split()], 2), mla_one_gpu)


@pytest.mark.parametrize("layout", ["ep2", "pp2-vpp2", "pp2-vpp2-split", "pp2-vpp2-mhc-recompute"])
def test_local_modules(layout: str, local_arguments: list[str], local_one_gpu: dict[int, float]) -> None:
    """The same without Transformer Engine. Not TP + SP: Megatron's own RMSNorm refuses it on a GPU."""
    compare(layout, train([*local_arguments, *LAYOUTS[layout].split()], 2), local_one_gpu)


def test_dense_local_modules_under_tp(dense_arguments: list[str]) -> None:
    """Without SP, which a MoE needs beside TP."""
    losses = train([*dense_arguments, "--tensor-model-parallel-size=2"], 2)
    compare("tp2", losses, train(dense_arguments, 1))


def compare(layout: str, losses: dict[int, float], one_gpu: dict[int, float]) -> None:
    print(f"{layout}: {losses} against {one_gpu}")
    assert losses.keys() == one_gpu.keys() == set(range(1, ITERATIONS + 1))
    assert losses[1] == pytest.approx(one_gpu[1], rel=1e-3)
    for iteration, loss in losses.items():
        assert loss == pytest.approx(one_gpu[iteration], rel=2e-2), f"iteration {iteration}"
