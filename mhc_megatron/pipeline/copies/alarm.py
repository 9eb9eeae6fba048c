"""A signal that ends the process, unless it is put off in time: for a thread that may be kept from running.

A host that has launched more than the GPU's queues hold waits inside a call of CUDA's, and not every library lets go of Python's
lock there: then no thread of Python's runs any more. The kernel's timers need none.
"""

from __future__ import annotations

import ctypes
import signal
import time


class _Event(ctypes.Structure):
    """sigevent: value, signal and how to notify (0: by the signal); 64 bytes."""

    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("rest", ctypes.c_byte * 48),
    )


class _Times(ctypes.Structure):
    """itimerspec: seconds and nanoseconds, of the interval and of the first time."""

    _fields_ = (("interval", ctypes.c_long * 2), ("first", ctypes.c_long * 2))


class Alarm:
    """SIGABRT, later. Other timers of the process are not touched.

    Raises:
        OSError: if the system has no timer left, or none at all.
    """

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None, use_errno=True)
        if not hasattr(self._library, "timer_create"):  # before glibc 2.34
            self._library = ctypes.CDLL("librt.so.1", use_errno=True)
        self._timer = ctypes.c_void_p()
        event = _Event(signal=signal.SIGABRT, notify=0)
        if self._library.timer_create(time.CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(self._timer)):
            raise OSError(ctypes.get_errno(), "timer_create")

    def set(self, seconds: float) -> None:
        """So many seconds from now instead; 0: never."""
        whole = int(seconds)
        times = _Times(first=(ctypes.c_long * 2)(whole, int((seconds - whole) * 1e9)))
        self._library.timer_settime(self._timer, 0, ctypes.byref(times), None)
