"""Optimizer settings of mHC's parameters: no weight decay on phi (unless ``--mhc-weight-decay``), groups of their own.

Rebinds: ``get_standard_config_overrides`` in megatron.core.optimizer and, by the name it was imported under, in
megatron.training.training.
Why a spec can't: Megatron exempts 1-D parameters and biases from decay; phi is a matrix. And the distributed optimizer of
0.19.2 mixes up the states of a parameter group that holds bf16 and float32 parameters (it numbers them in buffer order and
stores float32 ones first: saving asserts, or swaps states of equal size), so float32 ones need groups of their own.
Tested on: megatron-core 0.19.2.
Retired by: a parameter attribute for weight decay, and a fix of the numbering, upstream.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mhc_megatron.megatron_hooks.rebind import Rebinding
from mhc_megatron.residual.hyper_connection import MHC_PARAMETER, NO_WEIGHT_DECAY

# Optimizers that Megatron gives one class for all parameters. The others (Muon, ...) sort parameters themselves.
_PLAIN_OPTIMIZERS = ("adam", "sgd")


def _get_standard_config_overrides(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_standard_config_overrides(config: Any) -> Any:
        from megatron.core.optimizer.optimizer_config import ParamKey

        overrides = {**original(config), ParamKey(attr=NO_WEIGHT_DECAY): {"wd_mult": 0.0}}
        if config.optimizer in _PLAIN_OPTIMIZERS:
            # Says what is so anyway, but parameters with this override form a group of their own, known to checkpoints.
            overrides[ParamKey(attr=MHC_PARAMETER)] = {"optimizer": config.optimizer}
        return overrides

    return get_standard_config_overrides


CORE_REBINDINGS = [
    Rebinding("megatron.core.optimizer", "get_standard_config_overrides", _get_standard_config_overrides)
]
TRAINING_REBINDINGS = [
    Rebinding("megatron.training.training", "get_standard_config_overrides", _get_standard_config_overrides)
]
