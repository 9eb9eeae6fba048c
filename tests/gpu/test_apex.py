"""NVIDIA's apex where Megatron uses it: gradient accumulation fusion, fused layer norms; without Transformer Engine its Adam.

``pytest -s`` prints by how much the losses move.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

from mhc_kernels import reference
from mhc_megatron import MHCConfig, to_mhc_spec
from mhc_megatron.residual.hyper_connection import MHC_PARAMETER
from tests import models
from tests.gpu import without
from tests.gpu.training import COMMON, LOCAL, QUICKSTART, Run, backward, build, text, train

WHICH = "NVIDIA's apex (github.com/NVIDIA/apex; the apex on PyPI is another package)"
EXTENSIONS = ["fused_weight_gradient_mlp_cuda", "fused_layer_norm_cuda", "amp_C"]


def _missing() -> list[str]:
    missing = []
    for name in ["apex.normalization", *EXTENSIONS]:
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(name)
    return missing


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(_missing()), reason=f"needs {WHICH} with its CUDA extensions; no {', '.join(_missing())}"),
]
needs_te = pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is None, reason="needs Transformer Engine")

SEQUENCE, MICROBATCHES = 512, 2
MHC = MHCConfig(init="paper")
BF16 = 2**-8  # the unit roundoff
NUDGE = 2**-9  # how far a rounding to bf16 moves a weight, in the mean square
FUSED, PLAIN = {"gradient_accumulation_fusion": True}, {"gradient_accumulation_fusion": False}
# As Megatron's own training sets it for bf16: main_grad is float32.
FP32_GRADIENTS = {"grad_reduce_in_fp32": True}
LAYER_NORM = {"normalization": "LayerNorm", "layernorm_epsilon": 1e-5}
KINDS = [pytest.param(LOCAL, False, id="local"), pytest.param(QUICKSTART, True, id="te", marks=needs_te)]


@pytest.fixture
def fused_products(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """How often apex has added a weight's gradient to main_grad, by the extension's function."""
    extension = importlib.import_module("fused_weight_gradient_mlp_cuda")
    counts: Counter = Counter()

    def counted(name: str, original: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            counts[name] += 1
            original(*arguments)

        return call

    for name in ("wgrad_gemm_accum_fp32", "wgrad_gemm_accum_fp16"):
        monkeypatch.setattr(extension, name, counted(name, getattr(extension, name)))
    return counts


@pytest.fixture
def local_norm(monkeypatch: pytest.MonkeyPatch) -> Callable[[type], None]:
    """Sets the norm of Megatron's local specs. A spec with RMSNorm leaves PyTorch's for all that follow (0.19.2)."""
    from megatron.core.models import backends
    from megatron.core.models.gpt import gpt_layer_specs

    def choose(norm: type) -> None:
        monkeypatch.setattr(backends, "LNImpl", norm)
        monkeypatch.setattr(gpt_layer_specs, "LNImpl", norm)

    return choose


def _gradients(settings: dict[str, Any], te: bool, parts: torch.Tensor) -> tuple[dict[str, torch.Tensor], Any]:
    model = build(settings, MHC, SEQUENCE // MICROBATCHES, te, ddp=FP32_GRADIENTS)
    backward(model, parts)
    return {name: parameter.main_grad.clone() for name, parameter in model.named_parameters()}, model


@pytest.mark.parametrize(("settings", "te"), KINDS)
def test_fused_gradients(
    settings: dict[str, Any],
    te: bool,
    fused_products: Counter,
    monkeypatch: pytest.MonkeyPatch,
    one_process: None,
) -> None:
    """main_grad after two microbatches, against the sum of what each gives without fusion.

    Fusion adds a weight's gradient up in float32; without it each microbatch's is rounded to bf16 first, which is all that
    may differ. phi, alpha and bias have float32 gradients, the same sum either way: the same bits.
    """
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    # Else PyTorch may round parts of an unfused product's sum to bf16 as well.
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False)
    parts = text(1, SEQUENCE).view(MICROBATCHES, 1, -1)
    each = [_gradients({**settings, **PLAIN}, te, parts[k : k + 1])[0] for k in range(MICROBATCHES)]
    # Of Megatron itself from run to run; zero where all its kernels are deterministic.
    again = _gradients({**settings, **PLAIN}, te, parts[:1])[0]
    noise = {name: float((again[name] - each[0][name]).norm()) for name in again}
    assert not fused_products
    fused, model = _gradients({**settings, **FUSED}, te, parts)
    linears = [m for m in model.modules() if isinstance(m, (ColumnParallelLinear, RowParallelLinear))]
    assert fused_products == {"wgrad_gemm_accum_fp32": MICROBATCHES * len(linears)}
    assert len(linears) == (1 if te else 41)  # Transformer Engine's own linears add up by themselves

    worst: Counter = Counter()
    for name, parameter in model.named_parameters():
        total = each[0][name] + each[1][name]
        assert total.any(), f"{name} has no gradient: nothing is compared"
        error = float((fused[name] - total).norm())
        if getattr(parameter, MHC_PARAMETER, False):
            assert parameter.grad_added_to_main_grad, name
            allowed, kind = 0.0, "mHC's"
        elif parameter.dim() > 1 and parameter.grad_added_to_main_grad:
            allowed, kind = BF16 * sum(float(gradient[name].norm()) for gradient in each), "fused"
        else:
            allowed, kind = 0.0, "other"
        worst[kind] = max(worst[kind], error / float(total.norm()))
        assert error <= allowed + MICROBATCHES * noise[name], name
    print(f"\nlargest relative difference of a gradient: {dict(worst)}; noise {max(noise.values()):.1e}")
    assert worst["fused"] > 0, "no gradient differs at all: was it fused?"


def _allowed(*moves: float) -> float:
    """By how much a loss may move, relative: its own accuracy (logits are bf16), or twice the measured moves, each the largest
    of one run and so a sample."""
    return max(BF16, *(2 * move for move in moves))


def _losses(settings: dict[str, Any], mhc: MHCConfig | None, te: bool, noise: float = 0.0) -> Run:
    return train(settings, mhc, SEQUENCE, noise=noise, microbatches=MICROBATCHES, te=te, ddp=FP32_GRADIENTS)


@pytest.mark.parametrize(("settings", "te"), KINDS)
def test_fusion_moves_the_loss_as_it_does_without_mhc(settings: dict[str, Any], te: bool, one_process: None) -> None:
    """20 steps: not much more than the stock model's (`_allowed`), or than a rounding of every weight at the start does.

    The gradients' rounding is one of a step's size, not of a weight's, and 20 steps of 0.001 move a weight by its size (0.02).
    """
    plain = _losses({**settings, **PLAIN}, MHC, te)
    ours = max(_losses({**settings, **FUSED}, MHC, te).distance(plain))
    stock = max(_losses({**settings, **FUSED}, None, te).distance(_losses({**settings, **PLAIN}, None, te)))
    nudged = max(_losses({**settings, **PLAIN}, MHC, te, noise=NUDGE).distance(plain))
    print(f"\nfusion moves the loss by {ours:.1e} with mHC, {stock:.1e} without; rounded weights by {nudged:.1e}")
    print(f"losses {plain.losses[0]:.3f} -> {plain.losses[-1]:.3f}")
    assert plain.losses[-1] < 0.9 * plain.losses[0]
    assert ours <= _allowed(stock, nudged)


@pytest.mark.parametrize(
    ("hidden", "persistent"),
    [
        pytest.param(128, False, id="FusedLayerNorm"),
        pytest.param(
            1024,
            True,
            id="FastLayerNorm",
            marks=pytest.mark.skipif(
                importlib.util.find_spec("fast_layer_norm") is None, reason=f"needs {WHICH} with fast_layer_norm"
            ),
        ),
    ],
)
def test_fused_norm_after_aggregation(
    hidden: int, persistent: bool, local_norm: Callable[[type], None], one_process: None
) -> None:
    """mHC's kernels leave a LayerNorm to apex. Output and gradients against float64.

    Tolerance: at most four roundings to bf16 lie on each path (u, the norm's output, du, dx), of 2^-8 / sqrt(3) at most in the
    mean square.
    """
    from megatron.core.fusions.fused_layer_norm import FusedLayerNorm

    local_norm(FusedLayerNorm)
    settings = {**COMMON, **LOCAL, **LAYER_NORM, "hidden_size": hidden, "persist_layer_norm": persistent}
    config = models.make_config(**settings)
    mhc = MHCConfig(init="paper", init_alpha=0.5)
    spec = to_mhc_spec(models.block_spec(config, te=False), mhc)
    layer: Any = spec.layer_specs[1].submodules.input_layernorm(config=config, hidden_size=hidden, eps=1e-5)  # type: ignore[index]
    layer = layer.cuda().bfloat16()
    norm, connection = layer.norm, layer.hyper_connection
    assert type(norm) is FusedLayerNorm
    assert norm.persist_layer_norm == persistent
    with torch.no_grad():
        norm.weight.normal_(1, 0.2)
        norm.bias.normal_(0, 0.2)

    x = torch.randn(64, 2, mhc.num_streams * hidden, device="cuda").bfloat16().requires_grad_()
    assert layer.fused_norm(x) is None
    weights = torch.randn(64, 2, hidden, device="cuda").bfloat16()
    ours, residual = layer(x)
    ours.backward(weights)
    exact = x.detach().double().requires_grad_()
    streams = exact.unflatten(-1, (mhc.num_streams, hidden))
    own = [parameter.detach().double() for parameter in (connection.phi, connection.alpha, connection.bias)]
    pre, post, res = reference.mappings(streams, *own)
    gamma, beta = (parameter.detach().double().requires_grad_() for parameter in (norm.weight, norm.bias))
    expected = functional.layer_norm(reference.aggregate(streams, pre), (hidden,), gamma, beta, 1e-5)
    expected.backward(weights.double())
    for name, value, right in (
        ("output", ours, expected),
        ("post", residual.post, post),
        ("res", residual.res, res),
        ("x", x.grad, exact.grad),
        ("weight", norm.weight.grad, gamma.grad),
        ("bias", norm.bias.grad, beta.grad),
    ):
        error = float((value.double() - right).norm() / right.norm())
        assert error < 4 * BF16 / 3**0.5, name


def test_training_with_fused_norms(local_norm: Callable[[type], None], one_process: None) -> None:
    """Apex's norms and PyTorch's are one function: they differ as a rounding of every weight does (`_allowed`)."""
    from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    settings = {**LOCAL, **LAYER_NORM, **FUSED}
    local_norm(FusedLayerNorm)
    apex = _losses(settings, MHC, te=False)
    local_norm(WrappedTorchNorm)
    torch_norm = _losses(settings, MHC, te=False)
    distance = apex.distance(torch_norm)
    nudged = _losses(settings, MHC, te=False, noise=NUDGE).distance(torch_norm)
    print(
        f"\napex's norms move the loss by {max(distance):.1e}, first step {distance[0]:.1e}; rounded {max(nudged):.1e}"
    )
    assert apex.losses[-1] < 0.9 * apex.losses[0]
    assert distance[0] < BF16
    assert max(distance) <= _allowed(max(nudged))


@pytest.fixture(scope="module")
def without_apex() -> list[without.Report]:
    """Neither apex nor Transformer Engine: as it is, and with nudged weights."""
    hidden = ["transformer_engine", "apex", *EXTENSIONS, "fast_layer_norm"]
    return [without.run(hidden, {**LAYER_NORM, **PLAIN}, noise, FP32_GRADIENTS) for noise in (0.0, NUDGE)]


@pytest.mark.parametrize("distributed", [False, True], ids=["", "distributed optimizer, overlapped"])
def test_all_of_apex_without_transformer_engine(distributed: bool, without_apex: list[without.Report]) -> None:
    """Then Adam, gradient norm and scaling are apex's as well. Against PyTorch's, apex hidden from Megatron."""
    ddp = {**FP32_GRADIENTS, "use_distributed_optimizer": distributed, "overlap_grad_reduce": distributed}
    apex = without.run(["transformer_engine"], {**LAYER_NORM, **FUSED}, ddp=ddp)
    assert (apex.adam, apex.gradient_norm) == ("apex.optimizers.fused_adam", "amp_C")
    assert apex.norm == "megatron.core.fusions.fused_layer_norm"
    plain, nudged = without_apex
    assert (plain.adam, plain.gradient_norm) == ("torch.optim.adamw", "megatron.core.utils")
    assert plain.norm == "megatron.core.transformer.torch_norm"
    ours, drift = ([abs(a - b) / b for a, b in zip(run.losses, plain.losses, strict=True)] for run in (apex, nudged))
    print(f"\napex moves the loss by {max(ours):.1e}, first step {ours[0]:.1e}; rounded weights by {max(drift):.1e}")
    assert apex.losses[-1] < 0.9 * apex.losses[0]
    assert ours[0] < BF16
    assert max(ours) <= _allowed(max(drift))
