"""Every GPTModel of a run with ``--enable-mhc`` is built from an mHC spec.

Rebinds: ``GPTModel.__init__``, which is where every way to a spec meets: training scripts, ``--spec``, model builders.
Why a spec can't: the unmodified script chooses the spec.
Tested on: megatron-core 0.19.2.
Retired by: nothing upstream; scripts that call `to_mhc_spec` themselves don't need it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from mhc_megatron.arguments import flag
from mhc_megatron.conflicts import check_conflicts
from mhc_megatron.megatron_hooks.active import get_config
from mhc_megatron.megatron_hooks.rebind import Rebinding
from mhc_megatron.residual.layer import HyperConnectionLayer
from mhc_megatron.spec import to_mhc_spec


def _init(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        mhc_config = get_config()
        if mhc_config is None:
            return original(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs)
        config, arguments = bound.arguments["config"], bound.arguments
        check_conflicts(config, flag)
        block = _resolve(arguments["transformer_layer_spec"], config, arguments)
        if any(_is_converted(layer) for layer in block.layer_specs or []):
            raise ValueError(
                "--enable-mhc: this script's spec is an mHC spec already; remove the flag or its to_mhc_spec"
            )
        arguments["transformer_layer_spec"] = to_mhc_spec(block, mhc_config)
        return original(*bound.args, **bound.kwargs)

    return init


def _resolve(spec: Any, config: Any, arguments: dict[str, Any]) -> Any:
    """This chunk's block spec, resolved as TransformerBlock would: a block spec has a place for the exit."""
    from megatron.core.transformer.transformer_block import _get_block_submodules
    from megatron.core.utils import get_pg_rank

    pg_collection = arguments.get("pg_collection")
    pp_rank = get_pg_rank(pg_collection.pp) if pg_collection is not None and hasattr(pg_collection, "pp") else None
    return _get_block_submodules(config, spec, arguments.get("vp_stage"), pp_rank)


def _is_converted(layer_spec: Any) -> bool:
    return isinstance(layer_spec.module, type) and issubclass(layer_spec.module, HyperConnectionLayer)


REBINDINGS = [Rebinding("megatron.core.models.gpt.gpt_model", "GPTModel.__init__", _init)]
