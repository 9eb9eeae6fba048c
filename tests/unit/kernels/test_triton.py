"""The Triton kernels against the reference in float64: on a GPU if there is one, else interpreted on the CPU, the same kernels.

All memory that PyTorch hands out uninitialised is NaN here. The bounds are the issue's: relative errors in the norm.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mhc_kernels import aggregate, boundary, connect, mappings, mix, reference, sinkhorn

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
F64 = torch.float64
# Streams; phi; alpha and bias. The interpreter truncates float32 to bf16 where a GPU rounds: twice the error.
BOUNDS = {
    torch.float32: (1e-5, 1e-5, 1e-5),
    torch.float16: (3e-3, 2e-3, 1e-3),
    torch.bfloat16: (3e-3, 2e-3, 1e-3) if ON_GPU else (6e-3, 4e-3, 2e-3),
}


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def error(ours: Tensor, expected: Tensor) -> float:
    """Relative, in the norm; where nothing is expected (H_res of one stream has no gradient), absolute."""
    ours, expected = ours.detach().to(F64), expected.detach().to(F64)
    return float((ours - expected).norm() / (expected.norm() if expected.norm() > 0 else 1.0))


class Case:
    """Random arguments of a boundary, and gradients of its results."""

    def __init__(self, t: int, n: int, c: int, dtype: torch.dtype = torch.float32, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        rows = n * n + 2 * n
        self.arguments: dict[str, Tensor] = {
            "x": random(t, n, c).to(dtype),
            "res": torch.softmax(random(t, n, n), -1),
            "post": 1 + 0.3 * random(t, n),
            "y": random(t, c).to(dtype),
            "bias": random(c).to(dtype),
            "next_phi": random(rows, n * c) / math.sqrt(n * c),
            "next_alpha": 0.5 + torch.rand(3, generator=generator),
            "next_bias": random(rows),
        }
        self.arguments = {k: v.to(DEVICE) for k, v in self.arguments.items()}
        gradients = (random(t, n, c).to(dtype), random(t, c).to(dtype), random(t, n), random(t, n, n))
        self.gradients = tuple(g.to(DEVICE) for g in gradients)

    def leaves(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        return {k: v.detach().clone().to(dtype or v.dtype).requires_grad_() for k, v in self.arguments.items()}


PARAMETERS = ("next_phi", "next_alpha", "next_bias")


def check_boundary(case: Case, profile: str = "paper", mode: str = "mhc") -> None:
    dtype = case.arguments["x"].dtype
    settings = {"profile": profile, "mode": mode}
    ours = case.leaves()
    results = boundary(**ours, **settings, backend="triton")
    torch.autograd.backward(results, case.gradients)
    exact = case.leaves(F64)
    streams = reference.mix(*(exact[k] for k in ("x", "res", "post", "y", "bias")))
    # What follows reads the streams as they are stored; the rounding itself has no gradient.
    stored = streams + (results[0].detach().to(F64) - streams.detach())
    pre, post, res = reference.mappings(stored, *(exact[k] for k in PARAMETERS), **settings)
    expected = (stored, reference.aggregate(stored, pre), post, res)
    torch.autograd.backward(expected, [g.to(F64) for g in case.gradients])

    of_streams, of_phi, of_gates = BOUNDS[dtype]
    assert error(results[0], streams) <= of_streams
    assert error(results[1], expected[1]) <= of_streams
    assert error(results[2], post) <= of_gates
    assert error(results[3], res) <= of_gates
    assert all(r.dtype == torch.float32 for r in results[2:])
    for name, leaf in ours.items():
        bound = {"next_phi": of_phi, "next_alpha": of_gates, "next_bias": of_gates}.get(name, of_streams)
        assert leaf.grad.dtype == leaf.dtype
        # That of y's bias is the sum of dy as it is stored: terms that cancel leave the rounding of each.
        expected_grad = ours["y"].grad.to(F64).sum(0) if name == "bias" else exact[name].grad
        assert error(leaf.grad, expected_grad) <= bound, name


@pytest.mark.parametrize("n", range(1, 9))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_boundary(n: int, dtype: torch.dtype) -> None:
    check_boundary(Case(70, n, 48, dtype))


@pytest.mark.parametrize(("t", "c"), [(1, 16), (33, 80), (64, 272), (129, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_boundary_shapes(t: int, c: int, dtype: torch.dtype) -> None:
    """Ragged in tokens and channels: no block divides them."""
    check_boundary(Case(t, 4, c, dtype))


@pytest.mark.parametrize("n", [1, 3, 4])
@pytest.mark.parametrize(("profile", "mode"), [("deepseek-v4", "mhc"), ("paper", "hc")])
def test_boundary_numerics(n: int, profile: str, mode: str) -> None:
    check_boundary(Case(37, n, 32), profile, mode)


@pytest.mark.gpu
@pytest.mark.parametrize(("t", "c"), [(1024, 2560), (500, 7168), (2048, 1280)])
@pytest.mark.parametrize("n", [2, 4, 8])
def test_boundary_at_size(t: int, c: int, n: int) -> None:
    check_boundary(Case(t, n, c, torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_connect_equals_boundary(dtype: torch.dtype) -> None:
    """The second half alone: from the streams that a boundary wrote, what the boundary computed, and its gradients."""
    case = Case(70, 4, 48, dtype)
    leaves = case.leaves()
    whole = boundary(**leaves, backend="triton")
    x = whole[0].detach().requires_grad_()
    parameters = [leaves[k].detach().clone().requires_grad_() for k in PARAMETERS]
    half = connect(x, *parameters, backend="triton")
    for a, b in zip(whole, half, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    torch.autograd.backward(whole, case.gradients)
    torch.autograd.backward(half, case.gradients)
    for name, parameter in zip(PARAMETERS, parameters, strict=True):
        torch.testing.assert_close(leaves[name].grad, parameter.grad, rtol=0, atol=0)
    # dx of the boundary is H_res^T of what the half gives.
    through = torch.einsum("tij,tic->tjc", case.arguments["res"].to(F64), x.grad.to(F64))
    assert error(leaves["x"].grad, through) <= BOUNDS[dtype][0]


@pytest.mark.parametrize("n", [1, 3, 4, 8])
def test_separate_operations(n: int) -> None:
    """mappings, aggregate and mix one by one, each with its own backward."""
    case = Case(45, n, 32)
    ours, exact = case.leaves(), case.leaves(F64)
    for leaves, backend in ((ours, "triton"), (exact, "reference")):
        pre, post, res = mappings(leaves["x"], *(leaves[k] for k in PARAMETERS), backend=backend)
        u = aggregate(leaves["x"], pre, backend=backend)
        out = mix(leaves["x"], res, post, leaves["y"], leaves["bias"], backend=backend)
        g = case.gradients
        # Gradients into the mappings from outside as well.
        torch.autograd.backward((out, u, pre), (g[0].to(out.dtype), g[1].to(out.dtype), g[2].to(pre.dtype)))
        leaves["results"] = torch.cat([t.flatten() for t in (pre, post, res, u, out)])
    assert error(ours.pop("results"), exact.pop("results")) <= 1e-5
    for name in ("x", "y", "bias", *PARAMETERS):
        assert error(ours[name].grad, exact[name].grad) <= 1e-5, name


def test_expanded_gradients() -> None:
    """``sum().backward()`` hands the kernels gradients that are not contiguous."""
    case = Case(20, 4, 32)
    ours, exact = case.leaves(), case.leaves(F64)
    sum(r.sum() for r in boundary(**ours, backend="triton")).backward()
    sum(r.sum() for r in boundary(**exact, backend="reference")).backward()
    for name in ours:
        if name not in PARAMETERS:  # those of phi, alpha and bias cancel here to nothing
            assert error(ours[name].grad, exact[name].grad) <= 1e-5, name


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (3,), (1, 2)])
def test_unused_results(used: tuple[int, ...]) -> None:
    """A chain may be cut anywhere: gradients of results that nobody used are zero."""
    case = Case(40, 4, 32)
    ours, exact = case.leaves(), case.leaves(F64)
    for leaves, backend in ((ours, "triton"), (exact, "reference")):
        results = boundary(**leaves, backend=backend)
        torch.autograd.backward([results[k] for k in used], [case.gradients[k].to(results[k].dtype) for k in used])
    for name in ours:
        expected = exact[name].grad
        assert error(ours[name].grad, torch.zeros_like(exact[name]) if expected is None else expected) <= 1e-5, name


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


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e18])
def test_streams_of_any_scale(scale: float) -> None:
    """Tokens of zeros, and streams so small or large that their squares leave float32."""
    case = Case(20, 4, 32)
    case.arguments["x"][:5] *= scale
    case.arguments["y"][:5] *= scale
    case.arguments["bias"] = torch.zeros_like(case.arguments["bias"])
    leaves = case.leaves()
    results = boundary(**leaves, backend="triton")
    exact = boundary(**case.leaves(F64), backend="reference")
    for ours, expected in zip(results, exact, strict=True):
        assert error(ours[:5], expected[:5]) <= 1e-5
        assert error(ours[5:], expected[5:]) <= 1e-5


def test_nan_stays_in_its_token() -> None:
    case = Case(40, 4, 32)
    case.arguments["x"][7, 2, 5] = math.nan
    leaves = case.leaves()
    results = boundary(**leaves, backend="triton")
    torch.autograd.backward(results, case.gradients)
    others = torch.arange(40, device=DEVICE) != 7
    for tensor in (*results, leaves["x"].grad, leaves["y"].grad, leaves["res"].grad, leaves["post"].grad):
        assert tensor[7].isnan().any()
        assert not tensor[others].isnan().any()
    assert leaves["next_phi"].grad.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_every_time(dtype: torch.dtype) -> None:
    case = Case(1000, 4, 1280, dtype) if ON_GPU else Case(150, 4, 48, dtype)

    def run() -> list[Tensor]:
        leaves = case.leaves()
        results = boundary(**leaves, backend="triton")
        torch.autograd.backward(results, case.gradients)
        return [*results, *(leaf.grad for leaf in leaves.values())]

    first = run()
    for _ in range(20 if ON_GPU else 2):
        for a, b in zip(first, run(), strict=True):
            assert torch.equal(a, b)


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


def test_main_grad_accumulates() -> None:
    """As Megatron's fused gradient accumulation: added to main_grad, marked, and some gradient handed on for the hook."""
    case = Case(70, 4, 48)
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


