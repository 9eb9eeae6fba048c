"""The fused boundary, its halves and its parts against the reference in float64: values and all gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mhc_kernels import (
    RMSNorm,
    add_output_,
    aggregate,
    boundary,
    connect,
    mappings,
    mix,
    output_gradients,
    reference,
    sinkhorn,
)
from tests.unit.kernels.cases import BOUNDS, DEVICE, F64, ON_GPU, PARAMETERS, Case, error

pytestmark = pytest.mark.usefixtures("poisoned_memory")


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
        off = error(leaf.grad, expected_grad)
        print(f"n = {case.arguments['x'].shape[1]}, {dtype}: d{name} off by {off:.1e}, at most {bound:.0e}")
        assert off <= bound, name


@pytest.mark.parametrize("n", [4, 8])
def test_rounding_of_streams_alone(n: int) -> None:
    """Why `check_boundary` goes on from the streams as they are stored: in float64, without a kernel, their rounding to bf16
    changes the parameters' gradients by more than these may be off. (``pytest -s`` prints by how much.)"""
    case = Case(512, n, 512, torch.bfloat16)

    def run(rounds: bool) -> dict[str, Tensor]:
        exact = case.leaves(F64)
        streams = reference.mix(*(exact[k] for k in ("x", "res", "post", "y", "bias")))
        if rounds:
            streams = streams + (streams.detach().bfloat16().to(F64) - streams.detach())
        pre, post, res = reference.mappings(streams, *(exact[k] for k in PARAMETERS))
        u = reference.aggregate(streams, pre)
        torch.autograd.backward((streams, u, post, res), [g.to(F64) for g in case.gradients])
        return {"u": u, **{f"d {name}": leaf.grad for name, leaf in exact.items()}}

    rounded, exact = run(True), run(False)
    off = {name: error(rounded[name], exact[name]) for name in exact}
    print(f"\nn = {n}: " + ", ".join(f"{name} {by:.1e}" for name, by in off.items()))
    assert max(off["u"], off["d x"], off["d y"]) < 3e-3
    assert off["d next_phi"] > 2e-3
    assert min(off["d next_alpha"], off["d next_bias"]) > 1e-3


@pytest.mark.parametrize("n", range(1, 9))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_boundary(n: int, dtype: torch.dtype) -> None:
    check_boundary(Case(70, n, 48, dtype))


