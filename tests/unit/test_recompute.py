"""--mhc-recompute in Megatron models: the same bits with it and without, and with Megatron's own recompute beside it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from mhc_kernels.fused import functions
from mhc_megatron import MHCConfig
from mhc_megatron.residual import recompute
from mhc_megatron.residual.input import HyperConnectionInput
from tests import models
from tests.unit.test_chain import gradients

pytestmark = pytest.mark.usefixtures("one_process")

MHC: dict[str, Any] = {"init": "paper", "init_alpha": 0.5, "backend": "triton", "sinkhorn_iterations": 2}


def build(mhc: dict[str, Any], **settings: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return models.build(models.make_config(**settings), MHCConfig(**MHC, **mhc))


def assert_same_bits(ours: tuple[float, dict], expected: tuple[float, dict]) -> None:
    assert ours[0] == expected[0]
    assert ours[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert torch.equal(ours[1][name], gradient), name


@pytest.fixture
def mixes(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """How many streams were computed again."""
    counts: Counter = Counter()
    original = functions._mix_again

    def counted(*arguments: Any) -> torch.Tensor:
        counts["again"] += 1
        return original(*arguments)

    monkeypatch.setattr(functions, "_mix_again", counted)
    return counts


@pytest.mark.parametrize(
    ("kind", "sublayers", "again"),
    [("dense", 3, 5), ("moe", 8, 7), ("mla", 0, 4)],  # 7 boundaries and a mix; automatic: 2
)
def test_same_bits(kind: str, sublayers: int, again: int, mixes: Counter) -> None:
    settings = models.MODELS[kind]
    ours = gradients(build({"recompute": True, "recompute_sublayers": sublayers}, **settings))
    assert mixes["again"] == again
    assert_same_bits(ours, gradients(build({}, **settings)))
    assert mixes["again"] == again


@pytest.mark.parametrize("modules", [["core_attn"], ["moe"], ["mlp"], ["mla_up_proj", "shared_experts"]], ids=str)
def test_beside_selective_recompute(modules: list[str], mixes: Counter) -> None:
    kind = "mla" if "mla_up_proj" in modules else "moe"
    settings = {**models.MODELS[kind], "recompute_granularity": "selective", "recompute_modules": modules}
    ours = gradients(build({"recompute": True, "recompute_sublayers": 2}, **settings))
    assert mixes["again"] == 4
    assert_same_bits(ours, gradients(build({}, **settings)))


def test_dropout(mixes: Counter) -> None:
    losses = []
    for mhc in ({"recompute": True}, {}):
        model = build(mhc, **models.DENSE, hidden_dropout=0.2)
        torch.manual_seed(3)
        losses.append(gradients(model.train()))
    assert mixes["again"] > 0
    assert_same_bits(*losses)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpoint_around_a_layer(reentrant: bool, mixes: Counter) -> None:
    results = []
    for mhc in ({"recompute": True, "recompute_sublayers": 4}, {}):
        model = build(mhc, **models.DENSE)
        layer = model.decoder.layers[1]
        forward = layer.forward

        def checkpointed(hidden_states: torch.Tensor, forward: Any = forward, **kwargs: Any) -> Any:
            return torch.utils.checkpoint.checkpoint(
                lambda hidden: forward(hidden, **kwargs), hidden_states, use_reentrant=reentrant
            )

        layer.forward = checkpointed
        results.append(gradients(model))
    assert mixes["again"] > 0
    assert_same_bits(*results)


def test_a_hook_cuts_the_chain(mixes: Counter) -> None:
    results = []
    for mhc in ({"recompute": True, "recompute_sublayers": 8}, {}):
        model = build(mhc, **models.DENSE)
        model.decoder.layers[1].register_forward_hook(lambda module, inputs, output: (output[0] * 1.5, *output[1:]))
        results.append(gradients(model))
    # Four boundaries before the cut (nobody takes what the last one prepared), three and a mix after it.
    assert mixes["again"] == 4 + 3
    assert_same_bits(*results)


def test_microbatches_of_a_schedule(mixes: Counter) -> None:
    results = []
    for mhc in ({"recompute": True}, {}):
        model = build(mhc, **models.DENSE, num_layers=2)
        config = model.config
        losses = models.one_step([model], config)
        results.append((losses, {name: p.main_grad.clone() for name, p in model.named_parameters()}))
    assert mixes["again"] == 2 * models.MICROBATCHES
    assert_same_bits(*results)


def test_evaluation_starts_no_block(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build({"recompute": True}, **models.DENSE, num_layers=1)
    monkeypatch.setattr("mhc_megatron.residual.input.recompute", None)
    with torch.no_grad():
        models.forward(model, models.tokens(0))


@pytest.mark.parametrize("sublayers", [2, 8])
def test_frozen_layers(sublayers: int, mixes: Counter) -> None:
    results = []
    for mhc in ({"recompute": True, "recompute_sublayers": sublayers}, {}):
        model = build(mhc, **models.DENSE)
        for frozen in (model.embedding, *model.decoder.layers[:2]):
            frozen.requires_grad_(False)
        results.append(gradients(model))
    assert mixes["again"] > 0
    assert_same_bits(*results)


@pytest.mark.parametrize("overrides", [{"recompute_granularity": "full"}, {"backend": "auto"}], ids=str)
def test_says_where_it_does_not_apply(
    overrides: dict[str, Any], mixes: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(recompute, "_report", said.append)
    backend = overrides.pop("backend", "triton")
    full = {"recompute_method": "uniform", "recompute_num_layers": 1} if overrides else {}
    config = models.make_config(**models.DENSE, **overrides, **full)
    model = models.build(config, MHCConfig(**{**MHC, "backend": backend}, recompute=True))
    assert len(set(said)) == 1
    assert said[0].startswith("off: ")
    assert not any(m._recomputes for m in model.modules() if isinstance(m, HyperConnectionInput))
    gradients(model.train())
    assert mixes["again"] == 0


def test_automatic_length_needs_the_least_memory() -> None:
    for sublayers in range(1, 40):
        for in_flight in (1, 2, 7):
            # Block by block: the kept streams of all, and what the backward of one holds.
            needs = [in_flight * len(range(0, sublayers, length)) + length for length in range(1, sublayers + 1)]
            assert needs[recompute.automatic_length(sublayers, in_flight) - 1] == min(needs)
    # About the square root of L times the microbatches in flight.
    assert recompute.automatic_length(64, 1) == 8
    assert recompute.automatic_length(64, 4) == 16


@pytest.mark.parametrize(
    ("stages", "rank", "chunks", "group", "expected"),
    [(1, 0, None, None, 1), (4, 0, None, None, 4), (4, 3, None, None, 1), (2, 0, 2, None, 5), (2, 1, 2, 4, 5)],
)
def test_microbatches_in_flight(
    stages: int, rank: int, chunks: int | None, group: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Warm-up of 1F1B: the stages behind; interleaved: twice them and a group for every further chunk. And one more."""
    for name, value in (("model_parallel_world_size", stages), ("model_parallel_rank", rank)):
        monkeypatch.setattr(recompute.parallel_state, f"get_pipeline_{name}", lambda value=value: value)
    monkeypatch.setattr(recompute.parallel_state, "get_virtual_pipeline_model_parallel_world_size", lambda: chunks)
    assert recompute.microbatches_in_flight(group) == expected


def test_bad_values() -> None:
    with pytest.raises(ValueError, match=r"recompute_sublayers must be an integer >= 0, got -1"):
        MHCConfig(recompute=True, recompute_sublayers=-1)
    with pytest.raises(ValueError, match=r"recompute_sublayers 3 has no effect without MHCConfig.recompute"):
        MHCConfig(recompute_sublayers=3)
    with pytest.raises(ValueError, match=r"recompute has no effect with MHCConfig.backend 'reference'"):
        MHCConfig(recompute=True, backend="reference")
