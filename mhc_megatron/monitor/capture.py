"""What a monitored step leaves behind: the mappings of a sample of tokens, in one small tensor.

Forward hooks on the mHC inputs, which hand on the streams, H_post and H_res of their sublayer anyway. They are there only during
a monitored step; no other step, evaluation or recompute pays for them. Nothing waits for the GPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mhc_kernels import reference
from mhc_megatron.monitor.sampling import Part
from mhc_megatron.residual.input import HyperConnectionInput
from mhc_megatron.residual.layer import HyperConnectionLayer
from mhc_megatron.residual.streams import Residual, unflatten

SUBLAYERS = ("attention", "mlp")  # of a layer, in their order


class Sublayer(NamedTuple):
    """Where one mHC input is: its layer's number (from 1, of the whole model), which sublayer, and the module (a weak
    reference: what watches a model must not keep it)."""

    layer: int
    name: str
    module: weakref.ref[HyperConnectionInput]

    @property
    def slot(self) -> int:
        return len(SUBLAYERS) * (self.layer - 1) + SUBLAYERS.index(self.name)


def find_sublayers(chunks: Sequence[nn.Module]) -> list[Sublayer]:
    """The mHC inputs of the decoder layers of these model chunks (MTP layers are not part of that depth)."""
    found = []
    for layer in (m for chunk in chunks for m in chunk.modules() if isinstance(m, HyperConnectionLayer)):
        inner: Any = layer
        if inner.is_mtp_layer:
            continue
        for name, module in zip(SUBLAYERS, (inner.input_layernorm, inner.pre_mlp_layernorm), strict=True):
            if isinstance(module, HyperConnectionInput):
                found.append(Sublayer(inner.layer_number, name, weakref.ref(module)))
    return found


class Layout:
    """Columns of the sample's last axis: present (0 or 1) | H_res | H_post | H_pre | stream similarity."""

    def __init__(self, num_streams: int):
        self.widths = [1, num_streams * num_streams, num_streams, num_streams, 1]
        self.width = sum(self.widths)


class Sample:
    """``values [slots, tokens, columns]``, float32: zero but for the sublayers and tokens of this rank.

    Args:
        sublayers: this rank's. slots: of the whole model.
        tokens: how many are sampled; part: which of them this rank has.
        num_streams: n.
    """

    def __init__(self, sublayers: Sequence[Sublayer], slots: int, tokens: int, part: Part, num_streams: int):
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
        columns = Layout(num_streams).width
        self.values = torch.zeros(slots, tokens, columns, dtype=torch.float32, device=device)
        self._sublayers, self._part = sublayers, part
        self._places: tuple[torch.Size, tuple[Tensor, ...]] | None = None
        self._taken: set[int] = set()

    @contextmanager
    def taking(self) -> Iterator[None]:
        """Take the first forward of every sublayer: the first microbatch, on every stage the same one."""
        modules = [(s.slot, s.module()) for s in self._sublayers]
        handles = [m.register_forward_hook(self._hook(slot)) for slot, m in modules if m is not None]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, slot: int) -> Any:
        def take(module: Any, inputs: Any, output: tuple[Tensor, Residual]) -> None:
            if slot not in self._taken:
                self._taken.add(slot)
                self._take(slot, module, output[1])

        return take

    @torch.no_grad()
    def _take(self, slot: int, module: HyperConnectionInput, residual: Residual) -> None:
        number, *places = self._tokens_of(residual.x)
        x = unflatten(residual.x[*places], module.num_streams)
        columns = (
            x.new_ones(x.shape[0], 1, dtype=torch.float32),
            residual.res[*places].flatten(1),
            residual.post[*places],
            _pre(module, x),
            _similarity(x)[:, None],
        )
        self.values[slot, number] = torch.cat(columns, 1)

    def _tokens_of(self, x: Tensor) -> tuple[Tensor, ...]:
        if self._places is None or self._places[0] != x.shape:
            tokens = self._part.tokens(self.values.shape[1], *x.shape[:2])
            self._places = (x.shape, tuple(t.to(x.device) for t in tokens))
        return self._places[1]


def _pre(module: HyperConnectionInput, x: Tensor) -> Tensor:
    """H_pre ``[T, n]`` of streams ``[T, n, C]``. The kernels keep it to themselves; one Sinkhorn iteration, for H_res, is
    the least that the definition takes."""
    own, cfg = module.hyper_connection, module.hyper_connection.mhc_config
    pre, _, _ = reference.mappings(
        x, own.phi, own.alpha, own.bias, iterations=1, eps=cfg.eps, profile=cfg.profile, mode=cfg.mode
    )
    return pre


def _similarity(x: Tensor) -> Tensor:
    """``[T, n, C] -> [T]``: the mean cosine of two streams, NaN for one stream."""
    n = x.shape[-2]
    unit = torch.nn.functional.normalize(x.float(), dim=-1)
    # The squared norm of the sum counts every pair twice, and every stream with itself.
    total, own = unit.sum(-2).square().sum(-1), unit.square().sum((-2, -1))
    return (total - own) / (n * (n - 1)) if n > 1 else torch.full_like(total, float("nan"))
