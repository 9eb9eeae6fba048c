"""The fused boundary in Megatron layers: the same numbers as the reference, and correct wherever the chain is cut."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch

from mhc_megatron import MHCConfig
from mhc_megatron.residual.hyper_connection import HyperConnection
from mhc_megatron.residual.input import HyperConnectionInput
from tests import models

pytestmark = pytest.mark.usefixtures("one_process")

MHC = {"init": "paper", "init_alpha": 0.5, "sinkhorn_iterations": 3}  # interpreted: iterations cost seconds


def gradients(model: torch.nn.Module, seed: int = 0) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = models.forward(model, models.tokens(seed)).mean()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: tuple[float, dict], expected: tuple[float, dict], tolerance: float = 1e-5) -> None:
    assert ours[0] == pytest.approx(expected[0], rel=tolerance)
    assert ours[1].keys() == expected[1].keys()
    # alpha's is a sum over all tokens: in the first sublayer (equal streams before a norm) it cancels to 1 / 100 of the other
    # layers', and is compared in units of the largest.
    of_alpha = max((g.norm() for name, g in expected[1].items() if name.endswith(".alpha")), default=None)
    for name, gradient in expected[1].items():
        size = of_alpha if name.endswith(".alpha") else gradient.norm()
        assert (ours[1][name] - gradient).norm() <= tolerance * size, name


@pytest.mark.parametrize("kind", ["dense", "moe", "mla"])
def test_interpreted_kernels_train_a_megatron_model(kind: str, hyper_connection_calls: Counter) -> None:
    """Stock Megatron around our Triton kernels: loss and every gradient equal the reference's."""
    config = models.make_config(**models.MODELS[kind], hidden_size=64)
    model = models.build(config, MHCConfig(**MHC, backend="triton"))
    ours = gradients(model)
    sublayers = 2 * config.num_layers
    assert hyper_connection_calls == {"connect": 1, "boundary": sublayers - 1}
    torch.manual_seed(0)
    reference = models.build(config, MHCConfig(**MHC, backend="reference"))
    reference.load_state_dict(model.state_dict())
    assert_same(ours, gradients(reference))


def test_layers_of_multi_token_prediction_are_chains_of_their_own(hyper_connection_calls: Counter) -> None:
    """Interpreted kernels: gradients equal the reference's, and nothing is computed for a sublayer that does not come next."""
    config = models.make_config(**models.DENSE, num_layers=2, hidden_size=64, mtp_num_layers=2)
    model = models.build(config, MHCConfig(**MHC, backend="triton"))
    ours = gradients(model)
    assert hyper_connection_calls == {"connect": 3, "boundary": 3 + 1 + 1}
    reference = models.build(config, MHCConfig(**MHC, backend="reference"))
    reference.load_state_dict(model.state_dict())
    assert_same(ours, gradients(reference))


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_module_hooks_run_before_parameters_are_read(backend: str) -> None:
    """Megatron waits for overlapped parameter gathers in forward pre-hooks: fused or not, every hyper-connection is called."""
    model = models.build(models.make_config(**models.DENSE, num_layers=2), MHCConfig(**MHC, backend=backend))
    called: Counter = Counter()
    names = {module: name for name, module in model.named_modules() if isinstance(module, HyperConnection)}
    for module in names:
        module.register_forward_pre_hook(lambda module, arguments: called.update([names[module]]))
    models.forward(model, models.tokens(0))
    assert called == Counter(names.values())


