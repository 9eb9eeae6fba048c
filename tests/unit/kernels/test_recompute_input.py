"""What a sublayer reads, freed after its forward and there again for its backward: the same bits, and free in between."""

from __future__ import annotations

import contextlib
import gc
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from mhc_kernels import RMSNorm, boundary, connect, free_until_backward, mix, recompute
from mhc_kernels.fused.boundary import BackwardCall, ForwardCall
from mhc_kernels.recompute_input import Refill
from tests.unit.kernels.cases import DEVICE, PARAMETERS, Case
from tests.unit.kernels.test_recompute import LENGTH, Chain, T

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def size(storage: StorageWeakRef) -> int | None:
    """Bytes of a storage; None once nobody has it any more."""
    there = torch.UntypedStorage._new_with_weak_ptr(storage.cdata)
    return None if there is None else there.nbytes()


class Freeing:
    """Sublayers ``sin``, which keeps what it reads; it is freed. refilled: sizes of all inputs at each one's backward."""

    def __init__(self, chain: Chain):
        self.chain, self.storages = chain, list[StorageWeakRef]()
        self.refilled: list[list[int | None]] = []
        chain.sublayer = self

    def __call__(self, u: Tensor) -> Tensor:
        y = u.sin()
        self.storages.append(StorageWeakRef(u.untyped_storage()))
        assert free_until_backward(u, y)
        y.register_hook(lambda gradient: self.refilled.append([size(storage) for storage in self.storages]))
        return y


@pytest.fixture
def refills(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What was computed again."""
    made: list[Tensor] = []
    original = Refill._filled

    @contextlib.contextmanager
    def recorded(*arguments: Any) -> Iterator[Tensor]:
        with original(*arguments) as u:
            yield u
        made.append(u)

    monkeypatch.setattr(Refill, "_filled", recorded)
    return made


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Of those, what had a pass over the streams of its own."""
    made: list[Tensor] = []
    original = ForwardCall.aggregate_again

    def recorded(call: ForwardCall, streams: Tensor, kept: Tensor, gamma: Tensor | None, u: Tensor) -> None:
        original(call, streams, kept, gamma, u)
        made.append(u)

    monkeypatch.setattr(ForwardCall, "aggregate_again", recorded)
    return made


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
