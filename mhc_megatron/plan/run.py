"""What is planned: a model, its layout over GPUs and its batch, in one place; and the pipeline's chunks as Megatron cuts them."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import Any

from mhc_megatron.arguments import check_args
from mhc_megatron.config import MHCConfig
from mhc_megatron.pipeline.cut import layers_of_chunk
from mhc_megatron.pipeline.state import communication, transport_of
from mhc_megatron.residual.backend import why_reference


class NotCoveredError(ValueError):
    """Arguments that Megatron and mHC accept, and the planner does not count."""


@dataclass(frozen=True)
class Chunk:
    """The part of a model that one rank computes in one go: a pipeline stage, or under an interleaved schedule one of its pieces.

    stage, number: the pipeline rank; which of the rank's chunks. first_layer: of all layers, from 0. embedding, loss:
    whether it has the model's ends.
    """

    stage: int
    number: int
    first_layer: int
    layers: int
    embedding: bool
    loss: bool


@dataclass(frozen=True)
class Run:
    """A model and its layout.

    config: Megatron's TransformerConfig. mhc: None for residual connections. microbatches: of one pipeline in one step.
    vocabulary: padded. tied: embedding and output weights are one. learned_positions: rows of a learned position embedding.
    distributed_optimizer: optimizer states are sharded over data parallelism. gradients: ``main`` (Megatron's buffers;
    weight gradients pass through memory of their own first, unless fused) or ``plain`` (PyTorch's, no optimizer: a bare
    forward and backward). gradient_bytes: of a main gradient. state_bytes: of a parameter's master copy and of its two moments.
    stages_first: ranks of a pipeline come before those of data parallelism (``--use-tp-pp-dp-mapping``).
    """

    config: Any
    mhc: MHCConfig | None
    world_size: int
    sequence: int
    micro_batch: int
    microbatches: int
    vocabulary: int
    tied: bool = False
    learned_positions: int = 0
    distributed_optimizer: bool = True
    gradients: str = "main"
    gradient_bytes: int = 4
    state_bytes: tuple[int, int] = (4, 8)
    gpus_per_node: int = 8
    stages_first: bool = False

    @classmethod
    def from_arguments(cls, args: argparse.Namespace, config: Any, gpus_per_node: int = 8) -> Run:
        """The run of parsed arguments (`mhc_megatron.dry_run.parse`).

        Raises:
            NotCoveredError: naming the flag, for what the planner does not cover.
        """
        flag = not_covered(args)
        if flag is not None:
            raise NotCoveredError(
                f"{flag} is not covered: the planner counts what Transformer Engine modules in bf16, fp16 or fp32 "
                "and Adam keep; leave it out to plan without it"
            )
        run = replace(cls.from_covered(args, config), gpus_per_node=gpus_per_node)
        reason = None if run.mhc is None else why_reference(run.mhc, config)
        if reason is not None:
            raise NotCoveredError(
                f"mHC on the slow reference is not covered ({reason}): the planner counts what its Triton kernels keep and move"
            )
        return run

    @classmethod
    def from_covered(cls, args: argparse.Namespace, config: Any) -> Run:
        """The same without a look at what is covered (`not_covered`)."""
        learned = args.position_embedding_type == "learned_absolute"
        precision_aware = args.use_precision_aware_optimizer
        return cls(
            config=config,
            mhc=check_args(args),
            world_size=args.world_size,
            sequence=args.seq_length,
            micro_batch=args.micro_batch_size,
            microbatches=args.global_batch_size // (args.micro_batch_size * args.data_parallel_size),
            vocabulary=args.padded_vocab_size,
            tied=not args.untie_embeddings_and_output_weights,
            learned_positions=args.max_position_embeddings if learned else 0,
            stages_first=args.use_tp_pp_dp_mapping,
            distributed_optimizer=args.use_distributed_optimizer,
            gradient_bytes=4 if args.accumulate_allreduce_grads_in_fp32 else config.params_dtype.itemsize,
            state_bytes=(
                args.main_params_dtype.itemsize if precision_aware else 4,
                args.exp_avg_dtype.itemsize + args.exp_avg_sq_dtype.itemsize if precision_aware else 8,
            ),
        )

    @property
    def streams(self) -> int:
        """n: 1 without mHC."""
        return self.mhc.num_streams if self.mhc is not None else 1

    @property
    def communication(self) -> str:
        """Of its pipeline (`mhc_megatron.pipeline.state.communication`); without mHC, what it would be with it."""
        return communication(self.mhc or MHCConfig(), self.config, self.leaves_node)

    @property
    def copies(self) -> bool:
        """Whether copy engines move what goes over links of their own. Under TP and CP Megatron has the GPU's work in one queue
        (CUDA_DEVICE_MAX_CONNECTIONS=1), and they can't."""
        one_queue = self.tensor > 1 or self.config.context_parallel_size > 1
        return transport_of(self.mhc or MHCConfig()) == "copy-engine" and not self.leaves_node and not one_queue

    @property
    def leaves_node(self) -> bool:
        """Whether transfers of some pipeline do. Ranks of a pipeline lie side by side, or all over the job."""
        side_by_side = self.tensor * self.config.context_parallel_size * self.stages
        span, node = side_by_side if self.stages_first else self.world_size, self.gpus_per_node
        return self.world_size > node and (span > node or node % span != 0)

    @property
    def tensor(self) -> int:
        return self.config.tensor_model_parallel_size

    @property
    def expert_tensor(self) -> int:
        return self.config.expert_tensor_parallel_size or self.tensor

    @property
    def stages(self) -> int:
        return self.config.pipeline_model_parallel_size

    @property
    def chunks_per_stage(self) -> int:
        return self.config.virtual_pipeline_model_parallel_size or 1

    @property
    def data(self) -> int:
        """Ranks over which a dense parameter's optimizer state is sharded: data parallel times context parallel."""
        return self.world_size // (self.tensor * self.stages)

    @property
    def expert_data(self) -> int:
        """The same of an expert's parameter."""
        return self.world_size // (self.expert_tensor * self.config.expert_model_parallel_size * self.stages)

    @property
    def tokens(self) -> int:
        """Of one microbatch on one context-parallel rank."""
        return self.sequence * self.micro_batch // self.config.context_parallel_size

    @property
    def residual_tokens(self) -> float:
        """Tokens between sublayers: sequence parallelism divides them by the tensor-parallel size."""
        return self.tokens / self.tensor if self.config.sequence_parallel else self.tokens

    @property
    def value(self) -> int:
        """Bytes of an activation's value."""
        return self.config.params_dtype.itemsize

    @property
    def group(self) -> int:
        """Microbatches that go through a chunk one after the other, under an interleaved schedule."""
        return self.config.microbatch_group_size_per_vp_stage or self.stages

    def chunks(self) -> list[list[Chunk]]:
        """Of every stage, in order."""
        placed: list[list[Chunk]] = [[] for _ in range(self.stages)]
        first_layer = 0
        for number in range(self.chunks_per_stage):  # the model's order: all stages, then their next chunks
            for stage in range(self.stages):
                layers, embedding, loss = _cut(self.config, stage, number)
                placed[stage].append(Chunk(stage, number, first_layer, layers, embedding, loss))
                first_layer += layers
        return placed

    def is_moe(self, layer: int) -> bool:
        """Whether a layer (from 0) is a mixture of experts."""
        config = self.config
        if not config.num_moe_experts:
            return False
        pattern = config.moe_layer_freq
        return layer % pattern == 0 if isinstance(pattern, int) else bool(pattern[layer])


