"""Autograd around the operators. One Function a step; x is ``[..., n*C]`` in all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mhc_kernels.fused import boundary as boundary_operators
from mhc_kernels.fused import memory, single
from mhc_kernels.fused.boundary import ForwardOptions as ForwardOptions
from mhc_kernels.fused.boundary import forward_call as forward_call
from mhc_kernels.fused.library import observed
from mhc_kernels.recompute_block import RecomputePlace, saved_tensors_are_hooked
from mhc_kernels.recompute_input import Refill, identify


class Settings(NamedTuple):
    """What the mappings of a sublayer do. eps_sinkhorn > 0: profile deepseek-v4; hc: mode hc."""

    iterations: int
    eps: float
    eps_sinkhorn: float
    hc: bool


def new_seed(device: torch.device) -> Tensor:
    """A dropout seed from the device's default generator: a checkpoint's recompute restores it, and no host sync."""
    return torch.randint(2**62, (1,), dtype=torch.int64, device=device)


def _refuse_second_derivatives() -> None:
    """Raises RuntimeError in a backward that is to be differentiated itself."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling() and not torch._C._len_torch_dispatch_stack():
        raise RuntimeError(
            "mhc_kernels: the Triton kernels have no second derivatives (create_graph=True); use backend='reference'"
        )


def _bias_gradient(dy: Tensor, y_bias: Tensor | None) -> Tensor | None:
    if y_bias is None:
        return None
    return dy.reshape(-1, dy.shape[-1]).sum(0, dtype=y_bias.dtype)  # one launch: added up in float32 whatever the dtype


