"""Bytes that a microbatch moves for mHC, through memory and between pipeline stages, and how long the chunks compute.

Kernels: units of C values a token and sublayer as kernels/README.md counts them. Times are estimates from data-sheet numbers and
the two shares below; they say which of two layouts is better, not how long a step will take.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mhc_megatron.plan.gpus import COPY_SHARE, Gpu
from mhc_megatron.plan.operations import hidden_bytes
from mhc_megatron.plan.run import Chunk, Run

# What the kernels reach of the time that a copy of the bytes of two passes takes (kernels/README.md: 0.69 to 0.75, H200,
# 8192 tokens or more).
KERNEL_SHARE = 0.73
# Units that residual connections move for what the kernels do in their place: an addition and a norm, forward and backward.
RESIDUAL_FORWARD = 3 + 2
RESIDUAL_UNITS = RESIDUAL_FORWARD + 3 + 3


@dataclass(frozen=True)
class KernelTraffic:
    """Of one microbatch on one rank: bytes that mHC's kernels move; those that a two-pass bound needs; those that
    residual connections would have moved instead."""

    moved: float
    bound: float
    replaced: float

    def seconds(self, gpu: Gpu) -> tuple[float, float]:
        """Of the kernels, and of what they replace."""
        copy = gpu.bandwidth * COPY_SHARE
        return self.bound / (copy * KERNEL_SHARE), self.replaced / copy


def kernel_traffic(run: Run, chunks: list[Chunk], block_length: int | None) -> KernelTraffic:
    """What mHC's kernels move for one microbatch in these chunks, forward and backward; nothing without mHC."""
    if run.mhc is None:
        return KernelTraffic(0, 0, 0)
    n, unit = run.streams, hidden_bytes(run)
    moved: float = 0
    bound: float = 0
    sublayers = 0
    replaced = RESIDUAL_UNITS
    for chunk in chunks:
        own = 2 * chunk.layers
        again = 0
        # The backward computes streams, one mix each, and writes what sublayers read where it has the streams; what the last
        # sublayer reads has a pass of its own.
        if block_length and own:
            again = (own - -(-own // block_length)) * (2 * n + 1) + own + n
        moved += own * (8 * n + 6 if n <= 4 else 11 * n + 6) + again
        bound += own * (7 * n + 6) + again
        sublayers += own
    if run.config.recompute_granularity == "full":  # the forward runs twice
        moved += sublayers * _forward_units(n)
        bound += sublayers * _forward_units(n)
        replaced += RESIDUAL_FORWARD
    return KernelTraffic(moved * unit, bound * unit, sublayers * replaced * unit)


def _forward_units(n: int) -> int:
    return 3 * n + 2


def added_seconds(run: Run, chunk: Chunk, gpu: Gpu, block_length: int | None) -> tuple[float, float]:
    """What mHC's kernels take of one microbatch beyond what they replace, in the forward and in the backward pass."""
    if run.mhc is None:
        return 0.0, 0.0
    kernels, replaced = kernel_traffic(run, [chunk], block_length).seconds(gpu)
    units = 2 * chunk.layers * hidden_bytes(run)
    first = KernelTraffic(0, units * _forward_units(run.streams), units * RESIDUAL_FORWARD).seconds(gpu)
    forward = first[0] - first[1]
    return forward, kernels - replaced - forward


def boundary_bytes(run: Run) -> dict[str, float]:
    """What crosses a pipeline boundary for one microbatch in one direction.

    residual: C a token. wide: n*C. split, split_side: with split streams, C and H_post (n float32) in the schedule's own
    tensor, and n*C beside it.
    """
    hidden = hidden_bytes(run)
    n = run.streams
    return {
        "residual": hidden,
        "wide": n * hidden,
        "split": hidden + 4 * n * run.residual_tokens,
        "split_side": n * hidden,
    }


def chunk_flops(run: Run, chunk: Chunk) -> tuple[float, float]:
    """Floating-point operations of one forward pass on one rank: of the chunk, and of its last sublayer (an MLP or MoE)."""
    total = last = 0.0
    for layer in range(chunk.first_layer, chunk.first_layer + chunk.layers):
        last = 2 * run.tokens * _mlp_weights(run.config, run.is_moe(layer))
        total += 2 * run.tokens * _attention_weights(run.config) + _scores(run) + last
    if chunk.loss:
        total += 2 * run.tokens * run.vocabulary * run.config.hidden_size
    return total / run.tensor, last / run.tensor


def chunk_seconds(run: Run, chunk: Chunk, gpu: Gpu, utilization: float) -> tuple[float, float, float]:
    """Forward and backward of one microbatch at a given share of the GPU's peak, and the last sublayer's part of either."""
    flops, last = chunk_flops(run, chunk)
    forward = flops / (gpu.flops * utilization)
    backward = (3 if run.config.recompute_granularity == "full" else 2) * forward
    return forward, backward, last / flops if flops else 0.0


def _attention_weights(config: Any) -> float:
    heads, hidden = config.num_attention_heads, config.hidden_size
    if not config.multi_latent_attention:
        query, key = config.kv_channels * heads, config.kv_channels * config.num_query_groups
        return hidden * (2 * query + 2 * key)
    head = config.qk_head_dim + config.qk_pos_emb_head_dim
    query = hidden * heads * head if config.q_lora_rank is None else config.q_lora_rank * (hidden + heads * head)
    key = config.kv_lora_rank * (hidden + heads * (config.qk_head_dim + config.v_head_dim))
    return query + key + hidden * config.qk_pos_emb_head_dim + heads * config.v_head_dim * hidden


def _scores(run: Run) -> float:
    """Attention proper: causal, so half of all pairs of tokens."""
    config = run.config
    if config.multi_latent_attention:
        widths = config.qk_head_dim + config.qk_pos_emb_head_dim + config.v_head_dim
    else:
        widths = 2 * config.kv_channels
    return 2 * run.tokens * run.sequence / 2 * config.num_attention_heads * widths


def _mlp_weights(config: Any, moe: bool) -> float:
    matrices = 3 if config.gated_linear_unit else 2
    if not moe:
        return matrices * config.hidden_size * config.ffn_hidden_size
    latent = config.moe_latent_size or config.hidden_size
    routed = matrices * latent * config.moe_ffn_hidden_size * config.moe_router_topk
    shared = matrices * config.hidden_size * (config.moe_shared_expert_intermediate_size or 0)
    return routed + shared + config.hidden_size * config.num_moe_experts