def _cut(config: Any, stage: int, number: int) -> tuple[int, bool, bool]:
    """Layers of a chunk, and whether it has the embedding and the loss."""
    last = (config.virtual_pipeline_model_parallel_size or 1) - 1
    embedding = stage == 0 and number == 0
    loss = stage == config.pipeline_model_parallel_size - 1 and number == last
    return layers_of_chunk(config, stage, number), embedding, loss


def not_covered(args: argparse.Namespace, activations: bool = False) -> str | None:
    """The first flag, with its value, that the planner does not count; None if there is none.

    activations: look at what these depend on alone, not at the optimizer's state.
    """
    flags = {
        "--transformer-impl": args.transformer_impl != "transformer_engine" and args.transformer_impl,
        "--fp8-format": args.fp8,
        "--fp4-format": args.fp4,
        "--mtp-num-layers": args.mtp_num_layers,
        "--hybrid-layer-pattern": getattr(args, "hybrid_layer_pattern", None),
        "--use-megatron-fsdp": args.use_megatron_fsdp,
        "--cpu-offloading-num-layers": args.cpu_offloading_num_layers,
    }
    if not activations:
        flags["--optimizer-cpu-offload"] = args.optimizer_cpu_offload
        flags["--optimizer"] = args.optimizer != "adam" and args.optimizer
    return next((f"{flag} {value}" for flag, value in flags.items() if value), None)
