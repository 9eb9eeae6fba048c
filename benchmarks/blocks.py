"""The transformer blocks that `overhead.py` and `pipeline.py` time: shapes, and the kinds of residual connection they are built
with."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.parallel_state import (
    get_expert_model_parallel_world_size,
    is_pipeline_first_stage,
    is_pipeline_last_stage,
)
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.module import Float16Module

from mhc_megatron import MHCConfig, to_mhc_spec
from mhc_megatron.plan.run import Run

VOCABULARY = 256  # a block is what is timed: next to no embedding and no logits

_MLA: dict[str, Any] = {
    "multi_latent_attention": True,
    "kv_lora_rank": 512,
    "qk_head_dim": 128,
    "qk_pos_emb_head_dim": 64,
    "v_head_dim": 128,
    "rope_type": "rope",
}
_MOE: dict[str, Any] = {
    "moe_token_dispatcher_type": "alltoall",
    "moe_aux_loss_coeff": 0.0,
    "moe_grouped_gemm": True,
    "moe_permute_fusion": True,
}

SHAPES: dict[str, dict[str, Any]] = {
    # The paper's 27B: one dense layer, the others MoE.
    "27b": {
        **_MLA,
        **_MOE,
        "hidden_size": 2560,
        "num_attention_heads": 32,
        "q_lora_rank": None,
        "ffn_hidden_size": 12288,
        "num_moe_experts": 72,
        "moe_router_topk": 6,
        "moe_ffn_hidden_size": 1536,
        "moe_shared_expert_intermediate_size": 3072,
    },
    "dense": {
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_query_groups": 8,
        "ffn_hidden_size": 14336,
    },
    # DeepSeek-V3's layers with 16 of its 256 experts.
    "v3": {
        **_MLA,
        **_MOE,
        "hidden_size": 7168,
        "num_attention_heads": 128,
        "q_lora_rank": 1536,
        "ffn_hidden_size": 18432,
        "num_moe_experts": 16,
        "moe_router_topk": 8,
        "moe_ffn_hidden_size": 2048,
        "moe_shared_expert_intermediate_size": 2048,
    },
}
# Every expert takes as many tokens: Megatron's host then waits for no count of them.
PADDED: dict[str, Any] = {
    "moe_router_force_load_balancing": True,
    "moe_expert_capacity_factor": 1.0,
    "moe_pad_expert_input_to_capacity": True,
}
LAYERS = {"27b": 5, "dense": 4, "v3": 3}

# Small enough for a CPU, and for Megatron's local modules.
_TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": None,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 8,
    "ffn_hidden_size": 64,
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "moe_grouped_gemm": False,
    "moe_permute_fusion": False,
}

KINDS: dict[str, MHCConfig | None] = {
    "residual": None,
    "hc": MHCConfig(mode="hc"),
    "reference": MHCConfig(backend="reference"),
    "mhc": MHCConfig(),
    "recompute": MHCConfig(recompute=True),
}


PIPELINE_KINDS: dict[str, MHCConfig | None] = {
    "residual": None,
    "wide-stock": MHCConfig(pipeline_comm="wide"),
    "wide": MHCConfig(pipeline_comm="wide"),
    "split": MHCConfig(pipeline_comm="split"),
}


def of_kind(kind: str) -> MHCConfig | None:
    """The settings of one of KINDS, or of ``recompute:N``: blocks of N sublayers.

    Raises:
        ValueError: for another name.
    """
    name, _, length = kind.partition(":")
    if name not in KINDS or (length and (name != "recompute" or not length.isdecimal())):
        raise ValueError(f"no kind {kind!r}: {', '.join(KINDS)} and recompute:N (sublayers) exist")
    return MHCConfig(recompute=True, recompute_sublayers=int(length)) if length else KINDS[name]


def build(
    shape: str, mhc_config: MHCConfig | None, layers: int, sequence: int, tiny: bool, more: dict[str, Any]
) -> torch.nn.Module:
    """A GPTModel of one of SHAPES: Transformer Engine in bf16, or tiny, local and float32. more: fields of its config."""
    more = {**more, "expert_model_parallel_size": get_expert_model_parallel_world_size()}
    return _model(_config(shape, layers, tiny, more), mhc_config, sequence, tiny)


def planned_run(shape: str, mhc_config: MHCConfig | None, layers: int, sequence: int, tokens: int) -> Run:
    """A block's forward and backward, for the planner."""
    config = _config(shape, layers, False, {"moe_permute_fusion": False})  # the same memory, and Megatron asks for TE
    return Run(config, mhc_config, 1, sequence, max(1, tokens // sequence), 1, VOCABULARY, gradients="plain")


def build_chunks(
    kind: str,
    stages: int,
    vpp: int,
    layers: int,
    experts: int,
    sequence: int,
    tiny: bool,
    group: int,
    flush: bool,
    transport: str = "nccl",
) -> tuple[list[torch.nn.Module], Any]:
    """This rank's chunks of a 27B-shaped model on so many stages, and their config, as Megatron's arguments would have it.

    group: microbatches that pass a chunk in a row; flush: ``overlap_p2p_comm_warmup_flush``; both with several chunks.
    transport: MHCConfig.pipeline_transport.
    """
    dtype = torch.float32 if tiny else torch.bfloat16
    settings: dict[str, Any] = {
        "pipeline_model_parallel_size": stages,
        "pipeline_dtype": dtype,
        "deallocate_pipeline_outputs": True,
        **PADDED,
        "num_moe_experts": experts,
        "batch_p2p_comm": vpp == 1,
    }
    if vpp > 1:
        settings |= {"virtual_pipeline_model_parallel_size": vpp, "overlap_p2p_comm": True}
        settings |= {"microbatch_group_size_per_vp_stage": group, "overlap_p2p_comm_warmup_flush": flush}
    config = _config("27b", layers, tiny, settings)
    chunks = range(vpp) if vpp > 1 else [None]
    mhc_config = PIPELINE_KINDS[kind]
    if mhc_config is not None:
        mhc_config = dataclasses.replace(mhc_config, pipeline_transport=transport)
    return [_model(config, mhc_config, sequence, tiny, chunk) for chunk in chunks], config


def _config(shape: str, layers: int, tiny: bool, more: dict[str, Any]) -> TransformerConfig:
    settings: dict[str, Any] = {
        "num_layers": layers,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "gradient_accumulation_fusion": False,
        "bf16": not tiny,
        "params_dtype": torch.float32 if tiny else torch.bfloat16,
        "use_cpu_initialization": tiny,
        "masked_softmax_fusion": not tiny,
        "persist_layer_norm": not tiny,
        **SHAPES[shape],
        **more,
    }
    if "num_moe_experts" in settings:
        settings["moe_layer_freq"] = [0] + [1] * (layers - 1)
    if tiny:
        settings |= {name: value for name, value in _TINY.items() if name in settings}
    mla = settings.get("multi_latent_attention", False)
    return (MLATransformerConfig if mla else TransformerConfig)(**settings)


def _model(
    config: TransformerConfig, mhc_config: MHCConfig | None, sequence: int, tiny: bool, vp_stage: int | None = None
) -> torch.nn.Module:
    torch.manual_seed(0)
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=not tiny, vp_stage=vp_stage)
    if mhc_config is not None:
        spec = to_mhc_spec(spec, mhc_config)
    model = GPTModel(
        config,
        spec,
        VOCABULARY,
        sequence,
        pre_process=is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        vp_stage=vp_stage,
    )
    return model if tiny else Float16Module(config, model.cuda())
