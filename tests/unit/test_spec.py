"""to_mhc_spec against stock Megatron: the same function at step 0, and another one once it trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlock
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_layer import TransformerLayer

from mhc_kernels import mappings
from mhc_megatron import MHCConfig, to_mhc_spec
from mhc_megatron.residual.input import HyperConnectionInput
from tests import models
from tests.unit.kernels.test_reference import sinkhorn_by_definition

pytestmark = pytest.mark.usefixtures("one_process")

PRESERVING = {
    "paper": MHCConfig(),
    "deepseek-v4": MHCConfig(profile="deepseek-v4"),
    "hc": MHCConfig(mode="hc"),
    "one stream": MHCConfig(num_streams=1),
    "seven streams": MHCConfig(num_streams=7),
}
KINDS = {
    **models.MODELS,
    "mtp": {**models.MOE, "mtp_num_layers": 2},
    "mtp, one layer for all depths": {**models.DENSE, "mtp_num_layers": 2, "mtp_use_repeated_layer": True},
}


def stock_and_mhc(mhc: MHCConfig, **settings: Any) -> tuple[GPTModel, GPTModel]:
    """A stock model and an mHC model with the same shared parameters."""
    stock = models.build(models.make_config(**settings), None)
    ours = models.build(models.make_config(**settings), mhc)
    missing = ours.load_state_dict(stock.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert all("hyper_connection" in key for key in missing.missing_keys)
    return stock, ours


def stock_name(name: str) -> str:
    return name.replace("layernorm.norm.", "layernorm.")


@pytest.mark.parametrize("mhc", PRESERVING.values(), ids=PRESERVING)
@pytest.mark.parametrize("kind", KINDS)
def test_preserving_init_equals_stock(kind: str, mhc: MHCConfig) -> None:
    """Loss, and gradients of shared parameters, in float32 to 1e-5 (deepseek-v4: its eps of 1e-6 a sublayer, 5e-5).
    With MTP its losses are part of the gradients."""
    tolerance = 5e-5 if mhc.profile == "deepseek-v4" else 1e-5
    stock, ours = stock_and_mhc(mhc, **KINDS[kind])
    ids = models.tokens(0)
    expected, loss = models.forward(stock, ids), models.forward(ours, ids)
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=0)
    expected.mean().backward()
    loss.mean().backward()
    gradients = {stock_name(name): p.grad for name, p in ours.named_parameters()}
    for name, parameter in stock.named_parameters():
        error = (gradients[name] - parameter.grad).norm() / parameter.grad.norm()
        assert error < tolerance, f"{name}: {error:.1e}"


def test_dropout_and_biases_equal_stock() -> None:
    """The same random numbers for dropout, the bias added before it."""
    stock, ours = stock_and_mhc(MHCConfig(), **models.DENSE, hidden_dropout=0.3)
    for model in (stock, ours):
        for name, parameter in model.named_parameters():
            if name.endswith("bias") and "hyper" not in name:
                parameter.data.normal_(generator=torch.Generator().manual_seed(len(stock_name(name))))
    losses = []
    for model in (stock, ours):
        torch.manual_seed(5)
        losses.append(models.forward(model.train(), models.tokens(0)))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    torch.manual_seed(6)
    assert (models.forward(ours, models.tokens(0)) - losses[0]).abs().max() > 1e-2, "dropout does nothing"
    ours.eval(), stock.eval()
    torch.testing.assert_close(
        models.forward(ours, models.tokens(0)), models.forward(stock, models.tokens(0)), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_lone_layer_spec(kind: str) -> None:
    """A layer ModuleSpec: Megatron adds the final norm itself, the last layer contracts the streams."""
    settings = {**models.MODELS[kind], "moe_layer_freq": 1} if kind == "moe" else models.MODELS[kind]
    spec = get_gpt_layer_local_spec(num_experts=settings.get("num_moe_experts"), normalization="RMSNorm")

    def make(layer: ModuleSpec) -> GPTModel:
        config = models.make_config(**settings)
        return GPTModel(config, layer, models.VOCABULARY, models.SEQUENCE, position_embedding_type="rope")

    stock, ours = make(spec), make(to_mhc_spec(spec, MHCConfig()))
    ours.load_state_dict(stock.state_dict(), strict=False)
    ids = models.tokens(0)
    torch.testing.assert_close(models.forward(ours, ids), models.forward(stock, ids), rtol=1e-5, atol=0)


def test_mtp_layers_of_a_converted_block() -> None:
    """``get_gpt_mtp_block_spec`` of an mHC block spec, and of a stock one converted afterwards: the same model."""
    settings = {**models.MOE, "mtp_num_layers": 2}
    expected = models.build(models.make_config(**settings), MHCConfig(init="paper"))
    config = models.make_config(**settings)
    block = to_mhc_spec(models.block_spec(config, te=False), MHCConfig(init="paper"))
    mtp = get_gpt_mtp_block_spec(config, block, use_transformer_engine=False)
    model = GPTModel(
        config,
        block,
        models.VOCABULARY,
        models.SEQUENCE,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        mtp_block_spec=mtp,
    )
    model.load_state_dict(expected.state_dict())
    for of in (model, expected):
        models.forward(of, models.tokens(0)).mean().backward()
    gradients = dict(expected.named_parameters())
    assert any("mtp" in name and "hyper_connection" in name for name in gradients)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, gradients[name].grad), name
    with pytest.raises(ValueError, match="already"):
        to_mhc_spec(mtp, MHCConfig())
    again = to_mhc_spec(ModuleSpec(MultiTokenPredictionBlock, submodules=stock_mtp(config)), MHCConfig())
    inner = again.submodules.layer_specs[0].submodules.mtp_model_layer
    assert inner.module is block.layer_specs[-1].module


def test_learned_exit_of_mtp_layers() -> None:
    """Each has its own, in float32, in the checkpoint; it learns."""
    config = models.make_config(**models.DENSE, mtp_num_layers=2, bf16=True, params_dtype=torch.bfloat16)
    model = models.build(config, MHCConfig(profile="deepseek-v4", init="paper"))
    keys = models.sharded_state_dict([model])["model0"]
    model = Float16Module(config, model)
    models.forward(model, models.tokens(0)).mean().backward()
    for number in range(2):
        found = {
            name.rpartition(".")[2]: p
            for name, p in model.named_parameters()
            if f"mtp.layers.{number}.mtp_model_layer.exit_hyper_connection." in name
        }
        assert found.keys() == {"phi", "alpha", "bias"}
        for name, parameter in found.items():
            assert parameter.dtype == torch.float32
            assert parameter.grad.norm() > 0
            assert any(f"mtp.layers.{number}." in key and f"exit_hyper_connection.{name}" in key for key in keys)


def stock_mtp(config: Any) -> Any:
    return get_gpt_mtp_block_spec(config, models.block_spec(config, te=False), use_transformer_engine=False)


def test_block_module_spec_and_layer_class() -> None:
    config = models.make_config(**models.MOE)
    block = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    converted = to_mhc_spec(ModuleSpec(TransformerBlock, submodules=block), MHCConfig())
    assert converted.module is TransformerBlock
    assert all(issubclass(layer.module, TransformerLayer) for layer in converted.submodules.layer_specs)
    again = to_mhc_spec(block, MHCConfig())
    assert again.layer_specs[0].module is converted.submodules.layer_specs[0].module


def test_input_is_not_modified() -> None:
    block = get_gpt_decoder_block_spec(models.make_config(**models.MOE), use_transformer_engine=False)

    def contents() -> list[Any]:
        return [block.layer_norm, *((s, s.module, dict(s.params), dict(vars(s.submodules))) for s in block.layer_specs)]

    before = contents()
    to_mhc_spec(block, MHCConfig())
    assert before == contents()


def test_errors() -> None:
    layer = get_gpt_layer_local_spec()
    with pytest.raises(ValueError, match="already"):
        to_mhc_spec(to_mhc_spec(layer, MHCConfig()), MHCConfig())
    with pytest.raises(ValueError, match="pass a block spec"):
        to_mhc_spec(layer, MHCConfig(profile="deepseek-v4"))
    with pytest.raises(TypeError, match="TransformerLayer specs"):
        to_mhc_spec(ModuleSpec(torch.nn.Linear), MHCConfig())
    with pytest.raises(TypeError, match="got str"):
        to_mhc_spec("spec", MHCConfig())
    for settings, message in (
        ({"fp32_residual_connection": True}, "fp32_residual_connection"),
        ({"recompute_granularity": "selective", "recompute_modules": ["layernorm"]}, "take 'layernorm' out"),
    ):
        with pytest.raises(ValueError, match=message):
            models.build(models.make_config(**settings), MHCConfig())
    apart: dict[str, Any] = {"pipeline_model_parallel_size": 2, "pipeline_dtype": torch.float32}
    apart["pipeline_model_parallel_layout"] = "Ettt|tmL"
    models.build(models.make_config(**apart, mtp_num_layers=1), MHCConfig())
    for number, layout in ((1, "Etttt|mL"), (0, "Etttt|L")):
        apart["pipeline_model_parallel_layout"] = layout
        with pytest.raises(
            ValueError, match=rf"mtp_num_layers \({number}\): the last pipeline chunk has no decoder layer"
        ):
            models.build(models.make_config(**apart, mtp_num_layers=number), MHCConfig())
    with pytest.raises(ValueError, match="one MHCConfig"):
        config = models.make_config()
        models.build(config, MHCConfig(num_streams=2))
        models.build(config, MHCConfig(num_streams=4))


@pytest.mark.parametrize("mode", ["mhc", "hc"])
def test_streams_part_and_mappings_move(mode: str) -> None:
    """Symmetry breaks: after some steps the streams differ and all three mappings have left their start."""
    model = models.build(models.make_config(**models.MOE), MHCConfig(mode=mode))
    seen: dict[int, tuple] = {}

    def record(module: HyperConnectionInput, inputs: tuple, output: tuple) -> None:
        x, hc = output[1].x.detach().unflatten(-1, (4, -1)), module.hyper_connection
        maps = mappings(x, hc.phi.detach(), hc.alpha.detach(), hc.bias.detach(), mode=mode)
        seen[id(module)] = (x, *maps)

    connections = [m for m in model.modules() if isinstance(m, HyperConnectionInput)]
    for connection in connections:
        connection.register_forward_hook(record)
    models.forward(model, models.tokens(0))
    start = dict(seen)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = models.forward(model, models.tokens(0)).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    models.forward(model, models.tokens(0))
    for k, connection in enumerate(connections):
        x, *maps = seen[id(connection)]
        if k == 0:  # the first sublayer reads copies of the embedding: no matrix with rows that sum to 1 changes them
            maps = maps[:2]
        else:
            assert (x - x.mean(-2, keepdim=True)).norm() / x.norm() > 1e-2
        for before, after in zip(start[id(connection)][1:], maps, strict=False):
            assert (after - before).abs().max() > 1e-3
            assert after.flatten(2).std(dim=(0, 1)).max() > 1e-5, "the mapping does not depend on the token"


class TestBf16Model:
    @pytest.fixture
    def model(self) -> Float16Module:
        config = models.make_config(**models.MOE, bf16=True, params_dtype=torch.bfloat16)
        return Float16Module(config, models.build(config, MHCConfig(init="paper", init_alpha=0.5)))

    def test_parameters_stay_float32(self, model: Float16Module) -> None:
        for name, parameter in model.named_parameters():
            ours = "hyper_connection" in name
            assert parameter.dtype == (torch.float32 if ours else torch.bfloat16), name
        fresh = models.build(models.make_config(), MHCConfig(init="paper"))
        phi = fresh.decoder.layers[0].input_layernorm.hyper_connection.phi
        exact = phi.detach().clone()
        fresh.half().bfloat16().to(torch.float16)
        assert torch.equal(phi, exact), "a cast to 16 bits and back has lost bits"

    def test_loss_near_float32(self, model: Float16Module) -> None:
        single = models.build(models.make_config(**models.MOE), MHCConfig(init="paper", init_alpha=0.5))
        single.load_state_dict({k: v.float() for k, v in model.module.state_dict().items() if v is not None})
        ids = models.tokens(0)
        expected = models.forward(single, ids).mean()
        assert abs(models.forward(model, ids).mean() - expected) / expected < 1e-2

    @pytest.mark.parametrize("scale", [1, 50, 1e4])
    def test_manifold(self, model: Float16Module, scale: float) -> None:
        """In the bf16 model itself: rows sum to 1, the matrix is the definition's, nothing overflows."""
        connection = model.module.decoder.layers[2].pre_mlp_layernorm.hyper_connection
        g = torch.Generator().manual_seed(0)
        x = torch.randn(64, 2, 4, 32, generator=g).bfloat16()
        with torch.no_grad():
            # Logits are alpha * mix + b: all of the scale in b, a token's own part on top.
            sign = torch.sign(torch.randn(16, generator=g))
            connection.bias[8:] = torch.rand(16, generator=g) if scale == 1 else scale * sign
            connection.alpha.fill_(0.0)
            pre, post, res = mappings(x, connection.phi, connection.alpha, connection.bias)
        for mapping in (pre, post, res):
            assert mapping.dtype == torch.float32
            assert torch.isfinite(mapping).all()
        assert (res.sum(-1) - 1).abs().max() < 1e-6
        if scale <= 50:
            expected = sinkhorn_by_definition(connection.bias[8:].unflatten(0, (4, 4)), 20)
            assert (res.double() - expected).abs().max() < 1e-5
        if scale <= 1:
            assert (res.sum(-2) - 1).abs().max() < 1e-4


@pytest.mark.parametrize("recompute", [{}, {"recompute_modules": ["core_attn", "mlp"]}, {"recompute_modules": ["moe"]}])
def test_selective_recompute_changes_nothing(recompute: dict[str, Any]) -> None:
    settings = {"recompute_granularity": "selective", **recompute} if recompute else {}
    mhc = MHCConfig(init="paper", init_alpha=0.5)
    plain = models.build(models.make_config(**models.MOE), mhc)
    ours = models.build(models.make_config(**models.MOE, **settings), mhc)
    ours.load_state_dict(plain.state_dict())
    for model in (plain, ours):
        models.forward(model, models.tokens(0)).mean().backward()
    for (name, expected), parameter in zip(plain.named_parameters(), ours.parameters(), strict=True):
        assert torch.equal(parameter.grad, expected.grad), name
