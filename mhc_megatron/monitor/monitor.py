"""Monitor: logs the gains of a model's mappings while it trains."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from mhc_megatron.config import MHCConfig
from mhc_megatron.monitor.band import Band, show
from mhc_megatron.monitor.capture import SUBLAYERS, Layout, Sample, find_sublayers
from mhc_megatron.monitor.depth import extreme
from mhc_megatron.monitor.gains import summarize
from mhc_megatron.monitor.ranks import Ranks
from mhc_megatron.monitor.records import DIRECTIONS, Record, Writer, numbers
from mhc_megatron.monitor.scalars import scalars

_logger = logging.getLogger(__name__)
_RECORDED = ("mode", "profile", "init", "num_streams", "sinkhorn_iterations", "monitor_interval", "monitor_band")


class Step:
    """What the caller knows of a step, e.g. ``step.values["loss"] = loss``: numbers or tensors of one element, written
    with the gains; on other ranks than the one that logs they are ignored."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}


class Monitor:
    """Logs what `mhc_megatron.monitor.gains` defines, every ``monitor_interval`` iterations and at iteration 1.

        monitor = Monitor(model, folder="my-run")
        for iteration in range(1, iterations + 1):
            with monitor.step(iteration) as step:
                loss = ...forward, backward, optimizer...
                step.values["loss"] = loss

    Every rank must have one and call it for every step: a monitored step ends with a collective. ``python -m mhc_megatron
    pretrain`` does all this by itself.

    Args:
        model: the rank's model, or its list of chunks, wrapped or not.
        mhc_config: settings (the ``monitor_*`` fields); default: those that the model was built with.
        folder: where ``mhc-monitor.jsonl`` is appended; default ``mhc_config.monitor_dir``; with neither, no file.
        tensorboard: a ``SummaryWriter`` or None, used on the last rank only. wandb: the ``wandb`` module, a run, or None.

    Raises:
        ValueError: if the model has no mHC.
    """

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        mhc_config: MHCConfig | None = None,
        *,
        folder: str | None = None,
        tensorboard: Any = None,
        wandb: Any = None,
    ):
        chunks = [model] if isinstance(model, nn.Module) else list(model)
        built_with = mhc_config_of(chunks)
        if built_with is None:
            raise ValueError("Monitor: this model has no mHC; build it from a to_mhc_spec spec")
        self._n, self._settings = built_with.num_streams, mhc_config or built_with
        inner = unwrap(chunks[0])
        self._slots = len(SUBLAYERS) * inner.config.num_layers
        self._ranks = Ranks(getattr(inner, "pg_collection", None), inner.config.sequence_parallel)
        self._sublayers = find_sublayers(chunks) if self._ranks.fills else []
        self._band = Band(self._settings.monitor_band)
        self._writers = (tensorboard, wandb)
        folder = folder or self._settings.monitor_dir
        run = {name: getattr(built_with if name == "num_streams" else self._settings, name) for name in _RECORDED}
        self._file = Writer(folder, run | {"num_layers": inner.config.num_layers}) if folder else None
        if self._ranks.logs and self._settings.monitor_interval and self._file is None:
            _logger.warning(
                "mHC monitor: no folder (--mhc-monitor-dir, --save or --tensorboard-dir): gains are not kept"
            )

    @property
    def interval(self) -> int:
        """Iterations from one monitored step to the next; 0: never."""
        return self._settings.monitor_interval

    def is_due(self, iteration: int) -> bool:
        """Whether the step that makes this the number of finished iterations is monitored."""
        return self.interval > 0 and (iteration == 1 or iteration % self.interval == 0)

    @contextmanager
    def step(self, iteration: int) -> Iterator[Step]:
        """Around one training step, all its microbatches. iteration: counts from 1."""
        step = Step()
        if not (self.is_due(iteration) and self._ranks.takes_part):
            yield step
            return
        sample = Sample(self._sublayers, self._slots, self._settings.monitor_tokens, self._ranks.part, self._n)
        with sample.taking():
            yield step
        self._ranks.complete(sample.values)
        if self._ranks.logs:
            self._log(iteration, sample, step)

    def _log(self, iteration: int, sample: Sample, step: Step) -> None:
        values = sample.values.cpu()  # the only wait for the GPU
        slots = (values[..., 0] > 0).any(1)
        tokens = (values[slots][..., 0] > 0).all(0)
        if not slots.any() or not tokens.any():
            _logger.warning(f"mHC monitor: iteration {iteration}: no forward pass, no gains")
            return
        _, res, post, pre, similarity = values[slots][:, tokens].split(Layout(self._n).widths, -1)
        record: Record = {"iteration": iteration}
        record |= {name: numbers(float(value)) for name, value in step.values.items() if value is not None}
        record["tokens"] = int(tokens.sum())
        record["sublayers"] = [
            [slot // len(SUBLAYERS) + 1, SUBLAYERS[slot % len(SUBLAYERS)]] for slot in slots.nonzero()[:, 0].tolist()
        ]
        record |= summarize(res.unflatten(-1, (self._n, self._n)), post, pre, similarity[..., 0])
        print(describe(record), flush=True)
        for message in self._band.check(record):
            _logger.warning(f"mHC monitor: {message}")
        self._write(record)

    def _write(self, record: Record) -> None:
        if self._file is not None:
            try:
                self._file.write(record)
            except OSError as error:  # a full disk must not end a training run
                _logger.warning(f"mHC monitor: {self._file.path}: {error}; iteration {record['iteration']} is not kept")
        tensorboard, wandb = self._writers
        if tensorboard is None and wandb is None:
            return
        named = scalars(record)
        if tensorboard is not None:
            for name, value in named.items():
                tensorboard.add_scalar(name, value, record["iteration"])
        if wandb is not None:
            wandb.log(named, record["iteration"])


def describe(record: Record) -> str:
    """One line for the log."""
    composite, single = record["composite"], record["single"]

    def span(gains: dict[str, Any], direction: str, i: int | None) -> str:
        least, most = gains[direction]["min"], gains[direction]["max"]
        if i is not None:
            least, most = least[i : i + 1], most[i : i + 1]
        finite = None not in (*least, *most)
        return f"{show(min(least))} to {show(max(most))}" if finite else show(None)

    parts = [
        f"{d} {span(composite, d, 0)} (from any depth {extreme(record, d, 'min')} to {extreme(record, d, 'max')}; "
        f"single layers {span(single, d, None)})"
        for d in DIRECTIONS
    ]
    return f"mHC gains at iteration {record['iteration']}: composite {', '.join(parts)}"


def unwrap(model: Any) -> Any:
    """Megatron's model inside DDP and Float16Module."""
    while not hasattr(model, "config") or hasattr(model, "module"):
        model = model.module
    return model


def mhc_config_of(chunks: Sequence[nn.Module]) -> MHCConfig | None:
    """The settings that these chunks were built with; None without mHC."""
    configs = (getattr(module, "mhc_config", None) for chunk in chunks for module in chunk.modules())
    return next((config for config in configs if isinstance(config, MHCConfig)), None)
