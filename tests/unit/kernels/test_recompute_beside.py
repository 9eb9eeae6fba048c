"""What a sublayer reads, computed again by the boundary that reads its streams anyway, or in a pass of its own where that one
reads others: the same bits."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mhc_kernels import boundary, connect, free_until_backward, mix, recompute
from tests.unit.kernels.cases import DEVICE
from tests.unit.kernels.freeing import Freeing, size
from tests.unit.kernels.test_recompute import LENGTH, Chain, T

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize(
    "options",
    [
        {"n": 1},
        {"n": 2, "norm": True},
        {"n": 3, "dtype": torch.float32},
        {"n": 4, "dtype": torch.float16, "norm": True},
        {"n": 5},
        {"n": 8},
        {"dropout_p": 0.3, "norm": True},
    ],
    ids=str,
)
def test_same_bits_of_every_kind(options: dict[str, Any], refills: list[Tensor], alone: list[Tensor]) -> None:
    """With flat streams, every input but the last comes from the boundary that reads its streams anyway."""
    chain, kept = Chain(**options, flat=True), Chain(**options, flat=True)
    kept.sublayer = torch.sin
    Freeing(chain)
    for ours, expected in zip(chain.step(3), kept.step(None), strict=True):
        assert torch.equal(ours, expected)
    assert (len(refills), len(alone)) == (LENGTH + 1, 1)


@pytest.mark.parametrize("centered", [False, True])
def test_a_norm_that_only_one_of_two_has(centered: bool, refills: list[Tensor], alone: list[Tensor]) -> None:
    """The boundary that computes an input again has other options than the one that made it."""
    results = []
    for frees in (True, False):
        chain = Chain(norm=True)
        assert chain.norm is not None
        norm = chain.norm._replace(centered=centered)
        x, u, post, res = connect(chain.x.flatten(-2), *chain.own[0], flat=True, backend="triton", norm=norm)
        for k in (1, 2, 3):
            y = u.sin()
            assert not frees or free_until_backward(u, y)
            more: dict[str, Any] = {"flat": True, "backend": "triton", "norm": None if k % 2 else norm}
            x, u, post, res = boundary(x, res, post, y, None, *chain.own[k], **more)
        leaves = [chain.x, norm.weight, *(p for own in chain.own[:4] for p in own)]
        results.append(torch.autograd.grad(u.float().square().sum() + x.float().square().sum(), leaves))
    assert (len(refills), len(alone)) == (3, 0)
    for ours, kept in zip(*results, strict=True):
        assert torch.equal(ours, kept)


def _doubled(x: Tensor) -> Tensor:
    with torch.no_grad():
        return x.mul_(2)


def _replaced(x: Tensor) -> Tensor:
    x.data = x.data * 2
    return x


class _Rounded(torch.autograd.graph.saved_tensors_hooks):
    def __init__(self) -> None:
        super().__init__(lambda tensor: tensor.detach().half().to(tensor.dtype), lambda tensor: tensor)


@pytest.mark.parametrize(
    ("change", "hooks"),
    [(_doubled, contextlib.nullcontext), (_replaced, contextlib.nullcontext), (lambda x: x, _Rounded)],
    ids=["in place", "other data", "hooks"],
)
def test_streams_that_are_not_what_they_were(
    change: Callable[[Tensor], Tensor], hooks: Callable[[], Any], alone: list[Tensor]
) -> None:
    """The boundary before keeps nothing that would notice: its streams are computed again."""
    results = []
    for frees in (True, False):
        chain = Chain(dtype=torch.float32, flat=True)
        weight = torch.ones(32, device=DEVICE, requires_grad=True)
        options: dict[str, Any] = {"flat": True, "backend": "triton"}
        x, u, post, res = connect(chain.x.flatten(-2), *chain.own[0], **options)
        x, u, post, res = boundary(x, res, post, u.sin(), None, *chain.own[1], recompute=recompute(3), **options)
        y = (u * weight).sin()
        assert not frees or free_until_backward(u, y)
        x = change(x)
        with hooks():
            x, u, post, res = boundary(x, res, post, y, None, *chain.own[2], **options)
        out = mix(x, res, post, u.sin(), **options)
        results.append(torch.autograd.grad(out.square().sum(), weight)[0])
    assert len(alone) == 1
    assert torch.equal(*results)


def test_other_streams_of_the_same_tensor(alone: list[Tensor]) -> None:
    """n = 2 of 32 channels read as n = 4 of 16: u is not what that boundary would write."""
    chain, options = Chain(n=2, flat=True), {"flat": True, "backend": "triton"}
    x, u, *_ = connect(chain.x.flatten(-2), *chain.own[0], **options)
    expected = u.detach().clone()
    y, seen = u.sin(), list[Tensor]()
    assert free_until_backward(u, y)
    y.register_hook(lambda gradient: seen.append(u.detach().clone()))
    res, post = torch.ones(T, 4, 4, device=DEVICE), torch.ones(T, 4, device=DEVICE)
    own = torch.ones(24, 64, device=DEVICE), torch.ones(3, device=DEVICE), torch.ones(24, device=DEVICE)
    half = y[:, :16].contiguous()
    refill = y._mhc_refill  # type: ignore[attr-defined]
    half._mhc_refill = refill  # type: ignore[attr-defined]
    boundary(x, res, post, half, None, *own, **options)[1].sum().backward()
    assert len(alone) == 1
    assert torch.equal(seen[0], expected)


def test_nothing_is_computed_for_sublayers_whose_backward_does_not_run(refills: list[Tensor]) -> None:
    """The gradients of the last boundary's parameters take the backward of the sublayer after it alone; also where the graph
    before that boundary is gone."""
    chain, outputs = Chain(flat=True), list[Tensor]()
    freeing = Freeing(chain)

    def remembered(u: Tensor) -> Tensor:
        outputs.append(freeing(u))
        return outputs[-1]

    chain.sublayer = remembered
    out = chain.run(100)
    torch.autograd.grad(out.sum(), chain.own[-1], retain_graph=True)
    assert len(refills) == 1
    assert [size(storage) for storage in freeing.storages[:-1]] == [0] * LENGTH
    torch.autograd.grad(outputs[0].sum(), chain.own[0][0])
    torch.autograd.grad(out.sum(), chain.own[-1], retain_graph=True)


def test_outputs_may_be_copied_and_saved() -> None:
    chain = Chain()
    _, u, *_ = connect(chain.x, *chain.own[0], backend="triton")
    y = u.sin()
    assert free_until_backward(u, y)
    with io.BytesIO() as file:
        torch.save(y, file)
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=False), y)


def test_streams_changed_in_between(alone: list[Tensor]) -> None:
    """What the next boundary reads is then not what the input was aggregated from."""
    results = []
    for frees in (True, False):
        chain = Chain(flat=True)
        freeing = Freeing(chain) if frees else None
        if freeing is None:
            chain.sublayer = torch.sin
        chain.between = lambda x: x * 2
        results.append(chain.step(None))
    assert len(alone) == LENGTH  # all but the first: nothing has come between connect and its boundary
    for ours, kept in zip(*results, strict=True):
        assert torch.equal(ours, kept)
