"""L_r of ``--mhc-recompute``, as the planner finds it for the model that is being built (called by the model hook)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

from mhc_megatron.config import MHCConfig
from mhc_megatron.megatron_hooks.active import get_args
from mhc_megatron.plan.block_length import BlockLength, choose_block_length
from mhc_megatron.plan.run import Run, not_covered
from mhc_megatron.residual.recompute import PlannedLength, set_planned_length

_GIB = 2**30


def plan_block_length(mhc_config: MHCConfig, config: Any, vocabulary: int, stage: int) -> None:
    """Leave the automatic L_r, or why the planner can't choose it, on a model's TransformerConfig.

    Args:
        mhc_config, config: the model's.
        vocabulary: rows of its embedding.
        stage: this process's place in the pipeline.
    """
    args, full = get_args(), config.recompute_granularity == "full"
    if args is not None and mhc_config.recompute and not mhc_config.recompute_sublayers and not full:
        set_planned_length(config, _planned(args, mhc_config, config, vocabulary, stage))


def _planned(args: Any, mhc_config: MHCConfig, config: Any, vocabulary: int, stage: int) -> PlannedLength:
    try:
        flag = not_covered(args, activations=True)
        if flag is not None:
            return PlannedLength(None, (), f"the planner does not cover {flag}")
        run = replace(Run.from_covered(args, config), mhc=mhc_config, vocabulary=vocabulary)
        lengths = _of_all_stages(run)
        own = lengths[stage]
    except Exception as error:  # a block's length is not worth a run: the formula will do, and rank 0 says so
        return PlannedLength(None, (), f"the planner fails on this model ({error!r}); please report it")
    return PlannedLength(own.length, own.sublayers, _told(lengths))


_latest: list[tuple[Any, list[BlockLength]]] = []
"""A rank's chunks are built one after the other, with equal configs, and ask the same."""


def _of_all_stages(run: Run) -> list[BlockLength]:
    """On every rank: rank 0 tells of them all, and if the planner fails, it fails on all ranks."""
    known = {field.name: getattr(run.config, field.name) for field in fields(run.config)}
    # Initialisers are functions of their own in every config.
    asked = replace(run, config=None), {name: value for name, value in known.items() if not callable(value)}
    if not (_latest and _latest[0][0] == asked):
        _latest[:] = [(asked, [choose_block_length(run, number) for number in range(run.stages)])]
    return _latest[0][1]


def _told(lengths: list[BlockLength]) -> str:
    """Of all stages in order: how long their blocks are, and what that saves."""
    where = f" in pipeline stages 0 to {len(lengths) - 1}" if len(lengths) > 1 else ""
    taken = _each(
        of.length if any(of.sublayers) else "-" for of in lengths
    )  # an embedding or a loss alone has no blocks
    blocks = f"blocks of {taken} sublayers{where}"
    if all(of.length == of.formula for of in lengths):
        return f"{blocks}, by the formula; the planner finds none that needs noticeably less"
    saved = _each(f"{of.saved / _GIB:.2f}" for of in lengths)
    return f"{blocks}, by the planner's count {saved} GiB less than with the formula's {_each(of.formula for of in lengths)}"


def _each(values: Iterable[Any]) -> str:
    """One for all stages if they are the same."""
    texts = [str(value) for value in values]
    return texts[0] if len(set(texts)) == 1 else " | ".join(texts)
