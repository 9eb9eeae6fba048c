"""What PyTorch has no name for: CUDA's driver, by its C interface, as the kernels' launches (`mhc_kernels.fused.direct`).

Addresses are integers, streams are `torch.cuda.Stream`. All functions work in the current CUDA context (PyTorch's), and raise
RuntimeError with the driver's own words.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch

_PORTABLE_AND_MAPPED = 3  # CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP
_LAZY_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
_NATIVE_ATOMICS = 3  # CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED
_AT_LEAST = 0  # CU_STREAM_WAIT_VALUE_GEQ: (int32)(*address - value) >= 0

_u32, _u64, _size, _stream = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p


class _IpcHandle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_byte * 64),)


_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "cuCtxGetStreamPriorityRange": (ctypes.POINTER(ctypes.c_int), ctypes.POINTER(ctypes.c_int)),
    "cuStreamCreateWithPriority": (ctypes.POINTER(ctypes.c_void_p), ctypes.c_uint, ctypes.c_int),
    "cuStreamDestroy_v2": (_stream,),
    "cuThreadExchangeStreamCaptureMode": (ctypes.POINTER(ctypes.c_int),),
    "cuStreamWaitValue32_v2": (_stream, _u64, _u32, ctypes.c_uint),
    "cuStreamWriteValue32_v2": (_stream, _u64, _u32, ctypes.c_uint),
    "cuMemcpyAsync": (_u64, _u64, _size, _stream),
    "cuMemAlloc_v2": (ctypes.POINTER(_u64), _size),
    "cuMemFree_v2": (_u64,),
    "cuMemHostRegister_v2": (ctypes.c_void_p, _size, ctypes.c_uint),
    "cuMemHostUnregister": (ctypes.c_void_p,),
    "cuMemHostGetDevicePointer_v2": (ctypes.POINTER(_u64), ctypes.c_void_p, ctypes.c_uint),
    "cuIpcGetMemHandle": (ctypes.POINTER(_IpcHandle), _u64),
    "cuIpcOpenMemHandle_v2": (ctypes.POINTER(_u64), _IpcHandle, ctypes.c_uint),
    "cuIpcCloseMemHandle": (_u64,),
    "cuDeviceGetByPCIBusId": (ctypes.POINTER(ctypes.c_int), ctypes.c_char_p),
    "cuDeviceGetPCIBusId": (ctypes.c_char_p, ctypes.c_int, ctypes.c_int),
    "cuDeviceGet": (ctypes.POINTER(ctypes.c_int), ctypes.c_int),
    "cuDeviceGetP2PAttribute": (ctypes.POINTER(ctypes.c_int), ctypes.c_int, ctypes.c_int, ctypes.c_int),
}


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL("libcuda.so.1")
    for name, arguments in _ARGUMENTS.items():
        getattr(library, name).argtypes = arguments
    return library


def _call(name: str, *arguments: Any) -> None:
    if error := getattr(_library(), name)(*arguments):
        text = ctypes.c_char_p()
        _library().cuGetErrorString(error, ctypes.byref(text))
        raise RuntimeError(f"{name}: {(text.value or b'error').decode()} ({error})")


def priorities() -> range:
    """Of streams, from the highest (the smallest number) to the lowest."""
    least, greatest = ctypes.c_int(), ctypes.c_int()
    _call("cuCtxGetStreamPriorityRange", ctypes.byref(least), ctypes.byref(greatest))
    return range(greatest.value, least.value + 1)


def make_stream(priority: int) -> torch.cuda.Stream:
    """A new stream, which nothing else uses. It lives until `destroy_stream`."""
    stream = ctypes.c_void_p()
    _call("cuStreamCreateWithPriority", ctypes.byref(stream), _NON_BLOCKING, priority)
    assert stream.value is not None
    return torch.cuda.ExternalStream(stream.value)


def destroy_stream(stream: torch.cuda.Stream) -> None:
    """Undo `make_stream`."""
    _call("cuStreamDestroy_v2", stream.cuda_stream)


def leave_captures_alone() -> None:
    """Let this thread query events while another one captures a CUDA graph."""
    mode = ctypes.c_int(_THREAD_LOCAL)
    _call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))


def wait_value(stream: int, address: int, value: int) -> None:
    """What is put on the stream from now on waits until the number at ``address`` has come to ``value``, modulo 2^32."""
    _call("cuStreamWaitValue32_v2", stream, address, value & 0xFFFFFFFF, _AT_LEAST)


def write_value(stream: int, address: int, value: int) -> None:
    """Write a number, modulo 2^32, after all that the stream has done before is there to be seen."""
    _call("cuStreamWriteValue32_v2", stream, address, value & 0xFFFFFFFF, 0)


def copy(stream: int, target: int, source: int, size: int) -> None:
    """Copy bytes, wherever they are."""
    _call("cuMemcpyAsync", target, source, size, stream)


def allocate(size: int) -> int:
    """Memory of the current GPU that other processes can map."""
    address = _u64()
    _call("cuMemAlloc_v2", ctypes.byref(address), size)
    return address.value


def free(address: int) -> None:
    """Give `allocate`'s memory back. Waits for the GPU."""
    _call("cuMemFree_v2", address)


def export(address: int) -> bytes:
    """By which another process can `open_exported` what `allocate` gave."""
    handle = _IpcHandle()
    _call("cuIpcGetMemHandle", ctypes.byref(handle), address)
    return bytes(handle)


def open_exported(handle: bytes) -> int:
    """The address here of another process' memory, on the same GPU or on one that this one can access."""
    address = _u64()
    _call("cuIpcOpenMemHandle_v2", ctypes.byref(address), _IpcHandle.from_buffer_copy(handle), _LAZY_PEER_ACCESS)
    return address.value


def close_exported(address: int) -> None:
    """Undo `open_exported`."""
    _call("cuIpcCloseMemHandle", address)


def register(address: int, size: int) -> int:
    """Pin host memory; its address for the GPU."""
    found = _u64()
    _call("cuMemHostRegister_v2", address, size, _PORTABLE_AND_MAPPED)
    _call("cuMemHostGetDevicePointer_v2", ctypes.byref(found), address, 0)
    return found.value


def unregister(address: int) -> None:
    """Undo `register`."""
    _call("cuMemHostUnregister", address)


def bus_id() -> str:
    """Of the current GPU: what names it in all processes of a machine."""
    device, text = ctypes.c_int(), ctypes.create_string_buffer(32)
    _call("cuDeviceGet", ctypes.byref(device), torch.cuda.current_device())
    _call("cuDeviceGetPCIBusId", text, 32, device)
    return text.value.decode()


def linked(other: str) -> bool | None:
    """Whether NVLink connects the current GPU with the one that has this `bus_id`; None if this process can't see that one.

    By atomics between the two, which PCIe has not. (Over PCIe nothing orders writes to a GPU before a flag in host memory.)
    """
    device, peer, can = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    _call("cuDeviceGet", ctypes.byref(device), torch.cuda.current_device())
    try:
        _call("cuDeviceGetByPCIBusId", ctypes.byref(peer), other.encode())
    except RuntimeError:
        return None
    _call("cuDeviceGetP2PAttribute", ctypes.byref(can), _NATIVE_ATOMICS, device, peer)
    return bool(can.value)
