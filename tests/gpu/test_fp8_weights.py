"""mHC beside weights that are kept, and gathered, in FP8 (--fp8-param-gather): its own parameters are no products' weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from mhc_megatron.quickstart import data
from mhc_megatron.quickstart.jobs import megatron_arguments
from tests.gpu.launched import train
from tests.ranks import has_gpus

pytestmark = pytest.mark.gpu
pytest.importorskip("transformer_engine.pytorch", reason="needs Transformer Engine")

ITERATIONS = 6
# 264 tokens: no padding under TP.
SHARED = """
--vocab-size 264 --make-vocab-size-divisible-by 1 --global-batch-size 32 --lr-warmup-iters 0
--use-distributed-optimizer --enable-mhc
--distributed-timeout-minutes 2
""".split()
FP8 = "--fp8-format hybrid --fp8-recipe tensorwise --moe-router-padding-for-fp8".split()
WEIGHTS = [*FP8, "--fp8-param-gather"]
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel".split()


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder: Path = tmp_path_factory.mktemp("fp8-weights")
    shared = [*megatron_arguments(data.prepare(folder), ITERATIONS, gpu=True), *SHARED]
    start = folder / "start"
    train([*shared, f"--save={start}", "--save-interval=1", "--train-iters=1"], 1)
    return [*shared, f"--load={start}", "--finetune"]


@pytest.fixture(scope="module")
def plain(arguments: list[str]) -> dict[int, float]:
    """FP8 products of weights in bf16."""
    return train([*arguments, *FP8], 1)


@pytest.mark.parametrize(
    ("processes", "further"),
    [(1, WEIGHTS), (1, [*WEIGHTS, "--mhc-recompute"]), (2, [*TP2, *WEIGHTS, "--mhc-recompute"]), (2, WEIGHTS)],
    ids=["one GPU", "recompute", "tp2-sp-recompute", "dp2"],
)
def test_same_losses(processes: int, further: list[str], arguments: list[str], plain: dict[int, float]) -> None:
    """As with weights in bf16, but that those are rounded twice on their way to FP8."""
    if not has_gpus(processes):
        pytest.skip(f"needs {processes} CUDA GPUs (or MHC_SHARE_GPU=1)")
    losses = train([*arguments, *further], processes)
    print(f"{further}: {losses} against {plain}")
    assert losses.keys() == plain.keys() == set(range(1, ITERATIONS + 1))
    assert losses[1] == pytest.approx(plain[1], rel=5e-3)
    for iteration, loss in losses.items():
        assert loss == pytest.approx(plain[iteration], rel=2e-2), f"iteration {iteration}"
