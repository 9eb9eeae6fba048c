"""Pipeline schedules exchange streams.

Rebinds, in megatron.core.pipeline_parallel.schedules: the name ``P2PCommunicator``, where both 1F1B schedules take it from;
and both of those, to note how many microbatches there will be: it is then known which receives can be posted ahead.
Why a spec can't: the schedules compute the width of pipeline tensors from ``config.hidden_size``, and tell a communicator
nothing of what is to come.
Tested on: megatron-core 0.19.2.
Retired by: passing ``p2p_communicator=`` to ``pretrain`` (0.19 has it, and then asks for a process-group collection too).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from mhc_megatron.megatron_hooks.rebind import Rebinding
from mhc_megatron.pipeline.communicator import StreamsCommunicator
from mhc_megatron.pipeline.state import Running, pipeline_state

_MODULE = "megatron.core.pipeline_parallel.schedules"


def _schedule(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def schedule(*args: Any, **kwargs: Any) -> Any:
        from megatron.core.utils import get_model_config

        arguments = signature.bind(*args, **kwargs).arguments
        model = arguments["model"]
        state = pipeline_state(get_model_config(model[0] if isinstance(model, list) else model))
        if state is None:
            return original(*args, **kwargs)
        state.running = Running(arguments["num_microbatches"], arguments.get("forward_only", False))
        try:
            return original(*args, **kwargs)
        finally:
            state.running = None

    return schedule


REBINDINGS = [
    Rebinding(_MODULE, "P2PCommunicator", lambda original: StreamsCommunicator),
    *(Rebinding(_MODULE, f"forward_backward_pipelining_{how}_interleaving", _schedule) for how in ("with", "without")),
]
