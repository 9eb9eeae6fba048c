"""Common ground of the modules that stand where Megatron has a norm, and hold that norm inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.utils import sharded_state_dict_default
from megatron.core.utils import get_tensor_model_parallel_group_if_none
from torch import nn

NormBuilder = Any  # Callable[..., nn.Module], or a ModuleSpec


class NormWrapper(nn.Module):
    """Holds the wrapped norm as ``norm`` and keeps stock checkpoints loadable.

    In distributed checkpoints the norm keeps the key it has without mHC. A state dict of a model without mHC (Megatron's
    ``torch`` format) loads too: its ``<name>.weight`` is taken for ``<name>.norm.weight``.
    """

    def __init__(self, norm_builder: NormBuilder, config: Any, hidden_size: int, eps: float):
        super().__init__()
        build = build_module if isinstance(norm_builder, ModuleSpec) else _call
        self.norm = build(norm_builder, config=config, hidden_size=hidden_size, eps=eps)
        self.tp_group: Any = None  # the enclosing layer sets its own; None is Megatron's default group
        self.register_load_state_dict_pre_hook(_accept_stock_keys)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Megatron's sharded state dict, the norm's tensors under their stock keys."""
        sharded: dict[str, Any] = {}
        # A norm is not told its process groups; without the right one, replicas would claim to be the same shard.
        tp_group = get_tensor_model_parallel_group_if_none(self.tp_group)
        for name, child in self.named_children():
            child_sharded = sharded_state_dict_default(
                child, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=tp_group
            )
            if child is self.norm:
                replace_prefix_for_sharding(child_sharded, f"{prefix}norm.", prefix)
            sharded.update(child_sharded)
        return sharded


def _call(builder: Callable[..., nn.Module], **kwargs: Any) -> nn.Module:
    return builder(**kwargs)


def _accept_stock_keys(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in module.norm.state_dict():  # type: ignore[union-attr]
        stock, ours = prefix + name, f"{prefix}norm.{name}"
        if stock in state_dict and ours not in state_dict:
            state_dict[ours] = state_dict.pop(stock)
