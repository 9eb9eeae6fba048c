"""The hooks: installed once, marked, taken back; and an import that costs nothing."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
from megatron.core.models.bert.bert_model import BertModel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import schedules
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.training import training

import mhc_megatron
from mhc_megatron import MHCConfig, megatron_hooks, to_mhc_spec
from mhc_megatron.megatron_hooks import patched
from mhc_megatron.megatron_hooks.active import set_config
from mhc_megatron.megatron_hooks.rebind import Rebinding
from mhc_megatron.pipeline.communicator import StreamsCommunicator
from mhc_megatron.residual.layer import HyperConnectionLayer
from tests import models


def originals() -> list[Any]:
    import importlib

    found = []
    for rebinding in megatron_hooks.rebindings():
        owner: Any = importlib.import_module(rebinding.module)
        for part in rebinding.name.split("."):
            owner = getattr(owner, part)
        found.append(owner)
    return found


def test_enable_twice_disable_once() -> None:
    before = originals()
    mhc_megatron.enable()
    mhc_megatron.enable()
    try:
        hooked = originals()
        assert all(new is not old for new, old in zip(hooked, before, strict=True))
        assert [new.__wrapped__ for new in hooked] == before, "wrapped twice, or not marked"
    finally:
        mhc_megatron.disable()
    assert originals() == before


def test_moved_symbol_names_the_version() -> None:
    gone = Rebinding("megatron.core.pipeline_parallel.schedules", "P2PCommunicator2", lambda original: original)
    with pytest.raises(RuntimeError, match=r"megatron-core 0\.19\.\d+\S* has no .*schedules.P2PCommunicator2"):
        gone.apply()


def test_a_script_that_builds_another_model(hooks: None, one_process: None) -> None:
    """With --enable-mhc it must not train without mHC and say nothing."""
    config = models.make_config(normalization="LayerNorm")
    bert = models.wrap(BertModel(config, 2, bert_layer_local_spec, models.VOCABULARY, models.SEQUENCE), config)
    set_config(MHCConfig())
    with pytest.raises(ValueError, match="--enable-mhc: this script's model, a BertModel, has no mHC"):
        training.train_step(None, None, [bert], None, None, config, None, iteration=0)


@pytest.mark.parametrize("by", ["flag", "the script's spec"])
def test_layers_of_multi_token_prediction_get_mhc(
    by: str, hooks: None, one_process: None, capsys: pytest.CaptureFixture
) -> None:
    """Megatron builds their spec from stock layers, whatever the decoder's spec is."""
    config = models.make_config(mtp_num_layers=2)
    specs = models.specs(config, None)
    if by == "flag":
        set_config(MHCConfig())
    else:
        specs["transformer_layer_spec"] = to_mhc_spec(specs["transformer_layer_spec"], MHCConfig())
    model = GPTModel(config, vocab_size=models.VOCABULARY, max_sequence_length=models.SEQUENCE, **specs)
    assert all(isinstance(layer.mtp_model_layer, HyperConnectionLayer) for layer in model.mtp.layers)
    assert "multi-token prediction: its layers get mHC" in capsys.readouterr().out


def test_communicator_is_megatrons_for_other_models(hooks: None) -> None:
    assert issubclass(schedules.P2PCommunicator, P2PCommunicator)
    assert schedules.P2PCommunicator is not P2PCommunicator


@pytest.mark.usefixtures("one_process")
def test_hook_of_a_patched_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a patch's lines do: once though they are there twice; a class stays one; a name that is gone is an error."""
    for _ in range(2):
        monkeypatch.setattr(schedules, "P2PCommunicator", schedules.P2PCommunicator)  # put back at the end
        patched.hook(schedules.__name__, "pipeline", "P2PCommunicator")
    assert schedules.P2PCommunicator.__wrapped__ is P2PCommunicator
    assert issubclass(schedules.P2PCommunicator, P2PCommunicator)
    group = parallel_state.get_pipeline_model_parallel_group()
    assert type(schedules.P2PCommunicator(pp_group=group, config=models.make_config())) is StreamsCommunicator
    with pytest.raises(
        RuntimeError, match=r"has no megatron\.core\.pipeline_parallel\.schedules\.Communicator, which 0\.19"
    ):
        patched.hook(schedules.__name__, "pipeline", "Communicator")


def test_import_is_light() -> None:
    code = (
        "import sys, mhc_megatron; mhc_megatron.MHCConfig(); print('torch' in sys.modules, 'megatron' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["False", "False"]


@pytest.mark.usefixtures("hooks", "one_process")
class TestModelHook:
    def make(self) -> GPTModel:
        layer = get_gpt_layer_local_spec(normalization="RMSNorm")
        return GPTModel(models.make_config(), layer, models.VOCABULARY, models.SEQUENCE, position_embedding_type="rope")

    def test_only_with_the_flag(self) -> None:
        assert not isinstance(self.make().decoder.layers[0], HyperConnectionLayer)
        set_config(MHCConfig())
        model = self.make()
        assert all(isinstance(layer, HyperConnectionLayer) for layer in model.decoder.layers)
        assert models.forward(model, models.tokens(0)).isfinite().all()

    def test_converted_spec_is_not_converted_again(self) -> None:
        set_config(MHCConfig())
        with pytest.raises(ValueError, match="remove the flag or its to_mhc_spec"):
            models.build(models.make_config(), MHCConfig())


@pytest.mark.usefixtures("hooks", "one_process")
@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_weight_decay_and_groups(decay: bool, bf16: bool) -> None:
    """phi decays only if asked; alpha and bias never; float32 parameters never share a group with bf16 ones."""
    settings = {"bf16": True, "params_dtype": torch.bfloat16} if bf16 else {}
    config = models.make_config(**models.MOE, **settings)
    model = models.build(config, MHCConfig(weight_decay=decay))
    if bf16:
        from megatron.core.transformer.module import Float16Module

        model = Float16Module(config, model)
    wrapped = models.wrap(model, config)
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-3, bf16=bf16), [wrapped])
    names = {id(p): name for name, p in wrapped.named_parameters()}
    seen = set()
    for inner in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in inner.param_groups:
            ours = {getattr(p, "mhc_parameter", False) for p in group["params"]}
            if bf16 and group["params"]:
                assert len(ours) == 1
            for parameter in group["params"]:
                name = names.get(id(parameter), "")
                if "hyper_connection" in name:
                    seen.add(name.rpartition(".")[2])
                    assert group["wd_mult"] == (1.0 if decay and name.endswith("phi") else 0.0), name
                elif name.endswith("linear_qkv.weight"):
                    assert group["wd_mult"] == 1.0
    assert seen == {"phi", "alpha", "bias"}


def test_compile_helpers_is_skipped_for_the_wheel(hooks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.datasets import utils

    calls: list[Any] = []
    monkeypatch.setattr(subprocess, "run", lambda command: calls.append(command) or SimpleNamespace(returncode=0))
    utils.compile_helpers()
    assert not calls, "make was called though the wheel has no Makefile"
