"""Where Megatron has input_layernorm or pre_mlp_layernorm: streams in, what the sublayer reads and the residual out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mhc_kernels import RMSNorm
from mhc_kernels.norm import FUSED_NORM_STREAMS
from mhc_megatron.config import MHCConfig
from mhc_megatron.residual.backend import check_backend
from mhc_megatron.residual.chain import take
from mhc_megatron.residual.hyper_connection import HyperConnection
from mhc_megatron.residual.norm_wrapper import NormBuilder, NormWrapper
from mhc_megatron.residual.plain_norm import plain_rms_norm, wait_for_weight
from mhc_megatron.residual.streams import Residual, mark_pipeline_width


class HyperConnectionInput(NormWrapper):
    """``hidden [s, b, n*C] -> (norm(H_pre @ x) [s, b, C], Residual)``.

    Megatron hands the second element untouched to the sublayer's bias-dropout-add.

    Args:
        norm_builder: the stock norm's builder (IdentityOp where Transformer Engine fuses the norm into the linear).
        mhc_config: settings.
        config, hidden_size, eps: as Megatron passes them to a norm.
    """

    returns_residual = True  # the name by which Megatron's next release recognises such a norm

    def __init__(self, norm_builder: NormBuilder, mhc_config: MHCConfig, *, config: Any, hidden_size: int, eps: float):
        super().__init__(norm_builder, config, hidden_size, eps)
        self.num_streams = mhc_config.num_streams
        self.hidden_size = hidden_size
        self.hyper_connection = HyperConnection(config, mhc_config, hidden_size)
        self._successor: tuple[HyperConnectionInput, ...] = ()  # in a tuple: it is not a submodule
        check_backend(mhc_config, config, hidden_size, plain_rms_norm(self.norm))
        mark_pipeline_width(config, mhc_config.num_streams)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Residual]:
        if hidden.shape[-1] != self.num_streams * self.hidden_size:
            raise RuntimeError(
                f"mHC: expected streams {self.num_streams} * {self.hidden_size} wide, got {hidden.shape[-1]}. "
                "With pipeline parallelism, call mhc_megatron.enable() before training starts."
            )
        prepared = take(hidden, self)
        if prepared is None:
            norm = self.fused_norm(hidden)
            hidden, u, post, res = self.hyper_connection(hidden, norm=norm)
            normed = norm is not None
        else:
            u, post, res, normed = prepared.u, prepared.post, prepared.res, prepared.normed
        if not normed:
            u = self.norm(u)
        return u, Residual(hidden, post, res, torch.is_grad_enabled(), *self._successor)

    def fused_norm(self, hidden: Tensor) -> RMSNorm | None:
        """The norm, if the kernels take it along on these streams; then its weight is there to be read."""
        if self.num_streams > FUSED_NORM_STREAMS or not self.hyper_connection.fuses(hidden):
            return None
        norm = plain_rms_norm(self.norm)
        # With a weight of another dtype, what a norm returns is its own decision.
        if norm is None or norm.weight.dtype != hidden.dtype:
            return None
        wait_for_weight(self.norm)
        return norm

    def set_successor(self, reader: HyperConnectionInput) -> None:
        """Tell it which mHC input reads the streams after this sublayer."""
        self._successor = (reader,)
