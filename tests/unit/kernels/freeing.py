"""A chain whose sublayers' inputs are freed after the forward, for the tests of what puts them back."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from mhc_kernels import free_until_backward
from tests.unit.kernels.test_recompute import Chain


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
