"""Small GPT models, stock or mHC, and one training step of them under any layout."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from mhc_megatron import MHCConfig, to_mhc_spec

VOCABULARY, SEQUENCE, MICROBATCH, MICROBATCHES = 96, 16, 2, 4

DENSE: dict[str, Any] = {"add_bias_linear": True}
MOE: dict[str, Any] = {
    "add_bias_linear": False,
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 32,
    "moe_layer_freq": [0, 1, 1, 1],
    "moe_token_dispatcher_type": "alltoall",
    "moe_shared_expert_intermediate_size": 32,
    "moe_aux_loss_coeff": 0.0,
    "gated_linear_unit": True,
    "activation_func": torch.nn.functional.silu,
}
MLA: dict[str, Any] = {
    **MOE,
    "multi_latent_attention": True,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 8,
    "rope_type": "rope",
}
MODELS = {"dense": DENSE, "moe": MOE, "mla": MLA}


def make_config(**overrides: Any) -> TransformerConfig:
    """A float32 TransformerConfig of 4 layers, 32 wide, on the CPU unless overridden."""
    settings: dict[str, Any] = {
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "normalization": "RMSNorm",
        "use_cpu_initialization": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": False,
        # Larger than usual: streams, mappings and gradients should not hide near zero.
        "init_method_std": 0.1,
    }
    settings.update(overrides)
    cls = MLATransformerConfig if settings.get("multi_latent_attention") else TransformerConfig
    return cls(**settings)


def block_spec(config: TransformerConfig, te: bool, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Megatron's block spec, of Transformer Engine's modules or of its local ones."""
    # For a local RMSNorm 0.19.2 names apex's LayerNorm where apex is installed: in the block, and in layers not told of it.
    local_norm = None if te else config.normalization
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=te, normalization=local_norm, vp_stage=vp_stage)
    return dataclasses.replace(spec, layer_norm=WrappedTorchNorm) if local_norm == "RMSNorm" else spec


def specs(
    config: TransformerConfig, mhc: MHCConfig | None, vp_stage: int | None = None, te: bool = False
) -> dict[str, Any]:
    """A GPTModel's block spec and its MTP layers', converted unless mhc is None."""
    block = block_spec(config, te, vp_stage)
    mtp = get_gpt_mtp_block_spec(config, block, te, vp_stage) if config.mtp_num_layers and block.layer_specs else None
    if mhc is not None:
        block = to_mhc_spec(block, mhc)
        mtp = to_mhc_spec(mtp, mhc) if mtp else None
    return {"transformer_layer_spec": block, "mtp_block_spec": mtp}


def build(config: TransformerConfig, mhc: MHCConfig | None, vp_stage: int | None = None, te: bool = False) -> GPTModel:
    """This rank's GPTModel (chunk ``vp_stage``), its spec converted unless mhc is None."""
    return GPTModel(
        config,
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
        **specs(config, mhc, vp_stage, te),
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        vp_stage=vp_stage,
    )


def tokens(index: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(index)
    return torch.randint(0, VOCABULARY - 1, (MICROBATCH, SEQUENCE), generator=generator)


def forward(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Loss of every token, ``[b, s]``."""
    ids = ids.to("cuda") if torch.cuda.is_available() else ids
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids).contiguous()
    mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).triu(1)[None, None]
    return model(ids, positions, mask, labels=ids.roll(-1, 1))


def wrap(model: torch.nn.Module, config: TransformerConfig, **settings: Any) -> DistributedDataParallel:
    ddp_config = DistributedDataParallelConfig(
        **{"use_distributed_optimizer": False, "overlap_grad_reduce": False, **settings}
    )
    return DistributedDataParallel(config, ddp_config, model)


def one_step(models: list[torch.nn.Module], config: TransformerConfig) -> list[float]:
    """Forward and backward of MICROBATCHES microbatches by Megatron's schedule; gradients end up in ``main_grad``.

    Returns:
        the losses of all microbatches in order, on ranks of the last stage (of this data-parallel rank's share).
    """
    return step([wrap(model, config) for model in models], config, range(MICROBATCHES))


def step(
    wrapped: list[torch.nn.Module], config: TransformerConfig, microbatches: range, forward_only: bool = False
) -> list[float]:
    """As `one_step`, of chunks in Megatron's DDP and of these microbatches."""
    for chunk in wrapped:
        chunk.zero_grad_buffer()
    config.finalize_model_grads_func = finalize_model_grads
    dp_size, dp_rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    mine = microbatches[dp_rank::dp_size]
    iterators = [iter([tokens(i) for i in mine]) for _ in wrapped]

    def forward_step(iterator: Any, model: torch.nn.Module) -> Any:
        output = forward(model, next(iterator))
        return output, lambda out: (out.mean(), {"loss": out.mean().detach()})

    results = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(wrapped) > 1 else iterators[0],
        model=wrapped if len(wrapped) > 1 else wrapped[0],
        num_microbatches=len(mine),
        seq_length=SEQUENCE,
        micro_batch_size=MICROBATCH,
        forward_only=forward_only,
    )
    return [float(result["loss"]) for result in results]


def sharded_state_dict(models: list[torch.nn.Module]) -> dict[str, Any]:
    """The chunks' parameters as a distributed checkpoint sees them, the same keys under every layout."""
    metadata = {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "singleton_local_shards": False,
    }
    return {f"model{i}": model.sharded_state_dict(metadata=metadata) for i, model in enumerate(models)}


def save(models: list[torch.nn.Module], folder: Path) -> None:
    if dist.get_rank() == 0:
        folder.mkdir()
    dist.barrier()
    dist_checkpointing.save(sharded_state_dict(models), str(folder))


def load(models: list[torch.nn.Module], folder: Path) -> None:
    loaded = dist_checkpointing.load(sharded_state_dict(models), str(folder))
    for i, model in enumerate(models):
        model.load_state_dict(loaded.get(f"model{i}", {}))  # a chunk may have no parameters


def gradients_into_parameters(models: list[torch.nn.Module]) -> None:
    """So that `save` writes gradients, and another layout can read them."""
    with torch.no_grad():
        for model in models:
            for parameter in model.parameters():
                parameter.copy_(parameter.main_grad)
