"""--mhc-recompute in Megatron models: what sublayers read is free between forward and backward, wherever that is safe."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from mhc_kernels import free_until_backward, recompute_block
from mhc_megatron import MHCConfig
from mhc_megatron.residual import add, recompute
from mhc_megatron.residual.input import HyperConnectionInput
from tests import models
from tests.unit.kernels.test_recompute_input import size
from tests.unit.test_chain import gradients
from tests.unit.test_recompute import assert_same_bits, build

pytestmark = pytest.mark.usefixtures("one_process")

RECOMPUTE = {"recompute": True, "recompute_sublayers": 3}
SMALL = {**models.DENSE, "num_layers": 2}
SUBLAYERS = 4


class Asked:
    """What was to be freed, in order: whether it was, and its storage."""

    def __init__(self) -> None:
        self.freed: list[bool] = []
        self.storages: list[StorageWeakRef] = []

    def __call__(self, u: Tensor, y: Tensor) -> bool:
        self.storages.append(StorageWeakRef(u.untyped_storage()))
        self.freed.append(free_until_backward(u, y))
        return self.freed[-1]

    @property
    def sizes(self) -> list[int | None]:
        return [size(storage) for storage in self.storages]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    recorder = Asked()
    monkeypatch.setattr(add, "free_until_backward", recorder)
    return recorder


def saved_bytes(loss: Tensor) -> int:
    """Bytes that a graph keeps: all storages among the tensors that its nodes have saved, once each."""
    nodes, storages = {loss.grad_fn}, {}
    todo = list(nodes)
    while todo:
        node = todo.pop()
        names = [name for name in dir(node) if name.startswith("_saved_")]
        values = [getattr(node, name) for name in names] + [getattr(node, "saved_tensors", ())]
        for value in values:
            for tensor in value if isinstance(value, tuple | list) else (value,):
                if isinstance(tensor, Tensor) and not isinstance(tensor, torch.nn.Parameter):
                    storage = tensor.untyped_storage()
                    storages[storage._cdata] = storage.nbytes()
        todo += [following for following, _ in node.next_functions if following is not None and following not in nodes]
        nodes.update(todo)
    return sum(storages.values())


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("dense", {}),
        ("moe", {}),
        ("mla", {}),
        ("dense", {"normalization": "LayerNorm"}),
        ("moe", {"recompute_granularity": "selective", "recompute_modules": ["moe"]}),
        # Stock Megatron's 'mlp' never comes back from a backward with biases.
        (
            "dense",
            {"add_bias_linear": False, "recompute_granularity": "selective", "recompute_modules": ["mlp", "core_attn"]},
        ),
    ],
    ids=str,
)
def test_free_between_forward_and_backward(kind: str, settings: dict[str, Any], asked: Asked) -> None:
    settings = {**models.MODELS[kind], "num_layers": 2, "moe_layer_freq": 1, **settings}
    model = build(RECOMPUTE, **settings)
    loss = models.forward(model, models.tokens(0)).mean()
    assert asked.freed == [True] * SUBLAYERS
    assert asked.sizes == [0] * SUBLAYERS
    loss.backward()
    if "moe" not in settings.get(
        "recompute_modules", ()
    ):  # Megatron's MoE layers, mHC or not, hold what their recompute read
        assert asked.sizes == [None] * SUBLAYERS  # `loss` still holds the graph's nodes
    ours = loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same_bits(ours, gradients(build({}, **settings)))


def test_bytes_that_are_kept() -> None:
    """Without recompute all streams and inputs; with it the streams of one sublayer in three, and no inputs."""
    kept = []
    for mhc in ({}, RECOMPUTE):
        loss = models.forward(build(mhc, **SMALL), models.tokens(0)).mean()
        kept.append(saved_bytes(loss))
        loss.backward()
    each = models.SEQUENCE * models.MICROBATCH * 32 * torch.float32.itemsize  # C values a token
    assert kept[0] - kept[1] == (SUBLAYERS - 2) * 4 * each + SUBLAYERS * each


@pytest.mark.parametrize("mhc", [{"num_streams": 5}, {"profile": "deepseek-v4", "num_streams": 2}], ids=str)
def test_other_streams(mhc: dict[str, Any], asked: Asked) -> None:
    ours = gradients(build({**RECOMPUTE, **mhc}, **SMALL))
    assert asked.freed == [True] * SUBLAYERS
    assert_same_bits(ours, gradients(build(mhc, **SMALL)))


class Handing(torch.nn.Module):
    """A sublayer that returns what it reads, or a view of it."""

    def __init__(self, views: bool):
        super().__init__()
        self.views = views

    def forward(self, hidden: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        return hidden[..., : hidden.shape[-1]].view_as(hidden) if self.views else hidden, None


@pytest.mark.parametrize("views", [False, True])
def test_a_sublayer_that_returns_its_input(views: bool, asked: Asked) -> None:
    """Its output, which the recompute of the streams needs, is in the same memory."""
    results = []
    for mhc in (RECOMPUTE, {}):
        model = build(mhc, **SMALL)
        model.decoder.layers[0].mlp = Handing(views)
        results.append(gradients(model))
    assert asked.freed == [True, False, True, True]
    assert_same_bits(*results)


def test_a_torch_that_does_not_tell_of_hooks(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is freed then, as anybody may hook, and rank 0 says so."""
    said: list[str] = []
    monkeypatch.setattr(recompute, "_report", said.append)
    monkeypatch.setattr(recompute_block, "_top_hooks", None)
    gradients(build(RECOMPUTE, **SMALL))
    assert asked.freed == [False] * SUBLAYERS
    assert any("what sublayers read is kept: torch" in text for text in said)


