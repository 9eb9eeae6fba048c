"""`check`: what Megatron would refuse later, refused before, with the reason."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mhc_megatron import check
from mhc_megatron.quickstart import data
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
        (
            ("--enable-mhc", "--mhc-num-streams=9", "--mhc-backend=triton"),
            "(--mhc-backend): the Triton kernels take 1 to 8 streams, not n = 9; use 'auto' or 'reference'",
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


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data.prepare(tmp_path_factory.mktemp("check")).prefix


@pytest.mark.usefixtures("hooks")
def test_whole_data(dataset: Path) -> None:
    assert run(f"--data-path={dataset}") == 0


@pytest.mark.parametrize(
    ("suffix", "left", "reason"),
    [
        ("bin", 0, "the .bin file has 0 bytes, its index asks for "),
        ("bin", 1000, "the .bin file has 1000 bytes, its index asks for "),
        ("idx", 0, "bad header"),
        ("idx", 12, "unpack requires a buffer"),
        ("idx", 40, "buffer is smaller than requested size"),
    ],
)
@pytest.mark.usefixtures("hooks")
def test_data_cut_short(
    suffix: str, left: int, reason: str, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for of in ("bin", "idx"):
        whole = dataset.with_name(f"{dataset.name}.{of}").read_bytes()
        (tmp_path / f"text.{of}").write_bytes(whole[:left] if of == suffix else whole)
    assert run(f"--data-path={tmp_path / 'text'}") == 1
    told = capsys.readouterr().err
    assert told.startswith(
        f"check: FAILED: --data-path {tmp_path / 'text'}: not a whole indexed dataset, make it again: "
    )
    assert reason in told
    assert len(told.splitlines()) == 1


@pytest.mark.parametrize(
    ("kind", "package"),
    [("HuggingFaceTokenizer", "transformers"), ("GPT2BPETokenizer", "transformers"), ("TikTokenizer", "tiktoken")],
)
@pytest.mark.usefixtures("hooks")
def test_tokenizer_without_its_package(
    kind: str, package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *of: None if name == package else find(name, *of))
    assert run(f"--tokenizer-type={kind}", "--tokenizer-model=some") == 1
    assert f"needs the Python package {package}: pip install {package}\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--mhc-num-streams=9",), "the Triton kernels take 1 to 8 streams, not n = 9"),
        (("--mhc-backend=reference",), "--mhc-backend reference"),
        (("--mhc-num-streams=8",), None),
    ],
)
@pytest.mark.usefixtures("hooks")
def test_slow_reference(arguments: tuple[str, ...], reason: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--enable-mhc", *arguments) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines() if "slow" in line]
    assert lines == ([] if reason is None else [f"mHC runs its slow reference: {reason}"])


@pytest.mark.usefixtures("hooks")
def test_interleaved_microbatches(capsys: pytest.CaptureFixture[str]) -> None:
    interleaved = (*PIPELINE, "--num-virtual-stages-per-pipeline-rank=2", "--micro-batch-size=2")
    assert run(*interleaved, "--global-batch-size=24") == 1
    assert "3 microbatches can't run in groups of 2 over 2 stages; make --global-batch-size a multiple of 16" in (
        capsys.readouterr().err
    )
