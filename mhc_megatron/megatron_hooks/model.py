"""Every GPTModel of a run with ``--enable-mhc`` is built from an mHC spec; every mHC model has its planned block length, and mHC
in its MTP layers too.

Rebinds: ``GPTModel.__init__``, which is where every way to a spec meets: training scripts, ``--spec``, model builders.
Why a spec can't: the unmodified script chooses the spec. And a spec knows neither the batch nor the vocabulary, on which the
automatic L_r of ``--mhc-recompute`` depends.
Tested on: megatron-core 0.19.2.
Retired by: nothing upstream; scripts that call `to_mhc_spec` themselves don't need it, except for the L_r that the planner finds.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from mhc_megatron.arguments import flag
from mhc_megatron.config import MHCConfig
from mhc_megatron.conflicts import check_conflicts
from mhc_megatron.megatron_hooks.active import get_config, print_rank_0
from mhc_megatron.megatron_hooks.planned import plan_block_length
from mhc_megatron.megatron_hooks.rebind import Rebinding
from mhc_megatron.residual.layer import HyperConnectionLayer
from mhc_megatron.spec import to_mhc_spec


def _init(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        mhc_config = get_config()
        bound = signature.bind(self, *args, **kwargs)
        config, arguments = bound.arguments["config"], bound.arguments
        if mhc_config is not None:
            check_conflicts(config, flag)
            block = _resolve(arguments["transformer_layer_spec"], config, arguments)
            if any(_is_converted(layer) for layer in block.layer_specs or []):
                raise ValueError(
                    "--enable-mhc: this script's spec is an mHC spec already; remove the flag or its to_mhc_spec"
                )
            arguments["transformer_layer_spec"] = to_mhc_spec(block, mhc_config)
        else:
            mhc_config = _settings(arguments["transformer_layer_spec"])
        if mhc_config is not None:
            _convert_mtp(arguments, mhc_config)
            plan_block_length(mhc_config, config, arguments["vocab_size"], _stage(arguments))
        return original(*bound.args, **bound.kwargs)

    return init


def _resolve(spec: Any, config: Any, arguments: dict[str, Any]) -> Any:
    """This chunk's block spec, resolved as TransformerBlock would: a block spec has a place for the exit."""
    from megatron.core.transformer.transformer_block import _get_block_submodules

    return _get_block_submodules(config, spec, arguments.get("vp_stage"), _stage(arguments))


def _stage(arguments: dict[str, Any]) -> int:
    from megatron.core import parallel_state
    from megatron.core.utils import get_pg_rank

    groups: Any = arguments.get("pg_collection")
    return get_pg_rank(groups.pp) if hasattr(groups, "pp") else parallel_state.get_pipeline_model_parallel_rank()


def _settings(spec: Any) -> MHCConfig | None:
    """Those of a spec that the script has converted itself: a layer's, a block's, or its submodules; None for a stock one."""
    block = spec if hasattr(spec, "layer_specs") else getattr(spec, "submodules", None)
    layers = getattr(block, "layer_specs", None) or [spec]
    found: MHCConfig | None = (getattr(layers[0], "params", None) or {}).get("mhc_config")
    return found


def _convert_mtp(arguments: dict[str, Any], mhc_config: MHCConfig) -> None:
    """MTP layers as the decoder's. A script's own ``--spec`` has no part in them: Megatron makes their spec of stock layers."""
    spec: Any = arguments.get("mtp_block_spec")
    block = spec if hasattr(spec, "layer_specs") else getattr(spec, "submodules", None)
    layers = getattr(block, "layer_specs", None) or []
    if layers and not all(_is_converted(layer.submodules.mtp_model_layer) for layer in layers):
        arguments["mtp_block_spec"] = to_mhc_spec(spec, mhc_config)
        print_rank_0("multi-token prediction: its layers get mHC like the decoder's, with streams of their own")


def _is_converted(layer_spec: Any) -> bool:
    return isinstance(layer_spec.module, type) and issubclass(layer_spec.module, HyperConnectionLayer)


REBINDINGS = [Rebinding("megatron.core.models.gpt.gpt_model", "GPTModel.__init__", _init)]
