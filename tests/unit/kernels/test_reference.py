"""The reference against the definition written out, in higher precision, and against what must hold by construction."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mhc_kernels import aggregate, head, mappings, mix, reference, sinkhorn

F64 = torch.float64


def sinkhorn_by_definition(logits: Tensor, iterations: int) -> Tensor:
    """Eq. 9 as it stands: exp, then columns, then rows; float64. The column maximum cancels in the first step."""
    logits = logits.to(F64)
    m = torch.exp(logits - logits.amax(-2, keepdim=True))
    for _ in range(iterations):
        m = m / m.sum(-2, keepdim=True)
        m = m / m.sum(-1, keepdim=True)
    return m


def parameters(n: int, c: int, dtype: torch.dtype = F64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    rows = n * n + 2 * n
    phi = torch.randn(rows, n * c, generator=g, dtype=F64) / math.sqrt(n * c)
    alpha = torch.rand(3, generator=g, dtype=F64) + 0.5
    bias = torch.randn(rows, generator=g, dtype=F64)
    return phi.to(dtype), alpha.to(dtype), bias.to(dtype)


def random(*shape: int, seed: int = 1, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


shapes = st.tuples(st.integers(1, 8), st.integers(1, 24), st.integers(0, 5))


class TestSinkhorn:
    @pytest.mark.parametrize("n", [1, 2, 4, 7])
    @pytest.mark.parametrize("iterations", [1, 3, 20])
    def test_equals_definition(self, n: int, iterations: int) -> None:
        logits = 2 * random(50, n, n)
        expected = sinkhorn_by_definition(logits, iterations)
        torch.testing.assert_close(sinkhorn(logits, iterations), expected, rtol=1e-12, atol=1e-14)
        # The same definition from logits that float32 holds exactly: only the last rounding is left.
        single = logits.float()
        torch.testing.assert_close(
            sinkhorn(single, iterations), sinkhorn_by_definition(single, iterations).float(), rtol=2e-7, atol=0
        )

    def test_order_is_columns_then_rows(self) -> None:
        """One iteration leaves rows exact and columns not; the other order would be the other way round."""
        m = sinkhorn(random(100, 4, 4), 1)
        assert (m.sum(-1) - 1).abs().max() < 1e-12
        assert (m.sum(-2) - 1).abs().max() > 0.1

    def test_extreme_logits(self) -> None:
        g = torch.Generator().manual_seed(0)
        fifty = 100 * torch.rand(2000, 4, 4, generator=g) - 50
        signs = 50 * torch.sign(torch.randn(2000, 4, 4, generator=g))
        for logits in (fifty, signs):
            m = sinkhorn(logits)
            assert (m.sum(-1) - 1).abs().max() < 1e-6
            assert (m.double() - sinkhorn_by_definition(logits, 20)).abs().max() < 1e-5
        huge = (1e4 * torch.sign(torch.randn(2000, 4, 4, generator=g))).requires_grad_()
        m = sinkhorn(huge)
        (m * torch.randn(m.shape, generator=g)).sum().backward()
        assert torch.isfinite(m).all()
        assert torch.isfinite(huge.grad).all()
        assert (m.sum(-1) - 1).abs().max() < 1e-6

    def test_columns_at_twenty_iterations(self) -> None:
        """Truncation, not rounding: a normal draw of scale 1 now and then has a matrix that needs more iterations."""
        g = torch.Generator().manual_seed(0)
        for logits, quantile in (
            (2 * torch.rand(20000, 4, 4, generator=g) - 1, 1.0),
            (0.5 * torch.randn(20000, 4, 4, generator=g), 1.0),
            (torch.randn(20000, 4, 4, generator=g), 0.999),
        ):
            m = sinkhorn(logits)
            assert (m.sum(-2) - 1).abs().amax(-1).quantile(quantile) < 1e-4
            assert (m.double() - sinkhorn_by_definition(logits, 20)).abs().max() < 1e-6

    def test_nan_propagates(self) -> None:
        logits = torch.zeros(2, 4, 4)
        logits[0, 1, 2] = math.nan
        m = sinkhorn(logits)
        assert torch.isnan(m[0]).all()
        assert not torch.isnan(m[1]).any()

    @given(shapes)
    @settings(deadline=None, max_examples=40)
    def test_properties(self, shape: tuple[int, int, int]) -> None:
        n, _, t = shape
        m = sinkhorn(3 * random(t, 2, n, n, dtype=torch.float32))
        assert m.shape == (t, 2, n, n)
        assert m.dtype == torch.float32
        assert (m >= 0).all()
        torch.testing.assert_close(m.sum(-1), torch.ones(t, 2, n), rtol=0, atol=1e-6)
        if n == 1:
            assert (m == 1).all()

    @pytest.mark.parametrize("bad", [torch.zeros(3), torch.zeros(2, 3), torch.zeros(2, 0, 0)])
    def test_shape_errors(self, bad: Tensor) -> None:
        with pytest.raises(ValueError, match=r"\[\.\.\., n, n\]"):
            sinkhorn(bad)

    def test_iterations_error(self) -> None:
        with pytest.raises(ValueError, match="iterations must be >= 1, got 0"):
            sinkhorn(torch.zeros(2, 2), 0)


class TestDeepSeekV4:
    def test_equals_public_code(self) -> None:
        """Its steps in its own axes (the matrix stored transposed): softmax over what a stream sends, eps everywhere."""
        n, c, eps, iterations = 4, 6, 1e-6, 20
        phi, alpha, bias = parameters(n, c)
        x = random(3, 2, n, c)
        flat = x.flatten(-2)
        mixes = torch.nn.functional.linear(flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + eps), phi)
        pre = torch.sigmoid(mixes[..., :n] * alpha[0] + bias[:n]) + eps
        post = 2 * torch.sigmoid(mixes[..., n : 2 * n] * alpha[1] + bias[n : 2 * n])
        ours = (mixes[..., 2 * n :] * alpha[2] + bias[2 * n :]).unflatten(-1, (n, n))
        comb = torch.softmax(ours.transpose(-1, -2), dim=-1) + eps  # comb[j, i]: stream j into stream i
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
        for _ in range(iterations - 1):
            comb = comb / (comb.sum(-1, keepdim=True) + eps)
            comb = comb / (comb.sum(-2, keepdim=True) + eps)
        got = mappings(x, phi, alpha, bias, profile="deepseek-v4")
        for ours_, theirs in zip(got, (pre, post, comb.transpose(-1, -2)), strict=True):
            torch.testing.assert_close(ours_, theirs, rtol=1e-12, atol=1e-14)

    def test_finite_for_huge_logits(self) -> None:
        logits = 1e4 * torch.sign(random(500, 4, 4, dtype=torch.float32))
        assert torch.isfinite(reference.sinkhorn_deepseek_v4(logits)).all()


class TestMappings:
    def test_paper_by_definition(self) -> None:
        n, c = 3, 5
        phi, alpha, bias = parameters(n, c)
        x = random(7, n, c)
        pre, post, res = mappings(x, phi, alpha, bias)
        for t in range(7):  # token by token, index by index
            flat = x[t].flatten()
            r = 1 / math.sqrt(float(flat.square().mean()) + 1e-6)
            m = [r * float(phi[k] @ flat) for k in range(n * n + 2 * n)]
            logits = torch.zeros(n, n, dtype=F64)
            for i in range(n):
                assert math.isclose(float(pre[t, i]), 1 / (1 + math.exp(-(alpha[0] * m[i] + bias[i]))), rel_tol=1e-12)
                k = n + i
                assert math.isclose(float(post[t, i]), 2 / (1 + math.exp(-(alpha[1] * m[k] + bias[k]))), rel_tol=1e-12)
                for j in range(n):
                    k = 2 * n + i * n + j
                    logits[i, j] = alpha[2] * m[k] + bias[k]
            torch.testing.assert_close(res[t], sinkhorn_by_definition(logits, 20), rtol=1e-12, atol=1e-14)

    def test_hc_is_unconstrained(self) -> None:
        n, c = 4, 8
        phi, alpha, bias = parameters(n, c)
        x = random(50, n, c)
        pre, post, res = mappings(x, phi, alpha, bias, mode="hc")
        flat = x.flatten(-2)
        mixed = torch.tanh((flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + 1e-6)) @ phi.T)
        torch.testing.assert_close(pre, alpha[0] * mixed[:, :n] + bias[:n])
        torch.testing.assert_close(post, alpha[1] * mixed[:, n : 2 * n] + bias[n : 2 * n])
        torch.testing.assert_close(res.flatten(1), alpha[2] * mixed[:, 2 * n :] + bias[2 * n :])
        assert (res.sum(-1) - 1).abs().max() > 0.1

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_float32_whatever_the_streams(self, dtype: torch.dtype) -> None:
        phi, alpha, bias = parameters(4, 16, torch.float32)
        x = random(5, 4, 16).to(dtype)
        got = mappings(x, phi, alpha, bias)
        expected = mappings(x.double(), phi.double(), alpha.double(), bias.double())
        for ours, exact in zip(got, expected, strict=True):
            assert ours.dtype == torch.float32
            torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for ours, inside in zip(got, mappings(x, phi, alpha, bias), strict=True):
                assert torch.equal(ours, inside)

    def test_zero_rows_and_scale(self) -> None:
        """A token of zeros gives the biases' mappings; the RMS makes the mappings blind to the streams' scale."""
        phi, alpha, bias = parameters(4, 16)
        pre, post, _ = mappings(torch.zeros(1, 4, 16, dtype=F64), phi, alpha, bias)
        torch.testing.assert_close(pre[0], torch.sigmoid(bias[:4]))
        torch.testing.assert_close(post[0], 2 * torch.sigmoid(bias[4:8]))
        x = random(3, 4, 16)
        for small, large in zip(mappings(x, phi, alpha, bias), mappings(1e6 * x, phi, alpha, bias), strict=True):
            torch.testing.assert_close(small, large, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"profile": "v5"}, "profile must be one of"),
            ({"mode": "mHC"}, "mode must be one of"),
            ({"phi": torch.zeros(24, 60)}, r"phi must be \[24, 64\]"),
            ({"alpha": torch.zeros(1)}, r"alpha must be \[3\]"),
            ({"bias": torch.zeros(16)}, r"bias must be \[24\]"),
            ({"backend": "cuda"}, "backend must be one of"),
        ],
    )
    def test_errors(self, arguments: dict, message: str) -> None:
        phi, alpha, bias = parameters(4, 16)
        with pytest.raises(ValueError, match=message):
            mappings(**{"x": torch.zeros(2, 4, 16), "phi": phi, "alpha": alpha, "bias": bias, **arguments})


class TestStreams:
    @given(shapes, st.sampled_from([torch.float32, torch.bfloat16, torch.float16, F64]))
    @settings(deadline=None, max_examples=40)
    def test_aggregate_and_mix(self, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        n, c, t = shape
        x, y = random(t, n, c).to(dtype), random(t, c, seed=2).to(dtype)
        pre, post, res = (torch.rand(t, *s, dtype=F64).float() for s in ((n,), (n,), (n, n)))
        bias = random(c, seed=3).to(dtype)
        u, mixed = aggregate(x, pre), mix(x, res, post, y, bias)
        assert u.shape == y.shape
        assert u.dtype == mixed.dtype == dtype
        assert mixed.shape == x.shape
        exact_u = torch.einsum("ti,tic->tc", pre.double(), x.double())
        exact = torch.einsum("tij,tjc->tic", res.double(), x.double())
        exact = exact + post.double()[..., None] * (y.double() + bias.double())[:, None]
        rounding = 4 * torch.finfo(dtype if dtype != F64 else torch.float32).eps
        torch.testing.assert_close(u.double(), exact_u, rtol=rounding, atol=rounding * n)
        torch.testing.assert_close(mixed.double(), exact, rtol=rounding, atol=rounding * n)

    def test_direction_of_res(self) -> None:
        """res[i, j] carries stream j into stream i."""
        x = torch.arange(3.0).reshape(1, 3, 1) + 1
        res = torch.zeros(1, 3, 3)
        res[0, 0, 2] = 1
        out = mix(x, res, torch.zeros(1, 3), torch.zeros(1, 1))
        assert out.flatten().tolist() == [3, 0, 0]

    def test_shape_errors(self) -> None:
        x = torch.zeros(2, 4, 8)
        with pytest.raises(ValueError, match=r"pre must be \[2, 4\]"):
            aggregate(x, torch.zeros(2, 3))
        with pytest.raises(ValueError, match=r"res must be \[2, 4, 4\]"):
            mix(x, torch.zeros(4, 4), torch.zeros(2, 4), torch.zeros(2, 8))
        with pytest.raises(ValueError, match=r"y must be \[2, 8\]"):
            mix(x, torch.zeros(2, 4, 4), torch.zeros(2, 4), torch.zeros(2, 4, 8))


class TestGradients:
    """gradcheck in float64: every operation, every input."""

    @staticmethod
    def check(function, *inputs: Tensor) -> None:
        assert torch.autograd.gradcheck(function, tuple(t.clone().requires_grad_() for t in inputs))

    @pytest.mark.parametrize("n", [1, 2, 4])
    @pytest.mark.parametrize("t", [0, 1, 3])
    def test_sinkhorn(self, n: int, t: int) -> None:
        self.check(lambda logits: sinkhorn(logits, 5), random(t, n, n))
        self.check(lambda logits: reference.sinkhorn_deepseek_v4(logits, 5), random(t, n, n))

    @pytest.mark.parametrize("n", [1, 2, 4])
    @pytest.mark.parametrize(("mode", "profile"), [("mhc", "paper"), ("mhc", "deepseek-v4"), ("hc", "paper")])
    def test_mappings(self, n: int, mode: str, profile: str) -> None:
        self.check(
            lambda *a: mappings(*a, iterations=4, mode=mode, profile=profile), random(2, n, 3), *parameters(n, 3)
        )

    @pytest.mark.parametrize("n", [1, 2, 4])
    def test_head(self, n: int) -> None:
        self.check(lambda *a: head(*a), random(2, n, 3), random(n, n * 3), random(1), random(n))

    @pytest.mark.parametrize("n", [1, 3])
    @pytest.mark.parametrize("t", [0, 1, 2])
    def test_aggregate_and_mix(self, n: int, t: int) -> None:
        x, y = random(t, n, 3), random(t, 3)
        self.check(aggregate, x, random(t, n))
        self.check(mix, x, random(t, n, n), random(t, n), y, random(3))
        self.check(lambda *a: mix(*a), x, random(t, n, n), random(t, n), y)
