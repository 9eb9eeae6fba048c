"""``megatron.training.pretrain`` from a pip-installed megatron-core.

Rebinds: ``compile_helpers`` in megatron.core.datasets.utils: skipped where there is nothing to compile. The wheel ships the
compiled ``helpers_cpp`` without its Makefile, and Megatron's ``make`` then fails.
Why a spec can't: it is not about the model.
Tested on: megatron-core 0.19.2.
Retired by: a wheel with the Makefile, or a check before ``make``, upstream.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

from mhc_megatron.megatron_hooks.rebind import Rebinding


def _compile_helpers(original: Callable[[], None]) -> Callable[[], None]:
    def compile_helpers() -> None:
        import megatron.core.datasets as datasets

        makefile = os.path.join(os.path.dirname(datasets.__file__ or ""), "Makefile")
        if os.path.exists(makefile) or importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
            original()

    return compile_helpers


REBINDINGS = [Rebinding("megatron.core.datasets.utils", "compile_helpers", _compile_helpers)]
