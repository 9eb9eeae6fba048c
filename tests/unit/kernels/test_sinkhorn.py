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

    def adversarial(self, n: int, g: torch.Generator) -> dict[str, Tensor]:
        """Logits [T, n, n] that ``exp`` in float32 would lose, that are equal, or beside which what is padded might count."""
        t = 40
        normal = torch.randn(t, n, n, generator=g)
        signs = torch.sign(normal)
        low_row = normal.clone()
        low_row[:, 0] -= 100  # a row that columns leave nothing of
        scales = torch.tensor([1.0, 1e4, 1e31, 3e38])[torch.randint(4, (t, n, n), generator=g)]
        return {
            "fifty": 100 * torch.rand(t, n, n, generator=g) - 50,
            "signs": 50 * signs,
            "one hot": 60 * torch.nn.functional.one_hot(torch.randint(n, (t, n), generator=g), n).float() - 30,
            "low row": low_row,
            "tiny": 1e-30 * signs,
            "zero": torch.zeros(t, n, n),
            "large": 1e4 * signs,
            "huge": 1e31 * signs,
            "all huge": torch.full((t, n, n), 1e31),
            "all low": torch.full((t, n, n), -1e31),
            "all lowest": torch.full((t, n, n), -3e38),
            "all highest": torch.full((t, n, n), 3e38),
            "all scales": scales * normal.clamp(-1, 1),
        }

    @pytest.mark.parametrize("n", range(1, 9))
    def test_adversarial_logits(self, n: int) -> None:
        g = torch.Generator().manual_seed(n)
        for name, given in self.adversarial(n, g).items():
            logits = given.to(DEVICE).requires_grad_()
            exact = logits.detach().to(F64).requires_grad_()
            weights = torch.randn(given.shape, generator=g).to(DEVICE)
            ours, expected = sinkhorn(logits, backend="triton"), self.definition(exact)
            (ours * weights).sum().backward()
            (expected * weights).sum().backward()
            assert (ours.sum(-1) - 1).abs().max() < 1e-6, name
            assert (ours - expected).abs().max() < 1e-5, name
            assert (logits.grad - exact.grad).norm() <= 1e-5 * exact.grad.norm() + 1e-6, name

    def test_nan_stays_in_its_token(self) -> None:
        logits = torch.zeros(40, 4, 4, device=DEVICE)
        logits[7, 1, 2] = math.nan
        m = sinkhorn(logits, backend="triton")
        assert m[7].isnan().all()
        assert not m[torch.arange(40, device=DEVICE) != 7].isnan().any()
