"""Pipeline transfers of streams: many steps, the order in which things leave, a lost peer. (One step of each layout:
test_layouts.)"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import schedules

from mhc_megatron import MHCConfig
from mhc_megatron.pipeline import nodes
from mhc_megatron.pipeline.links import BACKWARD, Arrival, Links
from mhc_megatron.pipeline.nodes import leaves_node
from mhc_megatron.pipeline.side_channel import SideChannel
from mhc_megatron.pipeline.state import pipeline_state
from mhc_megatron.residual.input import HyperConnectionInput
from tests import models
from tests.ranks import run_ranks

STEPS = int(os.environ.get("MHC_PIPELINE_STEPS", "12"))
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "pp2": (2, {"pipeline_model_parallel_size": 2}, {"batch_p2p_comm": True}),
    "pp4": (4, {"pipeline_model_parallel_size": 4}, {"batch_p2p_comm": False}),
    "pp2-vpp2": (
        2,
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
        {"overlap_p2p_comm": True, "batch_p2p_comm": False},
    ),
    "pp2-ep2": (4, {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2}, {"batch_p2p_comm": False}),
    "pp2-tp2-sp": (
        4,
        {"pipeline_model_parallel_size": 2, "tensor_model_parallel_size": 2},
        {"batch_p2p_comm": False, "sequence_parallel": True},
    ),
    "pp3-vpp2": (
        3,
        {"pipeline_model_parallel_size": 3, "virtual_pipeline_model_parallel_size": 2},
        {"overlap_p2p_comm": True, "batch_p2p_comm": False, "num_layers": 6, "moe_layer_freq": [0, 1, 1, 1, 1, 1]},
    ),
    "pp2-vpp2-flush": (
        2,
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
        {"overlap_p2p_comm": True, "batch_p2p_comm": False, "overlap_p2p_comm_warmup_flush": True},
    ),
    "pp2-vpp2-no-overlap": (
        2,
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
        {"batch_p2p_comm": False},
    ),
    "pp2-vpp2-groups": (
        2,
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
        {
            **{"overlap_p2p_comm": True, "batch_p2p_comm": False, "overlap_p2p_comm_warmup_flush": True},
            "microbatch_group_size_per_vp_stage": 3,
        },
    ),
}


# On a GPU a sum has another order from kernel to kernel, and the kernels' float32 products are three TF32 ones.
TOLERANCE = 1e-4 if torch.cuda.is_available() else 1e-5


def chunks_of(
    settings: dict[str, Any], comm: str, model: dict[str, Any] = models.MOE, transport: str = "auto"
) -> tuple[list[torch.nn.Module], Any]:
    """This rank's chunks with the same parameters for every ``comm``, in Megatron's DDP."""
    config = models.make_config(**{**model, "pipeline_dtype": torch.float32, **settings})
    te = config.sequence_parallel and torch.cuda.is_available()  # Megatron's own RMSNorm refuses it on a GPU
    vpp = config.virtual_pipeline_model_parallel_size
    torch.manual_seed(1 + parallel_state.get_pipeline_model_parallel_rank())
    mhc = MHCConfig(init="paper", init_alpha=0.3, pipeline_comm=comm, pipeline_transport=transport)
    chunks = [models.build(config, mhc, stage, te) for stage in (range(vpp) if vpp else [None])]
    return [models.wrap(chunk.cuda(), config) for chunk in chunks], config


def uses(transport: str, config: Any) -> bool:
    """Whether the links of a schedule that has run are what was asked for: copy engines may have left them to NCCL."""
    group = parallel_state.get_pipeline_model_parallel_group()
    wraps, state = config.virtual_pipeline_model_parallel_size is not None, pipeline_state(config)
    assert state is not None
    return bool(Links.of(group, wraps, state.split, transport).copies.senders) == (transport == "copy-engine")


def many_steps(settings: dict[str, Any], folder: Path, transport: str = "nccl") -> None:
    """Steps of random numbers of microbatches, trained and evaluated, by wide and by split transfers: the same losses and
    gradients. transport: of the latter; wide is NCCL's, and that of another transport as well."""
    settings = {**settings, "deallocate_pipeline_outputs": True}
    (wide, wide_config), (split, split_config) = (
        chunks_of(settings, comm, transport=by) for comm, by in (("wide", "nccl"), ("split", transport))
    )
    copied = chunks_of(settings, "wide", transport=transport) if transport != "nccl" else None
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    group = wide_config.microbatch_group_size_per_vp_stage if len(wide) > 1 else 1
    counts = [m for m in range(group, max(8, 4 * group)) if not 0 < m % group < stages]
    draw, replicas = random.Random(0), parallel_state.get_data_parallel_world_size()
    for _ in range(STEPS):
        microbatches = range(draw.choice(counts) * replicas)
        forward_only = draw.random() < 0.25
        expected, losses = (
            models.step(chunks, config, microbatches, forward_only)
            for chunks, config in ((wide, wide_config), (split, split_config))
        )
        if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
            assert len(losses) == len(microbatches) // replicas
        torch.testing.assert_close(losses, expected, rtol=TOLERANCE, atol=0)
        if copied is not None:
            losses = models.step(*copied, microbatches, forward_only)
            torch.testing.assert_close(losses, expected, rtol=TOLERANCE, atol=0)
        if forward_only:
            continue
        for ours, theirs in zip(split, wide, strict=True):
            compare_gradients(ours, theirs)
        if copied is not None:
            for ours, theirs in zip(copied[0], wide, strict=True):
                compare_gradients(ours, theirs)
    assert not pipeline_state(wide_config).split
    assert pipeline_state(split_config).running is None, "would be taken for the next schedule"
    channel = pipeline_state(split_config).channel
    assert channel is not None
    assert uses(transport, split_config)
    for sends in channel.links.sends:
        sends.release()
        assert len(sends) <= 1
    assert not channel._gradients
    assert not channel._leaving
    assert channel._ahead is None


