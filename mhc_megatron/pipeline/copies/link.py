"""One end of a link on which copy engines move tensors, a piece after the other, through a ring (`Ring`).

Per piece the sender's stream waits until its slot is empty, copies the piece there and counts it as full; the receiver's stream
waits for that, copies it to where it is to be and counts it as empty. The GPUs wait for each other; no host does, and no kernel.
Both ends cut a tensor of so many bytes in the same pieces.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mhc_megatron.pipeline.copies import driver
from mhc_megatron.pipeline.copies.ring import Ring
from mhc_megatron.pipeline.copies.watchdog import Watchdog


class Copying:
    """The handle of a transfer, as a Work of torch.distributed's: no host waits in it. done: when it is over on this side."""

    def __init__(self, done: torch.cuda.Event):
        self.done = done

    def is_completed(self) -> bool:
        """Whether it is over on this side."""
        return self.done.query()

    def wait(self) -> None:
        """Let what is launched on the current stream from now on wait for it."""
        self.done.wait()


class _End:
    def __init__(self, ring: Ring, stream: torch.cuda.Stream, watchdog: Watchdog, name: str):
        self._ring, self._stream, self._watchdog, self._name = ring, stream, watchdog, name
        self._count = 0

    def _slot(self) -> tuple[int, int]:
        """The next piece's number, from 1, and its slot."""
        self._count += 1
        return self._count, self._ring.slots[(self._count - 1) % len(self._ring.slots)]

    def _start(self, tensor: Tensor) -> int:
        """The stream, after what has been launched for the tensor.

        Raises:
            RuntimeError: for a tensor with holes, and where a CUDA graph is captured: played again it would wait for nothing.
        """
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "mHC: a pipeline transfer by copy engine can't be captured in a CUDA graph; use --mhc-pipeline-transport nccl"
            )
        if not tensor.is_contiguous():
            raise RuntimeError(f"mHC: a pipeline transfer needs a contiguous tensor, got strides {tensor.stride()}")
        self._stream.wait_stream(torch.cuda.current_stream())
        return self._stream.cuda_stream

    def _end(self, tensor: Tensor) -> Copying:
        done = torch.cuda.Event()
        done.record(self._stream)
        self._watchdog.watch(self._name, done, f"{tuple(tensor.shape)}, {tensor.dtype}")
        return Copying(done)


class Sender(_End):
    """The sending end."""

    def send(self, tensor: Tensor) -> Copying:
        """Send a contiguous tensor, as soon as what has been launched on the current stream is done. It must stay alive until
        that is complete."""
        stream, address, ring = self._start(tensor), tensor.data_ptr(), self._ring
        for offset, size in ring.shape.cut(tensor.nbytes):
            number, slot = self._slot()
            if number > ring.shape.slots:
                driver.wait_value(stream, ring.free, number - ring.shape.slots)
            driver.copy(stream, slot, address + offset, size)
            driver.write_value(stream, ring.full, number)
        return self._end(tensor)


class Receiver(_End):
    """The receiving end."""

    def receive(self, tensor: Tensor) -> Copying:
        """Receive into a contiguous tensor, whose memory may be in use by what has been launched on the current stream."""
        stream, address, ring = self._start(tensor), tensor.data_ptr(), self._ring
        for offset, size in ring.shape.cut(tensor.nbytes):
            number, slot = self._slot()
            driver.wait_value(stream, ring.full, number)
            driver.copy(stream, address + offset, slot, size)
            driver.write_value(stream, ring.free, number)
        return self._end(tensor)
