"""The command line's settings, for the hooks that act on them; and what rank 0 is told."""

from __future__ import annotations

import os
from typing import Any

from mhc_megatron.config import MHCConfig

_config: MHCConfig | None = None
_args: Any = None


def get_config() -> MHCConfig | None:
    """The MHCConfig from ``--enable-mhc``; None if it was not given."""
    return _config


def get_args() -> Any:
    """Megatron's arguments, validated, with or without ``--enable-mhc``; None if there are none."""
    return _args


def set_config(config: MHCConfig | None, args: Any = None) -> None:
    """Called by the arguments hook once the arguments are checked."""
    global _config, _args
    _config, _args = config, args


def print_rank_0(message: str) -> None:
    """Print on global rank 0 (process groups need not exist yet)."""
    if os.environ.get("RANK", "0") == "0":
        print(f"mhc-megatron: {message}", flush=True)