def compare_gradients(ours: torch.nn.Module, theirs: torch.nn.Module, frozen: bool = False) -> None:
    """Errors relative to the largest gradient of a parameter of that name in the chunk: alpha's is a sum that may cancel. frozen:
    there may be none."""
    pairs = [
        (n, a.main_grad, b.main_grad) for (n, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True)
    ]
    scale: dict[str, torch.Tensor] = {}
    for name, _, expected in pairs:
        kind = name.rsplit(".", 1)[-1]
        scale[kind] = torch.maximum(scale.get(kind, expected.new_zeros(())), expected.norm())
    for name, gradient, expected in pairs:
        largest = scale[name.rsplit(".", 1)[-1]]
        if frozen and largest == 0:
            assert not gradient.any(), name
            continue
        error = (gradient - expected).norm() / largest
        assert error < TOLERANCE, f"{name}: {error:.1e}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_steps(layout: str, tmp_path: Path, hooks: None) -> None:
    processes, sizes, settings = LAYOUTS[layout]
    run_ranks(many_steps, processes, tmp_path, sizes, settings={**sizes, **settings}, folder=tmp_path)


def without_gpus(settings: dict[str, Any]) -> None:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("mhc_megatron.pipeline.links").addHandler(handler)
    (nccl, nccl_config), (asked, asked_config) = (
        chunks_of(settings, "wide", transport=by) for by in ("nccl", "copy-engine")
    )
    expected, losses = (models.step(c, k, range(4)) for c, k in ((nccl, nccl_config), (asked, asked_config)))
    assert losses == expected
    about = [text for text in said if "copy-engine" in text]
    assert len(about) == (dist.get_rank() == 0), said
    assert all("no effect: the pipeline group's backend is not NCCL" in text for text in about)


def test_copy_engines_need_gpus(tmp_path: Path, hooks: None) -> None:
    sizes = {"pipeline_model_parallel_size": 2}
    run_ranks(without_gpus, 2, tmp_path, sizes, settings={**sizes, "batch_p2p_comm": False})


def note_order(settings: dict[str, Any], folder: Path) -> None:
    """Write down what rank 0 sends and runs in one step, in order."""
    chunks, config = chunks_of(settings, "split")
    events: list[str] = []
    width = {models.SEQUENCE * models.MICROBATCH * 32 * 4: "streams", models.SEQUENCE * models.MICROBATCH * 36: "y"}

    def noted(name: str, function: Any) -> Any:
        def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if tensor.numel() in width:
                events.append(f"{name} {width[tensor.numel()]}")
            return function(tensor, *args, **kwargs)

        return call

    models.step(chunks, config, range(2))  # connects
    dist.isend, dist.irecv = noted("send", dist.isend), noted("receive", dist.irecv)
    last = [m for m in chunks[0].modules() if isinstance(m, HyperConnectionInput)][-1]
    assert last._departs is (dist.get_rank() == 0)
    mlp = chunks[0].module.decoder.layers[-1].mlp
    mlp.register_forward_pre_hook(lambda *_: events.append("F"))
    mlp.register_full_backward_hook(lambda *_: events.append("F backward"))
    models.step(chunks, config, range(2))
    (folder / f"events.{dist.get_rank()}").write_text(json.dumps(events))


