"""Parameters counted from the configuration against those of built models."""

from __future__ import annotations

from typing import Any

import pytest

from mhc_megatron import MHCConfig
from mhc_megatron.parameter_count import count_parameters
from tests import models

LAYER_NORM = {"normalization": "LayerNorm", "num_query_groups": 2, "add_bias_linear": True, "qk_layernorm": True}
BIASES = {**models.MOE, "add_bias_linear": True, "moe_shared_expert_intermediate_size": None}
MANY_EXPERTS = {**models.MOE, "num_moe_experts": 6, "moe_shared_expert_gate": True, "moe_layer_freq": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    **models.MODELS,
    "layer-norm": LAYER_NORM,
    "moe-biases": BIASES,
    "gated-shared-expert": MANY_EXPERTS,
    "mla-q-full": {**models.MLA, "q_lora_rank": None},
    "mla-norms": {**models.MLA, "qk_layernorm": True},
}
MHC = {
    "residual": None,
    "mhc": MHCConfig(),
    "two-streams": MHCConfig(num_streams=2),
    "exit": MHCConfig(profile="deepseek-v4"),
}


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("mhc", MHC.values(), ids=MHC.keys())
@pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS.keys())
def test_equals_the_built_model(settings: dict[str, Any], mhc: MHCConfig | None) -> None:
    config = models.make_config(**settings)
    model = models.build(config, mhc)
    counts = count_parameters(config, models.VOCABULARY, mhc)
    built = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert counts.total == sum(built.values())
    assert counts.mhc == sum(count for name, count in built.items() if "hyper_connection" in name)
    # A token meets all but the embedding's table and the routed experts beyond the top k.
    routed = sum(count for name, count in built.items() if ".experts." in name)
    idle = routed * (1 - config.moe_router_topk / (config.num_moe_experts or 1)) if routed else 0
    assert counts.active == sum(built.values()) - built["embedding.word_embeddings.weight"] - idle


def test_what_is_not_counted_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="mtp_num_layers"):
        count_parameters(models.make_config(mtp_num_layers=1), models.VOCABULARY, None)
