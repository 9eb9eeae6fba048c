"""Gradients added to Megatron's ``main_grad`` in the kernel."""

from __future__ import annotations

import pytest
import torch

from mhc_kernels import boundary
from tests.unit.kernels.cases import PARAMETERS, Case


@pytest.fixture(params=["poisoned", "as it comes"], autouse=True)
def memory(request: pytest.FixtureRequest) -> None:
    """Poisoned, and as a training step has it: that is another way to allocate (`fused/memory.py`)."""
    if request.param == "poisoned":
        request.getfixturevalue("poisoned_memory")


@pytest.mark.parametrize(
    ("n", "dtype"), [(4, torch.float32), (4, torch.bfloat16), (8, torch.float32), (8, torch.bfloat16)]
)
def test_main_grad_accumulates(n: int, dtype: torch.dtype) -> None:
    """As Megatron's fused gradient accumulation: added to main_grad, marked, and some gradient handed on for the hook."""
    case = Case(70, n, 48, dtype)
    plain, fused = case.leaves(), case.leaves()
    before = {k: torch.randn_like(fused[k]) for k in PARAMETERS}
    for name in PARAMETERS:
        fused[name].main_grad = before[name].clone()
    for leaves, accumulate in ((plain, False), (fused, True)):
        torch.autograd.backward(boundary(**leaves, accumulate=accumulate, backend="triton"), case.gradients)
    for name in PARAMETERS:
        assert fused[name].grad_added_to_main_grad
        torch.testing.assert_close(fused[name].main_grad, before[name] + plain[name].grad, rtol=1e-6, atol=1e-6)
        assert not hasattr(plain[name], "grad_added_to_main_grad")
    for name in ("x", "res", "post", "y", "bias"):
        assert torch.equal(plain[name].grad, fused[name].grad)


def test_no_main_grad_of_another_dtype() -> None:
    case = Case(20, 4, 32)
    leaves = case.leaves()
    for name in PARAMETERS:
        leaves[name].main_grad = torch.zeros_like(leaves[name], dtype=torch.bfloat16)
    torch.autograd.backward(boundary(**leaves, accumulate=True, backend="triton"), case.gradients)
    for name in PARAMETERS:
        assert not hasattr(leaves[name], "grad_added_to_main_grad")
        assert leaves[name].main_grad.abs().max() == 0
        assert leaves[name].grad.abs().max() > 0
