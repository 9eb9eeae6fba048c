"""Launches through the CUDA driver, with all arguments but addresses laid out once.

Triton's launcher reads 25 to 70 Python objects a launch, most of them constants that the kernel no longer has. Here one run of a
plan writes the addresses into one array and calls the driver; what the driver reads (``kernelParams``) points into that array.

What a compiled kernel takes (Triton 3.6): in the order of its signature, what is not ``constexpr`` there, and then two
pointers to scratch memory, null unless the kernel says that it needs some.
"""

from __future__ import annotations

import ctypes
import re
import struct
import threading
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

_FORMATS = {
    "i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u1": "B", "u8": "B", "u16": "H", "u32": "I", "u64": "Q",
    "fp32": "f", "f32": "f", "fp64": "d",
}  # fmt: skip
"""How `struct` writes what Triton's signatures call by these names."""

_PTX_PARAMETER = re.compile(r"\.param\s+\.[a-z](\d+)\s")
_SCRATCH_POINTERS = 2


class UnsupportedError(Exception):
    """Why a kernel can't be launched here."""


class Launch(NamedTuple):
    """A compiled kernel on a grid. places: of its arrays' addresses among those given to a run; then its other arguments."""

    compiled: Any
    grid: tuple[int, int, int]
    places: tuple[int, ...]
    scalars: tuple


class _Config(ctypes.Structure):
    """``CUlaunchConfig`` of cuda.h."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("attribute_count", ctypes.c_uint),
    )


@cache
def _driver() -> Any:
    try:
        # Not PyDLL: a launch waits where the queue is full, and other threads must run meanwhile.
        driver = ctypes.CDLL("libcuda.so.1")
        # No argtypes: its arguments are ctypes objects made once, which pass quicker unconverted.
        driver.cuLaunchKernelEx.restype = ctypes.c_int
        driver.cuCtxSetCurrent.argtypes = (ctypes.c_void_p,)
    except (OSError, AttributeError) as error:
        raise UnsupportedError(f"no CUDA driver with cuLaunchKernelEx ({error})") from error
    return driver


def scalar_arguments(launch: Launch) -> list[bytes | None]:
    """The kernel's arguments in their order: None for an address, else the bytes of a number.

    Raises:
        UnsupportedError: if the kernel's own list says otherwise, or it is launched in a way that is unknown here.
    """
    compiled, run = launch.compiled, launch.compiled.run
    if run.num_ctas != 1 or run.launch_cooperative_grid or run.launch_pdl:
        raise UnsupportedError("it has clusters, a cooperative grid or a programmatic launch")
    if run.global_scratch_size or run.profile_scratch_size:
        raise UnsupportedError("it needs scratch memory")
    kinds, arrays = list(compiled.src.signature.values()), len(launch.places)
    if len(kinds) != arrays + len(launch.scalars):
        raise UnsupportedError(f"{len(kinds)} arguments in its signature, {arrays + len(launch.scalars)} given")
    arguments: list[bytes | None] = []
    for kind in kinds[:arrays]:
        if not isinstance(kind, str) or not kind.startswith("*"):
            raise UnsupportedError(f"{kind!r} where an array is given")
        arguments.append(None)
    for kind, value in zip(kinds[arrays:], launch.scalars, strict=True):
        if kind == "constexpr":
            continue
        if kind not in _FORMATS:
            raise UnsupportedError(f"an argument of type {kind!r}")
        arguments.append(struct.pack("<" + _FORMATS[kind], value))
    sizes = [8 if argument is None else len(argument) for argument in arguments] + [8] * _SCRATCH_POINTERS
    ptx = compiled.asm.get("ptx", "")
    head = ptx[ptx.find(".entry") :].partition("{")[0]
    wanted = [int(bits) // 8 for bits in _PTX_PARAMETER.findall(head)]
    if sizes != wanted:
        raise UnsupportedError(f"its PTX takes arguments of {wanted} bytes, its signature has {sizes}")
    return arguments


class DirectLaunches:
    """The launches of a plan on the current device.

    Args:
        launches: kernels, loaded on that device.
        addresses: how many a run gets.

    Raises:
        UnsupportedError: naming the kernel and why.
    """

    def __init__(self, launches: Sequence[Launch], addresses: int):
        self._launch = _driver().cuLaunchKernelEx
        self._lock = threading.Lock()
        self._addresses = (ctypes.c_uint64 * addresses)()
        self._context = ctypes.c_void_p()
        _driver().cuCtxGetCurrent(ctypes.byref(self._context))
        self._stream = 0
        self._configs: list[_Config] = []
        self._calls: list[tuple[Any, ...]] = []
        self._kernels: list[Any] = []
        self._scalars: list[Any] = []  # alive as long as the addresses in _calls
        for launch in launches:
            try:
                self._add(launch)
            except UnsupportedError as error:
                raise UnsupportedError(f"kernel {launch.compiled.name}: {error}") from None

    def _add(self, launch: Launch) -> None:
        arguments = scalar_arguments(launch)
        warps, ctas, shared_bytes = launch.compiled.packed_metadata
        if ctas != 1:
            raise UnsupportedError("it has clusters")
        config = _Config(launch.grid, (32 * warps, 1, 1), shared_bytes)
        base = ctypes.addressof(self._addresses)
        scalars = (
            ctypes.c_uint64 * (len(arguments) + _SCRATCH_POINTERS)
        )()  # those of addresses stay unused; scratch: null
        parameters = (ctypes.c_void_p * len(scalars))()
        for index in range(len(scalars)):
            cell = ctypes.addressof(scalars) + 8 * index
            if index < len(launch.places):
                cell = base + 8 * launch.places[index]
            elif index < len(arguments):
                value = arguments[index]
                assert value is not None
                ctypes.memmove(cell, value, len(value))
            parameters[index] = cell
        self._configs.append(config)
        self._kernels.append(launch.compiled)
        self._scalars.append(scalars)
        function = ctypes.c_void_p(launch.compiled.function)
        self._calls.append((ctypes.byref(config), function, ctypes.byref(parameters), None))

    def run(self, addresses: list[int], stream: int) -> None:
        """Launch all kernels on a stream of the device."""
        launch = self._launch
        with self._lock:  # until the driver has copied the arguments
            self._addresses[:] = addresses  # type: ignore[assignment]
            if stream != self._stream:
                for config in self._configs:
                    config.stream = stream
                self._stream = stream
            for call in self._calls:
                if (error := launch(*call)) != 0:
                    self._after(error, call)

    def _after(self, error: int, call: tuple[Any, ...]) -> None:
        """A launch that failed: again, if only this thread had no CUDA context yet.

        Raises:
            RuntimeError: naming the kernel and CUDA's error.
        """
        current = ctypes.c_void_p()
        _driver().cuCtxGetCurrent(ctypes.byref(current))
        if not current.value and not _driver().cuCtxSetCurrent(self._context):
            error = self._launch(*call)
        if error:
            compiled = self._kernels[self._calls.index(call)]
            text = ctypes.c_char_p()
            _driver().cuGetErrorString(error, ctypes.byref(text))
            why = (text.value or b"unknown").decode()
            raise RuntimeError(f"mhc_kernels: launch of {compiled.name} failed: CUDA error {error}, {why}")
