"""Which ranks take part in monitoring, and how their samples come together.

* Data parallelism: one replica, the last one, because the last rank is where Megatron logs and has its TensorBoard and W&B
  writers. Other replicas see other text, not other weights.
* Pipeline parallelism: a token's composite gain needs its H_res of all stages. Every stage samples the same tokens of the
  step's first microbatch and fills its own sublayers of one zeroed tensor; a sum over the model-parallel group completes it
  (about 2 MB for 30 layers, 4 streams and 256 tokens), whatever the order of stages and virtual stages.
* Tensor parallelism: with sequence parallelism every rank has other tokens and fills its share; without, the last one does.
* Context parallelism: every rank has other tokens and fills its share.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from mhc_megatron.monitor.sampling import Part


class Ranks:
    """This rank's part.

    Args:
        groups: the model's ProcessGroupCollection; for groups that it lacks, Megatron's global ones.
        sequence_parallel: of the TransformerConfig.
    """

    def __init__(self, groups: Any, sequence_parallel: bool):
        tp = _group(groups, "tp", parallel_state.get_tensor_model_parallel_group)
        pp = _group(groups, "pp", parallel_state.get_pipeline_model_parallel_group)
        dp = _group(groups, "dp", parallel_state.get_data_parallel_group)
        cp = _group(groups, "cp", parallel_state.get_context_parallel_group)
        mp = _group(groups, "mp", parallel_state.get_model_parallel_group)
        self.takes_part = _is_last(dp)
        self.fills = self.takes_part and (sequence_parallel or _is_last(tp))
        self.part = Part(cp.rank(), cp.size(), *((tp.rank(), tp.size()) if sequence_parallel else ()))
        self.logs = self.takes_part and all(map(_is_last, (tp, pp, cp)))
        self._sums = [group for group in (mp, cp) if group.size() > 1]

    def complete(self, values: Tensor) -> None:
        """Sum, in place, what every rank that takes part has filled in; all of them must call it."""
        for group in self._sums:
            dist.all_reduce(values, group=group)


def _group(groups: Any, name: str, default: Any) -> dist.ProcessGroup:
    group = getattr(groups, name, None)
    return default() if group is None else group


def _is_last(group: dist.ProcessGroup) -> bool:
    return group.rank() == group.size() - 1
