"""A CUDA driver that launches nothing and records what it was told: for Triton's and our launches on a machine without a GPU.

Run as a script with a folder to work in, without TRITON_INTERPRET: compiles the kernels of a boundary and of its backward for
sm_90, launches them through Triton and then by addresses alone, and prints both records as JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

SOURCE = """
#include <stdint.h>
#include <string.h>
typedef struct { unsigned grid[3], block[3], shared; void *stream, *attributes; unsigned attribute_count; } Config;
typedef struct { uint64_t function, stream; unsigned grid[3], block[3], shared, attributes, count; uint64_t values[48]; } Record;
unsigned launches = 0, counts[64], sizes[64][48], no_context = 0;
Record records[64];
int cuLaunchKernelEx(const Config *c, void *function, void **parameters, void **extra) {
  if (no_context) return 201;
  Record *r = &records[launches++];
  memset(r, 0, sizeof *r);
  r->function = (uint64_t)function; r->stream = (uint64_t)c->stream;
  memcpy(r->grid, c->grid, 12); memcpy(r->block, c->block, 12);
  r->shared = c->shared; r->attributes = c->attribute_count; r->count = counts[r->function];
  for (unsigned i = 0; i < r->count; i++) memcpy(&r->values[i], parameters[i], sizes[r->function][i]);
  return 0;
}
int cuPointerGetAttribute(uint64_t *out, int attribute, uint64_t pointer) { *out = pointer; return 0; }
int cuCtxGetCurrent(void **context) { *context = no_context ? 0 : (void *)1; return 0; }
int cuCtxSetCurrent(void *context) { no_context = context != (void *)1; return no_context ? 201 : 0; }
int cuDeviceGet(int *device, int ordinal) { *device = 0; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "recorded"; return 0; }
int cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
"""
STREAM = 77


class _Record(ctypes.Structure):
    _fields_ = (
        ("function", ctypes.c_uint64),
        ("stream", ctypes.c_uint64),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("attributes", ctypes.c_uint),
        ("count", ctypes.c_uint),
        ("values", ctypes.c_uint64 * 48),
    )


def install(folder: Path) -> ctypes.CDLL:
    """Build the driver, make it this process's libcuda.so.1, and tell Triton that there is an sm_90 GPU."""
    library = folder / "libcuda.so.1"
    (folder / "driver.c").write_text(SOURCE)
    command = [
        "cc",
        "-shared",
        "-fPIC",
        "-O1",
        "-Wl,-soname,libcuda.so.1",
        "-o",
        str(library),
        str(folder / "driver.c"),
    ]
    subprocess.run(command, check=True)
    (folder / "libcuda.so").symlink_to(library.name)
    os.environ |= {"TRITON_LIBCUDA_PATH": str(folder), "TRITON_CACHE_DIR": str(folder / "cache")}
    driver = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)

    import torch
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaLauncher, ty_to_cpp
    from triton.runtime import driver as active

    functions = 0

    def describe(module: Any, function: Any, name: str, files: dict[str, str], digest: str) -> None:
        """The sizes of the next loaded kernel's parameters, as ptxas read them."""
        head = Path(files[f"{name}.ptx"]).read_text().partition(".entry")[2].partition(")")[0]
        sizes = [int(bits) // 8 for bits in re.findall(r"\.param \.[ubfs](\d+)", head)]
        place = functions + 1
        (ctypes.c_uint * 64).in_dll(driver, "counts")[place] = len(sizes)
        (ctypes.c_uint * 48 * 64).in_dll(driver, "sizes")[place][: len(sizes)] = sizes

    class Utils:
        def get_device_properties(self, device: int) -> dict[str, int]:
            return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}

        def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, ...]:
            nonlocal functions
            functions += 1
            return 1, functions, 100, 0, 1024

    class Driver:
        utils, launcher_cls = Utils(), CudaLauncher
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device=0: STREAM)
        map_python_to_cpp_type = staticmethod(ty_to_cpp)

    active.set_active(Driver())
    knobs.runtime.kernel_load_start_hook = describe
    # CPU tensors stand for the GPU's: their device index is -1.
    torch._C._cuda_getDevice = lambda: -1
    torch._C._cuda_getCurrentRawStream = lambda device: STREAM
    torch.cuda.device = lambda device: contextlib.nullcontext()
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    return driver


