"""Pipeline transfers of streams over NCCL, and by copy engines: as tests/distributed/test_pipeline.py, with a GPU a rank (or
MHC_SHARE_GPU=1: NCCL alone) and more steps."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.distributed import test_pipeline as pipeline
from tests.ranks import SHARE_GPU, has_gpus, run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not has_gpus(2), reason="needs two CUDA GPUs (or MHC_SHARE_GPU=1)"),
]


TRANSPORTS = ("nccl", "copy-engine")


@pytest.fixture
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What moves transfers. Copy engines need a GPU a rank, and more than the one queue of conftest.py's environment."""
    if request.param != "nccl":
        monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
        if SHARE_GPU:
            pytest.skip("copy engines need a GPU a rank")
    chosen: str = request.param
    return chosen


@pytest.mark.parametrize(
    ("layout", "transport"),
    [(layout, by) for by in TRANSPORTS for layout in pipeline.LAYOUTS if by == "nccl" or "tp2" not in layout],
    indirect=["transport"],
)
def test_many_steps(layout: str, transport: str, tmp_path: Path, hooks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    processes, sizes, settings = pipeline.LAYOUTS[layout]
    if not has_gpus(processes):
        pytest.skip(f"needs {processes} CUDA GPUs (or MHC_SHARE_GPU=1)")
    monkeypatch.setenv("MHC_PIPELINE_STEPS", os.environ.get("MHC_PIPELINE_STEPS", "200"))  # the ranks import anew
    arguments = {"settings": {**sizes, **settings}, "transport": transport, "folder": tmp_path}
    run_ranks(pipeline.many_steps, processes, tmp_path, sizes, **arguments)


@pytest.mark.parametrize("comm", ["wide", "split"])
@pytest.mark.parametrize("transport", TRANSPORTS, indirect=True)
def test_sends_survive_deallocation(comm: str, transport: str, tmp_path: Path, hooks: None) -> None:
    """Transfers large enough (32 MiB) to be under way when Megatron frees what they send."""
    _, sizes, settings = pipeline.LAYOUTS["pp2-vpp2"]
    settings = {**sizes, **settings, "hidden_size": 1024, "ffn_hidden_size": 64}
    arguments = {"settings": settings, "comm": comm, "steps": 50, "folder": tmp_path, "sequence": 1024}
    run_ranks(pipeline.sends_without_waiting, 2, tmp_path, sizes, **arguments, transport=transport)


@pytest.mark.parametrize("transport", TRANSPORTS, indirect=True)
def test_a_lost_peer_ends_the_run(transport: str, tmp_path: Path, hooks: None) -> None:
    sizes = {"pipeline_model_parallel_size": 2}
    layout = {**sizes, "distributed_timeout_minutes": 0.2}
    arguments = {"settings": {**sizes, "batch_p2p_comm": False}, "how": "stuck", "folder": tmp_path}
    # A watchdog ends the rank that waits. The other one would end later, the launcher would end both if that one did.
    with pytest.raises(Exception, match="process 0 terminated"):
        run_ranks(pipeline.lose_a_peer, 2, tmp_path, layout, **arguments, transport=transport)


def test_a_stage_with_nothing_to_train(tmp_path: Path, hooks: None) -> None:
    sizes = {"pipeline_model_parallel_size": 2}
    run_ranks(pipeline.frozen_stage, 2, tmp_path, sizes, settings={**sizes, "batch_p2p_comm": False})


@pytest.mark.parametrize("layout", ["pp2", "pp2-vpp2"])
def test_auto_across_nodes(layout: str, tmp_path: Path, hooks: None) -> None:
    _, sizes, settings = pipeline.LAYOUTS[layout]
    run_ranks(pipeline.across_nodes, 2, tmp_path, sizes, settings={**sizes, **settings})
