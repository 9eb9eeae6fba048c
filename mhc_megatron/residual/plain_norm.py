"""Which norms the kernels can take along: plain RMSNorm modules, that of PyTorch and that of Transformer Engine."""

from __future__ import annotations

import sys

from torch import Tensor, nn

from mhc_kernels import RMSNorm


def plain_rms_norm(norm: nn.Module) -> RMSNorm | None:
    """What this module computes, if that is `mhc_kernels.RMSNorm` and nothing else; None for any other module.

    A subclass may do more, a hook wants the module to be called: neither is plain. Of hooks, those of Megatron's overlapped
    parameter gather are known: they wait for the weight, see `wait_for_weight`.
    """
    if norm._forward_hooks or norm._backward_hooks or norm._backward_pre_hooks or "forward" in norm.__dict__:
        return None
    if norm._forward_pre_hooks_with_kwargs or not all(map(_waits, norm._forward_pre_hooks.values())):
        return None
    weight = getattr(norm, "weight", None)
    eps = getattr(norm, "eps", None)
    if not isinstance(weight, Tensor) or eps is None or weight.dim() != 1:
        return None
    if type(norm) is nn.RMSNorm:
        return RMSNorm(weight, float(eps))
    if type(norm) in _transformer_engine_norms():
        return RMSNorm(weight, float(eps), bool(norm.zero_centered_gamma))
    return None


def wait_for_weight(norm: nn.Module) -> None:
    """Run the hooks that Megatron's overlapped parameter gather has before a module's forward."""
    for hook in norm._forward_pre_hooks.values():
        hook(norm, ())


def _waits(hook: object) -> bool:
    return getattr(hook, "__module__", "") == "megatron.core.distributed.distributed_data_parallel"


def _transformer_engine_norms() -> tuple[type, ...]:
    # Only if it is loaded: a norm of its own then exists.
    engine = sys.modules.get("transformer_engine.pytorch")
    return () if engine is None else (engine.RMSNorm,)
