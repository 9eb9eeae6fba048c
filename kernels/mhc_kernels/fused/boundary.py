"""Operators for a boundary between two sublayers, and for its second half where a chain of sublayers starts.

``boundary`` mixes a sublayer's output into the streams, computes the next sublayer's mappings from the result, and what
that sublayer reads: 3 launches. ``boundary_backward`` is all of its gradients: 3 launches.
Without y, the streams are taken as they are.

`ForwardCall` and `BackwardCall` are the same, past the dispatcher and with all that follows from sizes and options known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mhc_kernels.fused.boundary_plans import (
    BackwardOptions,
    ForwardOptions,
    Shape,
    aggregate_again_plan,
    backward_plan,
    forward_plan,
    gradient_shapes,
    output_shapes,
)
from mhc_kernels.fused.launch import Plan
from mhc_kernels.fused.library import operator, sizes, sizes_of
from mhc_kernels.fused.memory import Form, allocator, form
from mhc_kernels.fused.single import Read, plans
from mhc_kernels.reference import streams_of

Outputs = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor, Tensor]
Gradients = tuple[
    Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None
]


def _forms(shapes: Sequence[Shape | None]) -> tuple[Form | None, ...]:
    return tuple(None if shape is None else form(*shape) for shape in shapes)


def _scratch(plan: Plan) -> Form:
    return form((plan.floats["scratch"],), torch.float32)


class ForwardCall:
    """`boundary` for streams of one shape, n, dtype and device (index), with the same options."""

    def __init__(self, shape: tuple[int, ...], n: int, dtype: torch.dtype, device: int, options: ForwardOptions):
        s = sizes_of(shape, n, dtype, device)
        shapes = output_shapes(s, shape[:-1], dtype, options.mixes, options.aggregates, options.gamma is not None)
        self._results = _forms(shapes)
        self.form_of_u = self._results[1]
        self._plan = None
        if s.t:
            self._plan = forward_plan(s, options)
            self._scratch = _scratch(self._plan)
        self._device, self._streams, self._options = device, (shape, n, dtype, device), options
        self._backward: dict[tuple[bool, bool, bool, Read | None], BackwardCall] = {}
        self.n, self.read = n, Read(options.gamma, options.centered)

    def run(
        self, x: Tensor, res: Tensor | None, post: Tensor | None, y: Tensor | None, y_bias: Tensor | None, seed: Tensor | None,
        phi: Tensor, alpha: Tensor, bias: Tensor, gamma: Tensor | None,
    ) -> Outputs:  # fmt: skip
        """As `boundary`."""
        new = allocator(x)
        results: list[Any] = [None if form is None else new(*form) for form in self._results]
        out, u, pre, post_out, res_out, kept = results
        if self._plan is not None:
            self._plan.run(
                self._device, x, res, post, y, y_bias, seed, phi, alpha, bias, gamma, out, u, pre, post_out, res_out, kept,
                new(*self._scratch),
            )  # fmt: skip
        return results  # type: ignore[return-value]

    def aggregate_again(self, streams: Tensor, kept: Tensor, gamma: Tensor | None, u: Tensor) -> None:
        """Write u as `run` returned it. streams: those that it was aggregated from; kept: what it returned as such."""
        if self._plan is not None:
            options = self._options
            plan = aggregate_again_plan(sizes_of(*self._streams), options.gamma, options.centered)
            plan.run(self._device, streams, streams if gamma is None else gamma, kept, u)

    def backward(self, g: bool, du: bool, accumulates: bool, read: Read | None = None) -> BackwardCall:
        """Its backward, given whether out and u have gradients and whether there are gradients of the parameters to add to.
        read: of the call whose u it computes again."""
        key = (g, du, accumulates, read)
        call = self._backward.get(key)
        if call is None:
            call = self._backward[key] = backward_call(*self._streams, self._options.backward(*key))
        return call


class BackwardCall:
    """`boundary_backward` for streams of one shape, n, dtype and device (index), with the same options."""

    def __init__(self, shape: tuple[int, ...], n: int, dtype: torch.dtype, device: int, options: BackwardOptions):
        s = sizes_of(shape, n, dtype, device)
        self._results = _forms(gradient_shapes(s, shape[:-1], dtype, options.mixes, options.gamma, options.accumulates))
        self._plan = None
        if s.t:
            self._plan = backward_plan(s, options)
            self._scratch = _scratch(self._plan)
        self._device, self._n, self._wide, self._accumulates = device, n, s.wide, options.accumulates

    def run(
        self, g: Tensor | None, du: Tensor | None, dpre: Tensor | None, dpost_out: Tensor | None, dres_out: Tensor | None,
        x: Tensor, res: Tensor | None, post: Tensor | None, y: Tensor | None, y_bias: Tensor | None, seed: Tensor | None,
        out: Tensor, pre: Tensor | None, kept: Tensor, alpha: Tensor, bias: Tensor, gamma: Tensor | None,
        mains: Sequence[Tensor | None], again: Sequence[Tensor | None] = (None, None, None),
    ) -> Gradients:  # fmt: skip
        """As `boundary_backward`. mains: the gradients to add to. again: what the call that returned x kept, its norm's weight,
        and the memory of its u, which gets the same values once more: x is read here anyway."""
        new = allocator(x)
        results: list[Any] = [None if form is None else new(*form) for form in self._results]
        if self._plan is None:
            for gradient in results[4:]:
                if gradient is not None:
                    gradient.zero_()
            return results  # type: ignore[return-value]
        dx, dy, dres, dpost, dgamma, dphi, dalpha, dbias = results
        if self._accumulates:
            dphi, dalpha, dbias = mains
        if dpost_out is None:
            dpost_out = bias.new_zeros((*x.shape[:-1], self._n))
        if dres_out is None:
            dres_out = bias.new_zeros((*x.shape[:-1], self._n, self._n))
        if dpre is None and du is None:
            dpre = bias.new_zeros((*x.shape[:-1], self._n))
        self._plan.run(
            self._device, x, g, du, dpre, dpost_out, dres_out, res, post, y, y_bias, seed, out, pre, kept, alpha, bias, gamma,
            *again, new(*self._scratch), torch.empty_like(out) if self._wide else None,
            dx, dy, dres, dpost, dgamma, dphi, dalpha, dbias,
        )  # fmt: skip
        return results  # type: ignore[return-value]


forward_call, backward_call = plans(ForwardCall), plans(BackwardCall)


def _fake_boundary(
    x: Tensor, res: Tensor | None, post: Tensor | None, y: Tensor | None, y_bias: Tensor | None, seed: Tensor | None, p: float,
    phi: Tensor, alpha: Tensor, bias: Tensor, aggregates: bool, iterations: int, eps: float, eps_sinkhorn: float, hc: bool,
    gamma: Tensor | None, norm_eps: float, centered: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    s = sizes(x, streams_of(bias))
    shapes = output_shapes(s, x.shape[:-1], x.dtype, y is not None, aggregates, gamma is not None)
    return tuple(None if shape is None else x.new_empty(shape[0], dtype=shape[1]) for shape in shapes)


@operator(
    "boundary(Tensor x, Tensor? res, Tensor? post, Tensor? y, Tensor? y_bias, Tensor? seed, float p, "
    "Tensor phi, Tensor alpha, Tensor bias, bool aggregates, int iterations, float eps, float eps_sinkhorn, bool hc, "
    "Tensor? gamma, float norm_eps, bool centered) -> "
    "(Tensor out, Tensor u, Tensor pre, Tensor post_out, Tensor res_out, Tensor kept)",
    _fake_boundary,
)
def boundary(
    x: Tensor, res: Tensor | None, post: Tensor | None, y: Tensor | None, y_bias: Tensor | None, seed: Tensor | None, p: float,
    phi: Tensor, alpha: Tensor, bias: Tensor, aggregates: bool, iterations: int, eps: float, eps_sinkhorn: float, hc: bool,
    gamma: Tensor | None, norm_eps: float, centered: bool,
) -> Outputs:  # fmt: skip
    """The streams after a sublayer, and what the next one takes from them.

    Args:
        x ``[..., n*C]``, res ``[..., n, n]``, post ``[..., n]``, y ``[..., C]``, y_bias ``[C]``: as in
        `mhc_kernels.mix`; y None: out is x. seed ``[1]`` int64, p: dropout of y + y_bias; None for none. phi ``[R,
        n*C]``, alpha ``[3]``, bias ``[R]``: the next sublayer's, as in `mhc_kernels.mappings`.
        aggregates: whether u is wanted.
        iterations, eps: of Sinkhorn, inside the RMS. eps_sinkhorn > 0: profile deepseek-v4. hc: mode hc.
        gamma ``[C]``, norm_eps, centered: RMSNorm of u, as in `mhc_kernels.RMSNorm`; None for none. n <= 4.

    Returns:
        out ``[..., n*C]`` (None without y), u ``[..., C]`` (None unless aggregates), pre (None if aggregates: it is in kept),
        post, res of the next sublayer, float32; kept, float32, what the backward needs besides (`boundary_plans`).
    """
    options = ForwardOptions(
        y is not None, y_bias is not None, seed is not None, p, aggregates, iterations, eps, eps_sinkhorn, hc,
        None if gamma is None else gamma.dtype, norm_eps, centered,
    )  # fmt: skip
    call = forward_call(x.shape, streams_of(bias), x.dtype, x.get_device(), options)
    return call.run(x, res, post, y, y_bias, seed, phi, alpha, bias, gamma)


def _fake_boundary_backward(
    g: Tensor | None, du: Tensor | None, dpre: Tensor | None, dpost_out: Tensor | None, dres_out: Tensor | None,
    x: Tensor, res: Tensor | None, post: Tensor | None, y: Tensor | None, y_bias: Tensor | None, seed: Tensor | None, p: float,
    out: Tensor, pre: Tensor | None, kept: Tensor, alpha: Tensor, bias: Tensor,
    main_phi: Tensor | None, main_alpha: Tensor | None, main_bias: Tensor | None,
    iterations: int, eps_sinkhorn: float, hc: bool, gamma: Tensor | None, centered: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    s = sizes(x, streams_of(bias))
    dtype = None if gamma is None else gamma.dtype
    shapes = gradient_shapes(s, x.shape[:-1], x.dtype, y is not None, dtype, main_phi is not None)
    return tuple(None if shape is None else x.new_empty(shape[0], dtype=shape[1]) for shape in shapes)


@operator(
    "boundary_backward(Tensor? g, Tensor? du, Tensor? dpre, Tensor? dpost_out, Tensor? dres_out, "
    "Tensor x, Tensor? res, Tensor? post, Tensor? y, Tensor? y_bias, Tensor? seed, float p, "
    "Tensor out, Tensor? pre, Tensor kept, Tensor alpha, Tensor bias, "
    "Tensor(a!)? main_phi, Tensor(b!)? main_alpha, Tensor(c!)? main_bias, int iterations, float eps_sinkhorn, bool hc, "
    "Tensor? gamma, bool centered) -> "
    "(Tensor dx, Tensor dy, Tensor dres, Tensor dpost, Tensor dgamma, Tensor dphi, Tensor dalpha, Tensor dbias)",
    _fake_boundary_backward,
)
def boundary_backward(
    g: Tensor | None, du: Tensor | None, dpre: Tensor | None, dpost_out: Tensor | None, dres_out: Tensor | None,
    x: Tensor, res: Tensor | None, post: Tensor | None, y: Tensor | None, y_bias: Tensor | None, seed: Tensor | None, p: float,
    out: Tensor, pre: Tensor | None, kept: Tensor, alpha: Tensor, bias: Tensor,
    main_phi: Tensor | None, main_alpha: Tensor | None, main_bias: Tensor | None,
    iterations: int, eps_sinkhorn: float, hc: bool, gamma: Tensor | None, centered: bool,
) -> Gradients:  # fmt: skip
    """All gradients of `boundary`.

    Args:
        g, du, dpre, dpost_out, dres_out: gradients of out, u, pre, post_out, res_out; None is zero. du or dpre, not both.
        out: the streams that phi was multiplied with (x itself without y). pre: None if it is in kept.
        main_phi, main_alpha, main_bias: float32 gradients to add to (all or none) instead of returning new ones.
        The others: as given to `boundary` and returned by it.

    Returns:
        Gradients of x, y, res, post, gamma, phi, alpha, bias; None where there is nothing to return.
    """
    options = BackwardOptions(
        g is not None, du is not None, main_phi is not None, y is not None, y_bias is not None, seed is not None, p,
        iterations, eps_sinkhorn, hc, None if gamma is None else gamma.dtype, centered, pre is None,
    )  # fmt: skip
    call = backward_call(x.shape, streams_of(bias), x.dtype, x.get_device(), options)
    return call.run(
        g, du, dpre, dpost_out, dres_out, x, res, post, y, y_bias, seed, out, pre, kept, alpha, bias, gamma,
        (main_phi, main_alpha, main_bias),
    )  # fmt: skip
