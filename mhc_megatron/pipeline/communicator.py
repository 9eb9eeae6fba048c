"""Megatron's pipeline transfers, for streams."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from mhc_megatron.pipeline.sends import NoWait, Sends
from mhc_megatron.pipeline.side_channel import SideChannel
from mhc_megatron.pipeline.split import accompany, columns
from mhc_megatron.pipeline.state import pipeline_state

_SENDS = Sends()


class StreamsCommunicator(P2PCommunicator):
    """Megatron's communicator, with tensors as wide as the model on this config has made them.

    For a model without mHC this is Megatron's communicator unchanged. Else the schedule's ``[s, b, C]`` becomes ``[s, b,
    n*C]``, or ``[s, b, C + a few]`` with a companion of ``[s, b, n*C]`` on the side (`split`).

    Sends do not stop the compute stream: the tensor is kept until it has gone. What leaves is an alias of the output, so that
    Megatron's ``deallocate_output_tensor``, which swaps the output's ``.data``, can't take it away meanwhile. With batched
    transfers (``batch_p2p_comm``), sends and receives have one handle: they wait as in Megatron.
    """

    def __init__(self, pp_group: Any, config: Any):
        super().__init__(pp_group, config)
        self._state = pipeline_state(config)
        if self._state is not None and self._state.split:
            wraps = config.virtual_pipeline_model_parallel_size is not None
            self._state.channel = SideChannel.of(pp_group, wraps)

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
        state, config = self._state, self.config
        arguments = {"recv_prev": recv_prev, "recv_next": recv_next}
        if state is None:
            return super()._communicate(
                tensor_send_next=tensor_send_next,
                tensor_send_prev=tensor_send_prev,
                tensor_shape=tensor_shape,
                wait_on_reqs=wait_on_reqs,
                **arguments,
            )
        channel = state.channel if state.split else None
        wide, streams = tensor_shape, None
        if tensor_shape is not None:
            *tokens, width = tensor_shape
            tensor_shape = wide = (*tokens, width * state.num_streams)
            if channel is not None:
                tensor_shape = (*tokens, width + columns(state.num_streams, config.pipeline_dtype))
        if channel is not None and recv_prev:
            # Before the schedule's own: it leaves earlier, too.
            streams = channel.receive_streams(wide, config.pipeline_dtype)
        if tensor_send_next is not None:
            tensor_send_next = tensor_send_next.detach()
        batched = config.batch_p2p_comm or config.use_ring_exchange_p2p
        received_prev, received_next, requests = super()._communicate(
            tensor_send_next=tensor_send_next,
            tensor_send_prev=tensor_send_prev,
            tensor_shape=tensor_shape,
            wait_on_reqs=wait_on_reqs and batched,
            **arguments,
        )
        if not batched:
            requests = self._do_not_wait(requests, tensor_send_next, tensor_send_prev, wait_on_reqs)
        if channel is not None:
            # After the schedule's own: the gradient of y is needed first.
            if tensor_send_prev is not None:
                channel.send_gradient()
            if recv_next:
                accompany(received_next, channel.receive_gradient(wide, config.pipeline_dtype))
            if streams is not None:
                accompany(received_prev, streams)
        return received_prev, received_next, requests

    def _do_not_wait(
        self, requests: dict[str, Any], to_next: torch.Tensor | None, to_prev: torch.Tensor | None, wait: bool
    ) -> dict[str, Any] | None:
        """Keep what is sent instead of waiting for it; wait for what is received if the schedule would."""
        for name, tensor in (("send_next", to_next), ("send_prev", to_prev)):
            if tensor is not None:
                _SENDS.keep(requests[name], tensor)
                requests[name] = NoWait()
        if not wait:
            return requests
        for request in requests.values():
            request.wait()
        return None
