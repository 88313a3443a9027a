"""Real time: a clock that the processes of a host share, and calls made in the order of their times. Knows no node."""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable
from itertools import count


class Clock:
    """Seconds since `epoch`, a reading of the host's monotonic clock, which all its processes share."""

    def __init__(self, epoch: float) -> None:
        self.epoch = epoch

    @property
    def now_s(self) -> float:
        return time.monotonic() - self.epoch

    def sleep_until(self, time_s: float) -> None:
        """Return at that time, or at once when it is past."""
        if (early_s := time_s - self.now_s) > 0:
            time.sleep(early_s)


class Timeline:
    """Calls in order of the times they are given for, on one thread, none before its time.

    A call that is given late is made at once. What a call raises goes to `failed`, and the timeline goes on.
    """

    def __init__(self, clock: Clock, name: str, failed: Callable[[BaseException], None]) -> None:
        self._clock, self._failed = clock, failed
        self._calls: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def at(self, time_s: float, call: Callable[[], None]) -> None:
        """Make this call at that time."""
        with self._changed:
            heapq.heappush(self._calls, (time_s, next(self._order), call))
            if self._calls[0][2] is call:
                self._changed.notify()

    def close(self) -> None:
        """Make no more calls, and wait for the one under way."""
        with self._changed:
            self._closed = True
            self._calls.clear()
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        while (call := self._next()) is not None:
            try:
                call()
            except BaseException as error:
                self._failed(error)

    def _next(self) -> Callable[[], None] | None:
        with self._changed:
            while not self._closed:
                if not self._calls:
                    self._changed.wait()
                elif (early_s := self._calls[0][0] - self._clock.now_s) > 0:
                    self._changed.wait(early_s)
                else:
                    return heapq.heappop(self._calls)[2]
            return None
