"""How a model's layers are cut into pipeline chunks, from its TransformerConfig alone."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.transformer_block import get_num_layers_to_build


def layers_of_chunk(config: Any, stage: int, number: int) -> int:
    """Decoder layers of a chunk.

    Args:
        stage: of the pipeline, from 0. number: of the chunk in this stage, from 0 (its virtual stage).
    """
    if config.pipeline_model_parallel_layout is not None:  # its own count asks for process groups
        count: int = config.pipeline_model_parallel_layout.layout[stage][number].count(LayerType.decoder)
        return count
    vp_stage = number if config.virtual_pipeline_model_parallel_size else None
    return get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=stage)


def check_mtp(config: Any) -> None:
    """Where there are layers of multi-token prediction, the last chunk must have a decoder layer as well.

    Megatron has the final norm, where streams end, right after the last decoder layer then: what goes on to another chunk
    would be one stream wide, and transfers are n.

    Raises:
        ValueError: naming the settings and the remedy, on every rank.
    """
    last = (config.virtual_pipeline_model_parallel_size or 1) - 1
    # 0 is not None to Megatron: it moves the norm as well.
    if config.mtp_num_layers is not None and not layers_of_chunk(config, config.pipeline_model_parallel_size - 1, last):
        raise ValueError(
            f"mHC with mtp_num_layers ({config.mtp_num_layers}): the last pipeline chunk has no decoder layer, and MTP layers "
            "must share theirs with the last one; change pipeline_model_parallel_layout (or "
            "account_for_loss_in_pipeline_split)"
        )