@pytest.mark.parametrize("n", [1, 4])
def test_no_tokens(n: int) -> None:
    case = Case(0, n, 32)
    leaves = case.leaves()
    results = boundary(**leaves, backend="triton")
    assert [tuple(r.shape) for r in results] == [(0, n, 32), (0, 32), (0, n), (0, n, n)]
    torch.autograd.backward(results, case.gradients)
    for name, leaf in leaves.items():
        assert leaf.grad.shape == leaf.shape
        assert not leaf.grad.any(), name
    assert sinkhorn(torch.zeros(0, 4, 4, device=DEVICE), backend="triton").shape == (0, 4, 4)


def test_leading_dimensions_and_flat_streams() -> None:
    case = Case(24, 4, 32)
    a = case.arguments
    expected = boundary(**a, backend="triton")
    shaped = {k: v.unflatten(0, (3, 2, 4)) if k in ("x", "res", "post", "y") else v for k, v in a.items()}
    for ours, plain in zip(boundary(**shaped, backend="triton"), expected, strict=True):
        assert torch.equal(ours.flatten(0, 2), plain)
    flat = boundary(**{**shaped, "x": shaped["x"].flatten(-2)}, flat=True, backend="triton")
    assert flat[0].shape == (3, 2, 4, 128)
    assert flat[0]._base is None  # Megatron copies views between layers
    assert torch.equal(flat[0].flatten(), expected[0].flatten())


