"""The kernels in PyTorch: arguments that are refused, torch.library, torch.compile, CUDA graphs, addresses, warm-up."""

from __future__ import annotations

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
    free_until_backward,
    mappings,
    mix,
    output_gradients,
    sinkhorn,
)
from tests.unit.kernels.cases import DEVICE, ON_GPU, PARAMETERS, Case, error

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def _with_norm(operation: Callable[..., Any]) -> Callable[..., Any]:
    return lambda norm_weight, **others: operation(**others, norm=RMSNorm(norm_weight, 1e-5))


def operations(tokens: int = 8) -> list[tuple[Callable[..., Any], dict[str, Tensor]]]:
    """Every operation of several tensors, and arguments that fit."""
    case = Case(tokens, 4, 32)
    a = case.arguments
    x, post, y = {"x": a["x"]}, {"post": a["post"]}, {"y": a["y"]}
    own = dict(zip(("phi", "alpha", "bias"), (a[name] for name in PARAMETERS), strict=True))
    flat, norm = a["x"].flatten(-2), {"norm_weight": torch.ones(32, device=DEVICE)}
    into = {"dy": torch.empty_like(a["y"]), "dpost": torch.empty_like(a["post"])}
    return [
        (mappings, x | own),
        (aggregate, x | {"pre": a["post"]}),
        (mix, x | {"res": a["res"]} | post | y | {"bias": a["bias"]}),
        (connect, x | own),
        (_with_norm(connect), x | own | norm),
        (boundary, a),
        (_with_norm(boundary), a | norm),
        (add_output_, {"x": flat} | post | y),
        (output_gradients, {"g": flat} | post | y | into),
    ]


class TestErrors:
    def test_strides(self) -> None:
        for operation, arguments in operations():
            for argument, tensor in arguments.items():
                strided = torch.stack((tensor, tensor), -1)[..., 0]
                message = rf"{argument} must be contiguous .* call {argument}.contiguous\(\)"
                with pytest.raises(ValueError, match=message):
                    operation(**{**arguments, argument: strided}, backend="triton")
        with pytest.raises(ValueError, match=r"logits must be contiguous .* call logits.contiguous\(\)"):
            sinkhorn(torch.zeros(8, 4, 4, device=DEVICE).mT, backend="triton")

    def test_devices(self) -> None:
        """The driver would take an address of another memory for one of its own."""
        # No other test's number of tokens: checked calls are remembered, and the CPU's have the key of meta tensors.
        for operation, arguments in operations(11):
            for argument, tensor in arguments.items():
                with pytest.raises(ValueError, match=r" on (cpu|cuda:\d|meta)"):
                    operation(**{**arguments, argument: tensor.to("meta")}, backend="triton")

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
    gamma = torch.rand(32, device=DEVICE)
    torch.library.opcheck(ops.mix.default, mixed, test_utils=tests)
    torch.library.opcheck(ops.mix_backward.default, (g[0].flatten(-2), *mixed), test_utils=tests)
    torch.library.opcheck(ops.aggregate.default, (x, a["post"]), test_utils=tests)
    torch.library.opcheck(ops.aggregate_backward.default, (g[1], x, a["post"]), test_utils=tests)
    torch.library.opcheck(ops.add_output_.default, (x, a["post"], a["y"]), test_utils=tests)
    outputs = (torch.empty_like(a["y"]), torch.empty_like(a["post"]))
    torch.library.opcheck(
        ops.add_output_backward.default, (g[0].flatten(-2), a["post"], a["y"], *outputs), test_utils=tests
    )
    torch.library.opcheck(ops.sinkhorn.default, (a["res"], 20, 0.0), test_utils=tests)
    torch.library.opcheck(ops.sinkhorn_backward.default, (g[3], a["res"], 20, 0.0), test_utils=tests)
    alone = (x, None, None, None, None, None, 0.0)
    no_norm = (None, 0.0, False)
    for aggregates in (True, False):
        torch.library.opcheck(ops.boundary.default, (*alone, *own, aggregates, *settings, *no_norm), test_utils=tests)
    _, _, pre, _, _, kept = ops.boundary.default(*alone, *own, False, *settings, *no_norm)
    rest = (x, pre, kept, *own[1:], None, None, None, 20, 0.0, False, None, False)
    torch.library.opcheck(
        ops.boundary_backward.default, (None, None, a["post"], *g[2:], *alone, *rest), test_utils=tests
    )
    upstream = (g[0].flatten(-2), g[1], None, g[2], g[3])
    for norm in (no_norm, (gamma, 1e-5, False)):
        torch.library.opcheck(ops.boundary.default, (*mixed, *own, True, *settings, *norm), test_utils=tests)
        out, _, _, _, _, kept = ops.boundary.default(*mixed, *own, True, *settings, *norm)
        rest = (out, None, kept, *own[1:])
        for mains in ((None, None, None), tuple(torch.zeros_like(p) for p in own)):
            arguments = (*upstream, *mixed, *rest, *mains, 20, 0.0, False, norm[0], norm[2])
            torch.library.opcheck(ops.boundary_backward.default, arguments, test_utils=tests)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("normalises", [False, True])