def test_streams_leave_before_the_last_sublayer_runs(tmp_path: Path, hooks: None) -> None:
    sizes = {"pipeline_model_parallel_size": 2}
    run_ranks(note_order, 2, tmp_path, sizes, settings={**sizes, "batch_p2p_comm": False}, folder=tmp_path)
    sender, receiver = (json.loads((tmp_path / f"events.{rank}").read_text()) for rank in range(2))
    gradients = ["receive y", "receive streams"]
    first = ["send streams", "F", "send y"]
    second = ["send streams", "F", "receive y", "send y", "receive streams"]
    assert sender == [*first, *second, "F backward", *gradients, "F backward"]
    # The second microbatch's streams are waited for before the first one's backward is over.
    received = ["receive streams", "receive y", "F", "F backward", "receive streams"]
    assert receiver == [*received, "send y", "receive y", "send streams", "F", "F backward", "send y", "send streams"]


def lose_a_peer(settings: dict[str, Any], how: str, folder: Path, comm: str = "split", transport: str = "nccl") -> None:
    chunks, config = chunks_of(settings, comm, transport=transport)
    models.step(chunks, config, range(4))
    assert uses(transport, config)
    if dist.get_rank() == 1:
        send = Links.send

        def lose(*_: Any) -> None:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)

        def forward_alone(links: Links, direction: int, tensor: torch.Tensor) -> None:
            return lose() if direction == BACKWARD else send(links, direction, tensor)

        # Of split transfers in the middle of a backward pass: y's gradient has left, the streams' has not.
        if comm == "split":
            SideChannel.send_gradient = lose
        else:
            Links.send = forward_alone
    else:  # the test's launcher ends the others when one dies; a cluster's may not
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    started = time.monotonic()
    try:
        models.step(chunks, config, range(4))
    except RuntimeError as error:
        (folder / "error").write_text(f"{time.monotonic() - started:.1f} {error}")
    os._exit(1)


@pytest.mark.parametrize(
    ("how", "layout", "comm"),
    [
        ("killed", "pp2", "split"),
        ("stuck", "pp2", "split"),
        ("stuck", "pp2", "wide"),
        ("stuck", "pp2-vpp2", "split"),
        ("killed", "pp2-vpp2", "wide"),
    ],
)
def test_a_lost_peer_ends_the_run(how: str, layout: str, comm: str, tmp_path: Path, hooks: None) -> None:
    """With the pipeline group's own timeout (here six seconds), on our links as well."""
    processes, sizes, settings = LAYOUTS[layout]
    further = {"settings": {**sizes, **settings, "batch_p2p_comm": False}, "how": how, "comm": comm, "folder": tmp_path}
    with pytest.raises(Exception, match="terminated"):
        run_ranks(lose_a_peer, processes, tmp_path, {**sizes, "distributed_timeout_minutes": 0.1}, **further)
    seconds, message = (tmp_path / "error").read_text().split(" ", 1)
    assert float(seconds) < 30
    assert "gloo" in message.lower() or "timed out" in message.lower(), message


