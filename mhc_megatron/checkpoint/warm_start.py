"""Loading a residual (stock) checkpoint into an mHC model: leave out what the checkpoint can't have."""

from __future__ import annotations

from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedTensor

_MARK = "hyper_connection."

Removed = list[tuple[tuple[Any, ...], ShardedTensor]]


def remove_mhc(sharded_state_dict: dict, path: tuple[Any, ...] = ()) -> Removed:
    """Take mHC's tensors out of a sharded state dict, in place, before ``dist_checkpointing.load``.

    Returns:
        ``(path of keys, tensor)`` of what was removed, for `restore_mhc`.
    """
    removed: Removed = []
    for key, value in list(sharded_state_dict.items()):
        if isinstance(value, dict):
            removed += remove_mhc(value, (*path, key))
        elif isinstance(value, ShardedTensor) and _MARK in value.key:
            del sharded_state_dict[key]
            removed.append(((*path, key), value))
    return removed


def restore_mhc(state_dict: dict, removed: Removed) -> None:
    """Put the model's own values (its initialisation) where `remove_mhc` took tensors, in the loaded state dict."""
    for (*path, last), value in removed:
        target = state_dict
        for key in path:
            target = target.setdefault(key, {})
        target[last] = value.data
