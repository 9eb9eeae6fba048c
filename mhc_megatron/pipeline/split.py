"""A boundary between pipeline stages at which a stage waits for C values a token, not n*C (for transfers that `passes` splits).

A stage boundary carries ``x' = H_res @ x + outer(H_post, y)``. ``H_res @ x`` is known before the chunk's last sublayer F runs;
y and H_post make the rest. So the sender sends ``H_res @ x`` [s, b, n*C] (`depart`), runs F, and
hands ``[y | H_post]`` to the schedule (`pack`); the receiver adds up (`arrive`). Backward: the gradients of y and H_post
come back in the schedule's own transfer, F's backward runs, and only then is the gradient of ``H_res @ x`` needed.

``[y | H_post]`` is one contiguous tensor [s, b, C + columns] in the streams' dtype, as the schedule wants it: first y [s, b,
C], then H_post's float32 bits. Nobody else computes with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mhc_kernels import RecomputePlace, add_output_, mix, output_gradients
from mhc_megatron.pipeline.links import Arrival
from mhc_megatron.pipeline.side_channel import SideChannel
from mhc_megatron.pipeline.state import PipelineState

_ARRIVAL = "_mhc_arrival"  # on a tensor that the schedule has received: what comes on the side


def columns(num_streams: int, dtype: torch.dtype) -> int:
    """What H_post takes beside y's C columns in tensors of ``dtype``."""
    return num_streams * torch.float32.itemsize // dtype.itemsize


def accompany(received: Tensor, arrival: Arrival) -> None:
    """Note on a tensor of the schedule what comes on the side with it."""
    setattr(received, _ARRIVAL, arrival)


class Departure:
    """One microbatch's output of one chunk: what the two autograd nodes that stand for it share."""

    def __init__(self, channel: SideChannel, dtype: torch.dtype):
        self.channel, self.dtype = channel, dtype
        self.gradient: Arrival | None = None


class _Depart(torch.autograd.Function):
    """(streams, post) -> post, and the streams are sent. It comes before F, so its backward comes after F's."""

    @staticmethod
    def forward(ctx: Any, streams: Tensor, post: Tensor, departure: Departure) -> Tensor:
        departure.channel.send_streams(streams.detach())
        ctx.departure = departure
        return post.view_as(post)

    @staticmethod
    def backward(ctx: Any, dpost: Tensor) -> Any:
        gradient, ctx.departure.gradient = ctx.departure.gradient, None
        received = gradient.wait()
        return received if ctx.needs_input_grad[0] else None, dpost, None


class _Pack(torch.autograd.Function):
    """y [s, b, C], post [s, b, n] -> [y | post]."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, post: Tensor, departure: Departure) -> Tensor:
        ctx.departure, ctx.num_streams = departure, post.shape[-1]
        return _join(y, post)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        ctx.departure.gradient = getattr(gradient, _ARRIVAL, None)
        if ctx.departure.gradient is None:
            raise RuntimeError(
                "mHC: a pipeline stage's gradient came without that of the streams; use --mhc-pipeline-comm wide where "
                "something replaces the schedule's tensors"
            )
        delattr(gradient, _ARRIVAL)  # the schedule keeps its tensor longer
        return *_part(gradient, ctx.num_streams), None


class _Arrive(torch.autograd.Function):
    """[y | post], H_res @ x -> x' [s, b, n*C], in place of H_res @ x."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, streams: Tensor, state: PipelineState, backend: str) -> Tensor:
        y, post = _part(packed, state.num_streams)
        add_output_(streams, post, y, backend=backend)
        ctx.save_for_backward(packed)
        ctx.channel, ctx.num_streams, ctx.backend = state.channel, state.num_streams, backend
        ctx.mark_dirty(streams)
        return streams

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (packed,) = ctx.saved_tensors
        gradient = gradient.contiguous()
        returned = torch.empty_like(packed)
        y, post = _part(packed, ctx.num_streams)
        output_gradients(gradient, post, y, *_part(returned, ctx.num_streams), backend=ctx.backend)
        ctx.channel.queue_gradient(gradient)
        return returned, None, None, None


