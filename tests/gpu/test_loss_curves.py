"""300 steps on real text: Transformer Engine and local modules, kernels and reference, bf16 and FP8 learn alike.

``pytest -s`` prints the curves.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest

from mhc_megatron import MHCConfig

pytestmark = pytest.mark.gpu
pytest.importorskip("transformer_engine.pytorch", reason="needs Transformer Engine")

from tests import models  # noqa: E402
from tests.gpu.test_fp8 import RECIPES  # noqa: E402
from tests.gpu.training import SMALL, train  # noqa: E402

STEPS, SEQUENCE, WINDOW = 300, 512, 50
MODEL = {**models.MODELS["moe"], **SMALL}  # without MLA: the local one of 0.19.2 can't be built on a GPU
FP8 = {**RECIPES["tensorwise"], "moe_router_padding_for_fp8": True}


class Variant(NamedTuple):
    settings: dict[str, Any] = {}
    backend: str = "auto"
    te: bool = True
    noise: float = 0.0


VARIANTS = {
    "local": Variant({"moe_grouped_gemm": False}, te=False),
    "reference": Variant(backend="reference"),
    "fp8": Variant(FP8),
}


def curve(variant: Variant) -> list[float]:
    """Mean losses of windows of steps."""
    mhc = MHCConfig(init="paper", backend=variant.backend)
    run = train({**MODEL, **variant.settings}, mhc, SEQUENCE, noise=variant.noise, steps=STEPS, te=variant.te)
    return [sum(run.losses[k : k + WINDOW]) / WINDOW for k in range(0, STEPS, WINDOW)]


def test_loss_curves_stay_within_3_percent(one_process: None) -> None:
    """Or within twice the noise: what other starts do to the same model's curve (a rounding of the weights; a hundredth of
    them). On an H200 all stayed within 1.4 %, which at the last window is three times the noise of these two starts."""
    base = curve(Variant())
    curves = {name: curve(variant) for name, variant in VARIANTS.items()}
    nudged = [curve(Variant(noise=noise)) for noise in (2**-9, 1e-2)]
    noise = [max(abs(other[k] - base[k]) for other in nudged) for k in range(len(base))]
    print(f"\n{'TE, Triton':10s}", *(f"{loss:.4f}" for loss in base))
    print(f"{'noise':10s}", *(f"{value:.4f}" for value in noise))
    for name, losses in curves.items():
        print(f"{name:10s}", *(f"{loss:.4f}" for loss in losses))
    assert base[-1] < math.log(256) / 2, "has not learned: a uniform guess loses log 256"
    for name, losses in curves.items():
        for k, loss in enumerate(losses):
            # Modules of another kind draw other weights, FP8 has its own error: 3 % of the loss is allowed to them.
            assert abs(loss - base[k]) < max(2 * noise[k], 0.03 * base[k]), f"{name}, steps {k * WINDOW} on"
