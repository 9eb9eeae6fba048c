"""Settings of NCCL for links, by name: ``high-priority``, ``ctas=1-4`` (thread blocks of a transfer), ``cga=1`` (those of one
cluster). Megatron has them for pipeline groups: ``--high-priority-stream-groups``, ``--nccl-communicator-config-path``."""

from __future__ import annotations

import re
from typing import Any

KEPT = ("min_ctas", "max_ctas", "cga_cluster_size")


def wrong(setting: str) -> bool:
    """Whether it is none."""
    return setting != "high-priority" and not re.fullmatch(r"ctas=\d+-\d+|cga=\d+", setting)


def apply(options: Any, setting: str) -> None:
    """Put it into a `ProcessGroupNCCL.Options`.

    Raises:
        ValueError: for a setting that is none.
    """
    if wrong(setting):
        raise ValueError(f"{setting} is neither high-priority nor ctas=MIN-MAX nor cga=N")
    name, _, value = setting.partition("=")
    if name == "ctas":
        options.config.min_ctas, options.config.max_ctas = map(int, value.split("-"))
    elif name == "cga":
        options.config.cga_cluster_size = int(value)
    else:
        options.is_high_priority_stream = True


def keep(options: Any) -> tuple[Any, ...]:
    """What `restore` puts back."""
    return options.is_high_priority_stream, *(getattr(options.config, name) for name in KEPT)


def restore(options: Any, kept: tuple[Any, ...]) -> None:
    options.is_high_priority_stream, *values = kept
    for name, value in zip(KEPT, values, strict=True):
        setattr(options.config, name, value)
