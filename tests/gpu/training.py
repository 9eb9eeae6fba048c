"""A training run of a stock Megatron model with Transformer Engine on real text, for the tests that compare runs."""

from __future__ import annotations

import gc
import sysconfig
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mhc_megatron import MHCConfig, to_mhc_spec
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


def text(steps: int, sequence: int) -> torch.Tensor:
    """[steps, sequence] bytes of Python's own sources."""
    source = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        source += path.read_bytes()
    assert len(source) >= steps * sequence
    return torch.frombuffer(source[: steps * sequence], dtype=torch.uint8).long().view(steps, sequence)


class Run(NamedTuple):
    """Losses of all steps; peak memory in GiB; bytes allocated after each step."""

    losses: list[float]
    peak: float
    allocated: list[int]

    def distance(self, other: Run) -> list[float]:
        """Relative, of the losses from another run's."""
        return [abs(a - b) / b for a, b in zip(self.losses, other.losses, strict=True)]


def train(
    settings: dict[str, Any],
    mhc: MHCConfig | None,
    sequence: int,
    rate: float = 1e-3,
    noise: float = 0.0,
    microbatches: int = 1,
    steps: int = STEPS,
    te: bool = True,
    seed: int = 0,
) -> Run:
    """Steps of Megatron's Adam.

    Args:
        settings: of the TransformerConfig, over COMMON.
        mhc: None for a stock model.
        noise: relative, on every parameter at the start.
        te: Transformer Engine's modules, or Megatron's local ones.
        seed: of the initialisation; the data are the same.
    """
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.module import Float16Module

    model_parallel_cuda_manual_seed(seed)
    torch.manual_seed(seed)
    config = models.make_config(**{**COMMON, **settings})
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=te)
    if mhc is not None:
        spec = to_mhc_spec(spec, mhc)
    model = GPTModel(config, spec, 256, sequence, position_embedding_type="rope")
    for module in model.modules():
        if isinstance(module, HyperConnection):
            # What gradient_accumulation_fusion sets; Megatron's own output layer wants apex for it.
            module._accumulate = mhc is not None and mhc.backend != "reference"
    model = Float16Module(config, model.cuda())
    if noise:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + noise * torch.randn_like(parameter))
    ddp = models.wrap(model, config)
    optimizer = get_megatron_optimizer(OptimizerConfig(lr=rate, bf16=True, clip_grad=1.0), [ddp])
    torch.cuda.reset_peak_memory_stats()
    losses, allocated = [], []
    for ids in text(steps, sequence):
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        model.set_is_first_microbatch()  # as Megatron's schedule does: FP8 copies of the weights are made anew
        for part in ids.view(microbatches, 1, -1):
            loss = models.forward(ddp, part).float().mean()
            loss.backward()
        ddp.finish_grad_sync()
        assert optimizer.step()[0]
        losses.append(loss.item())
        del loss
        allocated.append(torch.cuda.memory_allocated())
    peak = torch.cuda.max_memory_allocated() / 2**30
    del ddp, model, optimizer
    gc.collect()
    torch.cuda.empty_cache()
    return Run(losses, peak, allocated)
