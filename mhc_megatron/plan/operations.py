"""What a layer's modules keep for the backward, operation by operation: Transformer Engine's modules and Megatron-Core
0.19's MoE.

Sources: for linear layers, norms and attention what Transformer Engine's autograd functions save (inputs of linear
layers; a norm's input; query, key, value, output and the softmax's statistics), for MLA, MLP, experts, dispatcher and
router Megatron's modules, for mHC `mhc_kernels.fused.functions`. What two operations save is counted once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from mhc_megatron.plan.parameters import grouped_weights
from mhc_megatron.plan.run import Chunk, Run

BOUNDARY, MIX = "mhc boundary", "mhc mix"
FUSED_NORM_STREAMS = 4  # mhc_kernels.norm has it, with Triton: with more streams the kernels leave the norm alone


@dataclass(frozen=True)
class Operation:
    """One step of a forward pass; bytes on one rank for one microbatch.

    saved: kept for the backward. source, output: what it reads and writes; in the backward, the gradients of these.
    forward, backward: further memory while it runs. weight: the gradient of its parameters before it reaches Megatron's
    buffers. carried: the gradient of the residual stream, alive all the while. modules: names of ``--recompute-modules``
    that it belongs to, the narrowest first. streams: of a sublayer (bytes, place in its block of ``--mhc-recompute``, the
    block's length), at its boundary, and at the mix where its backward begins. reads_again: whether mHC's recompute brings
    back what its sublayer reads.
    """

    name: str
    saved: float = 0
    source: float = 0
    output: float = 0
    forward: float = 0
    backward: float = 0
    weight: float = 0
    carried: float = 0
    modules: tuple[str, ...] = ()
    streams: tuple[float, int, int] | None = None
    reads_again: bool = False


def chunk_operations(run: Run, chunk: Chunk, block_length: int | None = None) -> list[list[Operation]]:
    """A chunk's operations in forward order, a list a layer; the embedding first and the loss last, in lists of their own.

    block_length: sublayers that share the streams that are kept (L_r); None keeps all.
    """
    layers = range(chunk.first_layer, chunk.first_layer + chunk.layers)
    operations = _fuse_boundaries(run, [_layer(run, run.is_moe(layer)) for layer in layers])
    if block_length is not None:
        operations = _recompute_streams(run, operations, block_length)
    ends: list[list[Operation]] = [_embedding(run)] if chunk.embedding else []
    return [*ends, *operations, *([_loss(run)] if chunk.loss else [])]


def _fuse_boundaries(run: Run, layers: list[list[Operation]]) -> list[list[Operation]]:
    """The backward of a mix that is one operation with the next sublayer's boundary reads the next streams, and the gradient
    of what was aggregated from them. Of a chunk, the last mix stands alone."""
    if run.mhc is None:
        return layers
    more = stream_bytes(run) + hidden_bytes(run)
    # Under full recompute the chain is cut between layers.
    alone = layers if run.config.recompute_granularity == "full" else layers[-1:]
    last = [next(operation for operation in reversed(layer) if operation.name == MIX) for layer in alone]
    return [
        [
            replace(o, backward=o.backward + more) if o.name == MIX and not any(o is one for one in last) else o
            for o in layer
        ]
        for layer in layers
    ]


def hidden_bytes(run: Run) -> float:
    """A microbatch's C values a token, between sublayers."""
    return run.residual_tokens * run.config.hidden_size * run.value


def stream_bytes(run: Run) -> float:
    """The same n streams wide."""
    return run.streams * hidden_bytes(run)


def recompute_modules(config: Any) -> frozenset[str]:
    """Modules that ``--recompute-granularity selective`` recomputes."""
    if config.recompute_granularity != "selective":
        return frozenset()
    return frozenset(config.recompute_modules or ("core_attn",))


def _layer(run: Run, moe: bool) -> list[Operation]:
    config = run.config
    attention = _mla(run) if config.multi_latent_attention else _attention(run)
    mlp = _moe(run) if moe else _dense_mlp(run)
    # Stand-alone norms are those before MLA and MoE; elsewhere Transformer Engine's linear layer has the norm in it.
    attention = _sublayer(run, attention, own_norm=config.multi_latent_attention)
    return [*attention, *_sublayer(run, mlp, own_norm=moe)]


def _sublayer(run: Run, inner: list[Operation], own_norm: bool) -> list[Operation]:
    """Norm, the sublayer, and the addition, residual or mHC."""
    config, hidden, streams = run.config, hidden_bytes(run), stream_bytes(run)
    mask = hidden / run.value if config.hidden_dropout else 0
    first, last, norm_input = [], [Operation("add", mask)], hidden
    if run.mhc is not None:
        saved = streams + _mappings(run)
        first = [Operation(BOUNDARY, saved, streams, hidden, streams=(streams, 0, 1))]
        last = [Operation(MIX, hidden, hidden, streams, streams=(streams, 0, 1))]  # dropout: its seed only
        if own_norm and config.normalization == "RMSNorm" and run.streams <= FUSED_NORM_STREAMS:
            norm_input = 0  # the kernels compute it again from the streams
    modules = ("layernorm",) if own_norm else inner[0].modules
    norm = Operation("norm", norm_input + hidden, hidden, hidden, modules=modules)
    return [replace(operation, carried=streams) for operation in [*first, norm, *inner, *last]]


def _mappings(run: Run) -> float:
    """What a boundary keeps besides streams: H_res, H_post, H_pre and the projected values, float32; phi as the products
    read it."""
    n = run.streams
    rows = n * n + 2 * n
    padded = max(16, 1 << rows.bit_length())  # with a column for the RMS factor
    return run.residual_tokens * 4 * (rows + padded + 1) + padded * n * run.config.hidden_size * run.value


def _weight(run: Run, values: float) -> float:
    """Bytes of a weight that tensor parallelism divides."""
    return values / run.tensor * run.value


def _attention(run: Run) -> list[Operation]:
    config, hidden = run.config, hidden_bytes(run)
    each = run.tokens * run.value / run.tensor
    query_width = config.kv_channels * config.num_attention_heads
    key_width = config.kv_channels * config.num_query_groups
    query, key = query_width * each, key_width * each
    gate = query if config.attention_output_gate else 0
    before_norms = query + key if config.qk_layernorm else 0
    qkv = query + 2 * key + gate
    return [
        Operation("qkv", before_norms + gate, hidden, qkv, weight=_weight(run, config.hidden_size * qkv / each)),
        _core_attention(run, query, key, key, query),
        Operation("projection", query, query, hidden, weight=_weight(run, config.hidden_size * query_width)),
    ]


def _core_attention(run: Run, query: float, key: float, value: float, output: float) -> Operation:
    """Keeps query, key, value and the statistics. Its output is kept by the projection, which needs it under any recompute."""
    statistics = run.tokens * run.config.num_attention_heads / run.tensor * 4
    qkv = query + key + value
    dq = 2 * query  # the backward adds dQ up in float32
    return Operation("core attention", qkv + statistics, qkv, output, backward=dq, modules=("core_attn",))


def _mla(run: Run) -> list[Operation]:
    config, hidden, heads = run.config, hidden_bytes(run), run.config.num_attention_heads
    each = run.tokens * run.value * heads / run.tensor
    head = config.qk_head_dim + config.qk_pos_emb_head_dim
    query = key = head * each
    value = config.v_head_dim * each
    down = config.kv_lora_rank + config.qk_pos_emb_head_dim + (config.q_lora_rank or 0)
    compressed = down * run.residual_tokens * run.value
    up = config.kv_lora_rank * (config.qk_head_dim + config.v_head_dim)
    up += (config.q_lora_rank or config.hidden_size) * head
    core = _core_attention(run, query, key, value, value)
    projection = Operation("up projection", 0, compressed, query + key + value, weight=_weight(run, up * heads))
    if "mla_up_proj" in recompute_modules(config):  # then they are this operation's to compute again
        qkv = query + key + value
        projection = replace(projection, saved=qkv, source=0, modules=("mla_up_proj",))  # its input is kept as it is
        core = replace(core, saved=core.saved - qkv)
    norms = 2 if config.qk_layernorm else 1  # their inputs as well
    return [
        Operation(
            "down projection", norms * compressed, hidden, compressed, weight=config.hidden_size * down * run.value
        ),
        projection,
        core,
        Operation(
            "projection", value, value, hidden, weight=_weight(run, config.hidden_size * heads * config.v_head_dim)
        ),
    ]


def _activation(run: Run, rows: float, width: float, weighted: bool) -> tuple[float, float, float, float]:
    """Of an activation function: bytes of its input (``rows``, twice ``width`` if gated) and output, what it saves
    besides its input, and what its backward needs besides these gradients.

    weighted: a router's probability multiplies its rows.
    """
    config = run.config
    output = rows * width * run.value
    source = output * (2 if config.gated_linear_unit else 1)
    if config.use_te_activation_func or config.bias_activation_fusion:
        stored = source / run.value if config.activation_func_fp8_input_store else source
        return source, output, stored - source, 0
    saved = 2 * output if config.gated_linear_unit else 0  # act(gate), and linear + offset
    if not weighted:
        return source, output, saved, 0
    # The product's backward has three tensors of the wider type, before the activation's has begun.
    wide = 4 / run.value if config.moe_router_dtype == "fp32" else 1
    return source, output, saved + output, max(0, 3 * wide * output - source - output)


def _mlp(run: Run, width: int, modules: tuple[str, ...]) -> list[Operation]:
    name, hidden = modules[0], hidden_bytes(run)
    source, output, saved, backward = _activation(run, run.tokens, width / run.tensor, weighted=False)
    weight = _weight(run, run.config.hidden_size * width)
    return [
        Operation(f"{name} fc1", 0, hidden, source, weight=source / output * weight, modules=modules),
        Operation(f"{name} activation", source + saved, source, output, backward=backward, modules=modules),
        Operation(f"{name} fc2", output, output, hidden, weight=weight, modules=modules),
    ]


def _dense_mlp(run: Run) -> list[Operation]:
    return _mlp(run, run.config.ffn_hidden_size, ("mlp",))


def _moe(run: Run) -> list[Operation]:
    config, hidden = run.config, hidden_bytes(run)
    # Balanced routing. The ranks that hold an expert's tensor-parallel slices bring their tokens together.
    rows = run.residual_tokens * config.moe_router_topk * run.expert_tensor
    dispatched = rows * (config.moe_latent_size or config.hidden_size) * run.value
    source, output, saved, backward = _activation(run, rows, config.moe_ffn_hidden_size / run.expert_tensor, True)
    first, second = (values * run.value for values in grouped_weights(run))
    moe = ("moe",)
    shared: list[Operation] = []
    if config.moe_shared_expert_intermediate_size:
        shared = _mlp(run, config.moe_shared_expert_intermediate_size, ("shared_experts", "moe"))
    return [
        *shared,
        Operation("router", _router(run), hidden, modules=moe),
        # Tokens are permuted, exchanged and sorted by expert: two copies at a time. What came before the sorting stays
        # until the layer is done (MoELayer.forward has it in a variable); combining needs two more, what the experts gave
        # and that unsorted.
        Operation("dispatch", 0, hidden, dispatched, forward=dispatched, modules=moe),
        Operation("experts fc1", dispatched, dispatched, source, weight=first, modules=moe),
        Operation(
            "experts activation", source + saved + output, source, output, 0, backward, modules=("moe_act", *moe)
        ),
        Operation("experts fc2", 0, output, dispatched, weight=second, modules=moe),
        Operation("combine", 0, dispatched, hidden, forward=3 * dispatched, backward=dispatched, modules=moe),
    ]


def _router(run: Run) -> float:
    """Logits and scores, the map of rows (two int32 an expert and token) and the mask."""
    logit = 4 if run.config.moe_router_dtype == "fp32" else run.value
    return run.residual_tokens * run.config.num_moe_experts * (logit + 4 + 8 + 1)


def _embedding(run: Run) -> list[Operation]:
    hidden = hidden_bytes(run)
    mask = hidden / run.value if run.config.hidden_dropout else 0
    weight = _weight(run, run.vocabulary * run.config.hidden_size)
    return [Operation("embedding", mask, 0, stream_bytes(run), forward=hidden, weight=weight)]


def _loss(run: Run) -> list[Operation]:
    config, hidden = run.config, hidden_bytes(run)
    values = run.tokens * run.vocabulary / run.tensor
    logits = values * run.value
    te = config.cross_entropy_loss_fusion and config.cross_entropy_fusion_impl == "te"
    softmax = (
        logits if te else 4 * values
    )  # Transformer Engine leaves the gradient in the logits; Megatron keeps float32
    gathered = hidden * (run.tensor if config.sequence_parallel else 1)
    weight = _weight(run, run.vocabulary * config.hidden_size)
    return [
        *([] if run.mhc is None else [Operation("exit", stream_bytes(run), stream_bytes(run), hidden)]),
        Operation("final norm", 2 * hidden, hidden, hidden),
        Operation("logits", 0, gathered, logits, weight=weight),
        Operation("loss", softmax, 0 if te else logits, forward=logits),
    ]


def _recompute_streams(run: Run, layers: list[list[Operation]], block_length: int) -> list[list[Operation]]:
    streams, hidden = stream_bytes(run), hidden_bytes(run)
    sublayers = 2 * len(layers)
    result: list[list[Operation]] = []
    number = 0
    for layer in layers:
        changed = []
        first = number
        for operation in layer:
            # Megatron's block holds a layer's input until the layer returns: in the forward of its second sublayer as well.
            held = streams if number > first and first % block_length else 0
            operation = replace(operation, forward=operation.forward + held)
            if operation.streams is not None:
                place = number % block_length
                marked = (streams, place, min(block_length, sublayers - number + place))
                if operation.name == BOUNDARY:
                    kept = operation.saved - (streams if place else 0)
                    operation = replace(operation, saved=kept, streams=marked)
                else:  # its backward writes what the sublayer reads
                    operation = replace(operation, streams=marked, backward=operation.backward + hidden)
                    number += 1
            else:  # what the sublayer reads is there while it runs, forward and backward, and not in between
                forward, carried = operation.forward + hidden, operation.carried + hidden
                operation = replace(operation, forward=forward, carried=carried, reads_again=True)
                if operation.name == "norm":
                    operation = replace(operation, saved=operation.saved - hidden)
            changed.append(operation)
        result.append(changed)
    return result