class TestErrors:
    def test_strides(self) -> None:
        case = Case(8, 4, 32)
        strided = {
            name: case.arguments[name].transpose(0, 1).contiguous().transpose(0, 1) for name in ("x", "res", "y")
        }
        strided |= {name: torch.ones(*case.arguments[name].shape, 2, device=DEVICE)[..., 0] for name in PARAMETERS}
        for name, wrong in strided.items():
            with pytest.raises(ValueError, match=rf"{name} must be contiguous .* call {name}.contiguous\(\)"):
                boundary(**{**case.arguments, name: wrong}, backend="triton")

    @pytest.mark.parametrize(
        ("n", "c", "dtype", "message"),
        [
            (9, 16, torch.float32, "1 to 8 streams, not n = 9"),
            (4, 24, torch.float32, "C to be a multiple of 16, not 24"),
            (4, 16, torch.float64, "not torch.float64"),
        ],
    )
    def test_what_the_kernels_do_not_take(self, n: int, c: int, dtype: torch.dtype, message: str) -> None:
        x = torch.zeros(2, n, c, dtype=dtype, device=DEVICE)
        with pytest.raises(ValueError, match=f"backend 'triton': .*{message}; use backend 'reference'"):
            aggregate(x, torch.zeros(2, n, device=DEVICE), backend="triton")

    def test_auto_says_why_it_takes_the_reference(self) -> None:
        x, pre = torch.zeros(2, 4, 40, device=DEVICE), torch.zeros(2, 4, device=DEVICE)
        if ON_GPU:
            with pytest.warns(UserWarning, match="multiple of 16, not 40; the slow reference runs instead"):
                aggregate(x, pre)
        assert aggregate(x, pre).shape == (2, 40)

    def test_shapes_are_checked_at_every_call(self) -> None:
        """The checks of a call that passed before are skipped, those of any other are not."""
        arguments = Case(8, 4, 32).arguments
        boundary(**arguments, backend="triton")
        with pytest.raises(ValueError, match=r"alpha must be \[3\]"):
            boundary(**{**arguments, "next_alpha": arguments["next_alpha"][:1]}, backend="triton")
        with pytest.raises(ValueError, match="post must be"):
            boundary(**{**arguments, "post": arguments["post"][:4]}, backend="triton")

    def test_second_derivatives(self) -> None:
        leaves = Case(8, 4, 32).leaves()
        out = boundary(**leaves, backend="triton")[0]
        with pytest.raises(RuntimeError, match=r"no second derivatives .* use backend='reference'"):
            torch.autograd.grad(out.sum(), leaves["x"], create_graph=True)

    def test_dropout_probability(self) -> None:
        a = Case(4, 4, 16).arguments
        with pytest.raises(ValueError, match=r"dropout_p must be in \[0, 1\), got 1"):
            mix(*(a[k] for k in ("x", "res", "post", "y")), dropout_p=1.0)


