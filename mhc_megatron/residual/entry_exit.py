"""The model's two ends: copy the embedding into n streams, contract the streams before the final norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mhc_kernels import aggregate
from mhc_megatron.config import MHCConfig
from mhc_megatron.pipeline.split import arrive, depart_with, departs, pack
from mhc_megatron.pipeline.state import share_pipeline
from mhc_megatron.residual.hyper_connection import ExitHead
from mhc_megatron.residual.norm_wrapper import NormBuilder, NormWrapper
from mhc_megatron.residual.streams import expand, unflatten


class StreamEntry(nn.Module):
    """Stands as the input norm of the one pseudo-layer of a pipeline chunk that has no layer of its own.

    An embedding-only first chunk (``account_for_embedding_in_pipeline_split``, custom layouts) must send streams:
    ``[s, b, C] -> [s, b, n*C]``. A later chunk without layers passes its streams on. departs: to another pipeline stage, by
    split transfers, which carry all of them apart, as there is no sublayer whose output would follow.
    """

    def __init__(self, mhc_config: MHCConfig, *, config: Any, hidden_size: int, eps: float):
        super().__init__()
        self.mhc_config = mhc_config
        self.num_streams = mhc_config.num_streams
        self.hidden_size = hidden_size
        self.backend = mhc_config.backend
        self.departs = False
        self._pipeline = share_pipeline(config, mhc_config)

    @property
    def splits(self) -> bool:
        """Whether pipeline transfers are split."""
        return self._pipeline.split

    def forward(self, hidden: Tensor) -> Tensor:
        if hidden.shape[-1] == self.hidden_size:
            streams = expand(hidden, self.num_streams)
        elif hidden.shape[-1] == self.num_streams * self.hidden_size:
            # A chunk's output must be another tensor than its input: the schedule frees one and differentiates the other.
            streams = hidden.clone()
        else:
            streams = arrive(hidden, self._pipeline, self.backend)
        if not (self.departs and departs(self._pipeline)):
            return streams
        nothing = streams.new_zeros((*streams.shape[:-1], self.hidden_size))
        post = torch.zeros((*streams.shape[:-1], self.num_streams), dtype=torch.float32, device=streams.device)
        return pack(nothing, None, 0.0, *depart_with(self._pipeline, streams, post))


class StreamExit(NormWrapper):
    """Where Megatron has the final norm: ``[s, b, n*C] -> norm(mean over streams) [s, b, C]``.

    Profile ``deepseek-v4`` contracts with a learned head instead of the mean.
    """

    def __init__(self, norm_builder: NormBuilder, mhc_config: MHCConfig, *, config: Any, hidden_size: int, eps: float):
        super().__init__(norm_builder, config, hidden_size, eps)
        self.num_streams = mhc_config.num_streams
        self.backend = mhc_config.backend
        self.hyper_connection = ExitHead(config, mhc_config, hidden_size) if mhc_config.learned_exit else None
        share_pipeline(config, mhc_config)  # a chunk may have nothing else that does

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(contract(hidden, self.num_streams, self.hyper_connection, self.backend))


def contract(hidden: Tensor, num_streams: int, exit_head: ExitHead | None, backend: str) -> Tensor:
    """``[s, b, n*C] -> [s, b, C]``: the mean over streams, in float32, or the learned head's weights."""
    x = unflatten(hidden, num_streams)
    if exit_head is None:
        weights = x.new_full(x.shape[:-1], 1 / num_streams, dtype=torch.promote_types(x.dtype, torch.float32))
    else:
        weights = exit_head(x)
    return aggregate(x, weights, backend=backend)