def test_compiles_without_graph_breaks(dynamic: bool, normalises: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph, the same bits, other numbers of tokens without another compilation if they are dynamic."""
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters["stats"]
    counters.clear()
    weight = torch.rand(256, device=DEVICE).bfloat16().requires_grad_()

    def step(**leaves: Tensor) -> tuple[Tensor, ...]:
        norm = RMSNorm(weight, 1e-5) if normalises else None
        own = [leaves[name] for name in PARAMETERS]
        x, u, post, res = connect(leaves["x"], *own, norm=norm, iterations=2, backend="triton")
        x, u, post, res = boundary(
            **{**leaves, "x": x, "y": leaves["y"] + u}, norm=norm, iterations=2, backend="triton"
        )
        return mix(x, res, post, u, backend="triton"), u, post, res

    compiled_step = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="inductor" if ON_GPU else "aot_eager")
    with torch._dynamo.config.patch(disable=False):
        for tokens in (50, 70):
            case = Case(tokens, 4, 256, torch.bfloat16)
            eager, compiled = case.leaves(), case.leaves()
            torch.autograd.backward(step(**eager), case.gradients)
            torch.autograd.backward(compiled_step(**compiled), case.gradients)
            for name in eager:
                assert torch.equal(eager[name].grad, compiled[name].grad), name
    assert counters["unique_graphs"] == (1 if dynamic else 2)


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

    settings: dict[str, Any] = {
        "output_bias": True,
        "dropout_p": 0.1,
        "recompute": True,
        "split": True,
        "device": DEVICE,
    }
    state = torch.get_rng_state(), torch.cuda.get_rng_state() if ON_GPU else torch.get_rng_state()
    kernels, _ = warm_up(4, 32, torch.float32, **settings)
    weight = torch.ones(32, device=DEVICE, requires_grad=True)
    warm_up(4, 32, torch.float32, norm=(weight.dtype, False), others=[None], **settings)
    assert torch.equal(torch.get_rng_state(), state[0])
    if ON_GPU:
        assert torch.equal(torch.cuda.get_rng_state(), state[1])
    built = CompileTimes.kernels
    assert kernels > 0
    case = Case(40, 4, 32)
    leaves = case.leaves()
    own = [leaves[k] for k in PARAMETERS]
    x = leaves["x"].flatten(-2)
    x, u, post, res = connect(x, *own, flat=True, backend="triton")
    norms = (None, None, RMSNorm(weight, 1e-5), RMSNorm(weight, 1e-5), None)
    for norm in norms:
        y = u.sin()
        assert free_until_backward(u, y)
        x, u, post, res = boundary(
            x, res, post, y, leaves["bias"], *own, norm=norm, dropout_p=0.1, flat=True, backend="triton"
        )
    y = u.sin()
    assert free_until_backward(u, y)
    out = mix(x, res, post, y, leaves["bias"], dropout_p=0.1, flat=True, backend="triton").unflatten(-1, (4, 32))
    torch.autograd.backward(aggregate(out, post, backend="triton"), case.gradients[1])
    x, post, y = case.arguments["x"].flatten(-2), case.arguments["post"], case.arguments["y"]
    add_output_(x, post, y, backend="triton")
    output_gradients(x, post, y, torch.empty_like(y), torch.empty_like(post), backend="triton")
    assert CompileTimes.kernels == built
    assert warm_up(4, 32, torch.float32, **settings) == (0, 0.0)
