"""Everything that rebinds a name of Megatron, one module a seam. `enable` installs it all, `disable` takes it back."""

from __future__ import annotations

import itertools

from mhc_megatron.megatron_hooks.active import print_rank_0, set_config
from mhc_megatron.megatron_hooks.rebind import Rebinding


def enable() -> None:
    """Install the hooks. Call it once, before the training script imports from Megatron; calling it again does nothing.

    Nothing changes until ``--enable-mhc`` is on the command line or a model is built from a `to_mhc_spec` spec. The latter needs
    this call for pipeline parallelism and for the optimizer (weight decay; bf16 with the distributed optimizer).

    Raises:
        RuntimeError: if the installed Megatron lacks a name that a hook needs.
    """
    for rebinding in rebindings():
        rebinding.apply()


def disable() -> None:
    """Take every hook back and forget ``--enable-mhc``."""
    set_config(None)
    for rebinding in reversed(rebindings()):
        rebinding.revert()


def rebindings() -> list[Rebinding]:
    """Every hook, applied or not."""
    # Not at the top: `patched` is imported while Megatron is, and these import Megatron.
    from mhc_megatron.megatron_hooks import datasets, model, optimizer, pipeline

    core = [*datasets.REBINDINGS, *model.REBINDINGS, *pipeline.REBINDINGS, *optimizer.CORE_REBINDINGS]
    try:
        import megatron.training.training  # noqa: F401
    except ImportError as error:
        print_rank_0(f"megatron.training can't be imported ({error}): no command-line flags, to_mhc_spec works")
        return core
    from mhc_megatron.megatron_hooks import arguments, checkpoint, failed_save, monitor

    training = [optimizer.TRAINING_REBINDINGS, arguments.REBINDINGS, checkpoint.REBINDINGS]
    training += [failed_save.REBINDINGS, monitor.REBINDINGS]
    return [*core, *itertools.chain(*training)]