def test_saved_tensors_on_the_cpu(asked: Asked) -> None:
    results = []
    for mhc in (RECOMPUTE, {}):
        with torch.autograd.graph.save_on_cpu():
            results.append(gradients(build(mhc, **SMALL)))
    assert asked.freed == [False] * SUBLAYERS
    assert_same_bits(*results)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpoint_around_a_layer(reentrant: bool, asked: Asked) -> None:
    """Its recompute finds what it read; the sublayers outside are freed as ever."""
    results = []
    for mhc in (RECOMPUTE, {}):
        model = build(mhc, **{**SMALL, "num_layers": 3})
        layer = model.decoder.layers[1]

        def checkpointed(hidden_states: Tensor, forward: Any = layer.forward, **kwargs: Any) -> Any:
            return torch.utils.checkpoint.checkpoint(
                lambda hidden: forward(hidden, **kwargs), hidden_states, use_reentrant=reentrant
            )

        layer.forward = checkpointed
        results.append(gradients(model))
    # What the sublayer behind it reads was made inside. Reentrant: the layer runs again in the backward, and that graph has a
    # backward of its own.
    assert asked.freed[:6] == [True, True, False, False, reentrant, True]
    assert asked.freed[6:] == [reentrant] * 2
    assert_same_bits(*results)


def test_frozen_layers(asked: Asked) -> None:
    results = []
    for mhc in (RECOMPUTE, {}):
        model = build(mhc, **SMALL)
        model.embedding.requires_grad_(False)
        model.decoder.layers[0].requires_grad_(False)
        results.append(gradients(model))
    # Nobody differentiates the first layer. The second one's first mappings have gradients: their node knows what it takes.
    assert asked.freed == [False, False, True, True]
    assert_same_bits(*results)


def test_the_same_streams_read_twice(asked: Asked) -> None:
    """A second run of a layer over streams whose prepared input has been freed computes it anew."""
    results = []
    for mhc in (RECOMPUTE, {}):
        model = build(mhc, **SMALL)
        layer = model.decoder.layers[1]

        def twice(hidden_states: Tensor, forward: Any = layer.forward, **kwargs: Any) -> Any:
            first, context = forward(hidden_states, **kwargs)
            second, _ = forward(hidden_states, **kwargs)
            return first + 0.5 * second, context

        layer.forward = twice
        results.append(gradients(model))
    assert asked.freed == [True] * (SUBLAYERS + 2)
    assert results[0][0] == results[1][0]
    for name, gradient in results[1][1].items():
        # The gradients of one tensor of streams now meet in another order.
        torch.testing.assert_close(results[0][1][name], gradient, rtol=1e-5, atol=1e-6)


def test_evaluation_frees_nothing(asked: Asked) -> None:
    model = build(RECOMPUTE, **SMALL)
    with torch.no_grad():
        models.forward(model, models.tokens(0))
    assert asked.freed == []


def test_graphs_in_flight_and_dropped(asked: Asked) -> None:
    """As in a pipeline: several forward passes before the first backward, and one that never has any."""
    model = build(RECOMPUTE, **SMALL)
    expected = [gradients(model, seed) for seed in range(2)]
    asked.storages.clear()
    losses = [models.forward(model, models.tokens(seed)).mean() for seed in range(3)]
    assert asked.sizes == [0] * 3 * SUBLAYERS
    losses.pop()
    gc.collect()
    assert asked.sizes == [0] * 2 * SUBLAYERS + [None] * SUBLAYERS
    for loss, (value, of_one) in zip(losses, expected, strict=True):
        model.zero_grad()
        loss.backward()
        ours = loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert_same_bits(ours, (value, of_one))


def test_mappings_without_gradients_keep_their_input(asked: Asked) -> None:
    """A model of which only the sublayers are trained, from frozen streams on: no node of the first mappings."""
    results = []
    for mhc in (RECOMPUTE, {}):
        model = build(mhc, **SMALL)
        model.embedding.requires_grad_(False)
        for module in model.modules():
            if isinstance(module, HyperConnectionInput):
                module.requires_grad_(False)
        results.append(gradients(model))
    assert asked.freed == [False, True, True, True]
    assert_same_bits(*results)


def test_backend_without_recompute_is_not_asked(asked: Asked) -> None:
    gradients(build({}, **SMALL))
    gradients(models.build(models.make_config(**SMALL), MHCConfig(recompute=True)))  # the reference, on a CPU
    assert asked.freed == []
