"""What split pipeline transfers add up: a sublayer's output and streams that have come without it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mhc_kernels import add_output_, output_gradients
from tests.unit.kernels.cases import BOUNDS, DEVICE, F64, Case, error

pytestmark = pytest.mark.usefixtures("poisoned_memory")
SHAPES = [(t, n, c) for n in range(1, 9) for t, c in ((37, 48), (5, 1040))]


def arguments(t: int, n: int, c: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, post, y and a gradient of x'."""
    case = Case(t, n, c, dtype)
    x, post, y = (case.arguments[name] for name in ("x", "post", "y"))
    return x.flatten(-2), post, y, case.gradients[0].flatten(-2)


def run(x: Tensor, post: Tensor, y: Tensor, g: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """x', dy, dpost."""
    out, dy, dpost = x.clone(), torch.empty_like(y), torch.empty_like(post)
    add_output_(out, post, y, backend=backend)
    output_gradients(g, post, y, dy, dpost, backend=backend)
    return out, dy, dpost


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("t", "n", "c"), SHAPES)
def test_equals_float64(t: int, n: int, c: int, dtype: torch.dtype, backend: str) -> None:
    given = arguments(t, n, c, dtype)
    x, post, y, g = (a.to(F64) for a in given)
    rows = g.unflatten(-1, (n, c))
    expected = (
        (x.unflatten(-1, (n, c)) + post[..., None] * y[:, None]).flatten(-2),
        (post[..., None] * rows).sum(1),
        (rows * y[:, None]).sum(-1),
    )
    of_streams, _, of_mappings = BOUNDS[dtype]
    for name, ours, right, bound in zip(
        ("x'", "dy", "dpost"), run(*given, backend), expected, (of_streams, of_streams, of_mappings), strict=True
    ):
        assert error(ours, right) < bound, name


def test_nothing_beside_the_streams_is_written() -> None:
    """A slice of a larger tensor, as the schedule's packed one has it, and no tokens at all."""
    x, post, y, g = arguments(6, 4, 64, torch.float32)
    whole = torch.full((8, 4 * 64), 7.0, device=DEVICE)
    whole[1:7] = x
    add_output_(whole[1:7], post, y, backend="triton")
    assert torch.equal(whole[1:7], run(x, post, y, g, "triton")[0])
    assert (whole[[0, 7]] == 7).all()
    assert all(result.numel() == 0 for result in run(x[:0], post[:0], y[:0], g[:0], "triton"))


def test_same_bits_every_time_and_nan_goes_through() -> None:
    given = arguments(70, 4, 1040, torch.bfloat16)
    first = run(*given, "triton")
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(run(*given, "triton"), first, strict=True))
    x, post, y, g = given
    y[3, 5] = float("nan")
    out, dy, dpost = run(x, post, y, g, "triton")
    assert out.view(70, 4, -1)[3, :, 5].isnan().all()
    assert out.isnan().sum() == 4
    assert dpost[3].isnan().all()
    assert dpost.isnan().sum() == 4
    assert not dy.isnan().any()


def test_arguments_that_do_not_fit() -> None:
    """The kernels take addresses: what does not fit is refused before."""
    x, post, y, g = arguments(6, 4, 64, torch.bfloat16)
    dy, dpost = torch.empty_like(y), torch.empty_like(post)
    for wrong, message in (
        ((x, post, y[:, :32]), r"y must be \[6, 64\]"),
        ((x, post[:3], y), r"post must be \[6, 4\]"),
        ((x, post.double(), y), "post must be torch.float32 .* got torch.float64"),
        ((x, post, y.float()), "y must be torch.bfloat16 .* got torch.float32"),
        ((x[:, :255], post, y), "n\\*C values a token, and post n; got 255 and 4"),
        ((x, post, y.T.contiguous().T), r"y must be contiguous .* call y.contiguous\(\)"),
        ((x.clone().requires_grad_(), post, y), "no derivative"),
    ):
        with pytest.raises(ValueError, match=message):
            add_output_(*wrong, backend="triton")
    for wrong, message in (
        ((g, post, y, dy[:3], dpost), r"dy must be torch.bfloat16 \[6, 64\]"),
        ((g, post, y, dy, dpost[:3]), r"dpost must be torch.float32 \[6, 4\]"),
        ((g, post, y, dy.float(), dpost), "dy must be torch.bfloat16"),
    ):
        with pytest.raises(ValueError, match=message):
            output_gradients(*wrong, backend="triton")
