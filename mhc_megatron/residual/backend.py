"""Whether the backend asked for can run this model, found out when the model is built; and rank 0 told which one it is."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
from megatron.core.utils import log_single_rank

from mhc_kernels.backend import why_not_triton
from mhc_megatron.config import MHCConfig

_logger = logging.getLogger(__name__)


def check_backend(mhc_config: MHCConfig, config: Any, hidden_size: int) -> None:
    """Check MHCConfig.backend against the model.

    Raises:
        ValueError: for backend ``triton`` where its kernels can't run.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reason = why_not_triton(mhc_config.num_streams, hidden_size, config.params_dtype, device)
    if mhc_config.backend == "triton" and reason is not None:
        raise ValueError(f"MHCConfig.backend 'triton' (--mhc-backend): {reason}; use 'auto' or 'reference'")
    if mhc_config.backend == "reference":
        _report("reference, as asked for: plain PyTorch, slow")
    elif reason is None and device.type == "cuda":
        _report("triton")
    elif mhc_config.backend == "triton":
        _report("triton, interpreted: for tests")
    else:
        _report(f"reference: {reason}")


@cache
def _report(choice: str) -> None:
    log_single_rank(_logger, logging.WARNING, f"mHC: kernels: {choice}")
