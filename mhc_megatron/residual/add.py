"""Where Megatron has bias-dropout-add: ``x' = H_res @ x + outer(H_post, dropout(y + bias))``."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import dropout

from mhc_kernels import mix
from mhc_megatron.config import MHCConfig
from mhc_megatron.residual.streams import Residual

BiasDropoutAdd = Callable[[tuple[Tensor, Tensor | None], Residual, float], Tensor]


def hyper_connection_add(mhc_config: MHCConfig) -> Callable[[bool, bool], BiasDropoutAdd]:
    """A drop-in for Megatron's ``get_bias_dropout_add``.

    The function it returns maps ``((y [s, b, C], bias [C] or None), Residual, dropout probability)`` to ``[s, b, n*C]``.
    """

    def get(training: bool, fused: bool) -> BiasDropoutAdd:
        # `fused` asks for Megatron's jitted add; there is one implementation here, the backend's.
        def add(output_with_bias: tuple[Tensor, Tensor | None], residual: Residual, prob: float) -> Tensor:
            y, bias = output_with_bias
            if training and prob > 0:
                y = dropout(y if bias is None else y + bias, p=prob, training=True)
                bias = None
            streams = mix(residual.x, residual.res, residual.post, y, bias, backend=mhc_config.backend)
            return streams.flatten(-2)

        return add

    return get
