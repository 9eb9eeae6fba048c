"""The end of a run whose transfer does not end: as NCCL's watchdog does it for NCCL's."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import NamedTuple

import torch

from mhc_megatron.pipeline.copies import driver
from mhc_megatron.pipeline.copies.alarm import Alarm

_GRACE = 60.0
"""Seconds after which the process is ended without a word, if the thread does not get to look (`alarm`)."""


class _Pending(NamedTuple):
    since: float
    timeout: float
    done: torch.cuda.Event
    what: str


class Watchdog:
    """Looks after transfers, each link's in the order in which they were started.

    timeout: how long one may take from when it is started here, waiting for the other end included; asked at every start. Then
    the process ends by SIGABRT, as by NCCL's watchdog: the stream that waits can't be told to stop.
    """

    def __init__(self, timeout: Callable[[], timedelta]):
        self._timeout = timeout
        self._pending: dict[str, deque[_Pending]] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def watch(self, link: str, done: torch.cuda.Event, what: str) -> None:
        """From now on, until ``done``."""
        pending = _Pending(time.monotonic(), self._timeout().total_seconds(), done, f"{link} of {what}")
        with self._lock:
            self._pending.setdefault(link, deque()).append(pending)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, args=(torch.cuda.current_device(),), daemon=True)
            self._thread.start()

    def oldest(self) -> list[_Pending]:
        """The first transfer under way on each link; those that are over are forgotten."""
        found = []
        with self._lock:
            for waiting in self._pending.values():
                while waiting and waiting[0].done.query():
                    waiting.popleft()
                if waiting:
                    found.append(waiting[0])
        return found

    def _run(self, device: int) -> None:
        alarm: Alarm | None = None
        try:
            torch.cuda.set_device(device)
            driver.leave_captures_alone()
            alarm = Alarm()
        except Exception as error:
            _say(f"pipeline transfers are watched without an alarm behind it: {error}")
        paused, last, complained = 0.0, time.monotonic(), False
        while True:
            pending: list[_Pending] = []
            try:
                pending = self.oldest()
            except RuntimeError as error:
                if not complained:  # CUDA's errors end the run elsewhere
                    _say(f"pipeline transfers can't be watched: {error}")
                complained = True
            now = time.monotonic()
            interval = min([1.0, *(p.timeout / 10 for p in pending)])
            if now - last > 10 * interval + 5:  # the process was stopped, by a debugger, say: that is nobody's fault
                paused = now
            last = now
            if late := [p for p in pending if now - max(p.since, paused) > p.timeout]:
                _say(
                    f"pipeline transfer timed out: {late[0].what}, not complete after {late[0].timeout:.0f} s (the pipeline "
                    "group's timeout, --distributed-timeout-minutes): the other stage is gone or stuck. Ending this process."
                )
                os.abort()
            if alarm is not None:
                alarm.set(max(p.timeout for p in pending) + _GRACE if pending else 0.0)
            time.sleep(interval)


def _say(text: str) -> None:
    print(f"mHC: {text}", file=sys.stderr, flush=True)
