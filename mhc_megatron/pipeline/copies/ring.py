"""Memory between two processes of a machine: slots that a sender fills and a receiver empties, and how far each has come."""

from __future__ import annotations

import ctypes
import mmap
import os
import secrets
import weakref
from collections.abc import Iterator
from typing import NamedTuple

import torch

from mhc_megatron.pipeline.copies import driver

MIB = 2**20
_FLAGS = mmap.PAGESIZE
_FULL, _FREE = 1024, 2048  # offsets: apart from each other, as two processes write them
_TOKEN = 32


class Shape(NamedTuple):
    """Of a ring: so many slots of so many bytes; pieces: into how many at least a tensor is cut, if none gets smaller than
    ``smallest``."""

    slots: int
    slot: int
    pieces: int
    smallest: int

    def cut(self, size: int) -> Iterator[tuple[int, int]]:
        """(offset, size) of the pieces of a tensor of ``size`` bytes."""
        least = min(self.pieces, -(-size // self.smallest))
        step = -(-size // max(least, -(-size // self.slot), 1))
        step = max(256, step + -step % 256)
        for offset in range(0, size, step):
            yield offset, min(step, size - offset)


ON_HOST = Shape(4, 16 * MIB, 16, MIB)
"""Both copies are slow: many small pieces, so that the one of a piece runs while the other one of the next does."""
ON_GPU = Shape(2, 80 * MIB, 2, 8 * MIB)
"""Both copies are fast; beside matrix products every piece waits for 0.1 to 0.3 ms before it is copied
(benchmarks/README.md): few large ones."""


class Offer(NamedTuple):
    """What the receiver tells the sender: where its ring is. memory: of GPU memory, `driver.export`; b"": of the host's."""

    process: int
    descriptor: int
    token: bytes
    memory: bytes


class Ring:
    """One direction's, between two stages.

    full, free: addresses of the numbers of slots that have been filled and emptied, from the start. slots: those of the slots.
    All are the GPU's. Its memory is given back when nobody has the ring any more, but not at the process' end, which does it
    anyway.
    """

    def __init__(self, descriptor: int, size: int, memory: int | None, opened: bool):
        self.shape = ON_HOST if memory is None else ON_GPU
        self._descriptor = descriptor
        self.page = mmap.mmap(descriptor, size)
        host = ctypes.addressof(ctypes.c_char.from_buffer(self.page))
        flags = driver.register(host, size)
        weakref.finalize(self, _give_back, self.page, host, memory, opened).atexit = False
        self.full, self.free = flags + _FULL, flags + _FREE
        first = flags + _FLAGS if memory is None else memory
        self.slots = [first + number * self.shape.slot for number in range(self.shape.slots)]

    @classmethod
    def make(cls, on_gpu: bool) -> tuple[Ring, Offer]:
        """The receiver's: in the memory of its GPU, or in the host's.

        Raises:
            OSError: if the host has no memory for it; RuntimeError: if the GPU has none, or can't share it.
        """
        size = _FLAGS + (0 if on_gpu else ON_HOST.slots * ON_HOST.slot)
        descriptor = os.memfd_create("mhc-pipeline")  # without a name in a file system: nothing can be left behind
        os.posix_fallocate(descriptor, 0, size)
        memory = driver.allocate(ON_GPU.slots * ON_GPU.slot) if on_gpu else None
        ring = cls(descriptor, size, memory, opened=False)
        token = secrets.token_bytes(_TOKEN)
        ring.page[:_TOKEN] = token
        return ring, Offer(os.getpid(), descriptor, token, b"" if memory is None else driver.export(memory))

    @classmethod
    def open(cls, offer: Offer) -> Ring:
        """The sender's.

        Raises:
            OSError: if the receiver's memory is out of reach: in another container, say; RuntimeError: its GPU's.
        """
        descriptor = os.open(f"/proc/{offer.process}/fd/{offer.descriptor}", os.O_RDWR)
        size = os.fstat(descriptor).st_size
        if size < _FLAGS or os.pread(descriptor, _TOKEN, 0) != offer.token:
            os.close(descriptor)
            raise OSError("it has the other stage's process number for another one")
        return cls(descriptor, size, driver.open_exported(offer.memory) if offer.memory else None, opened=True)

    def settle(self) -> None:
        """Both ends have it: nobody else will open it."""
        os.close(self._descriptor)


def _give_back(page: mmap.mmap, host: int, memory: int | None, opened: bool) -> None:
    """``page``: mapped until here, where its memory is pinned no longer."""
    torch.cuda.synchronize()
    if memory is not None:
        (driver.close_exported if opened else driver.free)(memory)
    driver.unregister(host)
