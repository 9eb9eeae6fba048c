"""Flags <-> MHCConfig: one flag a field, under one heading of ``--help``."""

from __future__ import annotations

import argparse
import dataclasses
import re
from typing import Any

from mhc_megatron.config import FUNCTIONAL_FIELDS, MHCConfig
from mhc_megatron.conflicts import check_conflicts


def flag(name: str) -> str:
    """A Megatron setting's flag: ``fp32_residual_connection`` is ``--fp32-residual-connection``."""
    return "--" + name.replace("_", "-")


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add ``--enable-mhc`` and a ``--mhc-*`` flag for every field of MHCConfig."""
    group = parser.add_argument_group("manifold-constrained hyper-connections (mhc-megatron)")
    group.add_argument("--enable-mhc", action="store_true", help="replace the residual connections by mHC")
    for field in dataclasses.fields(MHCConfig):
        name, help_ = flag(f"mhc_{field.name}"), field.metadata["help"]
        if field.default != "":
            help_ += f" (default: {field.default})"
        if isinstance(field.default, bool):
            group.add_argument(name, action="store_true", help=help_)
        else:
            group.add_argument(
                name,
                type=type(field.default),
                default=field.default,
                choices=field.metadata["choices"],
                help=help_,
            )
    return parser


def config_from_args(args: Any) -> MHCConfig | None:
    """The MHCConfig of parsed arguments, None without ``--enable-mhc``.

    Raises:
        ValueError: naming the flag, for a value out of range or an ``--mhc-*`` flag without ``--enable-mhc``.
    """
    values: dict[str, Any] = {f.name: getattr(args, f"mhc_{f.name}", f.default) for f in dataclasses.fields(MHCConfig)}
    if not getattr(args, "enable_mhc", False):
        for field in dataclasses.fields(MHCConfig):
            if values[field.name] != field.default:
                raise ValueError(
                    f"{flag(f'mhc_{field.name}')} {values[field.name]} has no effect without --enable-mhc; "
                    "add --enable-mhc or remove it"
                )
        return None
    try:
        return MHCConfig(**values)
    except ValueError as error:
        raise ValueError(re.sub(r"MHCConfig\.(\w+)", lambda m: flag(f"mhc_{m[1]}"), str(error))) from None


def set_args(args: Any, checkpoint_args: Any) -> None:
    """Take the mHC settings of a checkpoint's arguments (``--use-checkpoint-args``)."""
    if not getattr(checkpoint_args, "enable_mhc", False):
        return
    args.enable_mhc = True
    for name in FUNCTIONAL_FIELDS:
        setattr(args, f"mhc_{name}", getattr(checkpoint_args, f"mhc_{name}"))


def check_args(args: Any) -> MHCConfig | None:
    """`config_from_args`, and with ``--enable-mhc`` every setting it can't be combined with.

    Raises:
        ValueError: naming the flag and the remedy.
    """
    config = config_from_args(args)
    if config is not None:
        check_conflicts(args, flag)
    return config
