"""The fused boundary in Megatron layers: the same numbers as the reference, and correct wherever the chain is cut."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from mhc_megatron import MHCConfig
from mhc_megatron.residual.hyper_connection import HyperConnection
from mhc_megatron.residual.input import HyperConnectionInput
from tests import models

pytestmark = pytest.mark.usefixtures("one_process")

MHC = {"init": "paper", "init_alpha": 0.5}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """How often a boundary was computed in one step, and how often its second half alone."""
    counts: Counter = Counter()
    for name in ("boundary", "connect"):
        original = getattr(HyperConnection, name)

        def counted(self: Any, *args: Any, _name: str = name, _original: Any = original) -> Any:
            counts[_name] += 1
            return _original(self, *args)

        monkeypatch.setattr(HyperConnection, name, counted)
    return counts


def gradients(model: torch.nn.Module, seed: int = 0) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = models.forward(model, models.tokens(seed)).mean()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: tuple[float, dict], expected: tuple[float, dict], tolerance: float = 1e-5) -> None:
    assert ours[0] == pytest.approx(expected[0], rel=tolerance)
    assert ours[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        # The second term is for sums that cancel (alpha): their terms are about 1e-2.
        assert (ours[1][name] - gradient).norm() <= tolerance * gradient.norm() + 1e-7, name


@pytest.mark.parametrize("kind", ["dense", "moe", "mla"])
def test_interpreted_kernels_train_a_megatron_model(kind: str, calls: Counter) -> None:
    """Stock Megatron around our Triton kernels: loss and every gradient equal the reference's."""
    config = models.make_config(**models.MODELS[kind], hidden_size=64)
    model = models.build(config, MHCConfig(**MHC, backend="triton"))
    ours = gradients(model)
    sublayers = 2 * config.num_layers
    assert calls == {"connect": 1, "boundary": sublayers - 1}
    torch.manual_seed(0)
    reference = models.build(config, MHCConfig(**MHC, backend="reference"))
    reference.load_state_dict(model.state_dict())
    assert_same(ours, gradients(reference))


class TestCuts:
    """Each changes what arrives at a sublayer; all of it is compared with a model whose chain was never linked."""

    def build(self, **overrides: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
        linked, unlinked = (
            models.build(models.make_config(**models.MOE, **overrides), MHCConfig(**MHC)) for _ in range(2)
        )
        unlinked.load_state_dict(linked.state_dict())
        for module in unlinked.modules():
            if isinstance(module, HyperConnectionInput):
                module._successor = ()
        return linked, unlinked

    def test_linked_equals_unlinked(self, calls: Counter) -> None:
        linked, unlinked = self.build()
        ours = gradients(linked)
        assert calls["boundary"] == 2 * linked.config.num_layers - 1
        calls.clear()
        expected = gradients(unlinked)
        assert calls == {"connect": 2 * linked.config.num_layers}
        assert_same(ours, expected)

    def test_hook_replaces_the_streams(self, calls: Counter) -> None:
        models_ = self.build()
        for model in models_:
            layer = model.decoder.layers[0]
            layer.register_forward_hook(lambda module, inputs, output: (output[0] * 1.5, *output[1:]))
        assert_same(gradients(models_[0]), gradients(models_[1]))
        assert calls["connect"] > 2  # after the cut as well

    def test_hook_changes_the_streams_in_place(self) -> None:
        models_ = self.build()
        for model in models_:
            layer = model.decoder.layers[0]

            def change(module: Any, inputs: Any, output: Any) -> None:
                with torch.no_grad():
                    output[0].mul_(1.5)

            layer.register_forward_hook(change)
        with torch.no_grad():
            ours, expected = (models.forward(model, models.tokens(0)) for model in models_)
        torch.testing.assert_close(ours, expected)

    @pytest.mark.parametrize("method", ["uniform", "block"])
    def test_full_recompute(self, method: str, calls: Counter) -> None:
        config = {"recompute_granularity": "full", "recompute_method": method, "recompute_num_layers": 1}
        linked, unlinked = self.build(**config)
        assert_same(gradients(linked.train()), gradients(unlinked.train()))
        plain, _ = self.build()
        plain.load_state_dict(linked.state_dict())
        assert_same(gradients(linked.train()), gradients(plain.train()))

    def test_activation_checkpoint_around_a_layer(self) -> None:
        """Not Megatron's own, which the chain knows of: its output is the inner tensor with another history."""
        from torch.utils.checkpoint import checkpoint

        models_ = self.build()
        for model in models_:
            layer = model.decoder.layers[1]

            def checkpointed(hidden_states: Any, _inner: Any = layer.forward, **kwargs: Any) -> Any:
                return checkpoint(lambda hidden: _inner(hidden, **kwargs), hidden_states, use_reentrant=True)

            layer.forward = checkpointed
        assert_same(gradients(models_[0]), gradients(models_[1]))

    def test_evaluation(self, calls: Counter) -> None:
        linked, unlinked = self.build()
        with torch.no_grad():
            ours, expected = (models.forward(model.eval(), models.tokens(0)) for model in (linked, unlinked))
        torch.testing.assert_close(ours, expected)
        assert calls["boundary"] == 2 * linked.config.num_layers - 1

    def test_two_models_do_not_mix(self) -> None:
        """Built one after the other; and a model whose layers were built out of order is not linked wrongly."""
        first, second = (models.build(models.make_config(**models.MOE), MHCConfig(**MHC)) for _ in range(2))
        for model in (first, second):
            readers = [m for m in model.modules() if isinstance(m, HyperConnectionInput)]
            for reader, following in zip(readers, [*readers[1:], None], strict=True):
                assert reader._successor == ((following,) if following is not None else ())
