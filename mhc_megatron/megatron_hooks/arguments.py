"""``--enable-mhc`` and ``--mhc-*`` in an unmodified training script.

Rebinds: ``add_megatron_arguments`` (adds the flags), ``parse_args`` (a YAML configuration drops them: refuse) and
``validate_args`` (checks them, with the checkpoint to be loaded, before any work), in megatron.training.arguments.
Why a spec can't: the parser is built inside Megatron.
Tested on: megatron-core 0.19.2.
Retired by: an upstream entry point for plugins' arguments.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from mhc_megatron.arguments import add_arguments, check_args
from mhc_megatron.checkpoint.compatibility import is_warm_start
from mhc_megatron.megatron_hooks.active import print_rank_0, set_config
from mhc_megatron.megatron_hooks.rebind import Rebinding

_MODULE = "megatron.training.arguments"


def _add_megatron_arguments(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_megatron_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = add_arguments(original(parser))
        _escape_broken_help(parser)
        return parser

    return add_megatron_arguments


def _escape_broken_help(parser: argparse.ArgumentParser) -> None:
    """Megatron 0.19.2's ``--help`` ends in an exception: one of its help texts has a bare ``%``."""
    formatter = parser._get_formatter()
    for action in parser._actions:
        if not action.help:
            continue
        try:
            formatter._expand_help(action)
        except (ValueError, TypeError, KeyError):
            action.help = action.help.replace("%", "%%")


def _parse_args(original: Callable[..., Any]) -> Callable[..., Any]:
    def parse_args(*args: Any, **kwargs: Any) -> Any:
        parsed = original(*args, **kwargs)
        if not hasattr(parsed, "enable_mhc") and "--enable-mhc" in sys.argv:
            raise ValueError("--enable-mhc: --yaml-cfg makes Megatron drop every flag, this one too; use flags instead")
        return parsed

    return parse_args


def _validate_args(original: Callable[..., Any]) -> Callable[..., Any]:
    def validate_args(args: Any, *rest: Any, **kwargs: Any) -> Any:
        config = check_args(args)  # first: Megatron's own checks may fail on what conflicts, and say less
        result = original(args, *rest, **kwargs)
        check_args(args)  # again, with what Megatron filled in
        _check_checkpoint(args)
        set_config(config, args)
        if config is not None:
            print_rank_0(
                f"mode {config.mode}, {config.num_streams} streams, {config.sinkhorn_iterations} Sinkhorn iterations, "
                f"profile {config.profile}, init {config.init}, backend {config.backend}"
            )
        return result

    return validate_args


def _check_checkpoint(args: Any) -> None:
    from megatron.core import dist_checkpointing
    from megatron.training import checkpointing

    for load_arg in ("load", "pretrained_checkpoint"):
        folder = getattr(args, load_arg, None)
        if not checkpointing.checkpoint_exists(folder):
            continue
        path = checkpointing.get_load_checkpoint_path_by_args(args, load_arg)
        if dist_checkpointing.check_is_distributed_checkpoint(path):
            recorded = dist_checkpointing.load_common_state_dict(path).get("args")
            fresh = load_arg == "pretrained_checkpoint" or args.finetune or args.no_load_optim
            if recorded is not None:
                is_warm_start(recorded, args, str(folder), fresh_optimizer=fresh)
        return  # Megatron loads the second only if the first is empty


REBINDINGS = [
    Rebinding(_MODULE, "add_megatron_arguments", _add_megatron_arguments),
    Rebinding(_MODULE, "parse_args", _parse_args),
    Rebinding(_MODULE, "validate_args", _validate_args),
]