@pytest.mark.parametrize(("t", "c"), [(1, 16), (33, 80), (64, 272), (129, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_boundary_shapes(t: int, c: int, dtype: torch.dtype) -> None:
    """Ragged in tokens and channels: no block divides them."""
    check_boundary(Case(t, 4, c, dtype))


@pytest.mark.parametrize("n", [1, 3, 4, 8])
@pytest.mark.parametrize(("profile", "mode"), [("deepseek-v4", "mhc"), ("paper", "hc")])
def test_boundary_numerics(n: int, profile: str, mode: str) -> None:
    check_boundary(Case(37, n, 32), profile, mode)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("t", "c", "dtype"),
    [
        (1024, 2560, torch.bfloat16),
        (500, 7168, torch.bfloat16),
        (2048, 1280, torch.bfloat16),
        (1024, 2560, torch.float32),
        (1024, 2560, torch.float16),
    ],
)
@pytest.mark.parametrize("n", [2, 4, 8])
def test_boundary_at_size(t: int, c: int, dtype: torch.dtype, n: int) -> None:
    check_boundary(Case(t, n, c, dtype))


@pytest.mark.parametrize("n", range(1, 9))
@pytest.mark.parametrize("kind", ["large logits", "low logits", "zero rows", "zero parameters"])
@pytest.mark.parametrize(
    ("t", "c", "dtype"),
    [(21, 48, torch.float32), pytest.param(512, 1280, torch.bfloat16, marks=pytest.mark.gpu)],
)
def test_boundary_on_adversarial_arguments(t: int, c: int, dtype: torch.dtype, kind: str, n: int) -> None:
    case = Case(t, n, c, dtype, seed=n)
    a = case.arguments
    if kind == "large logits":
        # Every other one: where all gates are shut, their gradients are what rounding leaves of 1 - H.
        a["next_bias"][1::2] *= 1e4
    elif kind == "low logits":  # all of H_res's: nothing else in the kernels' tiles may be above them
        a["next_bias"][2 * n :] = -1e31
    elif kind == "zero rows":
        for name in ("x", "y"):
            a[name][:5] = 0
        a["bias"].zero_()
    else:
        for name in PARAMETERS:
            a[name].zero_()
    check_boundary(case)
    if kind == "low logits":
        check_boundary(case, profile="deepseek-v4")


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


@pytest.mark.parametrize("n", [1, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_separate_operations_in_half_precision(n: int, dtype: torch.dtype) -> None:
    """Each from arguments of its own: a result's rounding is in no other one.

    The gradient of x is that of all three together. What mappings add to it is small, and alone it has three roundings to bf16:
    of the projected values' gradients, of phi, and its own.
    """
    case = Case(45, n, 32, dtype)
    of_streams, of_phi, of_gates = BOUNDS[dtype]
    operations: dict[str, tuple[Any, tuple[str, ...]]] = {
        "mappings": (mappings, ("x", *PARAMETERS)),
        "aggregate": (aggregate, ("x", "post")),
        "mix": (mix, ("x", "res", "post", "y", "bias")),
    }
    gradients = {g.shape: g for g in case.gradients}
    of_x = []
    for operation, (run, names) in operations.items():
        leaves = {name: case.arguments[name].detach().clone().requires_grad_() for name in names}
        exact = {name: leaf.detach().to(F64).requires_grad_() for name, leaf in leaves.items()}
        results = _backward(run(*leaves.values(), backend="triton"), gradients)
        expected = _backward(run(*exact.values(), backend="reference"), gradients)
        for ours, right in zip(results, expected, strict=True):
            assert error(ours, right) <= (of_gates if operation == "mappings" else of_streams), operation
        of_x.append((leaves.pop("x").grad.to(F64), exact.pop("x").grad))
        for name, leaf in leaves.items():
            bound = {"next_phi": of_phi, "next_alpha": of_gates, "next_bias": of_gates}.get(name, of_streams)
            right = leaves["y"].grad.to(F64).sum(0) if name == "bias" else exact[name].grad
            assert error(leaf.grad, right) <= bound, f"{operation}, {name}"
    ours, right = (sum(terms) for terms in zip(*of_x, strict=True))
    assert error(ours, right) <= of_streams


def _backward(results: Tensor | tuple[Tensor, ...], gradients: dict[torch.Size, Tensor]) -> tuple[Tensor, ...]:
    """The results, their gradients gone back: of each the one with its shape."""
    results = (results,) if isinstance(results, Tensor) else results
    torch.autograd.backward(results, [gradients[result.shape].to(result.dtype) for result in results])
    return results


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


@pytest.mark.parametrize("n", range(1, 9))
def test_nan_stays_in_its_token(n: int) -> None:
    case = Case(40, n, 32)
    case.arguments["x"][7, n // 2, 5] = math.nan
    leaves = case.leaves()
    results = boundary(**leaves, backend="triton")
    torch.autograd.backward(results, case.gradients)
    others = torch.arange(40, device=DEVICE) != 7
    for tensor in (*results, leaves["x"].grad, leaves["y"].grad, leaves["res"].grad, leaves["post"].grad):
        assert tensor[7].isnan().any()
        assert not tensor[others].isnan().any()
    assert leaves["next_phi"].grad.isnan().any()


def every_operation(case: Case) -> list[Tensor]:
    """Results and gradients of all operations."""
    gradients = {g.shape: g for g in case.gradients}
    norm = RMSNorm(torch.ones_like(case.arguments["y"][0]).requires_grad_(), 1e-5)
    found: list[Tensor] = []

    def keep(operation: Callable[[dict[str, Tensor], list[Tensor]], Tensor | tuple[Tensor, ...]]) -> None:
        leaves = case.leaves()
        found.extend(_backward(operation(leaves, [leaves[name] for name in PARAMETERS]), gradients))
        found.extend(leaf.grad for leaf in leaves.values() if leaf.grad is not None)

    keep(lambda a, own: boundary(**{**a, "x": connect(a["x"], *own, backend="triton")[0]}, backend="triton"))
    keep(lambda a, own: connect(a["x"], *own, norm=norm, backend="triton"))
    keep(lambda a, own: boundary(**a, norm=norm, backend="triton"))
    keep(lambda a, own: mappings(a["x"], *own, backend="triton"))
    keep(lambda a, own: aggregate(a["x"], a["post"], backend="triton"))
    keep(lambda a, own: mix(*(a[name] for name in ("x", "res", "post", "y", "bias")), backend="triton"))
    keep(lambda a, own: sinkhorn(a["res"], backend="triton"))
    x, post, y = case.arguments["x"].flatten(-2), case.arguments["post"], case.arguments["y"]
    added, dy, dpost = x.clone(), torch.empty_like(y), torch.empty_like(post)
    add_output_(added, post, y, backend="triton")
    output_gradients(x, post, y, dy, dpost, backend="triton")
    return [*found, norm.weight.grad, added, dy, dpost]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [2, 4, 5, 8] if ON_GPU else [4, 5])
def test_same_bits_every_time(n: int, dtype: torch.dtype) -> None:
    """Whatever else the GPU does: a copy that may overtake a product does so only at times."""
    case = Case(1000, n, 1280, dtype) if ON_GPU else Case(40, n, 48, dtype)
    busy = torch.ones(4096, 4096, dtype=torch.bfloat16, device=DEVICE) if ON_GPU else None
    first = every_operation(case)
    assert not any(tensor.isnan().any() for tensor in first)
    for repeat in range(20 if ON_GPU else 1):
        if busy is not None and repeat % 2:
            with torch.cuda.stream(torch.cuda.Stream()):
                busy @ busy
        for a, b in zip(first, every_operation(case), strict=True):
            assert torch.equal(a, b)


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
