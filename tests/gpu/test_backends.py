"""The Triton kernels in training: stock Megatron with Transformer Engine on real text, the loss curve of the reference backend.

``pytest -s`` prints the curves' distance with its bound, the reference's own drift, and the peak memory of each.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from mhc_megatron import MHCConfig

pytestmark = pytest.mark.gpu
pytest.importorskip("transformer_engine.pytorch", reason="needs Transformer Engine")

from tests import models  # noqa: E402
from tests.gpu.training import QUICKSTART, STEPS, train  # noqa: E402

LAYER_27B = {
    **models.MODELS["mla"],
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


@pytest.mark.parametrize(
    ("settings", "sequence", "rate"),
    [(QUICKSTART, 512, 1e-3), (LAYER_27B, 2048, 1e-4)],
    ids=["quickstart size", "27B-shaped layers"],
)
def test_backends_have_the_same_loss_curve(
    settings: dict[str, Any], sequence: int, rate: float, one_process: None, hyper_connection_calls: Counter
) -> None:
    triton = train(settings, MHCConfig(init="paper"), sequence, rate)
    # One chain through all layers: only the first sublayer is computed on its own.
    assert hyper_connection_calls == {"connect": STEPS, "boundary": STEPS * (2 * settings["num_layers"] - 1)}
    plain = MHCConfig(init="paper", backend="reference")
    reference = train(settings, plain, sequence, rate)
    distance = triton.distance(reference)
    # How far the reference itself drifts from a start that differs by a rounding of every bf16 weight: routing decisions flip.
    drift = train(settings, plain, sequence, rate, noise=2**-9).distance(reference)
    bound = max(2e-2, *drift)
    size = f"{settings['num_layers']} layers of {settings['hidden_size']}, {sequence} tokens, {STEPS} steps"
    print(f"\n{size}: losses {triton.losses[0]:.4f} -> {triton.losses[-1]:.4f} (reference {reference.losses[-1]:.4f})")
    print(f"relative distance: first {distance[0]:.1e} (bound 1e-3), largest {max(distance):.1e} (bound {bound:.1e})")
    print(f"drift of the reference from a nudged start: first {drift[0]:.1e}, largest {max(drift):.1e}")
    print(f"peak memory {triton.peak:.2f} GiB (reference {reference.peak:.2f})")
    assert triton.losses[-1] < 0.9 * triton.losses[0]
    assert distance[0] < 1e-3
    assert max(distance) < bound
    assert triton.peak <= reference.peak


def test_same_bits_every_run(one_process: None) -> None:
    first, second = (train(QUICKSTART, MHCConfig(init="paper"), 512) for _ in range(2))
    assert first.losses == second.losses