def test_operators_pass_opcheck() -> None:
    """Schemas (what is mutated, what is not) and fake tensors: what torch.compile relies on."""
    import mhc_kernels.fused.functions  # noqa: F401  (registers them)

    ops = torch.ops.mhc_kernels
    case = Case(20, 4, 32)
    a = case.arguments
    x, g = a["x"].flatten(-2), case.gradients
    tests = ("test_schema", "test_faketensor")
    mixed = (x, a["res"], a["post"], a["y"], a["bias"], None, 0.0)
    own = tuple(a[k] for k in PARAMETERS)
    settings = (20, 1e-6, 0.0, False)
    torch.library.opcheck(ops.mix.default, mixed, test_utils=tests)
    torch.library.opcheck(ops.mix_backward.default, (g[0].flatten(-2), *mixed), test_utils=tests)
    torch.library.opcheck(ops.aggregate.default, (x, a["post"]), test_utils=tests)
    torch.library.opcheck(ops.aggregate_backward.default, (g[1], x, a["post"]), test_utils=tests)
    torch.library.opcheck(ops.sinkhorn.default, (a["res"], 20, 0.0), test_utils=tests)
    torch.library.opcheck(ops.sinkhorn_backward.default, (g[3], a["res"], 20, 0.0), test_utils=tests)
    torch.library.opcheck(ops.boundary.default, (*mixed, *own, True, *settings), test_utils=tests)
    alone = (x, None, None, None, None, None, 0.0)
    torch.library.opcheck(ops.boundary.default, (*alone, *own, False, *settings), test_utils=tests)
    out, _, pre, _, _, saved, w = ops.boundary.default(*mixed, *own, True, *settings)
    upstream = (g[0].flatten(-2), g[1], None, g[2], g[3])
    rest = (out, pre, saved, w, *own[1:])
    for mains in ((None, None, None), tuple(torch.zeros_like(p) for p in own)):
        arguments = (*upstream, *mixed, *rest, *mains, 20, 0.0, False)
        torch.library.opcheck(ops.boundary_backward.default, arguments, test_utils=tests)


