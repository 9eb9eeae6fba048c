"""What a sublayer reads, freed after its forward and there again for its backward: the same bits, and free in between."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mhc_kernels import RMSNorm, boundary, connect, free_until_backward, mix, recompute
from mhc_kernels.fused.boundary import BackwardCall, ForwardCall
from tests.unit.kernels.cases import DEVICE, PARAMETERS, Case
from tests.unit.kernels.freeing import Freeing, size
from tests.unit.kernels.test_recompute import LENGTH, Chain

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


NORMS: list[dict[str, Any]] = [{}, {"centered": True}]
MAPPINGS: list[dict[str, Any]] = [{}, {"profile": "deepseek-v4"}, {"mode": "hc"}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", range(1, 9))
def test_the_bits_of_the_forward(n: int, dtype: torch.dtype) -> None:
    """Of widths that fill tiles and that do not, with and without a norm, in all kinds of mappings."""
    for kind, (t, c) in enumerate([(5, 16), (7, 272), (3, 512)]):
        leaves, norm = Case(t, n, c, dtype, seed=n).leaves(), None
        if n <= 4 and kind:
            norm = RMSNorm(torch.randn(c, device=DEVICE).to(dtype), 1e-3, **NORMS[kind - 1])
        options: dict[str, Any] = {"iterations": 1, "backend": "triton", "norm": norm, **MAPPINGS[kind]}
        if kind:
            u = connect(leaves["x"], *(leaves[name] for name in PARAMETERS), **options)[1]
        else:
            u = boundary(**leaves, **options)[1]
        expected = u.detach().clone()
        y = u.sin()
        assert free_until_backward(u, y)
        seen: list[Tensor] = []
        y.register_hook(lambda gradient, u=u, seen=seen: seen.append(bits(u).clone()))
        torch.autograd.grad(y, u, torch.ones_like(y))
        assert torch.equal(seen[0], bits(expected)), (t, c)


@pytest.mark.parametrize("length", [None, 3])
def test_same_bits(length: int | None) -> None:
    """Streams kept, and computed again as well."""
    chain, kept = Chain(), Chain()
    freeing, kept.sublayer = Freeing(chain), torch.sin
    for ours, expected in zip(chain.step(length), kept.step(None), strict=True):
        assert torch.equal(ours, expected)
    assert len(freeing.refilled) == LENGTH + 1


@pytest.mark.parametrize("length", [1, 4])
def test_one_input_at_a_time(length: int, refills: list[Tensor]) -> None:
    """No memory between forward and backward; in the backward that of one sublayer."""
    chain = Chain()
    freeing = Freeing(chain)
    out = chain.run(length)
    assert [size(storage) for storage in freeing.storages] == [0] * (LENGTH + 1)
    out.sum().backward()
    each = out.numel() // 4 * out.itemsize
    for k, sizes in enumerate(freeing.refilled):
        # Those of the sublayers after this one are gone: their backward was the last to hold them. (`refills` may not hold any.)
        refills.clear()
        assert sizes == [0] * (LENGTH - k) + [each] + sizes[LENGTH - k + 1 :]
    assert len(freeing.refilled) == LENGTH + 1


def test_freed_when_the_sublayers_backward_is_done() -> None:
    chain = Chain()
    freeing = Freeing(chain)
    out = chain.run(3)
    out.sum().backward()
    for k, sizes in enumerate(freeing.refilled):
        assert sizes[LENGTH - k + 1 :] == [None] * k


def test_there_for_hooks_of_the_sublayer_itself() -> None:
    chain = Chain()
    _, u, *_ = connect(chain.x, *chain.own[0], backend="triton")
    y, expected, seen = u.sin(), u.detach().clone(), list[Tensor]()
    y.register_hook(lambda gradient: seen.append(u.detach().clone()))
    assert free_until_backward(u, y)
    y.sum().backward()
    assert torch.equal(seen[0], expected)


def test_dropped_without_a_backward() -> None:
    chain = Chain()
    freeing = Freeing(chain)
    out = chain.run(3)
    chain.block = None
    del out
    gc.collect()
    assert [size(storage) for storage in freeing.storages] == [None] * (LENGTH + 1)


def test_what_nobody_kept_is_not_computed(refills: list[Tensor]) -> None:
    chain = Chain()

    def sublayer(u: Tensor) -> Tensor:
        y = u.tanh()  # keeps its result
        assert free_until_backward(u, y)
        return y

    chain.sublayer = sublayer
    chain.run(3).sum().backward()
    assert refills == []


def test_backward_twice(refills: list[Tensor]) -> None:
    chain = Chain()
    Freeing(chain)
    out = chain.run(3)
    first = torch.autograd.grad(out, chain.x, torch.ones_like(out), retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(out, chain.x, torch.ones_like(out))[0])
    assert len(refills) == LENGTH + 1
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, chain.x, torch.ones_like(out))


@pytest.mark.parametrize("where", [(ForwardCall, "aggregate_again"), (BackwardCall, "run")], ids=["alone", "beside"])
def test_a_refill_that_fails_is_made_again(where: tuple[type, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A backward that ends half way must not leave memory that the next one takes for u."""
    original, kept = getattr(*where), Chain()
    kept.sublayer = torch.sin
    chain = Chain()
    Freeing(chain)
    out = chain.run(3)

    def fails(*arguments: Any) -> None:
        monkeypatch.setattr(*where, original)
        raise KeyboardInterrupt

    monkeypatch.setattr(*where, fails)
    with pytest.raises(KeyboardInterrupt):
        torch.autograd.grad(out, chain.x, torch.ones_like(out), retain_graph=True)
    expected = kept.run(3)
    ours = torch.autograd.grad(out, chain.x, torch.ones_like(out))[0]
    assert torch.equal(ours, torch.autograd.grad(expected, kept.x, torch.ones_like(expected))[0])


