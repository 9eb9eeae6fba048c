"""No weight decay on phi, unless ``--mhc-weight-decay``.

Rebinds: ``get_standard_config_overrides`` in megatron.core.optimizer and, by the name it was imported under, in
megatron.training.training.
Why a spec can't: Megatron exempts 1-D parameters and biases; phi is a matrix.
Tested on: megatron-core 0.19.2.
Retired by: a parameter attribute for weight decay in Megatron's standard overrides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mhc_megatron.megatron_hooks.rebind import Rebinding
from mhc_megatron.residual.hyper_connection import NO_WEIGHT_DECAY


def _get_standard_config_overrides(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_standard_config_overrides(*args: Any, **kwargs: Any) -> Any:
        from megatron.core.optimizer.optimizer_config import ParamKey

        return {**original(*args, **kwargs), ParamKey(attr=NO_WEIGHT_DECAY): {"wd_mult": 0.0}}

    return get_standard_config_overrides


CORE_REBINDINGS = [
    Rebinding("megatron.core.optimizer", "get_standard_config_overrides", _get_standard_config_overrides)
]
TRAINING_REBINDINGS = [
    Rebinding("megatron.training.training", "get_standard_config_overrides", _get_standard_config_overrides)
]
