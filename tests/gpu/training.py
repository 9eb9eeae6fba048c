"""A training run of a stock Megatron model with Transformer Engine on real text, for the tests that compare runs."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import sysconfig
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core.distributed import DistributedDataParallel

from mhc_megatron import MHCConfig
from mhc_megatron.residual.hyper_connection import HyperConnection
from tests import models

STEPS = 20
COMMON: dict[str, Any] = {
    "bf16": True,
    "params_dtype": torch.bfloat16,
    "use_cpu_initialization": False,
    "moe_grouped_gemm": True,
    "init_method_std": 0.02,
}
SMALL = {"num_layers": 4, "hidden_size": 128, "ffn_hidden_size": 256, "moe_ffn_hidden_size": 128}
QUICKSTART = {**models.MODELS["mla"], **SMALL}
LOCAL = {**models.MODELS["moe"], **SMALL, "moe_grouped_gemm": False}  # 0.19.2 can't build its local MLA on a GPU


def text(steps: int, sequence: int) -> torch.Tensor:
    """[steps, sequence] bytes of Python's own sources."""
    source = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        source += path.read_bytes()
    assert len(source) >= steps * sequence
    return torch.frombuffer(source[: steps * sequence], dtype=torch.uint8).long().view(steps, sequence)


class Run(NamedTuple):
    """Losses of all steps; peak memory in GiB; bytes allocated after each step; a hash of all steps' gradients (``bits``)."""

    losses: list[float]
    peak: float
    allocated: list[int]
    gradients: str

    def distance(self, other: Run) -> list[float]:
        """Relative, of the losses from another run's."""
        return [abs(a - b) / b for a, b in zip(self.losses, other.losses, strict=True)]


def build(
    settings: dict[str, Any],
    mhc: MHCConfig | None,
    sequence: int,
    te: bool = True,
    noise: float = 0.0,
    ddp: dict[str, Any] | None = None,
    seed: int = 0,
) -> DistributedDataParallel:
    """A bf16 model in Megatron's DDP; a seed's weights are the same every time. Arguments as in `train`."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.module import Float16Module

    model_parallel_cuda_manual_seed(seed)
    torch.manual_seed(seed)
    config = models.make_config(**{**COMMON, **settings})
    specs = models.specs(config, mhc, te=te)
    model = GPTModel(config, vocab_size=256, max_sequence_length=sequence, position_embedding_type="rope", **specs)
    if "gradient_accumulation_fusion" not in settings:
        for module in model.modules():
            if isinstance(module, HyperConnection):
                # What that flag sets; Megatron's own output layer wants apex for it.
                module._accumulate = mhc is not None and mhc.backend != "reference"
    model = Float16Module(config, model.cuda())
    if noise:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + noise * torch.randn_like(parameter))
    return models.wrap(model, config, **(ddp or {}))


def backward(model: DistributedDataParallel, parts: torch.Tensor) -> torch.Tensor:
    """Forward and backward of microbatches ``[m, b, s]``, as Megatron's schedule does it; returns the last one's loss."""
    for k, part in enumerate(parts):
        with contextlib.nullcontext() if k == len(parts) - 1 else model.no_sync():
            loss = models.forward(model, part).float().mean()
            loss.backward()
    return loss.detach()


def train(
    settings: dict[str, Any],
    mhc: MHCConfig | None,
    sequence: int,
    rate: float = 1e-3,
    noise: float = 0.0,
    microbatches: int = 1,
    steps: int = STEPS,
    te: bool = True,
    ddp: dict[str, Any] | None = None,
    seed: int = 0,
    bits: bool = False,
) -> Run:
    """Steps of Megatron's Adam.

    Args:
        settings: of the TransformerConfig, over COMMON.
        mhc: None for a stock model.
        noise: relative, on every parameter at the start.
        te: Transformer Engine's modules, or Megatron's local ones.
        ddp: settings of the DistributedDataParallelConfig.
        seed: of the initialisation; the data are the same.
        bits: hash the gradients, as they are summed over microbatches.
    """
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    model = build(settings, mhc, sequence, te, noise, ddp, seed)
    distributed = model.ddp_config.use_distributed_optimizer
    optimizer = get_megatron_optimizer(
        OptimizerConfig(lr=rate, bf16=True, clip_grad=1.0, use_distributed_optimizer=distributed), [model]
    )
    torch.cuda.reset_peak_memory_stats()
    losses, allocated, digest = [], [], hashlib.sha256()
    for ids in text(steps, sequence):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        model.module.set_is_first_microbatch()  # as Megatron's schedule does: FP8 copies of the weights are made anew
        loss = backward(model, ids.view(microbatches, 1, -1))
        model.finish_grad_sync()
        for parameter in model.parameters() if bits else ():
            digest.update(parameter.main_grad.cpu().view(torch.uint8).numpy())
        assert optimizer.step()[0]
        losses.append(loss.item())
        del loss
        allocated.append(torch.cuda.memory_allocated())
    peak = torch.cuda.max_memory_allocated() / 2**30
    del model, optimizer
    gc.collect()
    torch.cuda.empty_cache()
    return Run(losses, peak, allocated, digest.hexdigest())
