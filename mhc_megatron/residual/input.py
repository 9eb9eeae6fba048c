"""Where Megatron has input_layernorm or pre_mlp_layernorm: streams in, what the sublayer reads and the residual out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mhc_kernels import RecomputePlace, RMSNorm, recompute
from mhc_kernels.norm import FUSED_NORM_STREAMS
from mhc_megatron.config import MHCConfig
from mhc_megatron.pipeline.split import announce, arrive, depart, departs
from mhc_megatron.pipeline.state import share_pipeline
from mhc_megatron.residual.backend import check_backend
from mhc_megatron.residual.chain import ChainLength, take
from mhc_megatron.residual.hyper_connection import HyperConnection
from mhc_megatron.residual.norm_wrapper import NormBuilder, NormWrapper
from mhc_megatron.residual.plain_norm import plain_rms_norm, wait_for_weight
from mhc_megatron.residual.recompute import block_length, planned_length, recomputes
from mhc_megatron.residual.streams import Residual


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
        self._chain = ChainLength()
        self._block_length: int | None = None
        triton = check_backend(mhc_config, config, hidden_size, plain_rms_norm(self.norm))
        self._microbatch_group = getattr(config, "microbatch_group_size_per_vp_stage", None)
        self._recomputes, self._planned_length = recomputes(mhc_config, config, triton), planned_length(config)
        self._pipeline, self._departs, self._announces = share_pipeline(config, mhc_config), False, False

    def forward(self, hidden: Tensor) -> tuple[Tensor, Residual]:
        if hidden.shape[-1] != self.num_streams * self.hidden_size:
            hidden = arrive(hidden, self._pipeline, self.hyper_connection.mhc_config.backend)
        elif self._announces:
            announce(self._pipeline, hidden)
        prepared = take(hidden, self)
        if prepared is None:
            norm = self.fused_norm(hidden)
            hidden, u, post, res = self.hyper_connection(hidden, norm=norm)
            normed, place = norm is not None, self._first_place(hidden)
        else:
            u, post, res, normed, place = prepared[:5]
        aggregated = None if place is None else u
        if not normed:
            u = self.norm(u)
        departure = None
        if self._departs and departs(self._pipeline):
            backend = self.hyper_connection.mhc_config.backend
            post, departure = depart(self._pipeline, hidden, res, post, u, place, backend)
        successor = self._successor[0] if self._successor else None
        return u, Residual(hidden, post, res, torch.is_grad_enabled(), successor, place, departure, aggregated)

    def _first_place(self, hidden: Tensor) -> RecomputePlace | None:
        """The start of a block with this sublayer's streams; None if all streams are kept."""
        if not self._recomputes or not torch.is_grad_enabled() or not self.hyper_connection.fuses(hidden):
            return None
        if self._block_length is None:
            self._block_length = block_length(
                self.hyper_connection.mhc_config, self._chain.sublayers, self._microbatch_group, self._planned_length
            )
        return recompute(self._block_length)

    def fused_norm(self, hidden: Tensor) -> RMSNorm | None:
        """The norm, if the kernels take it along on these streams; then its weight is there to be read."""
        return self.norm_for_kernels(hidden) if self.hyper_connection.fuses(hidden) else None

    def norm_for_kernels(self, hidden: Tensor) -> RMSNorm | None:
        """`fused_norm` of streams that are known to go to the kernels."""
        if self.num_streams > FUSED_NORM_STREAMS:
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

    def set_departure(self) -> None:
        """Tell it that the streams after this sublayer go to another pipeline stage, by transfers that may be split."""
        self._departs = True

    def set_announcing(self) -> None:
        """Tell it that it is the first one of its chunk's second layer, in a pipeline with split transfers."""
        self._announces = self._pipeline.announces = True

    def set_chain(self, length: ChainLength) -> None:
        """Tell it of the chain that it is in (which may still grow)."""
        self._chain = length
