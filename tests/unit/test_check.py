"""`check`: what Megatron would refuse later, refused before, with the reason."""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any

import pytest

from mhc_megatron import check
from mhc_megatron.quickstart.data import Text
from mhc_megatron.quickstart.jobs import megatron_arguments


def run(*extra: str, world_size: int = 8) -> int:
    text: Any = SimpleNamespace(prefix="/no/text")
    assert Text.__annotations__["prefix"]
    arguments = [a for a in megatron_arguments(text, 10, gpu=False) if not a.startswith("--data-")]
    if not any(a.startswith("--data-path") for a in extra):
        arguments.append("--mock-data")
    arguments.append("--global-batch-size=64")
    return check.run(argparse.Namespace(world_size=world_size, arguments=[*arguments, *extra]))


PIPELINE = ("--pipeline-model-parallel-size=2",)


@pytest.mark.usefixtures("hooks")
@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        (("--num-layer=3",), "unrecognized arguments: --num-layer=3"),
        (("--lr-decay-style=step",), "argument --lr-decay-style: invalid choice: 'step'"),
        (("--tensor-model-parallel-size=3",), "world size (8) is not divisible by total_model_size"),
        (("--expert-model-parallel-size=3",), "Number of experts should be a multiple of expert model parallel_size"),
        (("--enable-mhc", "--bf16", "--fp32-residual-connection"), "mHC can't be used with --fp32-residual-connection"),
        (("--mhc-num-streams=2",), "--mhc-num-streams 2 has no effect without --enable-mhc"),
        (("--moe-layer-freq=[1]*3",), "--moe-layer-freq has 3 entries, the model 4 layers"),
        (("--global-batch-size=12",), "must be divisible"),
        ((*PIPELINE, "--pipeline-model-parallel-layout=Et|tt|L"), "pipeline_model_parallel_layout"),
        ((*PIPELINE, "--pipeline-model-parallel-layout=Et|tx"), "x"),
        (("--data-path=/no/text",), "--data-path /no/text: there is no /no/text.bin"),
        (("--data-path", "1", "/no/a", "2", "/no/b"), "--data-path /no/a: there is no /no/a.bin"),
        (("--padded-vocab-size=200",), "the tokenizer has 257 tokens, the model a vocabulary of 200"),
        (
            ("--tokenizer-type=HuggingFaceTokenizer", "--tokenizer-model=/no/tokenizer"),
            "--tokenizer-model /no/tokenizer: ",
        ),
        (("--expert-model-parallel-size=4", *PIPELINE, "--expert-tensor-parallel-size=2"), "process groups: "),
    ],
    ids=lambda value: value[0].removeprefix("--") if isinstance(value, tuple) else "",
)
def test_refused(extra: tuple[str, ...], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*extra) == 1
    told = capsys.readouterr()
    assert told.err.startswith("check: FAILED: ")
    assert reason in told.err
    assert len(told.err.splitlines()) == 1
    assert not told.out


@pytest.mark.usefixtures("hooks")
def test_interleaved_microbatches(capsys: pytest.CaptureFixture[str]) -> None:
    interleaved = (*PIPELINE, "--num-virtual-stages-per-pipeline-rank=2", "--micro-batch-size=2")
    assert run(*interleaved, "--global-batch-size=24") == 1
    assert "3 microbatches can't run in groups of 2 over 2 stages; make --global-batch-size a multiple of 16" in (
        capsys.readouterr().err
    )
