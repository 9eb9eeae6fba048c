"""The flags: what they give, and every refusal, through Megatron's own parser and validation."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from types import SimpleNamespace
from typing import Any

import pytest

import mhc_megatron
from mhc_megatron import MHCConfig
from mhc_megatron.arguments import add_arguments, config_from_args
from mhc_megatron.checkpoint.compatibility import is_warm_start
from mhc_megatron.cpu import MEGATRON_ARGUMENTS
from mhc_megatron.megatron_hooks.active import get_config

BASE = [
    *"--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32".split(),
    *"--micro-batch-size 2 --global-batch-size 2 --train-iters 2 --lr 1e-3 --tokenizer-type NullTokenizer".split(),
    *"--vocab-size 64 --position-embedding-type rope".split(),
    *MEGATRON_ARGUMENTS,
]
MOE = "--num-experts 4 --moe-router-topk 2".split()


@pytest.fixture
def validate(hooks: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Megatron's parse_args and validate_args on a command line, with the hooks in."""

    def run(*arguments: str) -> argparse.Namespace:
        from megatron.training import arguments as megatron_arguments

        monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *BASE, *arguments])
        args = megatron_arguments.parse_args()
        megatron_arguments.validate_args(args)
        return args

    return run


def test_defaults_are_the_configs(validate: Any) -> None:
    args = validate("--enable-mhc")
    assert config_from_args(args) == MHCConfig() == get_config()
    assert vars(args)["mhc_num_streams"] == 4, "not recorded in the arguments, so not in checkpoints"


