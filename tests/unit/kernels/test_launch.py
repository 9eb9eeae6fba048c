"""Launches by addresses alone give the driver what Triton's launcher gives it; what can't be launched so goes through Triton."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mhc_kernels import RMSNorm, boundary
from tests.unit.kernels.cases import DEVICE, ON_GPU, Case


@pytest.mark.skipif(ON_GPU, reason="takes the place of the CUDA driver; the GPU's own test is below")
@pytest.mark.skipif(shutil.which("cc") is None, reason="builds a driver: needs a C compiler")
def test_driver_gets_the_same_from_us_as_from_triton(tmp_path: Path) -> None:
    """All kernels of a boundary and its backward, with dropout, a bias, a norm and gradients to add to; and without."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, str(Path(__file__).with_name("recording_driver.py")), str(tmp_path)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    found = json.loads(done.stdout)
    if not found["direct"]:
        pytest.skip("launches by addresses are for Triton 3.6")
    triton = found["by_triton"]
    # Addresses, T and p_drop, eps and so on, two pointers to scratch memory: all of the kernels' parameters are compared.
    assert [len(launch["values"]) for launch in triton] == 2 * [6, 13, 17, 21, 6, 38]
    assert all(launch["stream"] and launch["attributes"] == 0 for launch in triton)
    assert found["by_addresses"] == triton
    assert found["again"] == triton[:3]  # in a thread that had no CUDA context
    assert found["refused"] == 6
    (warning,) = found["warnings"]
    assert "kernel pack_kernel: no; its launches go through Triton" in warning


def _launch(**changes: Any) -> Any:
    """A kernel (pointer, i32 T, fp32 p, constexpr) as Triton describes it."""
    from mhc_kernels.fused.direct import Launch

    ptx = ".visible .entry k(\n .param .u64 .ptr .global .align 1 k_param_0,\n .param .u32 k_param_1,\n .param .f32 k_param_2,\n"
    ptx += " .param .u64 .ptr .global .align 1 k_param_3,\n .param .u64 .ptr .global .align 1 k_param_4\n)\n{"
    run = {"num_ctas": 1, "launch_cooperative_grid": False, "launch_pdl": False}
    run |= {"global_scratch_size": 0, "profile_scratch_size": 0}
    signature = {"x_ptr": "*bf16", "T": "i32", "p": "fp32", "N": "constexpr"}
    kernel = SimpleNamespace(
        src=SimpleNamespace(signature={**signature, **changes.pop("signature", {})}),
        asm={"ptx": changes.pop("ptx", ptx)},
        run=SimpleNamespace(**{**run, **changes}),
    )
    return Launch(kernel, (1, 1, 1), (0,), (-5, 0.5, 4))


def test_arguments_of_a_kernel() -> None:
    from mhc_kernels.fused.direct import scalar_arguments

    assert scalar_arguments(_launch()) == [None, b"\xfb\xff\xff\xff", b"\x00\x00\x00\x3f"]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"num_ctas": 2}, "clusters"),
        ({"launch_pdl": True}, "programmatic launch"),
        ({"global_scratch_size": 128}, "scratch memory"),
        ({"signature": {"more": "i32"}}, "5 arguments in its signature, 4 given"),
        ({"signature": {"x_ptr": "constexpr"}}, "'constexpr' where an array is given"),
        ({"signature": {"p": "bf16"}}, "type 'bf16'"),
        ({"signature": {"T": "i64"}}, "PTX takes arguments of"),
        ({"ptx": ""}, "PTX takes arguments of"),
    ],
)
def test_kernels_that_are_refused(changes: dict[str, Any], why: str) -> None:
    from mhc_kernels.fused.direct import UnsupportedError, scalar_arguments

    with pytest.raises(UnsupportedError, match=why):
        scalar_arguments(_launch(**changes))


@pytest.mark.usefixtures("poisoned_memory")
def test_allocations_are_poisoned() -> None:
    """Without that, the other tests would not see an output that is never written."""
    from mhc_kernels.fused.memory import allocator, form

    made = allocator(torch.ones(3, device=DEVICE))(*form((2, 3), torch.float32))
    assert made.isnan().all()
    assert made.is_contiguous()
    assert made.device.type == DEVICE


