"""Pipeline tensors that are n streams wide."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from mhc_megatron.residual.streams import pipeline_width


class StreamsCommunicator(P2PCommunicator):
    """Megatron's communicator, sending and receiving ``[s, b, n*C]`` where the schedule says ``[s, b, C]``.

    n is what the model recorded on its config; for a model without mHC this is Megatron's communicator unchanged.
    """

    def _communicate(
        self,
        *,
        tensor_send_next: torch.Tensor | None,
        tensor_send_prev: torch.Tensor | None,
        recv_prev: bool,
        recv_next: bool,
        tensor_shape: Any,
        wait_on_reqs: bool = True,
    ) -> Any:
        width = pipeline_width(self.config)
        if tensor_shape is not None and width > 1:
            tensor_shape = (*tensor_shape[:-1], tensor_shape[-1] * width)
        if tensor_send_next is not None:
            # An alias with the storage of its own: deallocate_output_tensor swaps the output's `.data` while a send of
            # it may be under way.
            tensor_send_next = tensor_send_next.detach()
        return super()._communicate(
            tensor_send_next=tensor_send_next,
            tensor_send_prev=tensor_send_prev,
            recv_prev=recv_prev,
            recv_next=recv_next,
            tensor_shape=tensor_shape,
            wait_on_reqs=wait_on_reqs,
        )
