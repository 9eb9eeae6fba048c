"""Checkpoints of another kind than the run: refused with the reason, or a residual one continued with mHC.

Rebinds, in megatron.training.checkpointing: ``_load_base_checkpoint`` (compares the recorded settings; leaves mHC's tensors
out of what is loaded from a residual checkpoint) and ``load_args_from_checkpoint`` (``--use-checkpoint-args`` takes the mHC
settings too).
Why a spec can't: Megatron's strictness settings cover keys that a checkpoint has too many, not those it lacks.
Tested on: megatron-core 0.19.2.
Retired by: an upstream way to mark sharded tensors as optional.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from mhc_megatron.arguments import set_args
from mhc_megatron.checkpoint.compatibility import is_warm_start
from mhc_megatron.checkpoint.warm_start import remove_mhc, restore_mhc
from mhc_megatron.megatron_hooks.active import get_config, print_rank_0
from mhc_megatron.megatron_hooks.rebind import Rebinding

_MODULE = "megatron.training.checkpointing"
_taking_arguments = False
_warm_start = False


def _load_base_checkpoint(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def load_base_checkpoint(*args: Any, **kwargs: Any) -> Any:
        global _warm_start
        bound = signature.bind(*args, **kwargs).arguments
        sharded = bound.get("sharded_state_dict")
        # Megatron reads the arguments first (rank0=True), then the tensors.
        removed = remove_mhc(sharded) if sharded is not None and _warm_start else []
        result = original(*args, **kwargs)
        state_dict = result[0]
        if not state_dict:
            return result
        if removed:
            restore_mhc(state_dict, removed)
        recorded = state_dict.get("args")
        if recorded is not None and not _taking_arguments:
            run = bound["args"]
            fresh = (
                run.finetune or run.no_load_optim or bound["load_dir"] == getattr(run, "pretrained_checkpoint", None)
            )
            warm = is_warm_start(recorded, run, str(bound["load_dir"]), fresh_optimizer=fresh)
            if warm and not _warm_start:
                _say_warm_start(bound["load_dir"])
            _warm_start = warm
        return result

    return load_base_checkpoint


def _say_warm_start(load_dir: Any) -> None:
    config = get_config()
    keeps = (
        "the model starts as the same function"
        if config and config.init == "preserve"
        else ("--mhc-init paper does NOT keep the model's function; use --mhc-init preserve for that")
    )
    print_rank_0(f"continuing the residual checkpoint in {load_dir} with mHC: {keeps}")


def _load_args_from_checkpoint(original: Callable[..., Any]) -> Callable[..., Any]:
    def load_args_from_checkpoint(*args: Any, **kwargs: Any) -> Any:
        global _taking_arguments
        _taking_arguments = True
        try:
            result = original(*args, **kwargs)
        finally:
            _taking_arguments = False
        if isinstance(result, tuple):
            set_args(*result)
        return result

    return load_args_from_checkpoint


REBINDINGS = [
    Rebinding(_MODULE, "_load_base_checkpoint", _load_base_checkpoint),
    Rebinding(_MODULE, "load_args_from_checkpoint", _load_args_from_checkpoint),
]