def _boundary(n: int, biased: bool, drops: bool, tokens: int, width: int) -> Callable[[], Any]:
    """A boundary and its backward, without the accumulation into leaves."""
    case = Case(tokens, n, width, torch.bfloat16)
    leaves = case.leaves()
    if not biased:
        leaves["bias"] = None
    inputs = [leaf for leaf in leaves.values() if leaf is not None]

    def call() -> Any:
        results = boundary(**leaves, dropout_p=0.1 if drops else 0.0, backend="triton")
        return torch.autograd.grad(results, inputs, case.gradients)

    return call


COUNTED = [(n, biased, drops) for n in (2, 4, 8) for biased in (False, True) for drops in (False, True)]


@pytest.mark.skipif(ON_GPU, reason="counts what is asked for; the GPU's own test is below")
@pytest.mark.parametrize(("n", "biased", "drops"), COUNTED)
def test_launches_of_a_boundary(n: int, biased: bool, drops: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six, and PyTorch's one for each of dropout's seed and the bias's gradient."""
    from mhc_kernels.fused import launch

    counted: list[str] = []

    def run(plan: Any, *_: Any) -> None:
        counted.extend(step.kernel.__name__ for step in plan._steps)

    class Operators(TorchDispatchMode):
        launch_nothing = {"empty", "new_empty", "empty_like", "view", "detach", "alias", "lift_fresh"}

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = function.overloadpacket.__name__
            if function.namespace != "mhc_kernels" and name not in self.launch_nothing:
                counted.append(name)
            return function(*args, **(kwargs or {}))

    monkeypatch.setattr(launch.Plan, "run", run)
    call = _boundary(n, biased, drops, 24, 32)
    with Operators():
        call()
    assert len(counted) == 6 + biased + drops, counted


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "biased", "drops"), COUNTED)
def test_launches_that_a_gpu_sees(n: int, biased: bool, drops: bool) -> None:
    """Kernels; PyTorch's sum over many tokens may clear a few bytes before."""
    from torch.profiler import ProfilerActivity, profile

    call = _boundary(n, biased, drops, 2048, 1280)
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    device = torch.autograd.DeviceType.CUDA
    kernels = [event.name for event in profiler.events() if event.device_type == device]
    kernels = [name for name in kernels if not name.startswith("Mem")]
    assert len(kernels) == 6 + biased + drops, kernels


@pytest.mark.gpu
@pytest.mark.parametrize("normalises", [False, True])
@pytest.mark.parametrize("n", [4, 6])
def test_launches_by_addresses(n: int, normalises: bool) -> None:
    """The same bits as through Triton: on another stream, in several new threads at once, and no
    warning that some kernel can't be launched so."""
    from mhc_kernels.fused import launch

    case = Case(72, n, 64, torch.bfloat16, seed=n)
    weight = torch.rand(64, device=DEVICE).bfloat16().requires_grad_() if normalises else None

    def run() -> list[Tensor]:
        leaves = case.leaves()
        norm = None if weight is None else RMSNorm(weight, 1e-5)
        results = boundary(**leaves, norm=norm, iterations=7 + normalises, backend="triton")  # plans of this test alone
        inputs = [*leaves.values(), *(() if weight is None else (weight,))]
        return [*results, *torch.autograd.grad(results, inputs, case.gradients)]

    def same(ours: list[Tensor]) -> bool:
        torch.cuda.synchronize()
        return all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))

    plans: set[Any] = set()
    original = launch.Plan.run

    def seen(plan: Any, *tensors: Tensor) -> None:
        plans.add(plan)
        original(plan, *tensors)

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("error", message="mhc_kernels")
        patch.setattr(launch, "_DIRECT", False)
        patch.setattr(launch.Plan, "run", seen)
        expected = run()  # through Triton: nothing is prepared
        assert all(not plan._direct for plan in plans)
        patch.setattr(launch, "_DIRECT", True)
        assert same(run())  # through Triton, and prepares
        assert all(plan._direct[0] is not None for plan in plans)
    assert same(run())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ours = run()
    assert same(ours)
    threaded: list[list[Tensor]] = []

    def in_thread() -> None:
        with torch.no_grad():  # nothing here has made a CUDA context current yet
            norm = None if weight is None else RMSNorm(weight, 1e-5)
            boundary(**case.arguments, norm=norm, iterations=7 + normalises, backend="triton")
        threaded.append(run())

    threads = [threading.Thread(target=in_thread) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(threaded) == 4
    assert all(same(ours) for ours in threaded)
