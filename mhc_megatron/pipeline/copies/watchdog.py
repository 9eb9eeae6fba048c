"""The end of a run whose transfer does not end: as NCCL's watchdog does it for NCCL's."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from datetime import timedelta

import torch


class Watchdog:
    """Looks after transfers, each link's in the order in which they were started.

    timeout: how long one may take from when it is started here, waiting for the other end included. Then the process ends by
    SIGABRT, as by NCCL's watchdog: the stream that waits can't be told to stop.
    """

    def __init__(self, timeout: timedelta):
        self._timeout = timeout.total_seconds()
        self._pending: dict[str, deque[tuple[float, torch.cuda.Event, str]]] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def watch(self, done: torch.cuda.Event, what: str) -> None:
        """From now on, until ``done``."""
        with self._lock:
            self._pending.setdefault(what.partition(" of ")[0], deque()).append((time.monotonic(), done, what))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, args=(torch.cuda.current_device(),), daemon=True)
            self._thread.start()

    def overdue(self, now: float) -> str | None:
        """The transfer that has taken too long, if there is one; those that are over are forgotten."""
        with self._lock:
            for waiting in self._pending.values():
                while waiting and waiting[0][1].query():
                    waiting.popleft()
                if waiting and now - waiting[0][0] > self._timeout:
                    return waiting[0][2]
        return None

    def _run(self, device: int) -> None:
        torch.cuda.set_device(device)
        while True:
            time.sleep(min(1.0, self._timeout / 10))
            if (what := self.overdue(time.monotonic())) is not None:
                print(
                    f"mHC: pipeline transfer timed out: {what}, not complete after {self._timeout:.0f} s (the pipeline group's "
                    "timeout, --distributed-timeout-minutes): the other stage is gone or stuck. Ending this process.",
                    file=sys.stderr,
                    flush=True,
                )
                os.abort()