def records(driver: ctypes.CDLL) -> list[dict[str, Any]]:
    """What was launched since the last call."""
    count = ctypes.c_uint.in_dll(driver, "launches")
    found = (_Record * 64).in_dll(driver, "records")[: count.value]
    count.value = 0
    return [
        {
            "function": record.function,
            "stream": record.stream,
            "grid": list(record.grid),
            "block": list(record.block),
            "shared": record.shared,
            "attributes": record.attributes,
            "values": list(record.values[: record.count]),
        }
        for record in found
    ]


def main(folder: Path) -> None:
    driver = install(folder)
    import torch

    from mhc_kernels.fused import direct, launch
    from mhc_kernels.fused.boundary import ForwardOptions, forward_call

    t, n, c = 24, 3, 32
    rows = n * n + 2 * n
    bf16 = torch.bfloat16
    x, g, y, du = (torch.zeros(t, width, dtype=bf16) for width in (n * c, n * c, c, c))
    y_bias, gamma, seed = torch.zeros(c, dtype=bf16), torch.ones(c), torch.zeros(1, dtype=torch.int64)
    res, post = torch.zeros(t, n, n), torch.zeros(t, n)
    phi, alpha, bias = torch.zeros(rows, n * c), torch.zeros(3), torch.zeros(rows)
    mains = tuple(torch.zeros_like(p) for p in (phi, alpha, bias))

    def call(tokens: int, mixes: tuple = (True, True, True, 0.25), norm: tuple = (torch.float32, 1e-5, False)) -> Any:
        settings = (True, 2, 1e-6, 0.0, False)
        return forward_call((tokens, n * c), n, bf16, -1, ForwardOptions(*mixes, *settings, *norm))

    runs: list[tuple[Any, tuple]] = []
    real = launch.Plan.run

    def keep(plan: Any, *tensors: Any) -> None:
        runs.append((plan, tensors))
        real(plan, *tensors)

    launch.Plan.run = keep  # type: ignore[method-assign]
    own = call(t)
    results = own.run(x, res, post, y, y_bias, seed, phi, alpha, bias, gamma)
    out, kept = results[0], results[5]
    upstream = (g, du, None, post, res)
    streams = (x, res, post, y, y_bias, seed, out, None, kept, alpha, bias, gamma)
    # What the sublayer before read is computed again, as if it were this boundary's u.
    own.backward(True, True, True, own.read).run(*upstream, *streams, mains, (kept, gamma, torch.zeros_like(du)))
    # The same without whatever may be missing: its kernels get other arrays' addresses instead.
    few = call(t, (True, False, False, 0.0), (None, 0.0, False))
    results = few.run(x, res, post, y, None, None, phi, alpha, bias, None)
    out, kept = results[0], results[5]
    streams = (x, res, post, y, None, None, out, None, kept, alpha, bias, None)
    few.backward(False, True, False).run(None, *upstream[1:], *streams, (None, None, None))
    launch.Plan.run = real  # type: ignore[method-assign]
    by_triton = records(driver)
    for plan, tensors in runs:
        plan.run(*tensors)
    by_addresses = records(driver)
    ctypes.c_uint.in_dll(driver, "no_context").value = 1  # this thread has no context yet
    runs[0][0].run(*runs[0][1])
    again = records(driver)

    def refuse(*_: Any) -> Any:
        raise direct.UnsupportedError("kernel pack_kernel: no")

    launch.DirectLaunches = refuse  # type: ignore[assignment, misc]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        other, shorter = call(t - 8), [tensor[: t - 8] for tensor in (x, res, post, y)]
        for _ in range(2):
            other.run(*shorter, y_bias, seed, phi, alpha, bias, gamma)
    result = {
        "direct": launch._DIRECT,
        "by_triton": by_triton,
        "by_addresses": by_addresses,
        "again": again,
        "refused": len(records(driver)),
        "warnings": [str(warning.message) for warning in said if "mhc_kernels" in str(warning.message)],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
