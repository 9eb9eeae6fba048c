"""The parameters of one sublayer's hyper-connection, their initialisation, and the mappings they give."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mhc_kernels import RecomputePlace, RMSNorm, boundary, connect, head
from mhc_kernels.backend import resolve_backend
from mhc_megatron.config import MHCConfig

# preserve: H_post = 1 + d_i, d from -SPREAD to SPREAD. Equal ones would keep the streams equal for ever.
POST_SPREAD = 0.15
# preserve: b_res = DIAGONAL * identity, so H_res starts near the identity, symmetric: its columns are exact as well.
RES_DIAGONAL = 4.0
# Attributes for the optimizer hook: a parameter of this package; one that gets no weight decay.
MHC_PARAMETER = "mhc_parameter"
NO_WEIGHT_DECAY = "mhc_no_weight_decay"


def _logit(p: float) -> float:
    # For n = 1 the preserving H_pre is exactly 1; sigmoid(30) rounds to 1 in float32 and stays finite.
    return 30.0 if p >= 1 else math.log(p / (1 - p))


class Float32Module(nn.Module):
    """A module whose parameters stay float32 through ``.half()``, ``.bfloat16()`` and Megatron's ``Float16Module``.

    Mappings computed from bf16 parameters leave the manifold. Moves between devices work as usual.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_float32, recurse)


def _parameter(shape: tuple[int, ...], config: Any) -> nn.Parameter:
    device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
    parameter = nn.Parameter(torch.empty(shape, dtype=torch.float32, device=device))
    setattr(parameter, MHC_PARAMETER, True)
    # Under sequence parallelism every tensor-parallel rank sees other tokens: Megatron then sums these gradients.
    parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return parameter


class HyperConnection(Float32Module):
    """phi, alpha and bias of one sublayer (section 4.2, Eq. 7).

    Args:
        config: Megatron's TransformerConfig.
        mhc_config: settings.
        hidden_size: C.
    """

    def __init__(self, config: Any, mhc_config: MHCConfig, hidden_size: int):
        super().__init__()
        n = mhc_config.num_streams
        self.mhc_config = mhc_config
        self._init_method = config.init_method
        self._accumulate = bool(getattr(config, "gradient_accumulation_fusion", False))
        self.phi = _parameter((n * n + 2 * n, n * hidden_size), config)
        self.alpha = _parameter((3,), config)
        self.bias = _parameter((n * n + 2 * n,), config)
        if not mhc_config.weight_decay:
            setattr(self.phi, NO_WEIGHT_DECAY, True)  # Megatron already exempts the 1-D alpha and bias
        if config.perform_initialization:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise in place: ``preserve`` makes the model its residual baseline, ``paper`` follows the paper."""
        cfg, n = self.mhc_config, self.mhc_config.num_streams
        pre, post, res = self.bias.split([n, n, n * n])
        self.alpha.fill_(cfg.init_alpha)
        self.bias.zero_()
        if cfg.init == "preserve":
            self.phi.zero_()
        else:
            self._init_method(self.phi)
        if cfg.mode == "hc":
            # No sigmoid in the way: the biases are the mappings. arXiv 2409.19606 starts at the identity as well.
            pre.fill_(1 / n)
            post.copy_(1 + self._post_offsets() if cfg.init == "preserve" else torch.ones(n))
            res.copy_(torch.eye(n).flatten())
        elif cfg.init == "preserve":
            eps = cfg.eps if cfg.profile == "deepseek-v4" and n > 1 else 0.0
            pre.fill_(_logit(1 / n - eps))
            post.copy_(torch.logit((1 + self._post_offsets()) / 2))
            res.copy_(RES_DIAGONAL * torch.eye(n).flatten())

    def _post_offsets(self) -> Tensor:
        n = self.mhc_config.num_streams
        return torch.linspace(-POST_SPREAD, POST_SPREAD, n) if n > 1 else torch.zeros(1)

    def forward(
        self,
        x: Tensor,
        res: Tensor | None = None,
        post: Tensor | None = None,
        y: Tensor | None = None,
        bias: Tensor | None = None,
        dropout_p: float = 0.0,
        norm: RMSNorm | None = None,
        recompute: RecomputePlace | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Streams ``[s, b, n*C]`` to (streams, u, post, res): what this sublayer reads, and what its add needs.

        With y, x is the residual of the sublayer before, and y, bias, dropout_p its output: `mhc_kernels.boundary`; without,
        `mhc_kernels.connect`. One entry for both: Megatron waits for parameters (overlapped all-gather) in hooks on the call.
        """
        cfg = self.mhc_config
        own = (self.phi, self.alpha, self.bias)
        settings: dict[str, Any] = {
            "iterations": cfg.sinkhorn_iterations,
            "eps": cfg.eps,
            "profile": cfg.profile,
            "mode": cfg.mode,
            "backend": cfg.backend,
            "accumulate": self._accumulate,
            "norm": norm,
            "flat": True,
        }
        if y is None:
            return connect(x, *own, **settings)
        assert res is not None
        assert post is not None
        return boundary(x, res, post, y, bias, *own, dropout_p=dropout_p, recompute=recompute, **settings)

    def fuses(self, x: Tensor) -> bool:
        """Whether the boundary into this sublayer is one step on these streams, and not two by the reference."""
        n = self.mhc_config.num_streams
        return resolve_backend(self.mhc_config.backend, n, x.shape[-1] // n, x.dtype, x.device) == "triton"


class ExitHead(Float32Module):
    """The learned exit of profile ``deepseek-v4``: one weight a stream and token, from all streams."""

    def __init__(self, config: Any, mhc_config: MHCConfig, hidden_size: int):
        super().__init__()
        n = mhc_config.num_streams
        self.mhc_config = mhc_config
        self._init_method = config.init_method
        self.phi = _parameter((n, n * hidden_size), config)
        self.alpha = _parameter((1,), config)
        self.bias = _parameter((n,), config)
        if not mhc_config.weight_decay:
            setattr(self.phi, NO_WEIGHT_DECAY, True)
        if config.perform_initialization:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise in place; ``preserve`` starts at the mean over streams."""
        cfg, n = self.mhc_config, self.mhc_config.num_streams
        self.alpha.fill_(cfg.init_alpha)
        if cfg.init == "preserve":
            self.phi.zero_()
            self.bias.fill_(_logit(1 / n - (cfg.eps if n > 1 else 0.0)))
        else:
            self._init_method(self.phi)
            self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Streams ``[..., n, C]`` to weights ``[..., n]``, float32."""
        return head(x, self.phi, self.alpha, self.bias, eps=self.mhc_config.eps, backend=self.mhc_config.backend)
