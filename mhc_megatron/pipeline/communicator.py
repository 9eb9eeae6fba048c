"""Megatron's pipeline transfers, for streams."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from mhc_megatron.pipeline.links import BACKWARD, FORWARD, Links
from mhc_megatron.pipeline.passes import Plan, Rank, plan, unknown
from mhc_megatron.pipeline.sends import NoWait
from mhc_megatron.pipeline.side_channel import SideChannel
from mhc_megatron.pipeline.split import accompany, columns
from mhc_megatron.pipeline.state import PipelineState, pipeline_state


class StreamsCommunicator(P2PCommunicator):
    """Megatron's communicator, with tensors as wide as the model on this config has made them.

    For a model without mHC this is Megatron's communicator unchanged. Else the schedule's ``[s, b, C]`` becomes ``[s, b,
    n*C]``, in Megatron's own transfers or over links of its own (`links`); or ``[s, b, C + a few]`` over links, with a companion
    of ``[s, b, n*C]`` (`split`, `side_channel`). On links:

    * Sends do not stop the compute stream, batched (``batch_p2p_comm``) or not: the tensor is kept until it has gone (`sends`).
    * What leaves is an alias of the output, so that Megatron's ``deallocate_output_tensor``, which swaps the output's
      ``.data``, can't take it away meanwhile.
    * The two directions do not wait for each other.
    """

    def __init__(self, pp_group: Any, config: Any):
        super().__init__(pp_group, config)
        self._state = state = pipeline_state(config)
        self._links: Links | None = None
        if state is None or not state.links:
            return
        wraps = config.virtual_pipeline_model_parallel_size is not None
        self._links = Links.of(pp_group, wraps, state.split, state.transport)
        if state.split:
            state.channel = SideChannel(self._links, self._plan(state))

    def _plan(self, state: PipelineState) -> Plan:
        """Of the schedule that is running."""
        from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table

        config, chunks = self.config, self.virtual_pipeline_model_parallel_size or 1
        if state.running is None:
            return unknown(chunks > 1, self.is_pp_last_stage)
        microbatches, forward_only = state.running
        group = config.microbatch_group_size_per_vp_stage if chunks > 1 else 1
        _, _, warm_up, _ = get_pp_rank_microbatches(
            microbatches,
            chunks,
            config.microbatch_group_size_per_vp_stage,
            forward_only,
            config.overlap_moe_expert_parallel_comm,
            p2p_communicator=self,
        )
        planned = plan(
            Rank(
                self.pp_group.rank(),
                self.pp_group.size(),
                chunks,
                get_schedule_table(microbatches, chunks, group),
                warm_up,
                group,
                config.overlap_p2p_comm,
                config.overlap_p2p_comm_warmup_flush,
                forward_only,
            )
        )
        return planned if state.announces else planned._replace(late=None)

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
        state = self._state
        if state is None or self._links is None:
            if state is not None and tensor_shape:
                tensor_shape = (*tensor_shape[:-1], tensor_shape[-1] * state.num_streams)
            if state is not None and tensor_send_next is not None:
                tensor_send_next = tensor_send_next.detach()  # as on links
            return super()._communicate(
                tensor_send_next=tensor_send_next,
                tensor_send_prev=tensor_send_prev,
                recv_prev=recv_prev,
                recv_next=recv_next,
                tensor_shape=tensor_shape,
                wait_on_reqs=wait_on_reqs,
            )
        return self._exchange(
            state, self._links, tensor_send_next, tensor_send_prev, recv_prev, recv_next, tensor_shape, wait_on_reqs
        )

    def _exchange(
        self,
        state: PipelineState,
        links: Links,
        to_next: torch.Tensor | None,
        to_prev: torch.Tensor | None,
        from_prev: bool,
        from_next: bool,
        tensor_shape: Any,
        wait: bool,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, dict[str, Any] | None]:
        """Megatron's ``_communicate`` on links: what is received from the previous and the next stage, and handles."""
        channel, dtype = state.channel if state.split else None, self.config.pipeline_dtype
        for tensor in (to_next, to_prev):
            if tensor is not None and tensor.dtype != dtype:
                raise RuntimeError(
                    f"mHC: a pipeline stage sends {tensor.dtype}, but the next one receives {dtype}: set pipeline_dtype "
                    "of the TransformerConfig to the dtype of the streams"
                )
        narrow, wide = _shapes(tensor_shape, state, dtype) if from_prev or from_next else ((), ())
        split = {
            FORWARD: channel is not None and from_prev and channel.splits_receive(),
            BACKWARD: channel is not None and from_next and channel.splits_gradient(),
        }
        wanted = [direction for direction, there in ((FORWARD, from_prev), (BACKWARD, from_next)) if there]
        # All memory first (`Links.buffer`).
        links.release()
        own = {way: links.buffer(narrow if split[way] else wide, dtype, requires_grad=True) for way in wanted}
        streams = channel.buffers(wide, dtype) if channel is not None and from_prev else []
        gradient = links.buffer(wide, dtype) if split[BACKWARD] else None

        handles: dict[str, Any] = {}

        def receive(way: int) -> None:
            handles["recv_prev" if way == FORWARD else "recv_next"] = links.receive(way, own[way]).work

        posts: list[list[Callable[[], Any]]] = []  # for each link, in its order
        if to_next is not None:
            posts.append([partial(links.send, FORWARD, to_next.detach())])
            handles["send_next"] = NoWait()
            if channel is not None and self._is_split(to_next, state):
                posts[-1].insert(0, channel.send_held)
        if from_prev:
            posts.append([partial(receive, FORWARD)])
            if channel is not None and split[FORWARD]:
                posts[-1].insert(0, lambda: accompany(own[FORWARD], channel.receive_streams(streams)))
            if channel is not None:
                posts[-1].append(lambda: channel.receive_ahead(streams))
        if to_prev is not None:
            apart = channel is not None and self._is_split(to_prev, state)
            posts.append([partial(links.send, BACKWARD, to_prev.detach(), more=apart)])
            handles["send_prev"] = NoWait()
            if channel is not None and apart:
                posts[-1].append(channel.send_gradient)
        if from_next:
            posts.append([partial(receive, BACKWARD)])
            if channel is not None and gradient is not None:
                posts[-1].append(lambda: accompany(own[BACKWARD], channel.receive_gradient(gradient)))
        # With one queue of launches for the GPU (CUDA_DEVICE_MAX_CONNECTIONS=1) what waits for an earlier transfer on its link
        # keeps back whatever is launched after it: the first ones of all links come first.
        for turn in zip_longest(*posts):
            for post in filter(None, turn):
                post()
        if wait:
            for handle in handles.values():
                handle.wait()
        return own.get(FORWARD), own.get(BACKWARD), None if wait else handles

    def _is_split(self, tensor: torch.Tensor, state: PipelineState) -> bool:
        """Whether it is y with H_post, or their gradients, and not streams."""
        return tensor.shape[-1] != self.config.hidden_size * state.num_streams


def _shapes(
    tensor_shape: Any, state: PipelineState, dtype: torch.dtype | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of y with H_post, and of streams, for the schedule's ``[s, b, C]``."""
    if dtype is None:
        raise RuntimeError("pipeline_dtype of the TransformerConfig must be set to receive from a pipeline stage")
    *tokens, width = tensor_shape
    return (*tokens, width + columns(state.num_streams, dtype)), (*tokens, width * state.num_streams)
