"""Whether a checkpoint fits this run's mHC settings, from the arguments Megatron records in it."""

from __future__ import annotations

from typing import Any

from mhc_megatron.arguments import config_from_args, flag
from mhc_megatron.config import FUNCTIONAL_FIELDS


def is_warm_start(checkpoint_args: Any, args: Any, source: str, *, fresh_optimizer: bool) -> bool:
    """Compare a checkpoint's recorded arguments with this run's.

    Args:
        checkpoint_args: the arguments recorded in the checkpoint.
        args: this run's.
        source: where the checkpoint lies, for messages.
        fresh_optimizer: whether this run leaves the checkpoint's optimizer state alone (``--finetune``,
            ``--pretrained-checkpoint``, ``--no-load-optim``).

    Returns:
        True if the checkpoint is a residual (stock) one to be continued with mHC: it has no mHC parameters.

    Raises:
        ValueError: if it does not fit, naming the flag and the remedy.
    """
    theirs, ours = config_from_args(checkpoint_args), config_from_args(args)
    if theirs is None and ours is None:
        return False
    if ours is None:
        raise ValueError(
            f"the checkpoint in {source} is an mHC model; add --enable-mhc (its settings are recorded in it)"
        )
    if theirs is None:
        if not fresh_optimizer:
            raise ValueError(
                f"the checkpoint in {source} is of a model without mHC, so it has no optimizer state for mHC's parameters; "
                "to continue it with --enable-mhc add --finetune, or load it with --pretrained-checkpoint"
            )
        return True
    for name in FUNCTIONAL_FIELDS:
        if getattr(theirs, name) != getattr(ours, name):
            raise ValueError(
                f"the checkpoint in {source} was made with {flag(f'mhc_{name}')} {getattr(theirs, name)}, this run has "
                f"{getattr(ours, name)}; use the checkpoint's value, or another --load folder"
            )
    return False
