"""MHCConfig: every choice of this package, with its default and its check. The only place with defaults."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

MODES = ("mhc", "hc")
PROFILES = ("paper", "deepseek-v4")
INITS = ("preserve", "paper")
BACKENDS = ("auto", "triton", "reference")
PIPELINE_COMMS = ("auto", "wide", "split", "wide-stock")
PIPELINE_TRANSPORTS = ("auto", "nccl", "copy-engine")

# Fields that change what a trained model computes: a checkpoint fits only a model with the same values.
FUNCTIONAL_FIELDS = ("num_streams", "mode", "profile", "sinkhorn_iterations", "eps")


def _option(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class MHCConfig:
    """Settings of manifold-constrained hyper-connections (arXiv 2512.24880).

    Every field has a flag: ``num_streams`` is ``--mhc-num-streams``, and so on (`mhc_megatron.arguments`).

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """

    num_streams: int = _option(4, "residual streams n (the paper uses 4)")
    sinkhorn_iterations: int = _option(20, "Sinkhorn iterations for H_res; fewer leave its column sums further off 1")
    mode: str = _option(
        "mhc", "mhc: H_res is projected to doubly stochastic matrices; hc: unconstrained (arXiv 2409.19606)", MODES
    )
    profile: str = _option(
        "paper",
        "numerics of the mappings: paper (arXiv 2512.24880), or deepseek-v4 (DeepSeek-V4's public code: "
        "eps in the sigmoid and in Sinkhorn, a learned exit)",
        PROFILES,
    )
    init: str = _option(
        "preserve",
        "preserve: the model computes exactly the residual network at step 0; "
        "paper: random phi, zero biases (mode hc: the identity)",
        INITS,
    )
    init_alpha: float = _option(0.01, "initial value of the three gates alpha (the paper's 0.01)")
    eps: float = _option(1e-6, "epsilon in the mappings' RMS (profile deepseek-v4: in sigmoid and Sinkhorn as well)")
    weight_decay: bool = _option(
        False, "apply weight decay to phi, as Megatron does to other matrices (default: no decay on mHC parameters)"
    )
    backend: str = _option(
        "auto", "auto: Triton kernels on a CUDA GPU, else the reference; triton; reference: plain PyTorch", BACKENDS
    )

    recompute: bool = _option(
        False,
        "keep the streams of one sublayer in a few; compute the others' and what sublayers read again in the backward, by the "
        "mHC kernels alone (paper section 4.3.2): the same bits, less memory; needs the Triton kernels",
    )
    recompute_sublayers: int = _option(
        0,
        "sublayers (two a layer) that share one kept set of streams under recompute; 0: what the planner finds to need the least "
        "memory on each pipeline stage, or the paper's formula where it can't know",
    )
    pipeline_comm: str = _option(
        "auto",
        "pipeline transfers: wide: all streams in the schedule's, over links of their own, no send stops the compute stream; "
        "split: H_res x while a chunk's last sublayer runs, its output after it (interleaved with overlapped transfers: a group "
        "of microbatches at a step's beginning and end, the others wide); wide-stock: all streams in Megatron's own transfers; "
        "auto: split in 1F1B where neighbouring stages are on different nodes, else wide",
        PIPELINE_COMMS,
    )
    pipeline_transport: str = _option(
        "auto",
        "what moves pipeline transfers that go over links of their own (wide, split): nccl; copy-engine: the GPUs' copy engines, "
        "which leave multiprocessors to computation, between stages of one node, and NCCL between others; "
        "auto: nccl",
        PIPELINE_TRANSPORTS,
    )

    monitor_interval: int = _option(
        100,
        "log the gains of the mappings every so many iterations, and at the first one; 0: never (`report` draws them)",
    )
    monitor_tokens: int = _option(256, "tokens that are sampled for it, evenly spaced in the step's first microbatch")
    monitor_band: float = _option(3.0, "warn, with the layer's number, when a gain leaves [1/band, band]")
    monitor_dir: str = _option(
        "", "folder for mhc-monitor.jsonl (default: that of --save, else of --tensorboard-dir; else no file)"
    )

    def __post_init__(self) -> None:
        lowest_values = {
            "num_streams": 1,
            "sinkhorn_iterations": 1,
            "recompute_sublayers": 0,
            "monitor_interval": 0,
            "monitor_tokens": 1,
        }
        for name, lowest in lowest_values.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
                raise ValueError(f"MHCConfig.{name} must be an integer >= {lowest}, got {value!r}")
        for f in dataclasses.fields(self):
            choices = f.metadata["choices"]
            if choices is not None and getattr(self, f.name) not in choices:
                raise ValueError(f"MHCConfig.{f.name} must be one of {choices}, got {getattr(self, f.name)!r}")
        if not self.eps > 0:
            raise ValueError(f"MHCConfig.eps must be > 0, got {self.eps!r}")
        if self.init_alpha == 0:
            # phi's gradient is proportional to alpha: with both at zero it would stay there.
            raise ValueError("MHCConfig.init_alpha must not be 0: phi would get no gradient")
        if not self.monitor_band > 1:
            raise ValueError(
                f"MHCConfig.monitor_band must be > 1, got {self.monitor_band!r}: gains outside [1/band, band] are reported"
            )
        if self.recompute_sublayers and not self.recompute:
            raise ValueError(
                f"MHCConfig.recompute_sublayers {self.recompute_sublayers} has no effect without MHCConfig.recompute; "
                "set it as well"
            )
        if self.recompute and self.backend == "reference":
            raise ValueError(
                "MHCConfig.recompute has no effect with MHCConfig.backend 'reference', which keeps all streams"
            )
        if self.mode == "hc" and self.profile != "paper":
            raise ValueError(f"MHCConfig.profile {self.profile!r} has no mode 'hc'; use profile 'paper'")

    @property
    def learned_exit(self) -> bool:
        """Whether the streams are contracted by a learned head (deepseek-v4) instead of their mean (paper)."""
        return self.profile == "deepseek-v4"
