"""Parameters counted from the configuration against a built model, with the norms that only Transformer Engine can place."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mhc_megatron import MHCConfig
from mhc_megatron.plan.parameters import model_count
from mhc_megatron.plan.run import Run
from tests import models

pytestmark = pytest.mark.gpu


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("q_lora_rank", [None, 16])
def test_mla_with_transformer_engine(q_lora_rank: int | None) -> None:
    pytest.importorskip("transformer_engine")
    settings: dict[str, Any] = {
        **models.MLA,
        "q_lora_rank": q_lora_rank,
        "qk_layernorm": True,
        "transformer_impl": "transformer_engine",
        "moe_grouped_gemm": True,
        "use_cpu_initialization": False,
        "bf16": True,
        "params_dtype": torch.bfloat16,
    }
    config = models.make_config(**settings)
    model = models.build(config, MHCConfig(), te=True)
    built = sum(parameter.numel() for parameter in model.parameters())
    run = Run(
        config, MHCConfig(), world_size=1, sequence=16, micro_batch=1, microbatches=1, vocabulary=models.VOCABULARY
    )
    assert model_count(run).total == built
