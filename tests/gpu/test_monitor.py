"""What the Triton kernels hand on is what the monitor reports: against the definition, on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from megatron.core.transformer.module import Float16Module

from mhc_megatron import MHCConfig, Monitor
from mhc_megatron.monitor.records import read
from tests import models
from tests.monitored import check, definition, streams

pytestmark = pytest.mark.gpu
pytest.importorskip("transformer_engine.pytorch", reason="needs Transformer Engine")


@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "mhc-recompute"])
def test_numbers_are_those_of_the_definition(recompute: bool, one_process: None, tmp_path: Path) -> None:
    """Both read the same bf16 streams; the kernels' product with phi, in float32, is what differs."""
    mhc = MHCConfig(init="paper", init_alpha=2.0, sinkhorn_iterations=1, recompute=recompute)
    bf16 = {"bf16": True, "params_dtype": torch.bfloat16, "use_cpu_initialization": False, "hidden_size": 128}
    config = models.make_config(**{**models.MODELS["mla"], **bf16, "moe_grouped_gemm": True})
    model = Float16Module(config, models.build(config, mhc, te=True).cuda())
    with streams(model) as seen, Monitor(model, folder=str(tmp_path)).step(1):
        models.forward(model, models.tokens(0)).mean().backward()
    check(read(tmp_path).records[1], definition(seen, mhc), rel=1e-4)
