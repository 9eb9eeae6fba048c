"""The monitor's numbers against the definition in float64, its hooks, its warnings, its file."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from mhc_megatron import MHCConfig, Monitor
from mhc_megatron.monitor.capture import find_sublayers
from mhc_megatron.monitor.gains import summarize
from mhc_megatron.monitor.monitor import describe
from mhc_megatron.monitor.records import FILE, Run, Writer, read
from mhc_megatron.monitor.scalars import scalars
from mhc_megatron.monitor.summary import COLUMNS, rows
from tests import models
from tests.monitored import check, definition, streams

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
# One Sinkhorn iteration: columns that are off, so that gains differ from 1.
CONFIGS = {
    "mhc": MHCConfig(init="paper", init_alpha=2.0, sinkhorn_iterations=1),
    "hc": MHCConfig(init="paper", init_alpha=0.5, mode="hc"),
    "deepseek-v4": MHCConfig(init="paper", init_alpha=2.0, sinkhorn_iterations=1, profile="deepseek-v4", num_streams=3),
}
# What the Triton kernels (interpreted here) hand on, with the streams between sublayers left out.
CONFIGS["triton"] = MHCConfig(init="paper", init_alpha=2.0, sinkhorn_iterations=1, backend="triton", recompute=True)
# The monitor has float32 mappings from the model, and writes 6 digits.
TOLERANCE = 2e-5


def train(model: torch.nn.Module, monitor: Monitor, iteration: int, microbatches: int = 2) -> None:
    """A step of several microbatches: forward and backward."""
    with monitor.step(iteration) as step:
        losses = [models.forward(model, models.tokens(i)).mean() for i in range(microbatches)]
        torch.stack(losses).sum().backward()
        step.values["loss"] = losses[0].detach()


@pytest.mark.parametrize("kind", CONFIGS)
def test_numbers_are_those_of_the_definition(kind: str, one_process: None, tmp_path: Path) -> None:
    mhc = CONFIGS[kind]
    model = models.build(models.make_config(**models.MOE), mhc)
    with streams(model) as seen:
        train(model, Monitor(model, folder=str(tmp_path)), 1)
    record = read(tmp_path).records[1]
    sublayers = definition(seen, mhc)
    assert record["sublayers"] == [[layer, name] for layer in range(1, 5) for name in ("attention", "mlp")]
    assert record["tokens"] == models.SEQUENCE

    check(record, sublayers, TOLERANCE)
    # The comparison would be empty if every gain were 1.
    assert max(record["composite"]["backward"]["max"]) > 1 + 1e-3


def test_full_recompute_has_the_same_numbers(one_process: None, tmp_path: Path) -> None:
    records = []
    for name, further in (("plain", {}), ("recompute", FULL)):
        torch.manual_seed(3)
        model = models.build(models.make_config(**models.MOE, **further), CONFIGS["mhc"])
        train(model, Monitor(model, folder=str(tmp_path / name)), 1)
        records.append(read(tmp_path / name).records[1])
    assert records[0] == records[1]


def test_nothing_is_captured_on_other_steps(one_process: None, tmp_path: Path) -> None:
    model = models.build(models.make_config(), MHCConfig(monitor_interval=5))
    monitor = Monitor(model, folder=str(tmp_path))
    modules = [sublayer.module() for sublayer in find_sublayers([model])]

    def hooks() -> int:
        return sum(len(module._forward_hooks) for module in modules)

    for iteration in range(1, 12):
        with monitor.step(iteration):
            assert hooks() == (8 if iteration in (1, 5, 10) else 0), iteration
            models.forward(model, models.tokens(0))
        assert hooks() == 0
    with pytest.raises(ZeroDivisionError), monitor.step(15):
        raise ZeroDivisionError
    assert hooks() == 0, "an exception in the step left hooks behind"
    assert list(read(tmp_path).records) == [1, 5, 10]
    off = Monitor(model, MHCConfig(monitor_interval=0))
    assert not any(off.is_due(iteration) for iteration in range(1, 12))


def test_a_step_without_a_forward_pass(one_process: None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = models.build(models.make_config(), MHCConfig())
    with Monitor(model, folder=str(tmp_path)).step(1):
        pass
    assert "iteration 1: no forward pass, no gains" in caplog.text
    assert not (tmp_path / FILE).exists()


def set_gain(model: torch.nn.Module, layer: int, name: str, gain: float) -> None:
    """H_res of one sublayer of an HC model: gain * identity for every token."""
    own = next(s.module() for s in find_sublayers([model]) if (s.layer, s.name) == (layer, name)).hyper_connection
    with torch.no_grad():
        own.alpha.zero_()
        own.bias[-16:] = gain * torch.eye(4).flatten()


def test_warning_when_a_gain_leaves_its_band(one_process: None, caplog: pytest.LogCaptureFixture) -> None:
    model = models.build(models.make_config(), MHCConfig(mode="hc", monitor_interval=1, monitor_band=2.0))
    monitor = Monitor(model)
    assert "no folder (--mhc-monitor-dir, --save or --tensorboard-dir): gains are not kept" in caplog.text

    def warnings(iteration: int) -> list[str]:
        caplog.clear()
        train(model, monitor, iteration, microbatches=1)
        return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]

    assert warnings(1) == []
    set_gain(model, 3, "mlp", 2.5)
    single, composite = warnings(2)
    assert (
        "iteration 2: gains of single layers outside [0.5, 2] (--mhc-monitor-band): layer 3 mlp: forward 2.5 to 2.5"
        in single
    )
    assert "composite gain outside [0.5, 2] (--mhc-monitor-band): from layer 3 mlp to the exit" in composite
    assert warnings(3) == [], "said already"
    set_gain(model, 2, "attention", 0.4)  # brings the product back to 1, and is outside itself
    assert [text.partition("--mhc-monitor-band): ")[2] for text in warnings(4)] == [
        "layer 2 attention: forward 0.4 to 0.4, backward 0.4 to 0.4"
    ]
    set_gain(model, 2, "attention", 1.0)
    set_gain(model, 3, "mlp", 1.0)
    assert warnings(5) == []
    set_gain(model, 3, "mlp", 3.0)
    assert len(warnings(6)) == 2, "it left again"


def test_scalars_for_tensorboard_and_wandb(one_process: None) -> None:
    """Only the writers' own interfaces are stood in for: the libraries need not be installed."""

    class Scalars(dict):
        def add_scalar(self, name: str, value: float, iteration: int) -> None:
            self[name] = (value, iteration)

        def log(self, values: dict[str, float], iteration: int) -> None:
            self.update({name: (value, iteration) for name, value in values.items()})

    model = models.build(models.make_config(), CONFIGS["mhc"])
    tensorboard, wandb = Scalars(), Scalars()
    train(model, Monitor(model, tensorboard=tensorboard, wandb=wandb), 100)
    assert tensorboard == wandb
    assert {iteration for _, iteration in wandb.values()} == {100}
    gain, _ = wandb["mhc/composite-backward-max"]
    assert gain == wandb["mhc-layers/composite-backward-max/001-attention"][0] > 1
    assert 0 < wandb["mhc/composite-backward-min"][0] < 1
    assert sum(name.startswith("mhc-layers/single-forward-max/") for name in wandb) == 8