def frozen_stage(settings: dict[str, Any]) -> None:
    """The first stage, or all of it but its last sublayer's MLP, is not trained: by split transfers as by wide ones."""
    (wide, wide_config), (split, split_config) = (chunks_of(settings, comm) for comm in ("wide", "split"))
    posted, taken = [], []
    receive, wait = SideChannel.receive_gradient, Arrival.wait
    SideChannel.receive_gradient = lambda *a: posted.append(receive(*a)) or posted[-1]
    Arrival.wait = lambda arrival: taken.append(arrival) or wait(arrival)
    for kept in (".layers.1.mlp.", "nothing"):
        for chunks in (wide, split):
            if parallel_state.is_pipeline_first_stage():
                for name, parameter in chunks[0].named_parameters():
                    parameter.requires_grad_(kept in name)
        for forward_only in (False, True, False, False):
            expected, losses = (
                models.step(chunks, config, range(4), forward_only)
                for chunks, config in ((wide, wide_config), (split, split_config))
            )
            torch.testing.assert_close(losses, expected, rtol=TOLERANCE, atol=0)
            if forward_only:
                continue
            assert {id(arrival.work) for arrival in posted} <= {id(arrival.work) for arrival in taken}
            assert len(posted) == (4 if parallel_state.is_pipeline_first_stage() else 0)
            posted.clear()
            taken.clear()
            compare_gradients(split[0], wide[0], frozen=True)
            trained = any(p.requires_grad and p.main_grad.norm() > 0 for p in split[0].parameters())
            assert trained is (kept != "nothing" or parallel_state.is_pipeline_last_stage())


def test_a_stage_with_nothing_to_train(hooks: None, tmp_path: Path) -> None:
    """Somebody receives the streams' gradient that comes for it all the same."""
    sizes = {"pipeline_model_parallel_size": 2}
    run_ranks(frozen_stage, 2, tmp_path, sizes, settings={**sizes, "batch_p2p_comm": False})


def across_nodes(settings: dict[str, Any]) -> None:
    assert leaves_node() is False
    nodes.machine = lambda: f"machine {dist.get_rank()}"
    nodes._known.clear()
    assert leaves_node() is True
    (wide, wide_config), (auto, auto_config) = (chunks_of(settings, comm) for comm in ("wide", "auto"))
    state = pipeline_state(auto_config)
    assert state is not None
    assert state.split is (auto_config.virtual_pipeline_model_parallel_size is None)
    expected, losses = (models.step(c, k, range(4)) for c, k in ((wide, wide_config), (auto, auto_config)))
    torch.testing.assert_close(losses, expected, rtol=TOLERANCE, atol=0)
    for ours, theirs in zip(auto, wide, strict=True):
        compare_gradients(ours, theirs)


@pytest.mark.parametrize("layout", ["pp2", "pp2-vpp2"])
def test_auto_across_nodes(layout: str, hooks: None, tmp_path: Path) -> None:
    """Split in 1F1B, wide in an interleaved schedule."""
    _, sizes, settings = LAYOUTS[layout]
    run_ranks(across_nodes, 2, tmp_path, sizes, settings={**sizes, **settings})


def sends_without_waiting(
    settings: dict[str, Any],
    comm: str,
    steps: int,
    folder: Path,
    sequence: int = models.SEQUENCE,
    transport: str = "nccl",
) -> None:
    """Whatever Megatron frees after a send is overwritten at once: the same bits as when nothing is freed and NCCL moves it."""
    models.SEQUENCE = sequence
    (kept, kept_config), (freed, freed_config) = (
        chunks_of({**settings, "deallocate_pipeline_outputs": free}, comm, models.DENSE, by)
        for free, by in ((False, "nccl"), (True, transport))
    )
    original = schedules.deallocate_output_tensor

    def poisoned(out: Any, free: bool = False) -> None:
        before = None if out is None or not free else (out.shape, out.dtype, out.device)
        original(out, free)
        if before is not None:
            shape, dtype, device = before
            held.append([torch.full(shape, float("nan"), dtype=dtype, device=device) for _ in range(4)])
            del held[:-4]

    held: list[Any] = []
    schedules.deallocate_output_tensor = poisoned
    for _ in range(steps):
        expected, losses = (models.step(c, k, range(4)) for c, k in ((kept, kept_config), (freed, freed_config)))
        assert losses == expected
        for a, b in zip(freed, kept, strict=True):
            for x, y in zip(a.parameters(), b.parameters(), strict=True):
                assert torch.equal(x.main_grad, y.main_grad)
    assert held
    assert uses(transport, freed_config)


@pytest.mark.parametrize("comm", ["wide", "split"])
def test_sends_survive_deallocation(comm: str, tmp_path: Path, hooks: None) -> None:
    processes, sizes, settings = LAYOUTS["pp2-vpp2"]
    settings = {**sizes, **settings}
    run_ranks(sends_without_waiting, processes, tmp_path, sizes, settings=settings, comm=comm, steps=4, folder=tmp_path)
