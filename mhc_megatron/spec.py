"""to_mhc_spec: the whole idea. mHC is a residual spec.

Megatron lets a norm return ``(output, residual)`` and hands that residual, untouched, to the bias-dropout-add of the same
sublayer. So three entries of a layer spec and one of a block spec make the model an mHC model; attention, MLA, router,
dispatcher, experts and Transformer Engine modules stay Megatron's own:

    input_layernorm, pre_mlp_layernorm  ->  HyperConnectionInput: map, aggregate, norm; returns (u, Residual)
    self_attn_bda, mlp_bda              ->  hyper_connection_add: x' = H_res @ x + H_post (y + bias)
    the block's layer_norm              ->  StreamExit: contract the streams, then the final norm

A layer of multi-token prediction (MTP) gets one stream, as Megatron projects it from the final norm's output and the next
token's embedding; its transformer layer expands it, and contracts what comes out.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec, get_module
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from mhc_megatron.config import MHCConfig
from mhc_megatron.residual.add import hyper_connection_add
from mhc_megatron.residual.entry_exit import StreamEntry, StreamExit
from mhc_megatron.residual.input import HyperConnectionInput
from mhc_megatron.residual.layer import StreamEntryLayer, hyper_connection_layer

# Ahead of a layer spec's own map, whose "input_layernorm." entry would catch these keys too.
_CHECKPOINT_KEYS = {
    "input_layernorm.hyper_connection.": "self_attention_hyper_connection.",
    "pre_mlp_layernorm.hyper_connection.": "mlp_hyper_connection.",
}


def to_mhc_spec[Spec: (ModuleSpec, TransformerBlockSubmodules, MultiTokenPredictionBlockSubmodules)](
    spec: Spec, mhc_config: MHCConfig
) -> Spec:
    """The same spec with mHC residual connections. The input is not modified.

    Args:
        spec: a TransformerLayer ModuleSpec (local or Transformer Engine; dense or MoE; MLA or not), a
            TransformerBlockSubmodules, or a TransformerBlock ModuleSpec. A block spec keeps its ``moe_layer_freq``
            pattern and may be a pipeline chunk's, without layers as well. With multi-token prediction also what
            ``get_gpt_mtp_block_spec`` makes of a stock spec (of a converted block spec it makes mHC layers by itself, and it
            refuses a converted layer spec).
        mhc_config: settings.

    Returns:
        A spec of the same kind.

    Raises:
        TypeError: for anything else.
        ValueError: for a spec that already is an mHC spec, that has cross attention, or a lone layer spec with
            profile ``deepseek-v4`` (its learned exit needs a block spec).
    """
    if isinstance(spec, TransformerBlockSubmodules):
        return _block(spec, mhc_config)
    if isinstance(spec, MultiTokenPredictionBlockSubmodules):
        return _mtp_block(spec, mhc_config)
    if isinstance(spec, ModuleSpec):
        module = get_module(spec)
        if isinstance(module, type) and issubclass(module, MultiTokenPredictionBlock):
            converted = copy.copy(spec)
            converted.submodules = _mtp_block(spec.submodules, mhc_config)
            return converted
        if isinstance(module, type) and issubclass(module, TransformerBlock):
            converted = copy.copy(spec)
            converted.submodules = _block(spec.submodules, mhc_config)
            return converted
        if mhc_config.learned_exit:
            raise ValueError(
                f"profile {mhc_config.profile!r} ends in a learned exit, which a lone layer spec has no place for; "
                "pass a block spec (get_gpt_decoder_block_spec)"
            )
        return _layer(spec, mhc_config, contract_after_last=True)
    raise TypeError(
        "to_mhc_spec takes a ModuleSpec, TransformerBlockSubmodules or MultiTokenPredictionBlockSubmodules, "
        f"got {type(spec).__name__}"
    )


def _block(block: TransformerBlockSubmodules, mhc_config: MHCConfig) -> TransformerBlockSubmodules:
    layers = [_layer(layer, mhc_config, contract_after_last=False) for layer in block.layer_specs or []]
    if not layers:
        entry = functools.partial(StreamEntry, mhc_config)
        layers = [ModuleSpec(StreamEntryLayer, submodules=TransformerLayerSubmodules(input_layernorm=entry))]
    exit_ = functools.partial(StreamExit, block.layer_norm or IdentityOp, mhc_config)
    return dataclasses.replace(block, layer_specs=layers, layer_norm=exit_)


def _mtp_block(
    block: MultiTokenPredictionBlockSubmodules, mhc_config: MHCConfig
) -> MultiTokenPredictionBlockSubmodules:
    layers = []
    for spec in block.layer_specs or []:
        inner = _layer(spec.submodules.mtp_model_layer, mhc_config, contract_after_last=False)
        layers.append(copy.copy(spec))
        layers[-1].submodules = dataclasses.replace(spec.submodules, mtp_model_layer=inner)
    return dataclasses.replace(block, layer_specs=layers)


def _layer(spec: ModuleSpec, mhc_config: MHCConfig, *, contract_after_last: bool) -> ModuleSpec:
    layer_class = get_module(spec)
    if not (isinstance(layer_class, type) and issubclass(layer_class, TransformerLayer)):
        raise TypeError(f"to_mhc_spec converts TransformerLayer specs, got one of {layer_class!r}")
    if "mhc_config" in spec.params:
        raise ValueError("this spec is an mHC spec already; convert the stock spec, once")
    submodules = spec.submodules
    if submodules.cross_attention is not IdentityOp:
        raise ValueError("mHC layers with cross attention are not supported")
    add = hyper_connection_add(mhc_config)
    replaced: dict[str, Any] = {}
    # A layer may lack one of its sublayers (heterogeneous models): nothing to connect there.
    if submodules.self_attention is not IdentityOp:
        norm = functools.partial(HyperConnectionInput, submodules.input_layernorm, mhc_config)
        replaced |= {"input_layernorm": norm, "self_attn_bda": add}
    if submodules.mlp is not IdentityOp:
        norm = functools.partial(HyperConnectionInput, submodules.pre_mlp_layernorm, mhc_config)
        replaced |= {"pre_mlp_layernorm": norm, "mlp_bda": add}
    keys = {**_CHECKPOINT_KEYS, **submodules.sharded_state_dict_keys_map}
    converted = copy.copy(spec)
    converted.module = hyper_connection_layer(layer_class)
    converted.params = {**spec.params, "mhc_config": mhc_config, "contract_after_last": contract_after_last}
    converted.submodules = dataclasses.replace(submodules, **replaced, sharded_state_dict_keys_map=keys)
    return converted
