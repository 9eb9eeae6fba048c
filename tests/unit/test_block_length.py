"""L_r of --mhc-recompute: what the planner finds, that training takes it, and where training falls back to the formula."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import subprocess
import sys
from typing import Any

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer import TransformerConfig

from mhc_megatron import MHCConfig, to_mhc_spec
from mhc_megatron.dry_run import parse
from mhc_megatron.megatron_hooks import planned
from mhc_megatron.megatron_hooks.active import get_args, set_config
from mhc_megatron.megatron_hooks.planned import plan_block_length
from mhc_megatron.plan.block_length import LOADS, MARGIN, WORST, choose_block_length, least_peak
from mhc_megatron.plan.memory import stage_memory, variant
from mhc_megatron.plan.run import Run
from mhc_megatron.residual import recompute
from mhc_megatron.residual.input import HyperConnectionInput
from mhc_megatron.residual.recompute import PlannedLength, automatic_length, block_length, microbatches_in_flight
from tests import models

RECOMPUTE = MHCConfig(recompute=True, backend="triton", sinkhorn_iterations=2)
MANY_TOKENS = 20_000  # a vocabulary with logits that are the peak of a small model


def make_run(layers: int, stages: int = 1, vocabulary: int = 96, **settings: Any) -> Run:
    config = models.make_config(
        num_layers=layers, pipeline_model_parallel_size=stages, pipeline_dtype=torch.float32, **settings
    )
    return Run(config, RECOMPUTE, stages, models.SEQUENCE, models.MICROBATCH, 8 * stages, vocabulary)


MOE = {**models.MOE, "moe_layer_freq": 1, "num_moe_experts": 8, "moe_router_topk": 4}
RUNS = {
    "moe, a pipeline": make_run(24, 4, **MOE),
    "moe, interleaved": make_run(24, 2, virtual_pipeline_model_parallel_size=2, overlap_p2p_comm=True, **MOE),
    # Where more than a balanced share of tokens makes the best length worse than the formula's.
    "moe, a pipeline, logits": make_run(40, 4, MANY_TOKENS, **(MOE | {"moe_ffn_hidden_size": 16})),
    "moe, recomputed": make_run(
        8, 4, 2000, **(MOE | {"moe_ffn_hidden_size": 64}), recompute_granularity="selective", recompute_modules=["moe"]
    ),
    "moe, wide experts": make_run(12, **(MOE | {"moe_ffn_hidden_size": 256})),
    "dense, logits": make_run(12, vocabulary=MANY_TOKENS, **models.DENSE),
    "dense, deep": make_run(40, 2, **models.DENSE),
}


# What the planner finds, against every length there is.


def activations(run: Run, stage: int, length: int) -> float:
    mhc = dataclasses.replace(run.mhc, recompute_sublayers=length)
    return stage_memory(dataclasses.replace(run, mhc=mhc), stage).activations


def loaded(run: Run, load: float) -> Run:
    """A rank whose experts get more than their share: as if tokens went to more experts."""
    config = copy.copy(run.config)
    config.moe_router_topk = round(load * config.moe_router_topk)
    return dataclasses.replace(run, config=config)


@pytest.mark.parametrize("kind", RUNS)
def test_chosen_length(kind: str) -> None:
    run = RUNS[kind]
    for stage in range(run.stages):
        chosen, place = choose_block_length(run, stage), stage_memory(run, stage)
        longest = max(chosen.sublayers)
        assert (place.block_length, place.activations) == (chosen.length, chosen.activations)
        peaks = {length: activations(run, stage, length) for length in range(1, longest + 1)}
        assert chosen.activations == peaks[chosen.length]
        assert chosen.formula_activations == peaks[chosen.formula]
        optimum, least = least_peak(run, stage)
        assert least == peaks[optimum] == min(peaks.values())
        assert chosen.activations <= (1 + MARGIN) * chosen.formula_activations
        # A rank that gets more tokens than its share is not the worse for it.
        for load in LOADS if run.config.num_moe_experts else ():
            more = loaded(run, load)
            limit = activations(more, stage, chosen.formula)
            assert activations(more, stage, chosen.length) <= (1 + MARGIN) * limit
        # Nor, wherever the peak is, by more than so much; and nothing noticeably better would have kept to that, except what the
        # loads forbid.
        in_flight = place.in_flight
        held = {length: in_flight * len(range(0, longest, length)) + length for length in peaks}
        assert held[chosen.formula] == min(held.values())
        assert held[chosen.length] <= WORST * held[chosen.formula]
        if not run.config.num_moe_experts:
            lowest = min(peak for length, peak in peaks.items() if held[length] <= WORST * held[chosen.formula])
            near = [length for length, peak in peaks.items() if peak <= (1 + MARGIN) * lowest]
            assert chosen.length in near
            assert held[chosen.length] == min(held[length] for length in near)


def test_logits_make_longer_blocks_free() -> None:
    """With the peak at the loss, where no block's streams are back, fewer and longer blocks need less."""
    chosen = choose_block_length(RUNS["dense, logits"], 0)
    assert chosen.length > chosen.formula
    assert chosen.saved > 0


