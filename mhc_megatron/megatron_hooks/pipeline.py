"""Pipeline schedules exchange streams.

Rebinds: the name ``P2PCommunicator`` in megatron.core.pipeline_parallel.schedules, where both 1F1B schedules take it from.
Why a spec can't: the schedules compute the width of pipeline tensors from ``config.hidden_size``.
Tested on: megatron-core 0.19.2.
Retired by: passing ``p2p_communicator=`` to ``pretrain`` (0.19 has it, and then asks for a process-group collection too).
"""

from __future__ import annotations

from mhc_megatron.megatron_hooks.rebind import Rebinding
from mhc_megatron.pipeline.communicator import StreamsCommunicator

REBINDINGS = [
    Rebinding("megatron.core.pipeline_parallel.schedules", "P2PCommunicator", lambda original: StreamsCommunicator)
]
