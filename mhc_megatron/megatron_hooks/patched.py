"""The hooks of a patched Megatron tree (patches/): `hook` is what a patch adds to the end of a module.

At that moment the module, and perhaps half of Megatron or of this package, is still being imported. So nothing is imported
here that a hook needs: the names are rebound to stand-ins, and the first call of one makes the hook.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from mhc_megatron.megatron_hooks.rebind import Rebinding


def hook(module: str, seam: str, *names: str) -> None:
    """Rebind ``names`` of a Megatron module as the hook module ``seam`` says. `disable` does not take it back.

    Args:
        module: the module's ``__name__``.
        seam: a module of mhc_megatron.megatron_hooks.
        names: as its REBINDINGS have them for this module.

    Raises:
        RuntimeError: if the module has no such name.
    """
    for name in names:
        Rebinding(module, name, functools.partial(_stand_in, module, seam, name)).apply()


def _stand_in(module: str, seam: str, name: str, original: Any) -> Any:
    @functools.cache
    def hooked() -> Callable[..., Any]:
        rebindings = importlib.import_module(f"mhc_megatron.megatron_hooks.{seam}").REBINDINGS
        (make,) = (r.make for r in rebindings if (r.module, r.name) == (module, name))
        return make(original)

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        return hooked()(*args, **kwargs)

    if isinstance(original, type):  # stays a class of this name; calling it makes an object of the hook's class
        return type(original.__name__, (original,), {"__new__": lambda cls, *args, **kwargs: stand_in(*args, **kwargs)})
    return stand_in
