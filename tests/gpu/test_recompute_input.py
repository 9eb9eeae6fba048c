"""What a sublayer reads, freed and put back, around sublayers that use streams of their own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mhc_kernels import boundary, connect, free_until_backward, mix, recompute
from tests.unit.kernels.cases import PARAMETERS, Case

pytestmark = pytest.mark.gpu
LENGTH = 6


def gradients(case: Case, weight: Tensor, side: torch.cuda.Stream, frees: bool) -> list[Tensor]:
    """Of a chain whose sublayers run on ``side``. frees: their inputs, and a block's streams."""
    leaves = case.leaves()
    weight = weight.detach().requires_grad_()
    own = [leaves[name] for name in PARAMETERS]

    def sublayer(u: Tensor) -> Tensor:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            y = (u @ weight).sin()
        torch.cuda.current_stream().wait_stream(side)
        assert not frees or free_until_backward(u, y)
        return y

    place = recompute(4) if frees else None
    x, u, post, res = connect(leaves["x"], *own)
    for _ in range(LENGTH):
        x, u, post, res = boundary(x, res, post, sublayer(u), None, *own, recompute=place)
        place = None if place is None else place.next()
    out = mix(x, res, post, sublayer(u), recompute=place)
    out.backward(case.gradients[0])
    return [weight.grad, *(leaf.grad for name, leaf in leaves.items() if name in ("x", *PARAMETERS))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("n", "c"), [(4, 512), (4, 2560), (3, 1040), (2, 1280), (8, 1280)])
def test_sublayers_on_another_stream(n: int, c: int, dtype: torch.dtype) -> None:
    """Their last operation is where the backward begins, and the hook runs there; the memory is the main stream's.

    Widths of several tiles: kernels that loop are other machine code than those that do not.
    """
    case = Case(2048, n, c, dtype)
    weight = torch.randn(c, c, generator=torch.Generator().manual_seed(0)).to("cuda", dtype) / 20
    side = torch.cuda.Stream()
    expected = gradients(case, weight, side, frees=False)
    for _ in range(5):
        for ours, theirs in zip(gradients(case, weight, side, frees=True), expected, strict=True):
            assert torch.equal(ours, theirs)