def _main_gradients(parameters: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """Megatron's float32 ``main_grad`` of each parameter, or None for all of them if one has none."""
    mains = tuple([getattr(p, "main_grad", None) for p in parameters])
    for main in mains:
        if main is None or main.dtype != torch.float32 or not main.is_contiguous():
            return (None,) * len(parameters)
    return mains


class Norm(NamedTuple):
    """Of a following RMSNorm: inside its root, and whether its weight is stored as the difference from 1."""

    eps: float
    centered: bool


NO_NORM = Norm(0.0, False)


class Setup(NamedTuple):
    """What a boundary is told besides tensors; one object, as autograd inspects every argument.

    p: of dropout. accumulate: add the gradients of phi, alpha and bias to their ``main_grad``, as Megatron's gradient
    accumulation fusion does in linear layers, and say so (``grad_added_to_main_grad``). call: what runs it past the dispatcher
    where nothing is listening there; None in a compiler.
    """

    p: float
    settings: Settings
    norm: Norm
    accumulate: bool
    call: boundary_operators.ForwardCall | None


class Boundary(torch.autograd.Function):
    """``(x, res, post, y, y_bias, ...) -> (x', u, post', res')``: see `mhc_kernels.boundary`.

    The node's ``aggregated`` gives what u was computed from, for `recompute_input`; None: it can't. ``streams`` identifies the
    streams that u was aggregated from (`recompute_input.identify`).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, res: Tensor, post: Tensor, y: Tensor, y_bias: Tensor | None, seed: Tensor | None,
        phi: Tensor, alpha: Tensor, bias: Tensor, gamma: Tensor | None, setup: Setup, recompute: RecomputePlace | None,
        refill: Refill | None,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        p, settings, norm, accumulate, call = setup
        if call is None or observed(x, res, post, y, y_bias, seed, phi, alpha, bias, gamma):
            call = None
            out, u, _, post_out, res_out, kept = boundary_operators.boundary(
                x, res, post, y, y_bias, seed, p, phi, alpha, bias, True, *settings, gamma, *norm
            )
        else:
            out, u, _, post_out, res_out, kept = call.run(x, res, post, y, y_bias, seed, phi, alpha, bias, gamma)
        if recompute is not None and any(ctx.needs_input_grad):  # else there will be no node
            recompute.enter(ctx, x, out)
        hooked = call is None or saved_tensors_are_hooked()  # what is saved may come back as something else
        ctx.recompute, ctx.unpacked, ctx.call, ctx.refill = recompute, None, call, None if hooked else refill
        ctx.aggregated, ctx.streams = (None, None) if hooked else (_aggregated_by_boundary, identify(out))
        kept_x = x if recompute is None or recompute.is_first else None
        kept_out = out if recompute is None or recompute.is_last else None
        own_phi = phi if accumulate else None  # kept has its values
        ctx.save_for_backward(kept_x, res, post, y, y_bias, seed, kept_out, kept, own_phi, alpha, bias, gamma)
        ctx.setup = setup
        ctx.set_materialize_grads(False)
        return out, u, post_out, res_out

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, du: Tensor | None, dpost: Tensor | None, dres: Tensor | None) -> Any:
        _refuse_second_derivatives()
        try:
            x, res, post, y, y_bias, seed, out, kept, phi, alpha, bias, gamma = _unpacked(ctx)
            if out is None:
                out = ctx.recompute.next().streams(_mix_again)
            if x is None:
                x = ctx.recompute.streams(_mix_again)
            dx, dy, dres_in, dpost_in, dgamma, dphi, dalpha, dbias = _boundary_backward(
                ctx, g, du, None, dpost, dres, x, res, post, y, y_bias, seed, out, None, kept, phi, alpha, bias, gamma,
                None if ctx.refill is None or not torch._C._will_engine_execute_node(ctx.next_functions[3][0]) else ctx.refill,
            )  # fmt: skip
        finally:
            ctx.unpacked = None  # it may hold what this node has made
        if ctx.recompute is not None:
            ctx.recompute.release()
        dy_bias = None if y_bias is None else _bias_gradient(dy, y_bias)
        return (
            dx, dres_in, dpost_in, dy, dy_bias, None, dphi, dalpha, dbias, None if gamma is None else dgamma, None, None,
            None,
        )  # fmt: skip


def _unpacked(context: Any) -> tuple[Any, ...]:
    """What a boundary's autograd node saved; unpacked once a pass, as activation checkpoints demand."""
    if context.recompute is None:
        return context.saved_tensors
    if context.unpacked is None:
        context.unpacked = context.saved_tensors
    return context.unpacked


def _mix_again(context: Any, x: Tensor | None) -> Tensor:
    """What the boundary of this autograd node wrote: `RecomputePlace.streams`."""
    first, res, post, y, y_bias, seed, *_ = _unpacked(context)
    return single.mix(first if x is None else x, res, post, y, y_bias, seed, context.setup.p)


def _aggregated_by_boundary(context: Any, x: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of a boundary's autograd node: the streams that u was aggregated from (x, if they are at hand), what was kept of that, the
    norm's weight."""
    _, _, _, _, _, _, out, kept, _, _, _, gamma = context.saved_tensors
    if x is None:
        x = context.recompute.next().streams(_mix_again) if out is None else out
    return x, kept, gamma


def _aggregated_by_connect(context: Any, x: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    saved, kept, _, _, _, gamma = context.saved_tensors
    return saved if x is None else x, kept, gamma


class Connect(torch.autograd.Function):
    """``x -> (x, u, post, res)``: see `mhc_kernels.connect`. x is handed on so that its later gradient comes here, to
    be added once."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, gamma: Tensor | None, setup: Setup
    ) -> tuple[Tensor | None, ...]:
        _, settings, norm, accumulate, call = setup
        if call is None or observed(x, phi, alpha, bias, gamma):
            call = None
            _, u, _, post, res, kept = boundary_operators.boundary(
                x, None, None, None, None, None, 0.0, phi, alpha, bias, True, *settings, gamma, *norm
            )
        else:
            _, u, _, post, res, kept = call.run(x, None, None, None, None, None, phi, alpha, bias, gamma)
        ctx.call = call
        hooked = call is None or saved_tensors_are_hooked()
        ctx.aggregated, ctx.streams = (None, None) if hooked else (_aggregated_by_connect, identify(x))
        ctx.save_for_backward(x, kept, phi if accumulate else None, alpha, bias, gamma)
        ctx.setup = setup
        ctx.set_materialize_grads(False)
        return x, u, post, res

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, du: Tensor | None, dpost: Tensor | None, dres: Tensor | None) -> Any:
        _refuse_second_derivatives()
        x, kept, phi, alpha, bias, gamma = ctx.saved_tensors
        dx, _, _, _, dgamma, dphi, dalpha, dbias = _boundary_backward(
            ctx, g, du, None, dpost, dres, x, None, None, None, None, None, x, None, kept, phi, alpha, bias, gamma
        )
        return dx, dphi, dalpha, dbias, None if gamma is None else dgamma, None


class Mappings(torch.autograd.Function):
    """``x -> (pre, post, res)``: see `mhc_kernels.mappings`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, settings: Settings
    ) -> tuple[Tensor, ...]:
        _, _, pre, post, res, kept = boundary_operators.boundary(
            x, None, None, None, None, None, 0.0, phi, alpha, bias, False, *settings, None, *NO_NORM
        )
        ctx.save_for_backward(x, pre, kept, alpha, bias)
        ctx.setup, ctx.call = Setup(0.0, settings, NO_NORM, False, None), None
        ctx.set_materialize_grads(False)
        return pre, post, res

    @staticmethod
    def backward(ctx: Any, dpre: Tensor | None, dpost: Tensor | None, dres: Tensor | None) -> Any:
        _refuse_second_derivatives()
        x, pre, kept, alpha, bias = ctx.saved_tensors
        nothing = (None,) * 5
        dx, _, _, _, _, *parameters = _boundary_backward(
            ctx, None, None, dpre, dpost, dres, x, *nothing, x, pre, kept, None, alpha, bias, None
        )
        return dx, *parameters, None


def _boundary_backward(
    ctx: Any, g: Tensor | None, du: Tensor | None, dpre: Tensor | None, dpost: Tensor | None, dres: Tensor | None,
    x: Tensor, res: Tensor | None, post: Tensor | None, y: Tensor | None, y_bias: Tensor | None, seed: Tensor | None,
    out: Tensor, pre: Tensor | None, kept: Tensor, phi: Tensor | None, alpha: Tensor, bias: Tensor, gamma: Tensor | None,
    refill: Refill | None = None,
) -> Sequence[Tensor]:  # fmt: skip
    """phi: None unless gradients are accumulated."""
    mains: tuple[Tensor | None, ...] = (None, None, None) if phi is None else _main_gradients((phi, alpha, bias))
    call = ctx.call
    given = [None if gradient is None else gradient.contiguous() for gradient in (g, du, dpre, dpost, dres)]
    if call is None or torch.compiler.is_compiling() or observed(*given):
        call, (p, settings, norm, _, _) = None, ctx.setup
        gradients = boundary_operators.boundary_backward(
            *given, x, res, post, y, y_bias, seed, p, out, pre, kept, alpha, bias, *mains,
            settings.iterations, settings.eps_sinkhorn, settings.hc, gamma, norm.centered,
        )  # fmt: skip
    else:
        with contextlib.nullcontext() if refill is None else refill.beside(x) as again:
            read, arrays = (None, (None, None, None)) if again is None else again
            gradients = call.backward(g is not None, du is not None, mains[0] is not None, read).run(
                *given, x, res, post, y, y_bias, seed, out, pre, kept, alpha, bias, gamma, mains, arrays
            )
    if phi is None or mains[0] is None:
        return gradients
    parameters = (phi, alpha, bias)
    for parameter in parameters:
        parameter.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    # A gradient must arrive for Megatron's hook to run; it looks at the mark and drops this one.
    dummies = (
        [torch.empty_like(parameter) for parameter in parameters] if call is None else memory.empty_like(*parameters)
    )
    return (*gradients[:5], *dummies)


class Mix(torch.autograd.Function):
    """``(x, res, post, y, y_bias) -> x'``: see `mhc_kernels.mix`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, res: Tensor, post: Tensor, y: Tensor, y_bias: Tensor | None, seed: Tensor | None, p: float,
        recompute: RecomputePlace | None,
    ) -> Tensor:  # fmt: skip
        if recompute is not None:
            recompute.check(x)
        ctx.recompute = recompute
        ctx.save_for_backward(x if recompute is None or recompute.is_first else None, res, post, y, y_bias, seed)
        ctx.p = p
        return single.mix(x, res, post, y, y_bias, seed, p)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        _refuse_second_derivatives()
        x, res, post, y, y_bias, seed = ctx.saved_tensors
        if x is None:
            x = ctx.recompute.streams(_mix_again)
        dx, dy, dres, dpost = single.mix_backward(g.contiguous(), x, res, post, y, y_bias, seed, ctx.p)
        return dx, dres, dpost, dy, _bias_gradient(dy, y_bias), None, None, None


class Aggregate(torch.autograd.Function):
    """``(x, pre) -> u``: see `mhc_kernels.aggregate`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pre: Tensor) -> Tensor:
        ctx.save_for_backward(x, pre)
        return single.aggregate(x, pre)

    @staticmethod
    def backward(ctx: Any, du: Tensor) -> Any:
        _refuse_second_derivatives()
        return single.aggregate_backward(du.contiguous(), *ctx.saved_tensors)


class Sinkhorn(torch.autograd.Function):
    """``logits -> H_res``: see `mhc_kernels.sinkhorn`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, iterations: int, eps: float) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.iterations, ctx.eps = iterations, eps
        return single.sinkhorn(logits, iterations, eps)

    @staticmethod
    def backward(ctx: Any, dres: Tensor) -> Any:
        _refuse_second_derivatives()
        (logits,) = ctx.saved_tensors
        return single.sinkhorn_backward(dres.contiguous(), logits, ctx.iterations, ctx.eps), None, None


def _without_functorch(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply``, without its search of all arguments for functorch's wrappers, where there are none."""
    plain = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def apply(*arguments: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return function.apply(*arguments)
        return plain(*arguments)

    return apply


apply_boundary = _without_functorch(Boundary)
apply_connect = _without_functorch(Connect)
