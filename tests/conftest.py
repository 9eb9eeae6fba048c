"""Tests run stock Megatron on the CPU with gloo, several processes where a layout needs them; tests/gpu needs a GPU."""

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "TORCHDYNAMO_DISABLE", "CUDA_DEVICE_MAX_CONNECTIONS"):
    os.environ.setdefault(_name, "1")

import pytest  # noqa: E402
import torch  # noqa: E402

ON_GPU = torch.cuda.is_available()

if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: the kernels' tests run interpreted
    from mhc_megatron import cpu

    cpu.install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        needs_gpu = item.get_closest_marker("gpu") is not None
        if needs_gpu and not ON_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
        if not needs_gpu and ON_GPU and "tests/unit/kernels" not in item.nodeid:
            item.add_marker(pytest.mark.skip(reason="runs Megatron on the CPU host, on machines without a GPU"))


@pytest.fixture
def hooks():
    """mhc_megatron.enable() for one test."""
    import mhc_megatron

    mhc_megatron.enable()
    yield
    mhc_megatron.disable()


@pytest.fixture
def one_process(tmp_path):
    """Megatron's process groups for a single process, seeded."""
    from tests.ranks import single_process

    with single_process(tmp_path):
        yield


@pytest.fixture
def hyper_connection_calls(monkeypatch):
    """How often a boundary was computed so far, and how often its second half alone (`connect`)."""
    from collections import Counter

    from mhc_megatron.residual.hyper_connection import HyperConnection

    counts: Counter = Counter()
    original = HyperConnection.forward

    def counted(self, *args, **kwargs):
        counts["boundary" if len(args) > 1 else "connect"] += 1
        return original(self, *args, **kwargs)

    monkeypatch.setattr(HyperConnection, "forward", counted)
    return counts
