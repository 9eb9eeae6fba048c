"""What a TransformerLayer must know beyond its spec: whether it is the model's first or last, and its checkpoint keys."""

from __future__ import annotations

import functools
from typing import Any

from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from mhc_megatron.config import MHCConfig
from mhc_megatron.conflicts import check_conflicts
from mhc_megatron.residual.chain import CHAIN
from mhc_megatron.residual.entry_exit import contract
from mhc_megatron.residual.input import HyperConnectionInput
from mhc_megatron.residual.norm_wrapper import NormWrapper
from mhc_megatron.residual.streams import expand


class HyperConnectionLayer:
    """Mixin before a TransformerLayer class (`hyper_connection_layer` combines them); takes two arguments of its own.

    Args:
        mhc_config: settings.
        contract_after_last: whether the model's last layer contracts the streams itself. Set for a lone layer spec,
            whose final norm Megatron chooses; a block spec does it in its final norm.
    """

    def __init__(self, config: Any, *args: Any, mhc_config: MHCConfig, contract_after_last: bool, **kwargs: Any):
        check_conflicts(config)
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        self.mhc_config = mhc_config
        layer: Any = self
        for norm in (layer.input_layernorm, layer.pre_mlp_layernorm):
            if isinstance(norm, NormWrapper):
                norm.tp_group = layer.tp_group
        inputs = [m for m in (layer.input_layernorm, layer.pre_mlp_layernorm) if isinstance(m, HyperConnectionInput)]
        CHAIN.extend(config, layer.layer_number, inputs)
        self.is_entry = layer.layer_number == 1
        self.is_exit = contract_after_last and layer.layer_number == config.num_layers
        if contract_after_last:
            _check_no_chunk_without_layers(config)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        # Narrow only if this chunk holds the embedding; an embedding-only chunk before it has sent streams already.
        if self.is_entry and hidden_states.shape[-1] == self.config.hidden_size:  # type: ignore[attr-defined]
            hidden_states = expand(hidden_states, self.mhc_config.num_streams)
        hidden, context = super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        if self.is_exit:
            hidden = contract(hidden, self.mhc_config.num_streams, None, self.mhc_config.backend)
        return hidden, context


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
