"""Gains of the mappings, logged while training (``--mhc-monitor-interval``).

Rebinds: ``train_step`` in megatron.training.training: on a monitored step, the forward passes in it are sampled, and what it
returns has the step's loss. With ``--enable-mhc`` and a model without mHC (no GPTModel) it refuses to train.
Why a spec can't: only the training loop knows where a step begins and ends, and which one it is.
Tested on: megatron-core 0.19.2.
Retired by: an upstream callback around a training step.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any

from mhc_megatron.megatron_hooks.active import get_config
from mhc_megatron.megatron_hooks.rebind import Rebinding
from mhc_megatron.monitor.monitor import Monitor, mhc_config_of, unwrap

# By the first chunk of the model that they watch; None for a model without mHC.
_monitors: weakref.WeakKeyDictionary[Any, Monitor | None] = weakref.WeakKeyDictionary()


def _train_step(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def train_step(*args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(*args, **kwargs).arguments
        model, finished = arguments["model"], arguments.get("iteration")
        if model[0] not in _monitors:
            _monitors[model[0]] = _monitor(model)
        monitor = _monitors[model[0]]
        if monitor is None or finished is None or not monitor.is_due(finished + 1):
            return original(*args, **kwargs)
        with monitor.step(finished + 1) as step:
            result = original(*args, **kwargs)
            losses, grad_norm = result[0], result[5]
            step.values = {"loss": next(iter(losses.values()), None), "grad_norm": grad_norm}
        return result

    return train_step


def _monitor(model: list[Any]) -> Monitor | None:
    from megatron.training.global_vars import get_args, get_tensorboard_writer, get_wandb_writer

    if mhc_config_of(model) is None:
        if get_config() is not None:
            raise ValueError(
                f"--enable-mhc: this script's model, a {type(unwrap(model[0])).__name__}, has no mHC: only GPTModel is "
                "converted; remove the flag"
            )
        return None
    args = get_args()
    return Monitor(model, folder=_folder(args), tensorboard=get_tensorboard_writer(), wandb=get_wandb_writer())


def _folder(args: Any) -> str | None:
    """Of the folders that may hold the file the first one on a file system: checkpoints may go to an object store."""
    named = (getattr(args, "mhc_monitor_dir", ""), args.save, args.tensorboard_dir)
    return next((folder for folder in named if folder and "://" not in folder), None)


REBINDINGS = [Rebinding("megatron.training.training", "train_step", _train_step)]