def fading(*diagonals: tuple[float, float]) -> dict[str, Any]:
    """A record of one token, its H_res diagonal; two sublayers a layer."""
    res = torch.diag_embed(torch.tensor(diagonals))[:, None]
    other = torch.ones(len(diagonals), 1, 2)
    sublayers = [[i // 2 + 1, ("attention", "mlp")[i % 2]] for i in range(len(diagonals))]
    return {"sublayers": sublayers, **summarize(res, other, other, other[..., 0])}


def test_a_stream_that_fades_halfway() -> None:
    """The whole model's product is the identity; from layer 2 on one stream keeps a quarter, and another doubles."""
    inner = [(1.2, 0.5), (0.5, 1.0), (0.5, 2.0)]
    record = {"iteration": 4, **fading((1 / 0.3, 1.0), *inner)}
    named = scalars(record)
    for direction in ("forward", "backward"):
        for bound, gain in (("max", 2.0), ("min", 0.25)):
            name = f"mhc/composite-{direction}-{bound}"
            assert (named[name], named[f"{name}-any-depth"]) == pytest.approx((1.0, gain))
            assert named[f"{name}-any-depth-layer"] == 2
    told = "forward 1 to 1 (from any depth 0.25 at layer 2 to 2 at layer 2; single layers 0.5 to 3.333)"
    assert told in describe(record)

    calm = {"iteration": 8, **fading(*[(1.0, 1.0)] * 4)}
    cells = dict(zip(COLUMNS, *rows([Run("mhc", records={4: record, 8: calm})]), strict=True))
    assert cells["composite backward, any depth"] == "1 at layer 1 to 1 at layer 1"
    assert cells["largest composite of the run, any depth"] == "2 at layer 2 (4)"
    assert cells["smallest composite of the run, any depth"] == "0.25 at layer 2 (4)"

    broken = {"iteration": 9, **fading((1.0, 1.0), (1.0, 1.0), (float("inf"), 1.0), (1.0, 1.0))}
    assert "from any depth not finite at layer 2 to not finite at layer 2" in describe(broken)
    (row,) = rows([Run("mhc", records={4: record, 9: broken})])
    assert row[-2:] == ("not finite at layer 2 (9)",) * 2


def test_full_disk(one_process: None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Gains that can't be written are a warning: training goes on."""
    model = models.build(models.make_config(), MHCConfig(monitor_interval=1))
    (tmp_path / FILE).symlink_to("/dev/full")
    train(model, Monitor(model, folder=str(tmp_path)), 1)
    assert "No space left on device; iteration 1 is not kept" in caplog.text


def test_file_of_a_run_killed_while_it_wrote(tmp_path: Path) -> None:
    for start, upto in ((1, 6), (4, 7)):
        writer = Writer(tmp_path, {"mode": "mhc"})
        for iteration in range(start, upto + 1):
            writer.write({"iteration": iteration, "loss": start + iteration / 10})
        with open(tmp_path / FILE, "a") as file:
            file.write('{"iteration": 8, "lo')
    Writer(tmp_path, {"mode": "mhc"}).write({"iteration": 8, "loss": math.pi})
    run = read(tmp_path)
    assert run.skipped == 2
    losses = {i: record["loss"] for i, record in run.records.items()}
    assert losses == {1: 1.1, 2: 1.2, 3: 1.3, 4: 4.4, 5: 4.5, 6: 4.6, 7: 4.7, 8: math.pi}


def test_numbers_that_are_not_finite(one_process: None, tmp_path: Path) -> None:
    model = models.build(models.make_config(), MHCConfig(mode="hc", monitor_interval=1))
    set_gain(model, 1, "mlp", float("inf"))
    train(model, Monitor(model, folder=str(tmp_path)), 1, microbatches=1)
    line = (tmp_path / FILE).read_text().splitlines()[-1]
    assert "NaN" not in line
    assert "Infinity" not in line
    assert json.loads(line)["composite"]["forward"]["max"][0] is None


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match=r"monitor_band must be > 1, got 0.5"):
        MHCConfig(monitor_band=0.5)
    with pytest.raises(ValueError, match=r"monitor_interval must be an integer >= 0, got -1"):
        MHCConfig(monitor_interval=-1)


def test_a_model_without_mhc(one_process: None) -> None:
    with pytest.raises(ValueError, match="this model has no mHC"):
        Monitor(models.build(models.make_config(), None))