def test_formula_where_nothing_is_gained() -> None:
    run = make_run(2, vocabulary=100 * MANY_TOKENS, **models.DENSE)  # so many logits that streams don't matter
    chosen = choose_block_length(run, 0)
    assert chosen.length == chosen.formula == automatic_length(4, 1)
    assert choose_block_length(variant(run, "mhc"), 0) == chosen


# Training.

LAUNCH = """
--num-layers 12 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 16
--micro-batch-size 2 --global-batch-size 16 --train-iters 2 --lr 1e-3 --tokenizer-type NullTokenizer --vocab-size 19999
--position-embedding-type rope --make-vocab-size-divisible-by 1 --normalization RMSNorm --mock-data
--mhc-backend triton --mhc-sinkhorn-iterations 2 --enable-mhc --mhc-recompute
""".split()


def parsed(*further: str) -> Run:
    """Megatron's arguments, parsed with the hooks in, on a machine that pretends to have Transformer Engine."""
    args, config = parse([*LAUNCH, *further], 1)
    return Run.from_covered(args, config)


def make_config(**settings: Any) -> TransformerConfig:
    return models.make_config(num_layers=12, **models.DENSE, **settings)


def built(config: TransformerConfig, mhc: MHCConfig | None = None) -> list[HyperConnectionInput]:
    """The mHC inputs of a model of local modules, as a script builds it. mhc: converted by the script."""
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    if mhc is not None:
        spec = to_mhc_spec(spec, mhc)
    model = GPTModel(config, spec, MANY_TOKENS, models.SEQUENCE, position_embedding_type="rope")
    return [module for module in model.modules() if isinstance(module, HyperConnectionInput)]


def taken(inputs: list[HyperConnectionInput]) -> int:
    """The length of a block that begins at the first of them, on streams that require gradients."""
    reader = inputs[0]
    streams = torch.zeros(2, 1, reader.num_streams * reader.hidden_size, requires_grad=True)
    assert reader._first_place(streams) is not None
    assert reader._block_length is not None
    return reader._block_length


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    texts: list[str] = []
    monkeypatch.setattr(recompute, "_report", texts.append)
    return texts


@pytest.mark.parametrize("by", ["flag", "script"])
@pytest.mark.usefixtures("hooks", "one_process")
def test_training_takes_the_planners(by: str, said: list[str]) -> None:
    """Also of a spec that the script has converted itself, if Megatron's arguments are there."""
    run = dataclasses.replace(parsed(), config=make_config(), vocabulary=MANY_TOKENS)
    chosen = choose_block_length(run, 0)
    assert chosen.length != chosen.formula
    if by == "script":
        set_config(None, get_args())
    assert taken(built(make_config(), RECOMPUTE if by == "script" else None)) == chosen.length
    saved = f"{chosen.saved / 2**30:.2f} GiB less than with the formula's {chosen.formula}"
    assert said == [f"blocks of {chosen.length} sublayers, by the planner's count {saved}"]


