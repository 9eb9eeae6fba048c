"""Parameters of a model, a pipeline chunk and a rank, and the bytes that they, their gradients and the optimizer take.

Counted from Megatron's configuration; the tests compare with models that Megatron has built.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mhc_megatron.plan.run import Chunk, Run


@dataclass(frozen=True)
class Count:
    """Parameters, by how they are held: dense (of the model's dtype, sharded over data parallelism), expert (over the
    experts' data parallelism), mhc (float32; counted in neither of the others)."""

    dense: float = 0
    expert: float = 0
    mhc: float = 0

    def __add__(self, other: Count) -> Count:
        return Count(self.dense + other.dense, self.expert + other.expert, self.mhc + other.mhc)

    @property
    def total(self) -> float:
        return self.dense + self.expert + self.mhc


@dataclass(frozen=True)
class StaticMemory:
    """Bytes a rank holds through the whole run: parameters, main gradients, and the optimizer's masters and moments."""

    parameters: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.parameters + self.gradients + self.optimizer


def rank_count(run: Run, chunks: Iterable[Chunk]) -> Count:
    """Parameters of one rank that has these chunks."""
    return sum((_chunk(run, chunk, run.tensor, run.expert_tensor, _experts(run)) for chunk in chunks), Count())


def model_count(run: Run) -> Count:
    """Parameters of the whole model, however it is cut."""
    experts = run.config.num_moe_experts or 0
    whole = Chunk(0, 0, 0, run.config.num_layers, embedding=True, loss=True)
    return _chunk(run, whole, 1, 1, experts)


def active_count(run: Run) -> Count:
    """Parameters that one token meets, counted as table 5 of the paper does: of the experts those that it is routed to, and not

    the embedding, where a token is only looked up (unless the output layer shares it).
    """
    whole = Chunk(0, 0, 0, run.config.num_layers, embedding=run.tied, loss=True)
    return _chunk(run, whole, 1, 1, run.config.moe_router_topk if run.config.num_moe_experts else 0)


def static_memory(run: Run, count: Count) -> StaticMemory:
    """What those parameters of one rank take.

    With the distributed optimizer, masters and moments are sharded. A float32 parameter is its own master. ``plain``
    gradients come and go with the backward: they are in the activations' peak.
    """
    value = run.config.params_dtype.itemsize
    parameters = (count.dense + count.expert) * value + count.mhc * 4
    if run.gradients == "plain":
        return StaticMemory(parameters, 0, 0)
    gradients = (count.dense + count.expert) * run.gradient_bytes + count.mhc * 4
    data, expert_data = (run.data, run.expert_data) if run.distributed_optimizer else (1, 1)
    master, moments = run.state_bytes
    state = moments if value == 4 else master + moments
    optimizer = count.dense * state / data + count.expert * state / expert_data + count.mhc * moments / data
    return StaticMemory(parameters, gradients, optimizer)


def hyper_connection(run: Run) -> int:
    """phi, alpha and bias of one sublayer."""
    n = run.streams
    rows = n * n + 2 * n
    return rows * n * run.config.hidden_size + 3 + rows if run.mhc is not None else 0


def grouped_weights(run: Run) -> tuple[float, float]:
    """The first and the second weight of a rank's routed experts, each counted over all of them."""
    config = run.config
    width = config.moe_latent_size or config.hidden_size
    one = _experts(run) * width * config.moe_ffn_hidden_size / run.expert_tensor
    return one * (2 if config.gated_linear_unit else 1), one


def _experts(run: Run) -> float:
    return (run.config.num_moe_experts or 0) / run.config.expert_model_parallel_size


def _chunk(run: Run, chunk: Chunk, tensor: int, expert_tensor: int, experts: float) -> Count:
    config, hidden = run.config, run.config.hidden_size
    count = Count()
    for layer in range(chunk.first_layer, chunk.first_layer + chunk.layers):
        count += _layer(run, run.is_moe(layer), tensor, expert_tensor, experts)
    embedding = run.vocabulary * hidden / tensor
    if chunk.embedding:
        count += Count(dense=embedding + run.learned_positions * hidden)
    if chunk.loss:
        # A tied output weight is a second copy where the embedding is on another stage.
        output = 0 if run.tied and chunk.embedding else embedding
        count += Count(dense=output + _norm(config))
        if run.mhc is not None and run.mhc.learned_exit:
            n = run.streams
            count += Count(mhc=n * n * hidden + 1 + n)
    return count


def _norm(config: Any, width: int | None = None) -> int:
    return (width or config.hidden_size) * (1 if config.normalization == "RMSNorm" else 2)


def _layer(run: Run, moe: bool, tensor: int, expert_tensor: int, experts: float) -> Count:
    config = run.config
    attention = _mla(config, tensor) if config.multi_latent_attention else _attention(config, tensor)
    count = Count(dense=attention + 2 * _norm(config), mhc=2 * hyper_connection(run))
    if not moe:
        return count + Count(dense=_mlp(config, config.ffn_hidden_size, tensor))
    router = config.hidden_size * config.num_moe_experts
    if config.add_bias_linear:
        router += config.num_moe_experts
    shared: float = 0
    if config.moe_shared_expert_intermediate_size:
        shared = _mlp(config, config.moe_shared_expert_intermediate_size, tensor)
        shared += config.hidden_size if config.moe_shared_expert_gate else 0
    latent = config.moe_latent_size
    projections = 2 * config.hidden_size * latent if latent else 0
    expert = _mlp(config, config.moe_ffn_hidden_size, expert_tensor, latent)
    return count + Count(dense=router + shared + projections, expert=experts * expert)


def _attention(config: Any, tensor: int) -> float:
    hidden, heads, groups = config.hidden_size, config.num_attention_heads, config.num_query_groups
    query, key = config.kv_channels * heads, config.kv_channels * groups
    qkv = query + 2 * key + (query if config.attention_output_gate else 0)
    count = (hidden * qkv + query * hidden) / tensor
    if config.add_bias_linear or config.add_qkv_bias:
        count += qkv / tensor
    if config.add_bias_linear:
        count += hidden
    return count + (2 * _norm(config, config.kv_channels) if config.qk_layernorm else 0)


def _mla(config: Any, tensor: int) -> float:
    hidden, heads = config.hidden_size, config.num_attention_heads
    head = config.qk_head_dim + config.qk_pos_emb_head_dim
    down = hidden * (config.kv_lora_rank + config.qk_pos_emb_head_dim)  # not divided by tensor parallelism
    up = config.kv_lora_rank * heads * (config.qk_head_dim + config.v_head_dim)
    norms = _norm(config, config.kv_lora_rank)
    if config.q_lora_rank is None:
        up += hidden * heads * head
        norms += _norm(config)  # of the projection's input, inside Transformer Engine's fused linear
    else:
        down += hidden * config.q_lora_rank
        up += config.q_lora_rank * heads * head
        norms += _norm(config, config.q_lora_rank)
    projection = heads * config.v_head_dim * hidden + (hidden * tensor if config.add_bias_linear else 0)
    return down + (up + projection) / tensor + (norms if config.qk_layernorm else 0)


def _mlp(config: Any, width: int, tensor: int, hidden: int | None = None) -> float:
    hidden = hidden or config.hidden_size
    first = width * (2 if config.gated_linear_unit else 1)
    biases = first / tensor + hidden if config.add_bias_linear else 0
    return (hidden * first + width * hidden) / tensor + biases
