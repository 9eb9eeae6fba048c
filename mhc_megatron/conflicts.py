"""Megatron settings that mHC can't be combined with: one list, checked on the arguments and on a TransformerConfig."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Conflict:
    """A setting by its name in Megatron (flag: with dashes), when it conflicts, and what to do about it."""

    name: str
    holds: Callable[[Any], bool]
    remedy: str


def _is_set(value: Any) -> bool:
    return bool(value)


CONFLICTS = (
    Conflict(
        "fp32_residual_connection",
        _is_set,
        "it converts the residual to float32, which with mHC is not one tensor; remove it (mHC mixes the streams in "
        "float32 already)",
    ),
    Conflict(
        "recompute_modules",
        lambda modules: "layernorm" in (modules or ()),
        "'layernorm' discards the residual together with the norm's output; take 'layernorm' out of the list",
    ),
    Conflict("enable_mhc_connections", _is_set, "that is Megatron's own mHC; use one of the two"),
    Conflict("enable_hyper_connections", _is_set, "that is Megatron's own hyper-connections; use one of the two"),
    Conflict(
        "overlap_moe_expert_parallel_comm",
        _is_set,
        "its schedule carries the residual as one tensor; not supported with mHC in this release, remove it",
    ),
    Conflict(
        "cuda_graph_impl",
        lambda impl: impl not in (None, "none"),
        "CUDA graphs with mHC are not supported in this release; use --cuda-graph-impl none",
    ),
    Conflict(
        "fine_grained_activation_offloading",
        _is_set,
        "it offloads the residual as one tensor; not supported with mHC in this release, remove it",
    ),
    Conflict(
        "cpu_offloading_num_layers",
        _is_set,
        "Transformer Engine's offloading gives a saved tensor back in its own layer's backward alone, and mHC's recompute asks "
        "for those of earlier layers; not supported with mHC in this release, remove it",
    ),
    Conflict(
        "inference_fuse_tp_communication",
        _is_set,
        "it adds the residual inside the linear layer; not supported with mHC, remove it",
    ),
    Conflict("hybrid_layer_pattern", _is_set, "mHC converts GPTModel only; hybrid models are not supported yet"),
    Conflict(
        "use_megatron_fsdp", _is_set, "FSDP with mHC is not supported in this release; use --use-distributed-optimizer"
    ),
    Conflict(
        "use_torch_fsdp2", _is_set, "FSDP with mHC is not supported in this release; use --use-distributed-optimizer"
    ),
)


def check_conflicts(settings: Any, describe: Callable[[str], str] = str) -> None:
    """Raise for the first conflicting setting.

    Args:
        settings: parsed arguments or a TransformerConfig; what it lacks is not checked.
        describe: how to name a setting in the message.

    Raises:
        ValueError: naming the setting, its value and the remedy.
    """
    active = not hasattr(settings, "recompute_granularity") or settings.recompute_granularity == "selective"
    for conflict in CONFLICTS:
        value = getattr(settings, conflict.name, None)
        if conflict.name == "recompute_modules" and not active:
            continue
        if conflict.holds(value):
            raise ValueError(f"mHC can't be used with {describe(conflict.name)} ({value!r}): {conflict.remedy}")
