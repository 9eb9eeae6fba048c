"""L_r of ``--mhc-recompute``: the block length that a pipeline stage trains with, in training and in `plan`.

The paper's formula (`mhc_megatron.residual.recompute.automatic_length`) counts streams alone: all that are kept, and a whole
block's that the backward brings back. Here the stage's passes are played. Often the peak is where a block's streams are not back
yet, at the loss's logits or in the last layers, and by the time that a long block further up brings its own back, the layers
after it have let go of more. Then longer blocks need less.

The plan may be wrong: routing is never balanced, and counts are within a per cent of what was measured. So a length has to earn
its place beside the formula's:

- Wherever the peak may really be, it holds at most `WORST` times the streams that the formula's holds.
- Its peak is not above the formula's, by more than `MARGIN`, where a rank's experts get `LOADS` times their share, in all layers.
- Of those within `MARGIN` of the lowest peak, the one that the formula likes best is taken: the formula's own where nothing is to
  be gained.

Time is no criterion. Every boundary but a block's first costs one more mix in the backward: from blocks of 6 to blocks of 13
these are 11 % more of what recompute costs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

from mhc_megatron.plan.activations import chunk_pass
from mhc_megatron.plan.order import Compute, Place
from mhc_megatron.plan.peak import peak, stage_order
from mhc_megatron.plan.run import Run
from mhc_megatron.residual.recompute import automatic_length, microbatches_in_flight, streams_held

MARGIN = 0.005
WORST = 2
LOADS = (1.25, 1.5, 2)


@dataclass(frozen=True)
class BlockLength:
    """What was chosen for a stage.

    length: L_r in sublayers, and the peak of the stage's activations with it, in bytes. formula: the same two of the paper's
    formula. sublayers: of the stage's chunks.
    """

    length: int
    activations: float
    formula: int
    formula_activations: float
    sublayers: tuple[int, ...]

    @property
    def saved(self) -> float:
        """Bytes less than with the formula's length."""
        return self.formula_activations - self.activations


def choose_block_length(run: Run, stage: int) -> BlockLength:
    """The automatic L_r of a stage, with --mhc-recompute and whatever length the run has.

    The same on every rank: it depends on the run alone.
    """
    sublayers = tuple(2 * chunk.layers for chunk in run.chunks()[stage])
    longest = max(1, *sublayers)
    in_flight = microbatches_in_flight(run.group, Place(run.stages, run.chunks_per_stage, stage))
    formula = automatic_length(longest, in_flight)

    def held(length: int) -> tuple[int, int]:
        return streams_held(longest, in_flight, length), length

    order = stage_order(run, stage)
    peak_of = _peaks(run, stage, order)
    bounded = (length for length in range(1, longest + 1) if held(length)[0] <= WORST * held(formula)[0])
    peaks = {length: peak_of(length) for length in bounded}
    loads = LOADS if run.config.num_moe_experts else ()
    loaded = [_peaks(_loaded(run, load), stage, order) for load in loads]
    limits = [(1 + MARGIN) * of(formula) for of in loaded]
    left = dict(peaks)
    while True:
        enough = (1 + MARGIN) * min(left.values())
        chosen = min((length for length, needed in left.items() if needed <= enough), key=held)
        if all(of(chosen) <= limit for of, limit in zip(loaded, limits, strict=True)):  # as the formula's does
            return BlockLength(chosen, peaks[chosen], formula, peaks[formula], sublayers)
        del left[chosen]


def least_peak(run: Run, stage: int) -> tuple[int, float]:
    """The block length with the lowest peak of the stage's activations of all, and that peak in bytes; to compare with."""
    peak_of = _peaks(run, stage, stage_order(run, stage))
    peaks = {length: peak_of(length) for length in range(1, max(1, *(2 * c.layers for c in run.chunks()[stage])) + 1)}
    length = min(peaks, key=lambda length: peaks[length])
    return length, peaks[length]


def _peaks(run: Run, stage: int, order: list[Compute]) -> Callable[[int], float]:
    """The peak of the stage's activations by block length."""
    kinds, alike = [], {}
    for chunk in run.chunks()[stage]:
        layers = range(chunk.first_layer, chunk.first_layer + chunk.layers)
        kinds.append((tuple(map(run.is_moe, layers)), chunk.embedding, chunk.loss))
        alike[kinds[-1]] = chunk  # an interleaved schedule's chunks mostly are: each kind is walked once

    def of(length: int) -> float:
        passes = {kind: chunk_pass(run, chunk, length) for kind, chunk in alike.items()}
        return peak(order, [passes[kind] for kind in kinds])[0]

    return of


def _loaded(run: Run, load: float) -> Run:
    """The run on a rank whose experts get so many times their share of the tokens, in every layer and microbatch."""
    config = copy.copy(run.config)
    config.moe_router_topk *= load  # as many rows a token; the router itself is counted by the number of experts
    return replace(run, config=config)