def departs(state: PipelineState) -> bool:
    """Whether the streams of the pass that runs leave apart from its output (`passes`). Call it once a pass, in chunks that
    hand theirs on.

    Raises:
        RuntimeError: without a schedule that sends streams.
    """
    if state.channel is None:
        raise RuntimeError(
            "mHC: --mhc-pipeline-comm split needs mhc_megatron.enable() before training starts, or 'wide'"
        )
    return state.channel.departs()


def depart(
    state: PipelineState, x: Tensor, res: Tensor, post: Tensor, u: Tensor, place: RecomputePlace | None, backend: str
) -> tuple[Tensor, Departure]:
    """Send ``H_res @ x`` to the next stage, or hold it (`side_channel`); call it before the chunk's last sublayer runs.

    Args:
        x ``[s, b, n*C]``, res ``[s, b, n, n]``, post ``[s, b, n]``: the sublayer's streams and mappings.
        u: any ``[s, b, C]`` of x's dtype; it is multiplied by zero.
        place: x's, as in `mhc_kernels.mix`.

    Returns:
        post, for `pack`, and what `pack` needs besides.
    """
    streams = mix(x, res, torch.zeros_like(post), u.detach(), recompute=place, flat=True, backend=backend)
    return depart_with(state, streams, post)


def depart_with(state: PipelineState, streams: Tensor, post: Tensor) -> tuple[Tensor, Departure]:
    """As `depart`, with ``H_res @ x`` given."""
    assert state.channel is not None, "departs() comes first"
    if torch.is_grad_enabled() and not (streams.requires_grad or post.requires_grad):
        # Nothing before the last sublayer is trained. The next stage sends a gradient of the streams all the same, and somebody
        # must receive it.
        post = post.detach().requires_grad_()
    departure = Departure(state.channel, streams.dtype)
    return _Depart.apply(streams, post, departure), departure


def announce(state: PipelineState, hidden: Tensor) -> None:
    """Have the receive of the next streams posted when the backward has the gradient of these (`side_channel`).

    Args:
        hidden: the streams that enter a chunk's second layer.
    """
    channel = state.channel
    if channel is not None and hidden.requires_grad and torch.is_grad_enabled():
        hidden.register_hook(lambda gradient: channel.post_ahead())


def pack(y: Tensor, bias: Tensor | None, dropout_p: float, post: Tensor, departure: Departure) -> Tensor:
    """``[dropout(y + bias) | post]``, in the streams' dtype: the chunk's output, for the schedule to send."""
    if bias is not None:
        y = y + bias
    if dropout_p:
        y = torch.nn.functional.dropout(y, dropout_p)
    return _Pack.apply(y.to(departure.dtype), post, departure)  # under autocast, y may have another dtype


def arrive(packed: Tensor, state: PipelineState, backend: str) -> Tensor:
    """The streams ``[s, b, n*C]`` of what the previous stage has packed and sent.

    Raises:
        RuntimeError: for a tensor with which nothing came on the side.
    """
    arrival = getattr(packed, _ARRIVAL, None)
    if arrival is None:
        raise RuntimeError(
            f"mHC: the model got a tensor {packed.shape[-1]} wide, which are no streams and came without any. "
            "With pipeline parallelism, call mhc_megatron.enable() before training starts."
        )
    delattr(packed, _ARRIVAL)  # the schedule keeps the tensor until the backward
    return _Arrive.apply(packed, arrival.wait(), state, backend)


def _join(y: Tensor, post: Tensor) -> Tensor:
    packed = y.new_empty((*y.shape[:-1], y.shape[-1] + columns(post.shape[-1], y.dtype)))
    flat = packed.view(-1)
    flat[: y.numel()].view(y.shape).copy_(y)
    flat[y.numel() :].view(torch.float32).view(post.shape).copy_(post)
    return packed


def _part(packed: Tensor, num_streams: int) -> tuple[Tensor, Tensor]:
    """Views: y [s, b, C], post [s, b, n]."""
    *tokens, width = packed.shape
    width -= columns(num_streams, packed.dtype)
    flat = packed.detach().view(-1)
    end = packed.numel() // packed.shape[-1] * width
    return flat[:end].view(*tokens, width), flat[end:].view(torch.float32).view(*tokens, num_streams)
