"""A RMSNorm fused into the aggregation, forward and backward, against the float64 reference."""

from __future__ import annotations

import pytest
import torch

from mhc_kernels import RMSNorm, boundary, connect, reference
from tests.unit.kernels.cases import BOUNDS, DEVICE, F64, ON_GPU, PARAMETERS, Case, error

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def check_norm(
    t: int, n: int, c: int, dtype: torch.dtype, centered: bool, weight_dtype: torch.dtype | None = None
) -> None:
    case = Case(t, n, c, dtype)
    ours, exact = case.leaves(), case.leaves(F64)
    weight = (
        (0.5 + torch.rand(c, generator=torch.Generator().manual_seed(1)))
        .to(DEVICE, weight_dtype or dtype)
        .requires_grad_()
    )
    exact_weight = weight.detach().to(F64).requires_grad_()
    results = boundary(**ours, norm=RMSNorm(weight, 1e-5, centered), backend="triton")
    torch.autograd.backward(results, case.gradients)
    streams = reference.mix(*(exact[k] for k in ("x", "res", "post", "y", "bias")))
    stored = streams + (results[0].detach().to(F64) - streams.detach())
    pre, post, res = reference.mappings(stored, *(exact[k] for k in PARAMETERS))
    u = RMSNorm(exact_weight, 1e-5, centered)(reference.aggregate(stored, pre))
    torch.autograd.backward((stored, u, post, res), [g.to(F64) for g in case.gradients])

    of_streams, of_phi, of_gates = BOUNDS[dtype]
    assert results[1].dtype == dtype
    assert error(results[1], u) <= of_streams
    for name in ("x", "y", "res", "post"):
        assert error(ours[name].grad, exact[name].grad) <= of_streams, name
    size = {name: exact[name].grad.norm() for name in PARAMETERS}
    if n == 1:
        # The norm undoes H_pre: its gradient is what eps leaves of terms that cancel, terms of the size they have without it.
        plain = case.leaves(F64)
        torch.autograd.backward(boundary(**plain, backend="reference"), [g.to(F64) for g in case.gradients])
        size = {name: plain[name].grad.norm() for name in PARAMETERS}
    for name, bound in zip(PARAMETERS, (of_phi, of_gates, of_gates), strict=True):
        assert (ours[name].grad.to(F64) - exact[name].grad).norm() <= bound * size[name], name
    assert weight.grad is not None
    assert weight.grad.dtype == weight.dtype
    assert error(weight.grad, exact_weight.grad) <= BOUNDS[weight.dtype][0]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("centered", [False, True])
def test_norm_in_float32(n: int, centered: bool) -> None:
    check_norm(70, n, 48, torch.float32, centered)


@pytest.mark.parametrize(("t", "c"), [(1, 16), (33, 80), (64, 272)])
def test_norm_at_ragged_shapes(t: int, c: int) -> None:
    check_norm(t, 4, c, torch.float32, False)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA GPU")
@pytest.mark.parametrize(("t", "n", "c"), [(70, 4, 48), (1024, 4, 2560), (500, 4, 7168), (129, 2, 1280)])
def test_norm_in_bfloat16(t: int, n: int, c: int) -> None:
    check_norm(t, n, c, torch.bfloat16, True)


def test_weights_of_several_dtypes_one_after_the_other() -> None:
    """What was prepared for one dtype must not run for another."""
    for weight_dtype in (torch.float16, torch.float32, torch.float16):
        check_norm(40, 4, 48, torch.float16, False, weight_dtype)


def test_weight_becomes_strided() -> None:
    case = Case(40, 4, 64)
    own = [case.arguments[k] for k in PARAMETERS]
    for weight, fails in ((torch.ones(64, device=DEVICE), False), (torch.ones(128, device=DEVICE)[::2], True)):
        if fails:
            with pytest.raises(ValueError, match="norm_weight must be contiguous"):
                connect(case.arguments["x"], *own, norm=RMSNorm(weight, 1e-6), backend="triton")
        else:
            connect(case.arguments["x"], *own, norm=RMSNorm(weight, 1e-6), backend="triton")


def test_gradients_of_connect_with_main_grad() -> None:
    """The start of a chain, with Megatron's float32 gradients of phi, alpha and bias, and a frozen weight."""
    case = Case(40, 4, 64)
    found = []
    for accumulate in (False, True):
        leaves = {k: v for k, v in case.leaves().items() if k in ("x", *PARAMETERS)}
        for k in PARAMETERS:
            leaves[k].main_grad = torch.zeros_like(leaves[k])  # type: ignore[attr-defined]
        norm = RMSNorm(torch.linspace(0.5, 1.5, 64, device=DEVICE), 1e-6)
        results = connect(*leaves.values(), norm=norm, accumulate=accumulate, backend="triton")
        torch.autograd.backward(results, case.gradients)
        parameters = [leaves[k].main_grad if accumulate else leaves[k].grad for k in PARAMETERS]
        found.append([leaves["x"].grad, *parameters])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    exact = {k: v for k, v in case.leaves(F64).items() if k in ("x", *PARAMETERS)}
    pre, post, res = reference.mappings(*exact.values())
    wide = RMSNorm(norm.weight.to(F64), 1e-6)
    u = wide(reference.aggregate(exact["x"], pre))
    torch.autograd.backward((exact["x"], u, post, res), [g.to(F64) for g in case.gradients])
    for ours, leaf in zip(found[0], exact.values(), strict=True):
        assert error(ours, leaf.grad) <= 1e-5


def test_no_tokens() -> None:
    case = Case(0, 4, 48)
    weight = torch.ones(48, device=DEVICE).requires_grad_()
    torch.autograd.backward(boundary(**case.leaves(), norm=RMSNorm(weight, 1e-5), backend="triton"), case.gradients)
    assert weight.grad is not None
    assert not weight.grad.any()


def test_connect_is_the_norm_of_what_it_is_without() -> None:
    case = Case(40, 4, 64)
    own = [case.arguments[k] for k in PARAMETERS]
    norm = RMSNorm(torch.rand(64, device=DEVICE), 1e-6)
    plain = connect(case.arguments["x"], *own, backend="triton")
    normed = connect(case.arguments["x"], *own, norm=norm, backend="triton")
    torch.testing.assert_close(normed[1], norm(plain[1]), rtol=1e-5, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(normed[2:], plain[2:], strict=True))


def test_same_bits_every_time() -> None:
    case = Case(70, 4, 48)
    runs = []
    for _ in range(2):
        leaves = case.leaves()
        weight = torch.ones(48, device=DEVICE).requires_grad_()
        torch.autograd.backward(boundary(**leaves, norm=RMSNorm(weight, 1e-5), backend="triton"), case.gradients)
        runs.append([weight.grad, *(leaf.grad for leaf in leaves.values())])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_weight_of_another_width() -> None:
    case = Case(4, 4, 16)
    own = [case.arguments[k] for k in PARAMETERS]
    with pytest.raises(ValueError, match=r"norm: the weight must be \[16\] and floating, got \[32\]"):
        connect(case.arguments["x"], *own, norm=RMSNorm(torch.ones(32, device=DEVICE), 1e-5))
