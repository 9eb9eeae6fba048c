"""Manifold-Constrained Hyper-Connections (mHC, arXiv 2512.24880) for stock NVIDIA Megatron-Core."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mhc_megatron.config import MHCConfig

if TYPE_CHECKING:
    from mhc_megatron.megatron_hooks import disable, enable
    from mhc_megatron.monitor.monitor import Monitor
    from mhc_megatron.spec import to_mhc_spec

__version__ = "0.1.0"
__all__ = ["MHCConfig", "Monitor", "disable", "enable", "to_mhc_spec"]


def __getattr__(name: str) -> Any:
    # Lazy: `import mhc_megatron` must cost neither torch nor megatron.
    if name == "to_mhc_spec":
        from mhc_megatron.spec import to_mhc_spec

        return to_mhc_spec
    if name == "Monitor":
        from mhc_megatron.monitor.monitor import Monitor

        return Monitor
    if name in ("enable", "disable"):
        from mhc_megatron import megatron_hooks

        return getattr(megatron_hooks, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