def test_a_pass_that_begins_at_a_sublayers_output(refills: list[Tensor]) -> None:
    """Its boundary's backward does not run; the streams are computed for this one input, and forgotten."""
    results = []
    for length in (100, None):
        chain = Chain()
        outputs: list[Tensor] = []
        sublayer = Freeing(chain) if length else torch.sin

        def remembered(u: Tensor, sublayer: Any = sublayer, outputs: list[Tensor] = outputs) -> Tensor:
            outputs.append(sublayer(u))
            return outputs[-1]

        chain.sublayer = remembered
        out = chain.run(length)
        own = [chain.x, *(p for own in chain.own for p in own)]
        alone = torch.autograd.grad(outputs[3].float().square().sum(), own, retain_graph=True, allow_unused=True)
        if length:
            assert len(refills) == 4
            assert chain.block.streams == {}
        results.append([alone, torch.autograd.grad(out.sum(), own)])
    for ours, kept in zip(*results, strict=True):
        for a, b in zip(ours, kept, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize(
    "sublayer",
    [
        lambda u, w: torch.nn.functional.linear(u.view(-1, u.shape[-1]), w).sin() * u,
        lambda u, w: checkpoint(lambda v: (v @ w).sin(), u, use_reentrant=True),
        lambda u, w: checkpoint(lambda v: (v @ w).sin(), u, use_reentrant=False),
        lambda u, w: (u.detach() @ w).sin(),
        lambda u, w: torch.stack([u.chunk(2, -1)[k] * u.chunk(2, -1)[1 - k] for k in (0, 1)], -1).flatten(-2).sin() @ w,
        lambda u, w: u.sin() @ w.detach(),
    ],
    ids=["view", "checkpoint", "checkpoint without reentry", "detached", "parts", "frozen"],
)
def test_what_sublayers_do_with_it(sublayer: Callable[[Tensor, Tensor], Tensor]) -> None:
    results = []
    weight = torch.randn(32, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.bfloat16).requires_grad_()
    for frees in (True, False):
        chain = Chain()

        def run(u: Tensor, frees: bool = frees) -> Tensor:
            y = sublayer(u, weight)
            if frees:
                assert free_until_backward(u, y)
                assert u.untyped_storage().nbytes() == 0
            return y

        chain.sublayer = run
        out = chain.run(3 if frees else None)
        out.sum().backward()
        results.append([chain.x.grad, *(p.grad for own in chain.own for p in own), weight.grad])
        weight.grad = None
    for ours, kept in zip(*results, strict=True):
        assert (ours is None and kept is None) or torch.equal(ours, kept)
    assert results[0][0].isfinite().all()


def _changed_without_gradients(u: Tensor) -> Tensor:
    with torch.no_grad():
        u.mul_(2)
    return u.sin()


def _with_other_data(u: Tensor) -> Tensor:
    u.data = u.data[:1].clone()
    return u.sin()


@pytest.mark.parametrize(
    "sublayer",
    [
        lambda u: u,
        lambda u: u.view(2, -1),
        lambda u: u[:2],
        lambda u: u.transpose(0, 1),
        lambda u: u.sin().detach(),
        lambda u: u.mul_(2).sin(),
        _changed_without_gradients,
        _with_other_data,
    ],
    ids=["u", "view", "part", "transposed", "no gradient", "in place", "in place without gradients", "other data"],
)
def test_kept_where_it_can_not_be_put_back(sublayer: Callable[[Tensor], Tensor]) -> None:
    chain = Chain()
    _, u, *_ = connect(chain.x, *chain.own[0], backend="triton")
    y = sublayer(u)
    assert not free_until_backward(u, y)
    assert u.untyped_storage().nbytes() > 0


def test_kept_without_gradients() -> None:
    chain = Chain()
    with torch.no_grad():
        _, u, *_ = connect(chain.x, *chain.own[0], backend="triton")
        assert not free_until_backward(u, u.sin())
    x = chain.x.detach()
    _, u, *_ = connect(x, *(p.detach() for p in chain.own[0]), backend="triton")
    assert not free_until_backward(u, u * chain.bias)  # no mappings to differentiate: no node that knows them
    assert u.untyped_storage().nbytes() > 0
    x, u, *_ = connect(chain.x, *chain.own[0], backend="triton")
    with torch.no_grad():
        assert not free_until_backward(u, u.sin())
    assert not free_until_backward(u.view(-1), u.sin())
    assert not free_until_backward(connect(chain.x, *chain.own[0], backend="reference")[1], u.sin())


def test_kept_under_hooks_on_saved_tensors() -> None:
    """Of the operation that made it, or around the call."""
    chain = Chain()
    with torch.autograd.graph.save_on_cpu():
        _, u, *_ = connect(chain.x, *chain.own[0], backend="triton")
        assert not free_until_backward(u, u.sin())
    assert not free_until_backward(u, u.sin())
    _, u, *_ = connect(chain.x, *chain.own[0], backend="triton")
    with torch.autograd.graph.save_on_cpu():
        y = u.sin()
        assert not free_until_backward(u, y)
    assert free_until_backward(u, y)  # sin's copy is on the CPU: nothing will be put back
    y.sum().backward()


def test_kept_under_a_dispatch_mode() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    chain = Chain()
    with FlopCounterMode(display=False):
        _, u, *_ = connect(chain.x, *chain.own[0], backend="triton")
        assert not free_until_backward(u, u.sin())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_around_sublayer_and_boundary(reentrant: bool) -> None:
    """Its recompute reads u again, and so must find it."""
    results = []
    for frees in (True, False):
        chain = Chain()
        place = recompute(3) if frees else None

        def sublayer(u: Tensor, frees: bool = frees) -> Tensor:
            y = u.sin()
            if frees:
                free_until_backward(u, y)
            return y

        def inside(x: Tensor, u: Tensor, post: Tensor, res: Tensor, place: Any, chain: Any = chain) -> Any:
            return boundary(x, res, post, sublayer(u), None, *chain.own[2], recompute=place, backend="triton")

        x, u, post, res = connect(chain.x, *chain.own[0], backend="triton")
        x, u, post, res = boundary(x, res, post, sublayer(u), None, *chain.own[1], recompute=place, backend="triton")
        place = None if place is None else place.next()
        x, u, post, res = checkpoint(inside, x, u, post, res, place, use_reentrant=reentrant)
        place = None if place is None or reentrant else place.next()
        out = mix(x, res, post, sublayer(u), recompute=place, backend="triton")
        out.sum().backward()
        results.append([chain.x.grad, *(p.grad for own in chain.own[:3] for p in own)])
    for ours, kept in zip(*results, strict=True):
        assert torch.equal(ours, kept)


def test_detached_from_its_boundary_is_refused() -> None:
    chain = Chain()
    x, u, post, res = connect(chain.x, *chain.own[0], backend="triton")
    y = u.detach() * chain.bias
    assert free_until_backward(u, y)
    del x, u, post, res
    with pytest.raises(RuntimeError, match="around a detach"):
        y.sum().backward()


def test_another_result_is_refused() -> None:
    chain = Chain()
    x, u, post, res = connect(chain.x.flatten(1), *chain.own[0], flat=True, backend="triton")
    for other in (x, post, res):
        with pytest.raises(ValueError, match="must be what boundary"):
            free_until_backward(other, u.sin())
