"""What the RMSNorm after a boundary costs: fused into it, or as a module after it.

    python kernels/benchmarks/norm.py [--shapes 8192x2560 ...]

GPU time as CUDA graphs, L2 flushed, medians; n = 4, bf16.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import cases
import torch
from timing import graph_us, launches
from torch import Tensor, nn

from mhc_kernels import RMSNorm, boundary

EPS = 1e-5


class NormCase:
    """A boundary, and what follows its u: ``forward()`` and ``forward_backward()``."""

    def __init__(self, inputs: cases.Inputs, norm: nn.Module | None, fuses: bool):
        tensors = (inputs.x, inputs.res, inputs.post, inputs.y, inputs.phi, inputs.alpha, inputs.bias)
        self.leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        self.gradients = inputs.gradients
        self.norm, self.fuses = norm, fuses

    def forward(self) -> tuple[Tensor, ...]:
        x, res, post, y, *own = self.leaves
        fused = None
        if self.norm is not None and self.fuses:
            fused = RMSNorm(self.norm.weight, EPS)  # type: ignore[arg-type]
        out, u, post, res = boundary(x, res, post, y, None, *own, norm=fused, backend="triton")
        return out, self.norm(u) if self.norm is not None and not self.fuses else u, post, res

    def forward_backward(self) -> tuple[Tensor, ...]:
        weight = [] if self.norm is None else [self.norm.weight]
        return torch.autograd.grad(self.forward(), [*self.leaves, *weight], self.gradients)  # type: ignore[list-item]


def norms(width: int) -> dict[str, Callable[[], tuple[nn.Module | None, bool]]]:
    """Name to (norm, whether it is fused)."""

    def torch_norm() -> nn.Module:
        return nn.RMSNorm(width, EPS, device="cuda", dtype=torch.bfloat16)

    found: dict[str, Callable[[], tuple[nn.Module | None, bool]]] = {
        "no norm": lambda: (None, False),
        "fused": lambda: (torch_norm(), True),
        "then torch's": lambda: (torch_norm(), False),
    }
    try:
        import transformer_engine.pytorch as te

        found["then TE's"] = lambda: (te.RMSNorm(width, eps=EPS, dtype=torch.bfloat16), False)
    except ImportError as error:
        print(f"Transformer Engine is not here ({error}): left out")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["8192x2560", "16384x2560", "8192x7168"], metavar="TxC")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a benchmark needs a CUDA GPU")
    print(f"{torch.cuda.get_device_name()}; microseconds\n     T     C  norm             forward  forward+b  launches")
    for shape in options.shapes:
        t, c = map(int, shape.split("x"))
        inputs = cases.make_inputs(t, c)
        for name, make in norms(c).items():
            case = NormCase(inputs, *make())
            case.forward_backward()
            forward, both = graph_us(case.forward), graph_us(case.forward_backward)
            print(
                f"{t:6d} {c:5d}  {name:14s} {forward:9.1f} {both:10.1f} {launches(case.forward_backward):9d}",
                flush=True,
            )


if __name__ == "__main__":
    main()
