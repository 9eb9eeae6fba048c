"""Fixtures of the kernels' tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

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
