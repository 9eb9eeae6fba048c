"""Fixtures of the kernels' tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mhc_kernels.fused.boundary import ForwardCall
from mhc_kernels.recompute_input import Refill
from tests.unit.kernels.cases import DEVICE


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """All memory that PyTorch hands out uninitialised is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    ones = torch.ones(3, device=DEVICE)
    for empty in (
        torch.empty(3, device=DEVICE),
        torch.empty_like(ones),
        ones.new_empty(3),
        torch.empty_strided((3,), (1,), device=DEVICE),
    ):
        assert empty.isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def refills(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What was computed again."""
    made: list[Tensor] = []
    original = Refill._filled

    @contextlib.contextmanager
    def recorded(*arguments: Any) -> Iterator[Tensor]:
        with original(*arguments) as u:
            yield u
        made.append(u)

    monkeypatch.setattr(Refill, "_filled", recorded)
    return made


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Of those, what had a pass over the streams of its own."""
    made: list[Tensor] = []
    original = ForwardCall.aggregate_again

    def recorded(call: ForwardCall, streams: Tensor, kept: Tensor, gamma: Tensor | None, u: Tensor) -> None:
        original(call, streams, kept, gamma, u)
        made.append(u)

    monkeypatch.setattr(ForwardCall, "aggregate_again", recorded)
    return made
