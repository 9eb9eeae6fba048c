"""What a sublayer reads, computed again in the backward instead of being kept (arXiv 2512.24880, section 4.3.2).

A sublayer F keeps its input u for its own backward. But u is an aggregation of streams that the backward has there anyway, so its
memory is idle from F's forward to F's backward. It is taken away and put back under the tensors that F saved: they see the
same storage, and PyTorch's count of changes to u does not move. F does not run again.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from mhc_kernels.recompute_block import saved_tensors_are_hooked

_ATTRIBUTE = "_mhc_refill"  # on a sublayer's output


class Refill:
    """Of one sublayer. As a hook on its output, it puts back what the sublayer's backward, which comes next, will look for.
    The boundary after the sublayer, which reads the same streams a moment before, does it on the way: `beside`."""

    def __init__(self, source: Any, u: Tensor):
        storage = u.untyped_storage()
        # Both weak: whoever saved u decides how long its storage lives, the graph how long its nodes do.
        self.source, self.storage = weakref.ref(source), StorageWeakRef(storage)
        self.bytes, self.device = storage.nbytes(), u.device
        self.stream = torch.cuda.current_stream(u.device) if u.is_cuda else None

    def __reduce__(self) -> tuple[Any, ...]:
        """y may be copied or written to a file: there it has none."""
        return type(None), ()

    def __call__(self, gradient: Tensor) -> None:
        storage = self._missing()
        if storage is None:
            return
        source = self.source()
        if source is None:
            raise RuntimeError(
                "recompute: a sublayer's input was freed that this backward can't compute again, as its streams' boundary is not "
                "in the graph; don't call free_until_backward() around a detach()"
            )
        with self._on_forward_stream():
            streams, kept, gamma = source.aggregated(source, None)
            with self._filled(storage, source) as u:
                source.call.aggregate_again(streams, kept, gamma, u)

    @contextlib.contextmanager
    def beside(self, x: Tensor) -> Iterator[tuple[Any, tuple[Tensor, Tensor | None, Tensor]] | None]:
        """What `BackwardCall.run` takes to write u again, and how its source aggregated it; None if the hook is to do it.

        Args:
            x: the streams that u was aggregated from.
        """
        storage, source = self._missing(), self.source()
        elsewhere = self.stream is not None and self.stream != torch.cuda.current_stream(self.device)
        if storage is None or source is None or not self.bytes or elsewhere:
            yield None
            return
        _, kept, gamma = source.aggregated(source, x)
        with self._filled(storage, source) as u:
            yield source.call.read, (kept, gamma, u)

    def _missing(self) -> torch.UntypedStorage | None:
        """u's storage, if it is wanted: nobody may have kept u, or a pass before this one has put it back."""
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        return None if storage is None or storage.nbytes() else storage

    @contextlib.contextmanager
    def _filled(self, storage: torch.UntypedStorage, source: Any) -> Iterator[Tensor]:
        """u with memory, to be filled."""
        storage.resize_(self.bytes)
        shape, strides, dtype = source.call.form_of_u
        try:
            yield torch.empty(0, dtype=dtype, device=self.device).set_(storage, 0, shape, strides)
        except BaseException:  # an interrupt as well: another pass must not take what is there for u
            storage.resize_(0)
            raise

    @contextlib.contextmanager
    def _on_forward_stream(self) -> Any:
        """The stream that u was freed on: the memory is that one's. Hooks run on the stream of the sublayer's last operation."""
        current = None if self.stream is None else torch.cuda.current_stream(self.device)
        if self.stream is None or current is None or current == self.stream:
            yield
            return
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            yield
        current.wait_stream(self.stream)


def free_until_backward(u: Tensor, y: Tensor) -> bool:
    """Free u once its sublayer ``y = F(u)`` has run; before F's backward it is there again, with the same bits.

    The backward computes u from its streams, which may themselves be computed again (`mhc_kernels.recompute`): in that of the
    boundary after F, or where the gradient of y comes in. So F's backward has to begin at y: what else F lets out must not have a
    gradient. Nobody may read u or a view of it between this call and that; make a copy of what is to be looked at later. u is
    put back once: after a backward with ``retain_graph=True`` it stays.

    Args:
        u: ``[..., C]``, as `boundary` or `connect` returned it (Triton).
        y: F's output, any shape.

    Returns:
        whether u was freed. It is not where nothing could bring it back or somebody else might want it: without gradients;
        where y is u or a view of it; where u was changed in place (PyTorch does not count changes through ``.data``); where
        hooks on saved tensors are active, here or where u was made, as in a non-reentrant activation checkpoint or with
        `torch.autograd.graph.save_on_cpu`; under a dispatch mode or torch.compile.

    Raises:
        ValueError: if u is another result of `boundary` or `connect`.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not y.requires_grad:
        return False
    source: Any = u.grad_fn
    if getattr(source, "aggregated", None) is None or saved_tensors_are_hooked():
        return False
    if u.output_nr != 1:
        raise ValueError("free_until_backward: u must be what boundary() or connect() returned as u")
    storage = u.untyped_storage()
    if u._version or storage._cdata == y.untyped_storage()._cdata:
        return False
    if u.shape != source.call.form_of_u.shape or storage.nbytes() != u.numel() * u.itemsize:  # it has got other data
        return False
    hooks: Any = y._backward_hooks or {}
    others = list(hooks)
    refill = Refill(source, u)
    y.register_hook(refill)
    setattr(y, _ATTRIBUTE, refill)
    # It has to be the first of them: one of F's own may want u, to compute something of F again (Megatron's
    # CheckpointWithoutOutput). PyTorch calls them in the order in which a plain dict would have them.
    for other in others:
        hooks[other] = hooks.pop(other)
    storage.resize_(0)
    return True


def identify(streams: Tensor) -> tuple[int, int] | None:
    """What tells whether a tensor has other values than now: its address and PyTorch's count of changes."""
    return None if streams.is_inference() else (streams.data_ptr(), streams._version)


def refill_of(y: Tensor, x: Tensor, n: int) -> Refill | None:
    """What puts back the input of the sublayer that returned y, if x, of n streams, is what it was aggregated from."""
    refill: Refill | None = getattr(y, _ATTRIBUTE, None)
    source = None if refill is None else refill.source()
    if source is None or not y.requires_grad:
        return None
    base = x if x._base is None or x._base.numel() != x.numel() else x._base  # x may be a view of them, [..., n, C]
    same = source in (x.grad_fn, base.grad_fn) and source.streams == identify(x) and source.call.n == n
    return refill if same else None
