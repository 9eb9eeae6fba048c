"""What a TransformerLayer must know beyond its spec: whether streams begin or end with it, and what it is linked to."""

from __future__ import annotations

import functools
from typing import Any

from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer, get_transformer_layer_offset
from megatron.core.utils import get_pg_rank
from torch import Tensor

from mhc_megatron.config import MHCConfig
from mhc_megatron.conflicts import check_conflicts
from mhc_megatron.pipeline.cut import check_mtp
from mhc_megatron.pipeline.state import sends_on, share_pipeline
from mhc_megatron.residual.chain import CHAIN
from mhc_megatron.residual.entry_exit import StreamEntry, contract
from mhc_megatron.residual.hyper_connection import ExitHead
from mhc_megatron.residual.input import HyperConnectionInput
from mhc_megatron.residual.norm_wrapper import NormWrapper
from mhc_megatron.residual.streams import expand


class HyperConnectionLayer:
    """Mixin before a TransformerLayer class (`hyper_connection_layer` combines them); takes two arguments of its own.

    In a layer of multi-token prediction streams begin and end with this layer, ``[s, b, C]`` outside.

    Args:
        mhc_config: settings.
        contract_after_last: whether the model's last layer contracts the streams itself. Set for a lone layer spec,
            whose final norm Megatron chooses; a block spec does it in its final norm.
    """

    def __init__(self, config: Any, *args: Any, mhc_config: MHCConfig, contract_after_last: bool, **kwargs: Any):
        check_conflicts(config)
        check_mtp(config)
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        self.mhc_config = mhc_config
        layer: Any = self
        for norm in (layer.input_layernorm, layer.pre_mlp_layernorm):
            if isinstance(norm, NormWrapper):
                norm.tp_group = layer.tp_group
        inputs = [m for m in (layer.input_layernorm, layer.pre_mlp_layernorm) if isinstance(m, HyperConnectionInput)]
        chain = CHAIN.extend(config, layer.layer_number, inputs, alone=layer.is_mtp_layer)
        vp_stage = kwargs.get("vp_stage")
        splits = share_pipeline(config, mhc_config).split and not layer.is_mtp_layer
        if inputs and splits and _ends_chunk(layer, vp_stage) and sends_on(layer, vp_stage):
            inputs[-1].set_departure()
        if inputs and splits and chain.layers == 2:
            inputs[0].set_announcing()
        self.is_entry = layer.layer_number == 1 or layer.is_mtp_layer
        self.is_exit = (contract_after_last and layer.layer_number == config.num_layers) or layer.is_mtp_layer
        learned = layer.is_mtp_layer and mhc_config.learned_exit
        self.exit_hyper_connection = ExitHead(config, mhc_config, config.hidden_size) if learned else None
        if contract_after_last:
            _check_no_chunk_without_layers(config)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        # Narrow only if this chunk holds the embedding; an embedding-only chunk before it has sent streams already.
        if self.is_entry and hidden_states.shape[-1] == self.config.hidden_size:  # type: ignore[attr-defined]
            hidden_states = expand(hidden_states, self.mhc_config.num_streams)
        hidden, context = super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        if self.is_exit:
            hidden = contract(hidden, self.mhc_config.num_streams, self.exit_hyper_connection, self.mhc_config.backend)
        return hidden, context


def _ends_chunk(layer: Any, vp_stage: int | None) -> bool:
    """Whether a layer is the last one of its pipeline chunk."""
    rank = get_pg_rank(layer.pg_collection.pp)
    first = get_transformer_layer_offset(layer.config, vp_stage, rank)
    return layer.layer_number == first + get_num_layers_to_build(layer.config, vp_stage, rank)


class StreamEntryLayer(TransformerLayer):
    """The one layer of a pipeline chunk that has none: only its input norm, a `StreamEntry`, does anything."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        check_mtp(config)
        super().__init__(config, *args, **kwargs)
        # Not a number of the model's: with MTP, Megatron looks for the last one to find the final norm's chunk.
        self.layer_number = 0
        entry: Any = self.input_layernorm
        assert isinstance(entry, StreamEntry)
        entry.departs = entry.splits and sends_on(self, kwargs.get("vp_stage"))


def _check_no_chunk_without_layers(config: Any) -> None:
    for name in (
        "account_for_embedding_in_pipeline_split",
        "account_for_loss_in_pipeline_split",
        "pipeline_model_parallel_layout",
    ):
        if getattr(config, name, None):
            raise ValueError(
                f"mHC: {name} may leave a pipeline chunk without layers, which a lone layer spec can't handle; "
                "pass to_mhc_spec a block spec (get_gpt_decoder_block_spec) instead"
            )


@functools.cache
def hyper_connection_layer(layer_class: type[TransformerLayer]) -> type[TransformerLayer]:
    """A subclass of ``layer_class`` with `HyperConnectionLayer` mixed in; the same one every time."""
    name = f"HyperConnection{layer_class.__name__}"
    return type(name, (HyperConnectionLayer, layer_class), {"__module__": __name__, "__qualname__": name})
