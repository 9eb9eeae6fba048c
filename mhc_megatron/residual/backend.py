"""Whether the backend asked for can run this model, found out when the model is built; and rank 0 told which one it is."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
from megatron.core.utils import log_single_rank

from mhc_kernels import RMSNorm
from mhc_kernels.backend import why_not_streams, why_not_triton
from mhc_kernels.norm import FUSED_NORM_STREAMS
from mhc_megatron.config import MHCConfig
from mhc_megatron.pipeline.state import splits

_logger = logging.getLogger(__name__)


def why_reference(mhc_config: MHCConfig, config: Any) -> str | None:
    """Why a model runs the reference on any GPU, by its settings alone; None where it will be the Triton kernels.

    Raises:
        ValueError: for backend ``triton`` where its kernels can't run.
    """
    if mhc_config.backend == "reference":
        return "--mhc-backend reference"
    reason = why_not_streams(mhc_config.num_streams, config.hidden_size, config.params_dtype)
    if reason is not None and mhc_config.backend == "triton":
        raise _refused(reason)
    return reason


def _refused(reason: str) -> ValueError:
    return ValueError(f"MHCConfig.backend 'triton' (--mhc-backend): {reason}; use 'auto' or 'reference'")


def check_backend(mhc_config: MHCConfig, config: Any, hidden_size: int, norm: RMSNorm | None) -> bool:
    """Check MHCConfig.backend against the model, and build its kernels where that is Triton.

    Args:
        mhc_config: settings.
        config: Megatron's TransformerConfig.
        hidden_size: C.
        norm: that of the sublayer, if it is one that the kernels may take along.

    Returns:
        whether Triton kernels will run.

    Raises:
        ValueError: for backend ``triton`` where its kernels can't run.
    """
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    reason = why_not_triton(mhc_config.num_streams, hidden_size, config.params_dtype, device)
    if mhc_config.backend == "reference":
        _report("reference, as asked for: plain PyTorch, slow")
        return False
    elif reason is None and on_gpu:
        _build(
            mhc_config,
            hidden_size,
            config.params_dtype,
            bool(config.add_bias_linear),
            float(config.hidden_dropout),
            bool(config.gradient_accumulation_fusion),
            None if norm is None or mhc_config.num_streams > FUSED_NORM_STREAMS else norm.centered,
            splits(mhc_config, config),
            device,
        )
        return True
    elif mhc_config.backend == "triton":
        if reason is not None:
            raise _refused(reason)
        _report("triton, interpreted: for tests")
        return True
    _report(f"reference: {reason}")
    return False


_norms: dict[tuple, list] = {}
"""That kernels have been built for, in chains with the same settings."""


@cache
def _build(
    mhc_config: MHCConfig,
    width: int,
    dtype: torch.dtype,
    output_bias: bool,
    dropout_p: float,
    accumulate: bool,
    centered: bool | None,
    split: bool,
    device: torch.device,
) -> None:
    from mhc_kernels.fused.warm_up import warm_up

    norm = None if centered is None else (dtype, centered)
    others = _norms.setdefault((mhc_config, width, dtype, output_bias, dropout_p, accumulate, device), [])
    kernels, seconds = warm_up(
        mhc_config.num_streams,
        width,
        dtype,
        iterations=mhc_config.sinkhorn_iterations,
        eps=mhc_config.eps,
        profile=mhc_config.profile,
        mode=mhc_config.mode,
        output_bias=output_bias,
        dropout_p=dropout_p,
        accumulate=accumulate,
        norm=norm,
        recompute=mhc_config.recompute,
        others=others,
        split=split,
        device=device,
    )
    others.append(norm)
    with_norm = "" if centered is None else ", with the RMSNorm that follows"
    _report(f"triton{with_norm} ({kernels} kernels compiled, or loaded from Triton's cache, in {seconds:.1f} s)")


@cache
def _report(choice: str) -> None:
    # At the level that Megatron shows by default.
    log_single_rank(_logger, logging.WARNING, f"mHC: kernels: {choice}")
