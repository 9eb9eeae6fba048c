"""How many parameters a GPTModel has, from Megatron's TransformerConfig alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mhc_megatron.config import MHCConfig


@dataclass(frozen=True)
class Counts:
    """Parameters of a whole model.

    active: those that a token meets: of the routed experts the top k, the output layer, but not the table its embedding is
        looked up in (as table 5 of arXiv 2512.24880 counts). mhc: of phi, alpha and biases (in both).
    """

    total: int
    active: int
    mhc: int


def count_parameters(
    config: Any,
    vocabulary: int,
    mhc: MHCConfig | None,
    *,
    tied_embeddings: bool = False,
    learned_positions: int = 0,
) -> Counts:
    """Count them; config is a TransformerConfig or MLATransformerConfig.

    Args:
        vocabulary: padded size.
        mhc: None for a residual model.
        tied_embeddings: one table for the embedding and the output layer.
        learned_positions: length of a table of learned position embeddings.

    Raises:
        NotImplementedError: for the parts of Megatron that are not counted here.
        ValueError: for a ``moe_layer_freq`` of another length than the model.
    """
    for unsupported in (
        "moe_latent_size",
        "mtp_num_layers",
        "experimental_attention_variant",
        "heterogeneous_block_specs",
    ):
        if getattr(config, unsupported, None):
            raise NotImplementedError(f"parameters of a model with {unsupported} are not counted")
    hidden, norm = config.hidden_size, _norm(config, config.hidden_size)
    total = active = norm  # the final one
    for is_moe in moe_layers(config):
        common = _attention(config) + 2 * norm
        if is_moe:
            expert = _mlp(config, config.moe_ffn_hidden_size)
            common += _linear(config, hidden, config.num_moe_experts)  # the router; its balancing bias is no parameter
            if config.moe_shared_expert_intermediate_size:
                common += _mlp(config, config.moe_shared_expert_intermediate_size)
                common += hidden if config.moe_shared_expert_gate else 0
            total += common + config.num_moe_experts * expert
            active += common + config.moe_router_topk * expert
        else:
            dense = common + _mlp(config, config.ffn_hidden_size)
            total, active = total + dense, active + dense
    added = _mhc(config, mhc) if mhc is not None else 0
    table = vocabulary * hidden
    total += added + learned_positions * hidden + (table if tied_embeddings else 2 * table)
    return Counts(total, active + added + table, added)


def moe_layers(config: Any) -> list[bool]:
    """For each layer, whether it is a MoE layer (``moe_layer_freq``). Raises ValueError if it has another length."""
    layers, frequency = config.num_layers, config.moe_layer_freq
    if not config.num_moe_experts:
        return [False] * layers
    if isinstance(frequency, int):
        return [i % frequency == 0 for i in range(layers)]
    if len(frequency) != layers:
        raise ValueError(f"moe_layer_freq has {len(frequency)} entries, the model {layers} layers")
    return [bool(is_moe) for is_moe in frequency]


def _norm(config: Any, width: int) -> int:
    return width if config.normalization == "RMSNorm" else 2 * width


def _linear(config: Any, inputs: int, outputs: int, bias: bool | None = None) -> int:
    return inputs * outputs + (outputs if (config.add_bias_linear if bias is None else bias) else 0)


def _mlp(config: Any, width: int) -> int:
    into = 2 * width if config.gated_linear_unit else width
    return _linear(config, config.hidden_size, into) + _linear(config, width, config.hidden_size)


def _attention(config: Any) -> int:
    hidden, heads = config.hidden_size, config.num_attention_heads
    if not config.multi_latent_attention:
        qkv = config.kv_channels * (heads + 2 * config.num_query_groups)
        count = _linear(config, hidden, qkv, config.add_bias_linear or config.add_qkv_bias)
        count += 2 * _norm(config, config.kv_channels) if config.qk_layernorm else 0
        return count + _linear(config, config.kv_channels * heads, hidden)
    query = heads * (config.qk_head_dim + config.qk_pos_emb_head_dim)
    if config.q_lora_rank:
        count = hidden * config.q_lora_rank + config.q_lora_rank * query
        count += _norm(config, config.q_lora_rank) if config.qk_layernorm else 0
    else:
        count = hidden * query
        # Megatron then norms the input of the query's projection, inside Transformer Engine's fused linear.
        count += _norm(config, hidden) if config.qk_layernorm else 0
    count += hidden * (config.kv_lora_rank + config.qk_pos_emb_head_dim)
    count += _norm(config, config.kv_lora_rank) if config.qk_layernorm else 0
    count += config.kv_lora_rank * heads * (config.qk_head_dim + config.v_head_dim)
    return count + _linear(config, heads * config.v_head_dim, hidden)


def _mhc(config: Any, mhc: MHCConfig) -> int:
    n = mhc.num_streams
    rows, inputs = n * n + 2 * n, n * config.hidden_size
    count = 2 * config.num_layers * (rows * inputs + 3 + rows)
    return count + (n * inputs + 1 + n if mhc.learned_exit else 0)
