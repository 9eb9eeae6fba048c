"""Where Megatron has bias-dropout-add: ``x' = H_res @ x + outer(H_post, dropout(y + bias))``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mhc_kernels import free_until_backward, mix
from mhc_megatron.config import MHCConfig
from mhc_megatron.pipeline.split import pack
from mhc_megatron.residual.chain import forget, prepare
from mhc_megatron.residual.streams import Residual

BiasDropoutAdd = Callable[[tuple[Tensor, Tensor | None], Residual, float], Tensor]


def hyper_connection_add(mhc_config: MHCConfig) -> Callable[[bool, bool], BiasDropoutAdd]:
    """A drop-in for Megatron's ``get_bias_dropout_add``.

    The function it returns maps ``((y [s, b, C], bias [C] or None), Residual, dropout probability)`` to ``[s, b, n*C]``; at
    the end of a pipeline chunk with split transfers, to what they carry after the streams (`pipeline.split`).
    """

    def get(training: bool, fused: bool) -> BiasDropoutAdd:
        # `fused` asks for Megatron's jitted add; there is one implementation here, the backend's.
        def add(output_with_bias: tuple[Tensor, Tensor | None], residual: Residual, prob: float) -> Tensor:
            y, bias = output_with_bias
            p = prob if training else 0.0
            x, post, res, grad, successor, place, departure, u = residual
            with torch.set_grad_enabled(grad):
                if u is not None and free_until_backward(u, y):
                    forget(x)
                y = y.contiguous()
                if departure is not None:
                    return pack(y, bias, p, post, departure)
                if successor is None or not successor.hyper_connection.fuses(x):
                    return mix(
                        x, res, post, y, bias, dropout_p=p, recompute=place, flat=True, backend=mhc_config.backend
                    )
                norm = successor.norm_for_kernels(x)
                streams, u, post, res = successor.hyper_connection(x, res, post, y, bias, p, norm, place)
            return prepare(streams, u, post, res, norm is not None, None if place is None else place.next(), successor)

        return add

    return get
