"""Streams computed again in the backward: the same bits, less memory, nothing left behind."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mhc_kernels import RMSNorm, boundary, connect, mix, recompute
from mhc_kernels.recompute_block import RecomputePlace
from tests.unit.kernels.cases import DEVICE

pytestmark = pytest.mark.usefixtures("poisoned_memory")
T, C, LENGTH = 10, 32, 5


class Chain:
    """connect, LENGTH boundaries and a mix; ``sublayer`` between them."""

    def __init__(
        self,
        n: int = 4,
        dtype: torch.dtype = torch.bfloat16,
        dropout_p: float = 0.0,
        norm: bool = False,
        flat: bool = False,
    ):
        generator = torch.Generator().manual_seed(n)

        def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(*shape, generator=generator).to(DEVICE, dtype).requires_grad_()

        rows = n * n + 2 * n
        self.x = random(T, n, C, dtype=dtype)
        self.own = [(random(rows, n * C), random(3), random(rows)) for _ in range(LENGTH + 1)]
        self.bias = random(C, dtype=dtype)
        self.norm = RMSNorm(random(C, dtype=dtype), 1e-5) if norm else None
        self.dropout_p, self.flat = dropout_p, flat
        self.between: Callable[[Tensor], Tensor] = lambda x: x
        self.sublayer: Callable[[Tensor], Tensor] = torch.tanh

    def run(self, block_length: int | None) -> Tensor:
        """The last streams; blocks of that many boundaries, or none."""
        torch.manual_seed(0)
        place = None if block_length is None else recompute(block_length)
        more: dict[str, Any] = {"flat": self.flat, "backend": "triton"}
        x = self.x.flatten(-2) if self.flat else self.x
        x, u, post, res = connect(x, *self.own[0], norm=self.norm, iterations=2, **more)
        more["dropout_p"] = self.dropout_p
        each = {"norm": self.norm, "iterations": 2, **more}
        for own in self.own[1:]:
            x, u, post, res = boundary(x, res, post, self.sublayer(u), self.bias, *own, recompute=place, **each)
            x = self.between(x)
            self.block = None if place is None else place.block
            place = None if place is None else place.next()
        return mix(x, res, post, self.sublayer(u), self.bias, recompute=place, **more)

    def step(self, block_length: int | None) -> list[Tensor]:
        """Output and all gradients."""
        leaves = [self.x, self.bias, *(p for own in self.own for p in own)]
        if self.norm is not None:
            leaves.append(self.norm.weight)
        out = self.run(block_length)
        return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]


@pytest.mark.parametrize("length", [1, 3, LENGTH, 100])
def test_same_bits(length: int) -> None:
    chain = Chain()
    for ours, kept in zip(chain.step(length), chain.step(None), strict=True):
        assert torch.equal(ours, kept)


@pytest.mark.parametrize(
    "options",
    [{"n": 1}, {"n": 2}, {"n": 3, "dtype": torch.float32}, {"n": 5}, {"n": 8}, {"dropout_p": 0.3}, {"norm": True}],
    ids=str,
)
def test_same_bits_of_every_kind(options: dict[str, Any]) -> None:
    chain = Chain(**options)
    for ours, kept in zip(chain.step(3), chain.step(None), strict=True):
        assert torch.equal(ours, kept)


@pytest.mark.parametrize("length", [None, 2])
def test_keeps_only_each_blocks_first_streams(length: int | None) -> None:
    chain = Chain()
    saved: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel() == T * 4 * C:
            saved.add(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = chain.run(length)
    # x_0 .. x_LENGTH; with blocks those at multiples of the length.
    assert len(saved) == (LENGTH + 1 if length is None else len(range(0, LENGTH + 1, length)))
    out.sum().backward()


def test_frees_as_the_backward_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = Chain()
    counts: list[int] = []
    out = chain.run(100)
    original = RecomputePlace.release

    def release(place: RecomputePlace) -> None:
        original(place)
        counts.append(len(place.block.streams))

    monkeypatch.setattr(RecomputePlace, "release", release)
    assert chain.block.streams == {}
    out.sum().backward()
    assert counts == [4, 3, 2, 1, 0]


def test_nothing_survives_while_the_loss_is_kept() -> None:
    chain = Chain()
    gc.disable()  # reference cycles would stay
    try:
        out = chain.run(3)
        block = weakref.ref(chain.block)
        chain.block = None
        out.sum().backward()
        assert block() is not None  # `out` holds the graph's nodes, they hold it
        assert block().streams == {}
        assert all(reference().unpacked is None for reference in block().boundaries)
        del out
        assert block() is None
    finally:
        gc.enable()


def test_backward_twice() -> None:
    chain = Chain()
    out = chain.run(3)
    first = torch.autograd.grad(out, chain.x, torch.ones_like(out), retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(out, chain.x, torch.ones_like(out))[0])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, chain.x, torch.ones_like(out))


def test_after_a_pass_that_failed() -> None:
    """Of which the autograd engine tells nobody."""
    chain = Chain()
    expected = torch.autograd.grad(chain.run(None).sum(), chain.x)[0]
    seen: list[Tensor] = []
    chain.between = lambda x: seen.append(x) or x
    out = chain.run(100)
    fails = seen[1].register_hook(lambda gradient: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        torch.autograd.grad(out.sum(), chain.x, retain_graph=True)
    assert chain.block.streams
    fails.remove()
    assert torch.equal(torch.autograd.grad(out.sum(), chain.x)[0], expected)
    assert chain.block.streams == {}


def test_partial_passes() -> None:
    """Each leaves nothing behind that the next one would see."""
    chain = Chain()
    out = chain.run(100)
    later, earlier = chain.own[-1], chain.own[1]
    first = torch.autograd.grad(out.sum(), later, retain_graph=True)
    assert chain.block.streams == {}
    everything = torch.autograd.grad(out.sum(), [*earlier, *later], retain_graph=True)
    for a, b in zip(everything[3:], first, strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        earlier[1].add_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_other_readers_of_the_streams() -> None:
    """Losses on every boundary's streams, saved tensors elsewhere in between."""
    results = []
    for length in (3, None):
        chain = Chain()
        losses: list[Tensor] = []
        chain.between = lambda x, losses=losses: losses.append(x.float().square().sum()) or x
        with torch.autograd.graph.save_on_cpu():
            total = chain.run(length).float().sum() + sum(losses)
        results.append(torch.autograd.grad(total, [chain.x, *(p for own in chain.own for p in own)]))
    for ours, kept in zip(*results, strict=True):
        assert torch.equal(ours, kept)


