"""The Sinkhorn kernels against the definition in float64, on ordinary and adversarial logits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mhc_kernels import sinkhorn
from tests.unit.kernels.cases import DEVICE, F64

pytestmark = pytest.mark.usefixtures("poisoned_memory")


class TestSinkhorn:
    def definition(self, logits: Tensor, iterations: int = 20) -> Tensor:
        """Eq. 9 in float64, in the log domain."""
        for _ in range(iterations):
            logits = torch.log_softmax(torch.log_softmax(logits, -2), -1)
        return logits.exp()

    @pytest.mark.parametrize("n", range(1, 9))
    @pytest.mark.parametrize("iterations", [1, 2, 20])
    def test_forward_and_gradient(self, n: int, iterations: int) -> None:
        g = torch.Generator().manual_seed(n)
        logits = (2 * torch.randn(200, n, n, generator=g)).to(DEVICE).requires_grad_()
        weights = torch.randn(200, n, n, generator=g).to(DEVICE)
        exact = logits.detach().to(F64).requires_grad_()
        ours, expected = sinkhorn(logits, iterations, backend="triton"), self.definition(exact, iterations)
        (ours * weights).sum().backward()
        (expected * weights).sum().backward()
        assert (ours - expected).abs().max() < 1e-6
        assert (logits.grad - exact.grad).norm() <= 1e-5 * exact.grad.norm() + 1e-6

    @pytest.mark.parametrize("n", [2, 3, 4, 8])
    def test_adversarial_logits(self, n: int) -> None:
        g = torch.Generator().manual_seed(0)
        signs = torch.sign(torch.randn(300, n, n, generator=g))
        one_hot = torch.nn.functional.one_hot(torch.randint(n, (300, n), generator=g), n).float()
        low_row = torch.randn(300, n, n, generator=g)
        low_row[:, 0] -= 100  # a row that columns leave nothing of
        cases = {
            "fifty": 100 * torch.rand(300, n, n, generator=g) - 50,
            "signs": 50 * signs,
            "one hot": 60 * one_hot - 30,
            "low row": low_row,
            "tiny": 1e-30 * signs,
            "zero": torch.zeros(2, n, n),
        }
        for name, logits in cases.items():
            ours = sinkhorn(logits.to(DEVICE), backend="triton").cpu()
            assert (ours.sum(-1) - 1).abs().max() < 1e-6, name
            assert (ours - self.definition(logits.to(F64))).abs().max() < 1e-5, name

    @pytest.mark.parametrize("n", [2, 4, 7])
    def test_huge_logits_are_finite(self, n: int) -> None:
        g = torch.Generator().manual_seed(0)
        for scale in (1e4, 1e30):
            logits = (scale * torch.sign(torch.randn(300, n, n, generator=g))).to(DEVICE).requires_grad_()
            ours = sinkhorn(logits, backend="triton")
            (ours * torch.randn(ours.shape, generator=g).to(DEVICE)).sum().backward()
            assert torch.isfinite(ours).all()
            assert torch.isfinite(logits.grad).all()
            assert (ours.sum(-1) - 1).abs().max() < 1e-6

    def test_nan_stays_in_its_token(self) -> None:
        logits = torch.zeros(40, 4, 4, device=DEVICE)
        logits[7, 1, 2] = math.nan
        m = sinkhorn(logits, backend="triton")
        assert m[7].isnan().all()
        assert not m[torch.arange(40, device=DEVICE) != 7].isnan().any()
