"""A GPT training script for a pip-installed megatron-core, as a user would have one: nothing in it knows of mHC.

Run by the quickstart and by examples/ through ``python -m mhc_megatron pretrain``, with and without ``--enable-mhc``. Reads
Megatron's indexed datasets (``--data-path`` and the like, or ``--mock-data``) through GPTDataset and trains through
``megatron.training.pretrain``, under any tensor, context, expert or pipeline layout.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.utils import get_blend_and_blend_per_split

Batch = dict[str, torch.Tensor]


def next_batch(data_iterator: Iterator[Batch], vp_stage: int | None) -> Batch | None:
    """The next microbatch, on the GPU; None for pipeline chunks that need no data."""
    if not reads_data(vp_stage):
        return None
    batch = {name: tensor.cuda(non_blocking=True) for name, tensor in next(data_iterator).items()}
    cp_group = parallel_state.get_context_parallel_group()
    return get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=cp_group)


def reads_data(vp_stage: int | None) -> bool:
    """Whether this pipeline chunk needs data: the first for its tokens, the last for its labels."""
    return parallel_state.is_pipeline_first_stage(
        ignore_virtual=False, vp_stage=vp_stage
    ) or parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)


def loss_function(loss_mask: Any, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Summed loss, number of tokens, and what Megatron reports, summed over data-parallel ranks."""
    loss = torch.sum(output.view(-1).float() * loss_mask.view(-1))
    tokens = loss_mask.sum().detach().to(torch.int)
    return loss, tokens, {"lm loss": torch.stack([loss.detach(), tokens.to(loss.dtype)])}


def forward_step(data_iterator: Iterator[Batch], model: torch.nn.Module) -> Any:
    """One microbatch through one pipeline chunk."""
    batch = next_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    if batch is None:
        # The local attention of a middle chunk still asks for the mask; it is the same causal one for every batch.
        return model(None, None, causal_mask(), labels=None), functools.partial(loss_function, None)
    # Layers of multi-token prediction have losses of their own, and take the mask.
    given = {"labels": batch["labels"], "loss_mask": batch["loss_mask"]}
    output = model(batch["tokens"], batch["position_ids"], causal_mask(), **given)
    return output, functools.partial(loss_function, batch["loss_mask"])


def causal_mask() -> torch.Tensor | None:
    """[1, 1, s, s], True where attention is NOT allowed; None for Transformer Engine, whose attention is causal by itself."""
    if get_args().transformer_impl == "transformer_engine":
        return None
    length = get_args().seq_length
    return torch.ones(length, length, dtype=torch.bool, device="cuda").triu(1)[None, None]


def datasets(samples: list[int], vp_stage: int | None = None) -> Any:
    """Training, validation and test datasets with as many samples as Megatron asks for."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        path_to_cache=args.data_cache_path,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=False,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=False,
        mmap_bin_files=args.mmap_bin_files,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
    )
    kind = MockGPTDataset if args.mock_data else GPTDataset
    return BlendedMegatronDatasetBuilder(kind, samples, functools.partial(reads_data, vp_stage), config).build()


datasets.is_distributed = True  # type: ignore[attr-defined]  # every rank builds its own: no broadcast needed

if __name__ == "__main__":
    args = parse_and_validate_args()
    if args.reset_attention_mask:
        raise ValueError(
            "--reset-attention-mask: this script knows only the causal mask; use Megatron-LM's pretrain_gpt.py"
        )
    config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    pretrain(config, datasets, ModelType.encoder_or_decoder, forward_step)
