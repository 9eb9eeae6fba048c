"""Rebinding one name of Megatron: idempotent, marked, reversible, with an error that names the version if it moved."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megatron.core.package_info import __version__ as megatron_version

_MARK = "__mhc_megatron__"


@dataclass
class Rebinding:
    """Replaces ``name`` (dotted: an attribute of a class) in a Megatron module by ``make(original)``.

    make: returns the replacement; it gets ``__wrapped__`` and a mark.
    """

    module: str
    name: str
    make: Callable[[Any], Any]
    _undo: tuple[Any, str, Any] | None = field(default=None, init=False)

    def find(self) -> tuple[Any, str, Any]:
        """The object that holds the name, the name's last part, and its value now. Changes nothing.

        Raises:
            RuntimeError: if this Megatron has no such name.
        """
        owner: Any = importlib.import_module(self.module)
        *path, last = self.name.split(".")
        try:
            for part in path:
                owner = getattr(owner, part)
            original = getattr(owner, last)
        except AttributeError:
            raise RuntimeError(
                f"mhc-megatron: megatron-core {megatron_version} has no {self.module}.{self.name}, which 0.19 has; "
                "install a release that mhc-megatron supports (see its README)"
            ) from None
        return owner, last, original

    def is_applied(self) -> bool:
        """Whether the name is rebound, by whichever object, or by a patch of Megatron's source (`patched`).

        Raises:
            RuntimeError: if this Megatron has no such name.
        """
        return getattr(self.find()[2], _MARK, False)

    def apply(self) -> None:
        """Rebind, unless done already.

        Raises:
            RuntimeError: if this Megatron has no such name.
        """
        owner, last, original = self.find()
        if self.is_applied():
            return
        replacement = self.make(original)
        if not isinstance(replacement, type):
            functools.update_wrapper(replacement, original)
        setattr(replacement, "__wrapped__", original)  # noqa: B010
        setattr(replacement, _MARK, True)
        setattr(owner, last, replacement)
        self._undo = (owner, last, original)

    def revert(self) -> None:
        """Put the original back, if this object replaced it."""
        if self._undo is not None:
            owner, last, original = self._undo
            setattr(owner, last, original)
            self._undo = None
