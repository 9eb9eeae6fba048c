"""What a sublayer reads, computed again in the backward instead of being kept (arXiv 2512.24880, section 4.3.2).

A sublayer F keeps its input u for its own backward. But u is an aggregation of streams that the backward has there anyway, so its
memory is idle from F's forward to F's backward. It is taken away and put back under the tensors that F saved: they see the
same storage, and PyTorch's count of changes to u does not move. F does not run again.
"""

from __future__ import annotations

import contextlib
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from mhc_kernels.recompute_block import saved_tensors_are_hooked


class _Refill:
    """A hook on the output of a sublayer: puts back what its backward, which comes next, will look for."""

    def __init__(self, source: Any, u: Tensor):
        storage = u.untyped_storage()
        # Both weak: whoever saved u decides how long its storage lives, the graph how long its nodes do.
        self.source, self.storage = weakref.ref(source), StorageWeakRef(storage)
        self.bytes, self.device = storage.nbytes(), u.device
        self.stream = torch.cuda.current_stream(u.device) if u.is_cuda else None

    def __call__(self, gradient: Tensor) -> None:
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        if storage is None or storage.nbytes():  # nobody kept u, or a pass before this one has put it back
            return
        source = self.source()
        if source is None:
            raise RuntimeError(
                "recompute: a sublayer's input was freed that this backward can't compute again, as its streams' boundary is not "
                "in the graph; don't call free_until_backward() around a detach()"
            )
        with self._on_forward_stream():
            streams, kept, gamma = source.aggregated(source)
            storage.resize_(self.bytes)
            shape, strides, dtype = source.call.form_of_u
            u = torch.empty(0, dtype=dtype, device=self.device).set_(storage, 0, shape, strides)
            try:
                source.call.aggregate_again(streams, kept, gamma, u)
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

    The backward computes u from its streams, which may themselves be computed again (`mhc_kernels.recompute`), where the gradient
    of y comes in. So F's backward has to begin at y: what else F lets out must not have a gradient. Nobody may read u or a
    view of it between this call and that; make a copy of what is to be looked at later. u is put back once: after a
    backward with ``retain_graph=True`` it stays.

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
    y.register_hook(_Refill(source, u))
    # It has to be the first of them: one of F's own may want u, to compute something of F again (Megatron's
    # CheckpointWithoutOutput). PyTorch calls them in the order in which a plain dict would have them.
    for other in others:
        hooks[other] = hooks.pop(other)
    storage.resize_(0)
    return True
