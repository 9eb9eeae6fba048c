"""mHC around Transformer Engine modules, on a GPU, against the reference in float64 and against stock Megatron."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mhc_kernels import reference
from mhc_megatron import MHCConfig
from tests import models

pytestmark = pytest.mark.gpu
pytest.importorskip("transformer_engine.pytorch", reason="needs Transformer Engine")

MHC = MHCConfig(init="paper", init_alpha=0.5)
BF16 = {"bf16": True, "params_dtype": torch.bfloat16, "use_cpu_initialization": False}


def _config(kind: str, **overrides: Any) -> Any:
    return models.make_config(
        **{**models.MODELS[kind], **BF16, "hidden_size": 128, "moe_grouped_gemm": kind != "dense", **overrides}
    )


def _bf16(config: Any, model: torch.nn.Module) -> torch.nn.Module:
    from megatron.core.transformer.module import Float16Module

    return Float16Module(config, model.cuda())


def _error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return float((ours.double() - expected.double()).norm() / expected.double().norm())


def _layer_by_reference(layer: Any, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """The layer's own sublayers; everything mHC in float64 by the reference. x: [s, b, n, C] float64."""
    sublayers = (
        (layer.input_layernorm, lambda u: layer.self_attention(u, **kwargs)),
        (layer.pre_mlp_layernorm, layer.mlp),
    )
    for norm, sublayer in sublayers:
        hc = norm.hyper_connection
        pre, post, res = reference.mappings(x, hc.phi.double(), hc.alpha.double(), hc.bias.double())
        y, bias = sublayer(norm.norm(reference.aggregate(x, pre).bfloat16()))
        x = reference.mix(x, res, post, y.double(), None if bias is None else bias.double())
        x = x.bfloat16().double()  # streams are bf16: without this a router's near-ties fall the other way
    return x


@pytest.mark.parametrize("kind", ["dense", "moe", "mla"])
def test_layer_equals_reference(kind: str, one_process: None) -> None:
    """Forward and all gradients. Tolerances: bf16 has 8 bits (4e-3 a rounding), a layer rounds the streams twice."""
    config = _config(kind)
    layer = models.build(config, MHC, te=True).cuda().bfloat16().decoder.layers[1]
    x = torch.randn(models.SEQUENCE, 4, MHC.num_streams, 128, device="cuda").bfloat16()
    rotary = None
    if kind != "mla":
        from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

        rotary = RotaryEmbedding(config.kv_channels, 1.0)(models.SEQUENCE)
    kwargs = {"attention_mask": None, "rotary_pos_emb": rotary}
    weights = torch.randn(x.shape, device="cuda")

    ours_in = x.flatten(-2).requires_grad_()
    ours = layer(ours_in, **kwargs)[0].unflatten(-1, x.shape[-2:])
    (ours.float() * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    layer.zero_grad()
    expected_in = x.double().requires_grad_()
    expected = _layer_by_reference(layer, expected_in, **kwargs)
    (expected * weights).sum().backward()

    assert _error(ours, expected) < 5e-3
    assert _error(ours_in.grad.unflatten(-1, x.shape[-2:]), expected_in.grad) < 1e-2
    for name, parameter in layer.named_parameters():
        assert _error(gradients[name], parameter.grad) < 3e-2, name


@pytest.mark.parametrize("kind", ["dense", "moe", "mla"])
def test_preserving_init_equals_stock(kind: str, one_process: None, tmp_path: Path) -> None:
    """The stock model's checkpoint, continued with mHC: the same loss up to bf16 rounding."""
    stock = models.build(_config(kind), None, te=True)
    models.save([stock], tmp_path / "stock")
    mhc = models.build(_config(kind), MHCConfig(), te=True)
    missing = mhc.load_state_dict(stock.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert all("hyper_connection" in key for key in missing.missing_keys)
    config = stock.config
    ids = models.tokens(0)
    ours, expected = (models.forward(_bf16(config, model), ids).mean() for model in (mhc, stock))
    assert abs(ours - expected) / expected < 2e-3


def test_parameters_and_mappings_stay_float32(one_process: None) -> None:
    config = _config("moe")
    model = _bf16(config, models.build(config, MHC, te=True))
    hyper = {name: p for name, p in model.named_parameters() if "hyper_connection" in name}
    assert len(hyper) == 2 * 3 * config.num_layers
    assert all(p.dtype == torch.float32 for p in hyper.values())
    connection = model.module.decoder.layers[0].input_layernorm.hyper_connection
    _, u, post, res = connection(torch.randn(8, 2, 4 * 128, device="cuda").bfloat16())
    assert (u.dtype, post.dtype, res.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert (res.sum(-1) - 1).abs().max() < 1e-6


def test_checkpoint_keys_do_not_depend_on_the_spec(one_process: None) -> None:
    """mHC's parameters and the norms have one key in local and in Transformer Engine models, dense and MoE.

    What else differs between the two (extra states) differs in stock models as well.
    """
    for kind in ("dense", "moe"):
        config = _config(kind, add_bias_linear=False, moe_grouped_gemm=False)

        def keys(mhc: MHCConfig | None, te: bool, config: Any = config) -> set[str]:
            sharded = models.sharded_state_dict([models.build(config, mhc, te=te)])["model0"]
            return {value.key for value in sharded.values() if hasattr(value, "key")}

        local, te = keys(MHC, False), keys(MHC, True)
        assert local - te == keys(None, False) - keys(None, True)
        assert te - local == keys(None, True) - keys(None, False)
        # Megatron stacks the layers of a model without a layer pattern under one key.
        layers = 1 if kind == "dense" else config.num_layers
        assert sum("hyper_connection" in key for key in local & te) == 2 * 3 * layers