@pytest.mark.parametrize(
    ("further", "reason"),
    [
        ("--bf16 --fp8-format hybrid", "the planner does not cover --fp8-format hybrid"),
        ("--transformer-impl local --no-persist-layer-norm", "the planner does not cover --transformer-impl local"),
    ],
)
@pytest.mark.usefixtures("hooks", "one_process")
def test_formula_for_what_is_not_covered(further: str, reason: str, said: list[str]) -> None:
    parsed(*further.split())
    length = automatic_length(24, 1)
    assert taken(built(make_config())) == length
    assert said == [f"blocks of {length} sublayers by the formula (24 in a row, 1 microbatches in flight): {reason}"]


@pytest.mark.usefixtures("hooks", "one_process")
def test_optimizers_that_plan_does_not_cover(said: list[str]) -> None:
    """Their states are no activations."""
    parsed("--optimizer", "sgd")
    taken(built(make_config()))
    assert "by the planner's count" in said[0]


@pytest.mark.usefixtures("hooks", "one_process")
def test_given_length(said: list[str]) -> None:
    parsed("--mhc-recompute-sublayers", "7")
    assert taken(built(make_config())) == 7
    assert said == ["blocks of 7 sublayers, as asked for (24 in a row)"]


@pytest.mark.usefixtures("hooks", "one_process")
def test_formula_without_arguments_or_with_strange_ones(said: list[str]) -> None:
    """A GPTModel in a script of one's own; and arguments of another Megatron, at which the planner fails."""
    taken(built(make_config(), RECOMPUTE))
    set_config(RECOMPUTE, argparse.Namespace(fp8=None))
    taken(built(make_config()))
    formula = f"blocks of {automatic_length(24, 1)} sublayers by the formula (24 in a row, 1 microbatches in flight): "
    assert (
        said[0] == f"{formula}the planner has no Megatron arguments here (mhc_megatron.enable() before they are parsed)"
    )
    assert said[1].startswith(f"{formula}the planner fails on this model (AttributeError(")


@pytest.mark.usefixtures("hooks")
def test_chunks_of_a_rank_are_planned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed()
    asked = []
    choose = planned.choose_block_length
    monkeypatch.setattr(
        planned, "choose_block_length", lambda run, stage: asked.append(run.config.num_layers) or choose(run, stage)
    )
    monkeypatch.setattr(planned, "_latest", [])
    configs = [make_config(), make_config(), make_config()]
    configs[2].num_layers = 8
    for config in configs:
        plan_block_length(RECOMPUTE, config, MANY_TOKENS, stage=0)
    assert asked == [12, 8]
    configs[2].num_layers = 6
    plan_block_length(RECOMPUTE, configs[2], MANY_TOKENS, stage=0)
    assert asked == [12, 8, 6]
    assert recompute.planned_length(configs[0]) == recompute.planned_length(configs[1])


@pytest.mark.usefixtures("hooks")
def test_formula_for_a_stage_that_the_arguments_do_not_have() -> None:
    """A model with a process group of its own for its pipeline."""
    parsed()
    config = make_config()
    plan_block_length(RECOMPUTE, config, MANY_TOKENS, stage=3)
    found = recompute.planned_length(config)
    assert found.length is None
    assert found.said.startswith("the planner fails on this model (IndexError(")


@pytest.mark.usefixtures("one_process")
def test_formula_for_another_chain(said: list[str]) -> None:
    """A model that has not the sublayers that the planner has counted."""
    nine = PlannedLength(9, (24,), "planned")
    assert block_length(RECOMPUTE, 24, None, nine) == 9
    assert block_length(RECOMPUTE, 16, None, nine) == automatic_length(16, microbatches_in_flight(None))
    assert said[0] == "planned"
    assert said[1].endswith("16 sublayers in a row are not what the planner made of Megatron's arguments")


def test_import_of_the_residual_needs_no_planner() -> None:
    """Imports point one way: the hook brings the length."""
    code = "import sys, mhc_megatron.spec; print([name for name in sys.modules if 'mhc_megatron.plan' in name])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
