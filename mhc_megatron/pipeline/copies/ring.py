"""Memory between two processes of a machine: slots that a sender fills and a receiver empties, and how far each has come."""

from __future__ import annotations

import contextlib
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
_NAME = "mhc-pipeline"
_FLAGS = mmap.PAGESIZE
_FULL, _FREE = 1024, 2048  # offsets: apart from each other, as two processes write them
_TOKEN = 32


class Shape(NamedTuple):
    """Of a ring: so many slots of so many bytes; pieces: into how many at least a tensor is cut, as long as they have at least
    ``smallest`` bytes."""

    slots: int
    slot: int
    pieces: int
    smallest: int

    def cut(self, size: int) -> Iterator[tuple[int, int]]:
        """(offset, size) of the pieces of a tensor of ``size`` bytes."""
        least = max(1, min(self.pieces, size // self.smallest))
        step = -(-size // max(least, -(-size // self.slot)))
        step = max(256, step + -step % 256)
        for offset in range(0, size, step):
            yield offset, min(step, size - offset)


ON_HOST = Shape(4, 16 * MIB, 16, MIB)
"""Both copies are slow: many small pieces, so that the one of a piece runs while the other one of the next does."""
ON_GPU = Shape(2, 80 * MIB, 2, 8 * MIB)
"""Both copies are fast, but beside matrix products 20 pieces took 3 ms longer than alone (benchmarks/README.md): few large
ones."""


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

    def __init__(self, descriptor: int, memory: int | None, opened: bool):
        self.shape = ON_HOST if memory is None else ON_GPU
        size = os.fstat(descriptor).st_size
        self._page = mmap.mmap(descriptor, size)
        host = ctypes.addressof(ctypes.c_char.from_buffer(self._page))
        flags = driver.register(host, size)
        device = torch.cuda.current_device()
        weakref.finalize(self, _give_back, device, self._page, host, memory, opened).atexit = False
        self.full, self.free = flags + _FULL, flags + _FREE
        first = flags + _FLAGS if memory is None else memory
        self.slots = [first + number * self.shape.slot for number in range(self.shape.slots)]

    @classmethod
    def make(cls, on_gpu: bool) -> tuple[Ring, Offer, int]:
        """The receiver's, in the memory of its GPU or in the host's; and the descriptor to be closed when the sender has it.

        Raises:
            OSError: if the host has no memory for it; RuntimeError: if the GPU has none, or can't share it.
        """
        with contextlib.ExitStack() as undo:
            descriptor = _memory_file()  # without a name in a file system: nothing can be left behind
            undo.callback(os.close, descriptor)
            os.posix_fallocate(descriptor, 0, _FLAGS + (0 if on_gpu else ON_HOST.slots * ON_HOST.slot))
            memory = driver.allocate(ON_GPU.slots * ON_GPU.slot) if on_gpu else None
            if memory is not None:
                undo.callback(driver.free, memory)
            exported = b"" if memory is None else driver.export(memory)
            ring = cls(descriptor, memory, opened=False)
            undo.pop_all()
        token = secrets.token_bytes(_TOKEN)
        ring._page[:_TOKEN] = token
        return ring, Offer(os.getpid(), descriptor, token, exported), descriptor

    @classmethod
    def open(cls, offer: Offer) -> Ring:
        """The sender's.

        Raises:
            OSError: if the receiver's memory is out of reach; RuntimeError: its GPU's.
        """
        path = f"/proc/{offer.process}/fd/{offer.descriptor}"
        with contextlib.ExitStack() as undo:
            try:
                if not os.readlink(path).startswith(f"/memfd:{_NAME}"):  # another process has that number here
                    raise OSError
                descriptor = os.open(path, os.O_RDWR)
                undo.callback(os.close, descriptor)
                if os.pread(descriptor, _TOKEN, 0) != offer.token:
                    raise OSError
            except OSError:
                raise OSError(
                    "the stages' processes can't open each other's memory (of other users, or in containers with their own "
                    "process numbers)"
                ) from None
            memory = driver.open_exported(offer.memory) if offer.memory else None
            if memory is not None:
                undo.callback(driver.close_exported, memory)
            ring = cls(descriptor, memory, opened=True)
            undo.pop_all()
        os.close(descriptor)
        return ring

    def give_up(self) -> None:
        """Let all that waits on it go on, here and at the other end, with whatever is in the slots."""
        for offset in (_FULL, _FREE):
            self._page[offset : offset + 4] = (2**31 - 1).to_bytes(4, "little")


def _memory_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create(_NAME)
    descriptor = ctypes.CDLL(None, use_errno=True).memfd_create(_NAME.encode(), 1)  # MFD_CLOEXEC
    if descriptor < 0:  # Python was built without it
        raise OSError(ctypes.get_errno(), "memfd_create")
    return int(descriptor)


def _give_back(device: int, page: mmap.mmap, host: int, memory: int | None, opened: bool) -> None:
    """``page``: mapped until here, where its memory is pinned no longer."""
    with torch.cuda.device(device):
        try:
            torch.cuda.synchronize()
            if memory is not None:
                (driver.close_exported if opened else driver.free)(memory)
        finally:
            driver.unregister(host)
