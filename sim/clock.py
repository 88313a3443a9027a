"""SimPy with one thing added: events that can be armed again. Knows no node, no link and no request.

A request is a chain of a few waits, one after another. With SimPy's own events each wait is a new object with a list
of callbacks; here one object goes from wait to wait. The heap, its order and the loop that works through it are
SimPy's.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from heapq import heappush
from typing import Any, NoReturn

import simpy

Callbacks = tuple[Callable[[Any], None], ...]
"""What SimPy calls, with the event; made once and given to many."""


class Armed:
    """To SimPy an event. `at_s` is when it happens; it is in the heap at most once at a time."""

    __slots__ = ("at_s", "callbacks")
    _ok = True  # what SimPy looks at after the callbacks: it has not failed

    at_s: float
    callbacks: Callbacks | None


class Clock(simpy.Environment):  # type: ignore[misc]  # simpy has no types
    """`push` and `tick` are for the two places from which nearly all events come, and save them a call of `arm`."""

    def __init__(self) -> None:
        super().__init__()
        self.push: Callable[[tuple[float, int, int, Armed]], None] = partial(heappush, self._queue)
        self.tick: Callable[[], int] = self._eid.__next__

    @property
    def pending(self) -> int:
        """Events that are still to happen."""
        return len(self._queue)

    def stop(self) -> NoReturn:
        """End the run that is going on, now."""
        raise simpy.core.StopSimulation(None)

    def arm(self, event: Armed, at_s: float, callbacks: Callbacks) -> None:
        """Call back with the event at a time: at exactly that one, where a delay from now would be rounded.

        What is to happen at infinity never does.
        """
        event.at_s, event.callbacks = at_s, callbacks
        if at_s < math.inf:
            self.push((at_s, 1, self.tick(), event))

    def call(self, at_s: float, call: Callable[[], None]) -> None:
        """Call something at a time; for what is rare."""
        self.arm(Armed(), at_s, (lambda _: call(),))


@contextmanager
def few_collections() -> Iterator[None]:
    """Python's garbage collector looks for cycles less often: a run makes millions of tuples, and no cycle."""
    before = gc.get_threshold()
    gc.set_threshold(200_000, 20, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)