def test_every_field_has_a_flag(validate: Any) -> None:
    values = {
        "num_streams": 2,
        "sinkhorn_iterations": 7,
        "mode": "hc",
        "profile": "paper",
        "init": "paper",
        "init_alpha": 0.5,
        "eps": 1e-5,
        "weight_decay": True,
        "recompute": True,
        "recompute_sublayers": 3,
        "pipeline_comm": "split",
        "pipeline_transport": "nccl",
        "backend": "triton",
        "monitor_interval": 7,
        "monitor_tokens": 64,
        "monitor_band": 1.5,
        "monitor_dir": "gains",
    }
    assert values.keys() == {field.name for field in dataclasses.fields(MHCConfig)}
    flags = []
    for name, value in values.items():
        flags += [f"--mhc-{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    assert config_from_args(validate("--enable-mhc", *flags)) == MHCConfig(**values)


def test_off_by_default(validate: Any) -> None:
    assert config_from_args(validate()) is None
    assert get_config() is None


def test_help_has_one_heading(validate: Any, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        validate("--help")
    assert stop.value.code == 0
    _, _, ours = capsys.readouterr().out.partition("\nmanifold-constrained hyper-connections (mhc-megatron):\n")
    for field in dataclasses.fields(MHCConfig):
        assert f"--mhc-{field.name.replace('_', '-')}" in ours.partition("\n\n")[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--fp32-residual-connection", r"--fp32-residual-connection .*remove it"),
        (
            "--recompute-granularity selective --recompute-modules layernorm",
            r"--recompute-modules .*take 'layernorm' out",
        ),
        ("--mhc-num-streams 0", r"--mhc-num-streams must be an integer >= 1, got 0"),
        ("--mhc-sinkhorn-iterations 0", r"--mhc-sinkhorn-iterations must be an integer >= 1, got 0"),
        ("--mhc-eps 0", r"--mhc-eps must be > 0"),
        ("--mhc-init-alpha 0", r"--mhc-init-alpha must not be 0: phi would get no gradient"),
        ("--mhc-mode hc --mhc-profile deepseek-v4", r"--mhc-profile 'deepseek-v4' has no mode 'hc'"),
        ("--mhc-recompute-sublayers 3", r"--mhc-recompute-sublayers 3 has no effect without --mhc-recompute;"),
        ("--mhc-recompute --mhc-backend reference", r"--mhc-recompute has no effect with --mhc-backend 'reference'"),
        ("--cpu-offloading-num-layers 1", r"--cpu-offloading-num-layers \(1\): Transformer Engine's .*remove it"),
        ("--cuda-graph-impl local", r"--cuda-graph-impl .*use --cuda-graph-impl none"),
        ("--use-megatron-fsdp", r"--use-megatron-fsdp .*use --use-distributed-optimizer"),
    ],
)
def test_refusals_name_flag_and_remedy(validate: Any, arguments: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate("--enable-mhc", *arguments.split())
    assert get_config() is None


@pytest.mark.parametrize("name", ["enable_mhc_connections", "enable_hyper_connections"])
def test_megatrons_own_mhc_is_refused(name: str) -> None:
    """The flags of releases to come: stock 0.19 has neither, so they can't be parsed here."""
    from mhc_megatron.arguments import check_args

    args = add_arguments(argparse.ArgumentParser()).parse_args(["--enable-mhc"])
    setattr(args, name, True)
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} .*use one of the two"):
        check_args(args)


@pytest.mark.parametrize("flag", ["--mhc-profile", "--mhc-mode", "--mhc-init"])
def test_unknown_choice(validate: Any, flag: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        validate("--enable-mhc", flag, "papper")
    error = capsys.readouterr().err
    assert f"argument {flag}: invalid choice: 'papper'" in error
    assert "choose from" in error


def test_setting_without_enable_is_not_ignored(validate: Any) -> None:
    with pytest.raises(ValueError, match="--mhc-num-streams 8 has no effect without --enable-mhc"):
        validate("--mhc-num-streams", "8")


def test_layernorm_recompute_is_fine_where_megatron_ignores_it(validate: Any) -> None:
    """recompute_modules counts only with selective recompute."""
    full = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1".split()
    assert config_from_args(validate("--enable-mhc", *MOE, *full)) == MHCConfig()


class TestCheckpointSettings:
    """A checkpoint's recorded arguments against this run's."""

    @staticmethod
    def args(*flags: str) -> argparse.Namespace:
        return add_arguments(argparse.ArgumentParser()).parse_args(flags)

    @pytest.mark.parametrize(
        ("flag", "value"),
        [
            ("--mhc-num-streams", "2"),
            ("--mhc-mode", "hc"),
            ("--mhc-profile", "deepseek-v4"),
            ("--mhc-sinkhorn-iterations", "5"),
            ("--mhc-eps", "1e-05"),
        ],
    )
    def test_other_settings(self, flag: str, value: str) -> None:
        theirs, ours = self.args("--enable-mhc", flag, value), self.args("--enable-mhc")
        with pytest.raises(
            ValueError, match=rf"/ckpt was made with {flag} {value}, this run has .*use the checkpoint's"
        ):
            is_warm_start(theirs, ours, "/ckpt", fresh_optimizer=True)

    def test_same_settings_and_what_does_not_matter(self) -> None:
        recompute = ("--mhc-recompute", "--mhc-recompute-sublayers", "3")
        theirs = self.args("--enable-mhc", "--mhc-init", "paper", "--mhc-weight-decay", *recompute)
        assert not is_warm_start(theirs, self.args("--enable-mhc"), "/ckpt", fresh_optimizer=False)
        assert not is_warm_start(SimpleNamespace(), self.args(), "/ckpt", fresh_optimizer=False)

    def test_mhc_checkpoint_in_a_residual_run(self) -> None:
        with pytest.raises(ValueError, match="/ckpt is an mHC model; add --enable-mhc"):
            is_warm_start(self.args("--enable-mhc"), self.args(), "/ckpt", fresh_optimizer=True)

    def test_residual_checkpoint(self) -> None:
        stock = SimpleNamespace(num_layers=2)
        assert is_warm_start(stock, self.args("--enable-mhc"), "/ckpt", fresh_optimizer=True)
        with pytest.raises(ValueError, match="add --finetune, or load it with --pretrained-checkpoint"):
            is_warm_start(stock, self.args("--enable-mhc"), "/ckpt", fresh_optimizer=False)


def test_config_is_checked_without_flags() -> None:
    with pytest.raises(ValueError, match=r"MHCConfig.num_streams must be an integer >= 1, got 2.5"):
        MHCConfig(num_streams=2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"MHCConfig.profile must be one of .* got 'mcore'"):
        MHCConfig(profile="mcore")
    with pytest.raises(dataclasses.FrozenInstanceError):
        MHCConfig().num_streams = 2  # type: ignore[misc]
    assert mhc_megatron.MHCConfig is MHCConfig
