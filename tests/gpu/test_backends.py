"""The Triton kernels in training: stock Megatron with Transformer Engine on real text, the loss curve of the reference backend.

``pytest -s`` prints the curves' distance and the peak memory of each.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from mhc_megatron import MHCConfig, to_mhc_spec
from mhc_megatron.residual.hyper_connection import HyperConnection
from tests import models

pytestmark = pytest.mark.gpu
pytest.importorskip("transformer_engine.pytorch", reason="needs Transformer Engine")

STEPS = 20
COMMON: dict[str, Any] = {
    **models.MODELS["mla"],
    "bf16": True,
    "params_dtype": torch.bfloat16,
    "use_cpu_initialization": False,
    "moe_grouped_gemm": True,
    "init_method_std": 0.02,
}
QUICKSTART = {"num_layers": 4, "hidden_size": 128, "ffn_hidden_size": 256, "moe_ffn_hidden_size": 128}
LAYER_27B = {
    "num_layers": 2,
    "moe_layer_freq": [0, 1],
    "hidden_size": 2560,
    "num_attention_heads": 32,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_head_dim": 128,
    "qk_pos_emb_head_dim": 64,
    "v_head_dim": 128,
    "ffn_hidden_size": 12288,
    "num_moe_experts": 72,
    "moe_router_topk": 6,
    "moe_ffn_hidden_size": 1536,
    "moe_shared_expert_intermediate_size": 3072,
}


def text(sequence: int) -> torch.Tensor:
    """[STEPS, sequence] bytes of Python's own sources."""
    source = b"".join(Path(module.__file__).read_bytes() for module in (argparse, subprocess))
    assert len(source) >= STEPS * sequence
    return torch.frombuffer(bytearray(source[: STEPS * sequence]), dtype=torch.uint8).long().view(STEPS, sequence)


def train(
    settings: dict[str, Any], backend: str, sequence: int, rate: float = 1e-3, noise: float = 0.0
) -> tuple[list[float], float]:
    """Losses of STEPS steps of Megatron's Adam, and the peak memory in GiB. noise: relative, on every parameter at the start."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.module import Float16Module

    model_parallel_cuda_manual_seed(0)
    torch.manual_seed(0)
    config = models.make_config(**{**COMMON, **settings})
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=True)
    spec = to_mhc_spec(spec, MHCConfig(init="paper", backend=backend))
    model = GPTModel(config, spec, 256, sequence, position_embedding_type="rope")
    for module in model.modules():
        if isinstance(module, HyperConnection):
            # What gradient_accumulation_fusion sets; Megatron's own output layer wants apex for it.
            module._accumulate = backend != "reference"
    model = Float16Module(config, model.cuda())
    if noise:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + noise * torch.randn_like(parameter))
    ddp = models.wrap(model, config)
    optimizer = get_megatron_optimizer(OptimizerConfig(lr=rate, bf16=True, clip_grad=1.0), [ddp])
    torch.cuda.reset_peak_memory_stats()
    losses = []
    for ids in text(sequence):
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        loss = models.forward(ddp, ids[None]).float().mean()
        loss.backward()
        ddp.finish_grad_sync()
        assert optimizer.step()[0]
        losses.append(loss.item())
    peak = torch.cuda.max_memory_allocated() / 2**30
    del ddp, model, optimizer
    gc.collect()
    torch.cuda.empty_cache()
    return losses, peak


@pytest.mark.parametrize(
    ("settings", "sequence", "rate"),
    [(QUICKSTART, 512, 1e-3), (LAYER_27B, 2048, 1e-4)],
    ids=["quickstart size", "27B-shaped layers"],
)
def test_backends_have_the_same_loss_curve(
    settings: dict[str, Any], sequence: int, rate: float, one_process: None, hyper_connection_calls: Counter
) -> None:
    triton, triton_peak = train(settings, "auto", sequence, rate)
    # One chain through all layers: only the first sublayer is computed on its own.
    assert hyper_connection_calls == {"connect": STEPS, "boundary": STEPS * (2 * settings["num_layers"] - 1)}
    reference, reference_peak = train(settings, "reference", sequence, rate)
    distance = [abs(a - b) / b for a, b in zip(triton, reference, strict=True)]
    # How far the reference itself drifts from a start that differs by a rounding of every bf16 weight: routing decisions flip.
    nudged, _ = train(settings, "reference", sequence, rate, noise=2**-9)
    drift = [abs(a - b) / b for a, b in zip(nudged, reference, strict=True)]
    print(
        f"\nlosses {triton[0]:.4f} -> {triton[-1]:.4f} (reference {reference[-1]:.4f}); relative distance: first "
        f"{distance[0]:.1e}, largest {max(distance):.1e} (of the reference from a nudged start: {drift[0]:.1e}, "
        f"{max(drift):.1e}); peak memory {triton_peak:.2f} GiB (reference {reference_peak:.2f})"
    )
    assert triton[-1] < 0.9 * triton[0]
    assert distance[0] < 1e-3
    assert max(distance) < max(2e-2, *drift)
    assert triton_peak <= reference_peak


def test_same_bits_every_run(one_process: None) -> None:
    first, second = (train(QUICKSTART, "triton", 512)[0] for _ in range(2))
    assert first == second