class TestNorm:
    """A plain RMSNorm goes into the kernels that compute its input."""

    def build(self) -> tuple[torch.nn.Module, list[torch.nn.Module]]:
        config = models.make_config(**models.DENSE, num_layers=2)
        model = models.build(config, MHCConfig(**MHC, backend="triton"))
        norms = [m.norm for m in model.modules() if isinstance(m, HyperConnectionInput)]
        assert all(type(norm) is torch.nn.RMSNorm for norm in norms)
        with torch.no_grad():
            for norm in norms:
                norm.weight.uniform_(0.5, 1.5)
        return model, norms

    def test_equals_the_module(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, norms = self.build()
        called: Counter = Counter()
        original = torch.nn.RMSNorm.forward

        def counted(self: Any, u: torch.Tensor) -> torch.Tensor:
            called[self] += 1
            return original(self, u)

        monkeypatch.setattr(torch.nn.RMSNorm, "forward", counted)
        ours = gradients(model)
        assert not any(called[norm] for norm in norms)
        for norm in norms:  # a hook of somebody's wants the module to be called
            norm.register_forward_hook(lambda module, inputs, output: None)
        expected = gradients(model)
        assert all(called[norm] == 1 for norm in norms)
        assert_same(ours, expected)

    def test_waits_for_an_overlapped_gather(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Megatron's hooks, under a gather that puts a bucket's parameters in place when it is waited for, and not before."""
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup

        model, _ = self.build()
        expected = models.forward(model, models.tokens(0))
        overlap = DistributedDataParallelConfig(
            use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True, bucket_size=1
        )
        ddp = DistributedDataParallel(models.make_config(**models.DENSE, num_layers=2), overlap, model)
        gathered = {parameter: parameter.detach().clone() for parameter in ddp.parameters()}

        def wait(self: Any, **kwargs: Any) -> None:
            for parameter in self.params:
                parameter.data.copy_(gathered[parameter])

        monkeypatch.setattr(_ParamAndGradBucketGroup, "finish_param_sync", wait)
        for parameter in gathered:
            parameter.data.fill_(math.nan)
        assert torch.equal(models.forward(ddp, models.tokens(0)), expected)

    def test_unknown_hook_before_it_is_called(self) -> None:
        model, norms = self.build()
        called: Counter = Counter()
        for norm in norms:
            norm.register_forward_pre_hook(lambda module, inputs: called.update([module]))
        models.forward(model, models.tokens(0))
        assert called == Counter(norms)


def test_reference_computes_nothing_twice(hyper_connection_calls: Counter) -> None:
    """Its boundary would be two steps: no link."""
    config = models.make_config(**models.MOE)
    gradients(models.build(config, MHCConfig(**MHC)))
    assert hyper_connection_calls == {"connect": 2 * config.num_layers}


class TestCuts:
    """Each changes what arrives at a sublayer; all of it is compared with a model whose chain was never linked.

    With the (interpreted) kernels: only they link.
    """

    LAYERS = 3

    def build(self, **overrides: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
        settings = {**models.DENSE, "num_layers": self.LAYERS, **overrides}
        linked, unlinked = (
            models.build(models.make_config(**settings), MHCConfig(**MHC, backend="triton")) for _ in range(2)
        )
        unlinked.load_state_dict(linked.state_dict())
        for module in unlinked.modules():
            if isinstance(module, HyperConnectionInput):
                module._successor = ()
        return linked, unlinked

    def test_linked_equals_unlinked(self, hyper_connection_calls: Counter) -> None:
        linked, unlinked = self.build()
        ours = gradients(linked)
        assert hyper_connection_calls == {"connect": 1, "boundary": 2 * self.LAYERS - 1}
        hyper_connection_calls.clear()
        expected = gradients(unlinked)
        assert hyper_connection_calls == {"connect": 2 * self.LAYERS}
        assert_same(ours, expected)

    def test_hook_replaces_the_streams(self, hyper_connection_calls: Counter) -> None:
        models_ = self.build()
        for model in models_:
            layer = model.decoder.layers[0]
            layer.register_forward_hook(lambda module, inputs, output: (output[0] * 1.5, *output[1:]))
        ours = gradients(models_[0])
        assert hyper_connection_calls == {"connect": 2, "boundary": 2 * self.LAYERS - 1}  # after the cut as well
        assert_same(ours, gradients(models_[1]))

    def test_hook_changes_the_streams_in_place(self, hyper_connection_calls: Counter) -> None:
        """In evaluation the sublayer after it starts anew; in training PyTorch refuses to go backward over it."""
        models_ = self.build()
        for model in models_:
            layer = model.decoder.layers[0]

            def change(module: Any, inputs: Any, output: Any) -> None:
                with torch.no_grad():
                    output[0].mul_(1.5)

            layer.register_forward_hook(change)
        with torch.no_grad():
            ours = models.forward(models_[0], models.tokens(0))
            assert hyper_connection_calls["connect"] == 2
            torch.testing.assert_close(ours, models.forward(models_[1], models.tokens(0)))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradients(models_[0])

    @pytest.mark.parametrize("method", ["uniform", "block"])
    def test_full_recompute(self, method: str) -> None:
        config = {"recompute_granularity": "full", "recompute_method": method, "recompute_num_layers": 1}
        recomputed, _ = self.build(**config)
        plain, _ = self.build()
        plain.load_state_dict(recomputed.state_dict())
        assert_same(gradients(recomputed.train()), gradients(plain.train()))

    @pytest.mark.parametrize("reentrant", [True, False])
    @pytest.mark.parametrize("layers", [(1,), (0, 1, 2)])
    def test_activation_checkpoint_around_layers(self, reentrant: bool, layers: tuple[int, ...]) -> None:
        """PyTorch's own, which the chain does not know of."""
        from torch.utils.checkpoint import checkpoint

        checkpointed, plain = self.build()
        for k in layers:
            layer = checkpointed.decoder.layers[k]

            def forward(hidden_states: Any, _inner: Any = layer.forward, **kwargs: Any) -> Any:
                return checkpoint(lambda hidden: _inner(hidden, **kwargs), hidden_states, use_reentrant=reentrant)

            layer.forward = forward
        assert_same(gradients(checkpointed), gradients(plain))

    def test_evaluation_keeps_no_graph(self, hyper_connection_calls: Counter) -> None:
        """Megatron runs every bias-dropout-add with gradients enabled, in evaluation as well."""
        linked, unlinked = self.build()
        seen: list[torch.Tensor] = []
        for layer in linked.decoder.layers:
            layer.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
        with torch.no_grad():
            ours = models.forward(linked.eval(), models.tokens(0))
            assert hyper_connection_calls == {"connect": 1, "boundary": 2 * self.LAYERS - 1}
            torch.testing.assert_close(ours, models.forward(unlinked.eval(), models.tokens(0)))
        assert len(seen) == self.LAYERS
        assert not any(hidden.requires_grad for hidden in seen)

    @pytest.mark.parametrize("backend", ["triton", "reference"])
    def test_inference_mode(self, backend: str) -> None:
        config = models.make_config(**models.DENSE, num_layers=2)
        model = models.build(config, MHCConfig(**MHC, backend=backend)).eval()
        with torch.no_grad():
            expected = models.forward(model, models.tokens(0))
        with torch.inference_mode():
            torch.testing.assert_close(models.forward(model, models.tokens(0)), expected)

    def test_two_models_do_not_mix(self) -> None:
        """Built one after the other, each is linked to itself."""
        first, second = (models.build(models.make_config(**models.MOE), MHCConfig(**MHC)) for _ in range(2))
        for model in (first, second):
            readers = [m for m in model.modules() if isinstance(m, HyperConnectionInput)]
            for reader, following in zip(readers, [*readers[1:], None], strict=True):
                assert reader._successor == ((following,) if following is not None else ())