def test_frozen_beginning() -> None:
    """Boundaries without a backward are not part of a block."""
    results = []
    for length in (LENGTH, None):
        chain = Chain()
        for frozen in (chain.x, chain.bias, *chain.own[0], *chain.own[1], *chain.own[2]):
            frozen.requires_grad_(False)
        out = chain.run(length)
        results.append(torch.autograd.grad(out.sum(), [p for own in chain.own[3:] for p in own]))
    for ours, kept in zip(*results, strict=True):
        assert torch.equal(ours, kept)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_around_a_boundary_and_the_end(reentrant: bool) -> None:
    results = []
    for length in (3, None):
        chain = Chain()
        place = None if length is None else recompute(length)
        own = [*chain.own]

        def after(x: Tensor, u: Tensor, post: Tensor, res: Tensor, place: Any, own: Any = own) -> Tensor:
            x, u, post, res = boundary(x, res, post, u.tanh(), None, *own[2], recompute=place, backend="triton")
            place = None if place is None else place.next()
            return mix(x, res, post, u.tanh(), recompute=place, backend="triton")

        x, u, post, res = connect(chain.x, *own[0], backend="triton")
        x, u, post, res = boundary(x, res, post, u.tanh(), None, *own[1], recompute=place, backend="triton")
        place = None if place is None else place.next()
        out = torch.utils.checkpoint.checkpoint(after, x, u, post, res, place, use_reentrant=reentrant)
        out.sum().backward()
        results.append([chain.x.grad, *(p.grad for o in own[:3] for p in o)])
    for ours, kept in zip(*results, strict=True):
        assert torch.equal(ours, kept)


def in_place(x: Tensor) -> Tensor:
    with torch.no_grad():
        return x.mul_(2)


@pytest.mark.parametrize("change", [torch.clone, in_place, lambda x: x[: T // 2]], ids=["copy", "in place", "part"])
def test_streams_from_elsewhere_are_refused(change: Callable[[Tensor], Tensor]) -> None:
    chain = Chain()
    x, u, post, res = connect(chain.x, *chain.own[0], backend="triton")
    place = recompute(3)
    x, u, post, res = boundary(x, res, post, u, None, *chain.own[1], recompute=place, backend="triton")
    x = change(x)
    u, post, res = u[: len(x)], post[: len(x)], res[: len(x)]
    for _ in range(2):
        with pytest.raises(ValueError, match="for a new block"):
            mix(x, res, post, u, recompute=place.next(), backend="triton")
        with pytest.raises(ValueError, match="for a new block"):
            boundary(x, res, post, u, None, *chain.own[2], recompute=place.next(), backend="triton")
    with torch.no_grad():  # nothing to compute again
        mix(x, res, post, u, recompute=place.next(), backend="triton")


def test_detached_in_the_middle_is_refused() -> None:
    chain = Chain()
    x, u, post, res = connect(chain.x, *chain.own[0], backend="triton")
    place = recompute(3)
    results = boundary(x, res, post, u, None, *chain.own[1], recompute=place, backend="triton")
    x, u, post, res = (tensor.detach() for tensor in results)
    place = place.next()
    del results
    x, u, post, res = boundary(x, res, post, u, None, *chain.own[2], recompute=place, backend="triton")
    with pytest.raises(RuntimeError, match="after detach"):
        x.sum().backward()


def test_two_boundaries_at_one_place_under_other_hooks() -> None:
    chain = Chain()
    x, u, post, res = connect(chain.x, *chain.own[0], backend="triton")
    place = recompute(3)
    with torch.autograd.graph.save_on_cpu():
        boundary(x, res, post, u, None, *chain.own[1], recompute=place, backend="triton")
        with pytest.raises(ValueError, match="two boundaries at one place"):
            boundary(x, res, post, u.tanh(), None, *chain.own[1], recompute=place, backend="triton")


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"length must be >= 1, got 0"):
        recompute(0)
    chain = Chain()
    x, u, post, res = connect(chain.x, *chain.own[0], backend="triton")
    place = recompute(2)
    after = boundary(x, res, post, u, None, *chain.own[1], recompute=place, backend="triton")
    with pytest.raises(ValueError, match="two boundaries at one place"):
        boundary(x, res, post, u, None, *chain.own[1], recompute=place, backend="triton")
    with pytest.raises(ValueError, match="x is not what the boundary before"):
        mix(x, res, post, u, recompute=place.next(), backend="triton")
    x, u, post, res = after
    with pytest.raises(ValueError, match="not with the reference backend"):
        mix(x, res, post, u, recompute=recompute(1), backend="reference")
    with pytest.raises(ValueError, match="not with the reference backend"):
        boundary(x, res, post, u, None, *chain.own[1], recompute=recompute(1), backend="reference")
