"""Optimizer settings of mHC's parameters, and the distributed optimizer made fit for float32 parameters in a bf16 model.

Rebinds: ``get_standard_config_overrides`` in megatron.core.optimizer and, by the name it was imported under, in
megatron.training.training: no weight decay on phi (unless ``--mhc-weight-decay``), and parameter groups of their own for
mHC's parameters. ``DistributedOptimizer._set_main_param_and_optimizer_states``: runs without autograd.
Why a spec can't: Megatron exempts 1-D parameters and biases from decay; phi is a matrix. And the distributed optimizer of
0.19.2 (1) mixes up the states of a group that holds bf16 and float32 parameters (it numbers them in buffer order and
stores float32 ones first: saving asserts, or swaps states of equal size), (2) can't load the state of a float32
parameter, whose shard is a view of a leaf that requires grad.
Tested on: megatron-core 0.19.2.
Retired by: a parameter attribute for weight decay, and fixes of (1) and (2), upstream.
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


def _without_autograd(original: Callable[..., Any]) -> Callable[..., Any]:
    import torch

    return torch.no_grad()(original)


CORE_REBINDINGS = [
    Rebinding("megatron.core.optimizer", "get_standard_config_overrides", _get_standard_config_overrides),
    Rebinding(
        "megatron.core.optimizer.distrib_optimizer",
        "DistributedOptimizer._set_main_param_and_optimizer_states",
        _without_autograd,
    ),
]
TRAINING_REBINDINGS = [
    Rebinding("megatron.training.training", "get_standard_config_overrides", _get_standard_config_overrides)
]
REBINDINGS = [*CORE_REBINDINGS, *TRAINING_REBINDINGS]