@pytest.mark.gpu
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._dynamo.config, "disable", False)
    case = Case(200, 4, 256, torch.bfloat16)

    def step(**leaves: Tensor) -> tuple[Tensor, ...]:
        return boundary(**leaves, backend="triton")

    eager, compiled = case.leaves(), case.leaves()
    torch.autograd.backward(step(**eager), case.gradients)
    torch.autograd.backward(torch.compile(step, fullgraph=True, dynamic=dynamic)(**compiled), case.gradients)
    for name in eager:
        assert torch.equal(eager[name].grad, compiled[name].grad), name


@pytest.mark.gpu
def test_misaligned_tensors() -> None:
    """Contiguous, but at an address that Triton may not assume to be a multiple of 16."""
    case = Case(40, 4, 64, torch.bfloat16)
    expected = boundary(**case.arguments, backend="triton")
    shifted = {}
    for name, tensor in case.arguments.items():
        room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=DEVICE)
        shifted[name] = room[1:].view(tensor.shape).copy_(tensor)
    for ours, plain in zip(boundary(**shifted, backend="triton"), expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-2, atol=1e-2)
        assert error(ours, plain) < 1e-6


@pytest.mark.gpu
def test_captured_in_a_cuda_graph() -> None:
    case = Case(300, 4, 256, torch.bfloat16)
    leaves = case.leaves()
    inputs = list(leaves.values())

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(boundary(**leaves, backend="triton"), inputs, case.gradients)

    expected = run()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for tensor in captured:
        tensor.zero_()
    graph.replay()
    for a, b in zip(captured, expected, strict=True):
        assert torch.equal(a, b)


def test_warm_up_builds_all_that_a_chain_needs() -> None:
    """After it, nothing is built at the first step; the random state is where it was."""
    from mhc_kernels.fused.launch import CompileTimes
    from mhc_kernels.fused.warm_up import warm_up

    settings = {"output_bias": True, "dropout_p": 0.1, "device": DEVICE}
    state = torch.get_rng_state(), torch.cuda.get_rng_state() if ON_GPU else torch.get_rng_state()
    kernels, _ = warm_up(4, 32, torch.float32, **settings)
    assert torch.equal(torch.get_rng_state(), state[0])
    if ON_GPU:  # interpreted kernels are never built
        assert torch.equal(torch.cuda.get_rng_state(), state[1])
        built = CompileTimes.kernels
        case = Case(40, 4, 32)
        leaves = case.leaves()
        x, u, post, res = connect(leaves["x"], *(leaves[k] for k in PARAMETERS))
        results = boundary(**{**leaves, "x": x, "post": post, "res": res}, dropout_p=0.1)
        out = mix(results[0], results[3], results[2], leaves["y"], leaves["bias"], dropout_p=0.1)
        torch.autograd.backward((aggregate(out, results[2]), results[1], u), (case.gradients[1],) * 3)
        assert CompileTimes.kernels == built
        assert warm_up(4, 32, torch.float32, **settings) == (0, 0.0)
    else:
        assert kernels > 0
