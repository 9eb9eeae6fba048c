"""Dropout inside the mix, as Megatron's bias-dropout-add has it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mhc_kernels import boundary, mix
from tests.unit.kernels.cases import F64, Case, error

pytestmark = pytest.mark.usefixtures("poisoned_memory")


class TestDropout:
    P = 0.3

    def kept(self, case: Case, seed: int) -> Tensor:
        """The mask, found by mixing ones into streams of zeros."""
        torch.manual_seed(seed)
        x = torch.zeros_like(case.arguments["x"])
        ones = {"post": torch.ones_like(case.arguments["post"]), "y": torch.ones_like(case.arguments["y"])}
        out = mix(x, case.arguments["res"], **ones, dropout_p=self.P, backend="triton")
        assert torch.equal(out, out[:, :1].expand_as(out))  # one decision a channel, for all streams
        values = out[:, 0].unique().tolist()
        assert values == pytest.approx([0, 1 / (1 - self.P)])
        return out[:, 0] > 0

    def test_equals_reference_under_the_same_mask(self) -> None:
        case = Case(50, 4, 48)
        kept = self.kept(case, 3)
        assert not torch.equal(kept, self.kept(case, 4))
        assert abs(kept.float().mean() - (1 - self.P)) < 0.03
        ours, exact = case.leaves(), case.leaves(F64)
        torch.manual_seed(3)
        results = boundary(**ours, dropout_p=self.P, backend="triton")
        torch.autograd.backward(results, case.gradients)
        masked = (exact["y"] + exact["bias"]) * kept / (1 - self.P)
        rest = {k: v for k, v in exact.items() if k not in ("y", "bias")}
        expected = boundary(**rest, y=masked, bias=None, backend="reference")
        torch.autograd.backward(expected, [g.to(F64) for g in case.gradients])
        for a, b in zip(results, expected, strict=True):
            assert error(a, b) <= 1e-5
        for name in ours:
            assert error(ours[name].grad, exact[name].grad) <= 1e-5, name

    def test_mix_alone(self) -> None:
        case = Case(50, 4, 48)
        kept = self.kept(case, 5)
        torch.manual_seed(5)
        leaves = case.leaves()
        out = mix(*(leaves[k] for k in ("x", "res", "post", "y", "bias")), dropout_p=self.P, backend="triton")
        out.backward(case.gradients[0])
        assert torch.equal(leaves["y"].grad != 0, kept)
