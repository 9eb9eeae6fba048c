"""The same loss and the same gradients under every parallel layout, parameters carried by distributed checkpoints.

One process draws the parameters (random phi: nothing hides behind the preserving initialisation) and saves them; every
layout loads that checkpoint, trains one step through Megatron's schedule and saves its gradients as a checkpoint; one
process loads those and compares. So each case also reshards a checkpoint, both ways.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from mhc_kernels import free_until_backward
from mhc_megatron import MHCConfig
from mhc_megatron.residual import add
from mhc_megatron.residual.input import HyperConnectionInput
from tests import models
from tests.ranks import run_ranks, single_process

# Float32; sums run in another order when tokens, weights or streams are split. A pipeline alone, with wide transfers, keeps it.
TOLERANCE = 1e-5
MHC = MHCConfig(init="paper", init_alpha=0.5)

TP2 = {"tensor_model_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
VPP2 = {**PP2, "virtual_pipeline_model_parallel_size": 2}
INTERLEAVED = {"overlap_p2p_comm": True, "batch_p2p_comm": False}
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
MHC_RECOMPUTE = {"mhc": {"backend": "triton", "recompute": True}}  # with interpreted kernels: slow
SPLIT, WIDE = {"mhc": {"pipeline_comm": "split"}}, {"mhc": {"pipeline_comm": "wide"}}
PP4_VPP2 = {"pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 2}
EIGHT_CHUNKS = {"pipeline_model_parallel_layout": "E|t||t|t||t|L"}
ENDS_APART = {"pipeline_model_parallel_layout": "E|tt|tt|L"}

# The model of a layout whose name begins like this; of any other, MoE (Megatron wants SP for TP with MoE).
KINDS = {
    "dense": models.DENSE,
    "moe": models.MOE,
    "mla": models.MLA,
    "mtp": {**models.MOE, "mtp_num_layers": 2},
    "mtp_dense": {**models.DENSE, "mtp_num_layers": 1},
}

# name: (processes, parallel sizes, further settings; "mhc": of MHCConfig).
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "recompute": (1, {}, RECOMPUTE),
    "dense-tp2": (2, TP2, {}),
    "dense-tp2-sp": (2, TP2, {"sequence_parallel": True}),
    "tp2-sp": (2, TP2, {"sequence_parallel": True}),
    "tp2-sp-recompute": (2, TP2, {"sequence_parallel": True, **RECOMPUTE, "distribute_saved_activations": False}),
    "ep2": (2, EP2, {}),
    "pp2": (2, PP2, {}),
    "pp2-no-batch": (2, PP2, {"batch_p2p_comm": False}),
    "pp2-recompute": (2, PP2, RECOMPUTE),
    "pp2-deallocate": (2, PP2, {"deallocate_pipeline_outputs": True}),
    "pp2-vpp2": (2, VPP2, {**INTERLEAVED, "deallocate_pipeline_outputs": True}),
    "pp2-vpp2-ends-apart": (2, VPP2, {**INTERLEAVED, **ENDS_APART, "deallocate_pipeline_outputs": True}),
    "dense-pp2-vpp2-mhc-recompute": (2, VPP2, {**INTERLEAVED, **MHC_RECOMPUTE, "deallocate_pipeline_outputs": True}),
    "dense-tp2-sp-mhc-recompute": (2, TP2, {"sequence_parallel": True, **MHC_RECOMPUTE}),
    "pp2-wide": (2, PP2, WIDE),
    "pp2-vpp2-wide": (2, VPP2, {**INTERLEAVED, **WIDE, "deallocate_pipeline_outputs": True}),
    "pp2-vpp2-no-overlap": (2, VPP2, {"batch_p2p_comm": False}),
    "pp2-vpp2-no-overlap-split": (2, VPP2, {**SPLIT, "deallocate_pipeline_outputs": True}),
    "pp2-split": (2, PP2, SPLIT),
    "pp2-no-batch-split": (2, PP2, {**SPLIT, "batch_p2p_comm": False, "deallocate_pipeline_outputs": True}),
    "dense-pp2-vpp2-split": (2, VPP2, {**INTERLEAVED, **SPLIT, "deallocate_pipeline_outputs": True}),
    "pp2-vpp2-split": (2, VPP2, {**INTERLEAVED, **SPLIT, "deallocate_pipeline_outputs": True}),
    "pp2-vpp2-ends-apart-split": (2, VPP2, {**INTERLEAVED, **SPLIT, **ENDS_APART}),
    "pp2-vpp2-flush-split": (2, VPP2, {**INTERLEAVED, **SPLIT, "overlap_p2p_comm_warmup_flush": True}),
    "pp4-vpp2-split": (4, PP4_VPP2, {**INTERLEAVED, **SPLIT, **EIGHT_CHUNKS}),
    "pp4-vpp2": (4, PP4_VPP2, {**INTERLEAVED, **EIGHT_CHUNKS, "deallocate_pipeline_outputs": True}),
    "pp2-ep2-split": (4, {**PP2, **EP2}, SPLIT),
    "pp2-tp2-sp-split": (4, {**PP2, **TP2}, {"sequence_parallel": True, **SPLIT}),
    "pp4-ends-apart-split": (4, {"pipeline_model_parallel_size": 4}, {**SPLIT, **ENDS_APART}),
    "dense-pp2-vpp2-split-mhc-recompute": (2, VPP2, {**INTERLEAVED, "mhc": {**SPLIT["mhc"], **MHC_RECOMPUTE["mhc"]}}),
    "pp2-ep2": (4, {**PP2, **EP2}, {}),
    "pp2-tp2-sp": (4, {**PP2, **TP2}, {"sequence_parallel": True}),
    # Not under TP + SP: `test_stock_latent_attention_under_tp_and_sp`.
    "mla-ep2": (2, EP2, {}),
    "mla-pp2-vpp2": (2, VPP2, {**INTERLEAVED, "deallocate_pipeline_outputs": True}),
    "mtp-tp2-sp-recompute": (2, TP2, {"sequence_parallel": True, **RECOMPUTE, "distribute_saved_activations": False}),
    "mtp-ep2": (2, EP2, {}),
    "mtp-pp2-vpp2-split": (2, VPP2, {**INTERLEAVED, **SPLIT, "deallocate_pipeline_outputs": True}),
    "mtp-pp2-vpp2-uneven": (2, VPP2, {**INTERLEAVED, "pipeline_model_parallel_layout": "E|tt|t|tmmL"}),
    "mtp-pp2-vpp2-empty-chunk": (2, VPP2, {**INTERLEAVED, "pipeline_model_parallel_layout": "Ett|t||tmmL"}),
    "mtp_dense-pp2-mhc-recompute": (2, PP2, MHC_RECOMPUTE),
    "pp4-ends-apart": (4, {"pipeline_model_parallel_size": 4}, ENDS_APART),
}


def _model(name: str) -> str:
    return next((kind for kind in KINDS if name.split("-")[0] == kind), "moe")


def _keeps_order(name: str) -> bool:
    """Whether a layout computes the same sums in the same order as one process. (MTP has a second embedding.)"""
    _, sizes, further = LAYOUTS[name]
    plain = all("pipeline" in size for size in sizes) and "mtp" not in _model(name)
    return plain and further.get("mhc", WIDE["mhc"]) == WIDE["mhc"]


def _train(folder: Path, settings: dict[str, Any], out: str) -> None:
    mhc = dataclasses.replace(MHC, **settings.get("mhc", {}))
    settings = {name: value for name, value in settings.items() if name != "mhc"}
    config = models.make_config(**KINDS[_model(out)], **settings)
    vpp = config.virtual_pipeline_model_parallel_size
    chunks = [models.build(config, mhc, stage) for stage in (range(vpp) if vpp else [None])]
    parameters = folder / f"{_model(out)}.parameters"
    if parameters.exists():
        models.load(chunks, parameters)
    else:
        models.save(chunks, parameters)
    with _inputs_freed(chunks if mhc.recompute else []):
        losses = models.one_step(chunks, config)
    _check_replicas(chunks)
    models.gradients_into_parameters(chunks)
    models.save(chunks, folder / out)
    last = parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0
    if last:
        rank = parallel_state.get_data_parallel_rank()
        (folder / f"{out}.losses.{rank}").write_text(json.dumps(losses))
    dist.barrier()


@contextlib.contextmanager
def _inputs_freed(chunks: list[torch.nn.Module]) -> Iterator[None]:
    """Check that --mhc-recompute frees what every sublayer of these chunks reads, in every microbatch."""
    sublayers = sum(isinstance(module, HyperConnectionInput) for chunk in chunks for module in chunk.modules())
    freed = []

    def free(*tensors: torch.Tensor) -> bool:
        freed.append(free_until_backward(*tensors))
        return freed[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(add, "free_until_backward", free)
        yield
    assert freed == [True] * (sublayers * models.MICROBATCHES)


def _check_replicas(chunks: list[torch.nn.Module]) -> None:
    """mHC parameters are replicated over tensor-parallel ranks: their gradients must be the same bits."""
    group = parallel_state.get_tensor_model_parallel_group()
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if "hyper_connection" in name:
                replicas = [torch.empty_like(parameter.main_grad) for _ in range(group.size())]
                dist.all_gather(replicas, parameter.main_grad, group=group)
                assert all(torch.equal(replica, replicas[0]) for replica in replicas), name


def _losses(folder: Path, out: str) -> list[float]:
    shares = [json.loads(path.read_text()) for path in sorted(folder.glob(f"{out}.losses.*"))]
    return [loss for step in zip(*shares, strict=True) for loss in step]


def _gradients(folder: Path, out: str) -> dict[str, torch.Tensor]:
    model = models.build(models.make_config(**KINDS[_model(out)]), MHC)
    models.load([model], folder / out)
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("layouts")
    losses, gradients = {}, {}
    for model in KINDS:
        with single_process(folder):
            _train(folder, {}, model)
            losses[model], gradients[model] = _losses(folder, model), _gradients(folder, model)
    return folder, losses, gradients


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_process(name: str, reference: Any, hooks: None) -> None:
    folder, losses, gradients = reference
    processes, sizes, further = LAYOUTS[name]
    settings = {**sizes, **further}
    if "pipeline_model_parallel_size" in sizes:
        settings["pipeline_dtype"] = torch.float32
    groups = {**sizes, "order": "tp-cp-ep-dp-pp"}
    run_ranks(_train, processes, folder, groups, folder=folder, settings=settings, out=name)

    tolerance = 0 if _keeps_order(name) else TOLERANCE
    torch.testing.assert_close(_losses(folder, name), losses[_model(name)], rtol=tolerance, atol=0)
    with single_process(folder):
        ours = _gradients(folder, name)
    for parameter, expected in gradients[_model(name)].items():
        assert expected.norm() > 0, f"{parameter} gets no gradient: the comparison would be empty"
        error = (ours[parameter] - expected).norm() / expected.norm()
        assert error <= tolerance, f"{parameter}: relative error {error:.1e}"


def _stock(folder: Path, settings: dict[str, Any], out: str) -> None:
    model = models.build(models.make_config(**models.MLA, **settings), None)
    start = folder / "stock.parameters"
    if start.exists():
        models.load([model], start)
    else:
        models.save([model], start)
    models.one_step([model], model.config)
    models.gradients_into_parameters([model])
    models.save([model], folder / out)


@pytest.mark.xfail(
    strict=True, reason="Megatron 0.19.2: TP ranks' gradients of the keys' rotary part are not added up in local MLA"
)
def test_stock_latent_attention_under_tp_and_sp(tmp_path: Path) -> None:
    """Without mHC. Where it passes, LAYOUTS can have MLA under TP + SP.

    Prints what is off in the last layer: the rows of linear_kv_down_proj that make the keys' rotary part, which all heads
    share (each rank keeps what its own heads give), and what gets its gradient through them.
    """
    with single_process(tmp_path):
        _stock(tmp_path, {}, "one")
    settings = {**TP2, "sequence_parallel": True}
    run_ranks(_stock, 2, tmp_path, {**TP2, "order": "tp-cp-ep-dp-pp"}, folder=tmp_path, settings=settings, out="two")
    with single_process(tmp_path):
        found = []
        for name in ("one", "two"):
            model = models.build(models.make_config(**models.MLA), None)
            models.load([model], tmp_path / name)
            found.append(dict(model.named_parameters()))
    worst = max(
        float((found[1][name] - expected).norm() / expected.norm().clamp_min(1e-12))
        for name, expected in found[0].items()
    )
    print(f"stock MLA under TP + SP: gradients off by up to {worst:.1e}; in the last layer")
    for name, expected in found[0].items():
        difference = (
            (found[1][name] - expected).flatten(1) if expected.dim() > 1 else (found[1][name] - expected)[:, None]
        )
        rows = (difference.norm(dim=1) > TOLERANCE * expected.norm()).nonzero()[:, 0].tolist()
        if rows and ".layers.3." in name:
            print(f"    {name}: rows {rows} of {len(expected)}")
    assert worst <= TOLERANCE
