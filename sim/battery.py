"""A battery: energy that drains at a power which changes now and then. Knows SimPy's clock and no node.

When it will be empty is worked out at every change, so it is at the exact time, without polling. SimPy withdraws no
event, so there is one only for the earliest time at which the battery may be empty: one that comes too early, since
less was drawn than was foreseen, foresees anew. What is left shrinks by a factor from one such event to the next, so
there are about as many as there are factors between the battery and a single job, whatever the number of jobs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from isthmus.sim.clock import Clock


class Battery:
    """`idle_w` while its node is up, `busy_w` more for each slot that works; `empty` is called once, at the end."""

    __slots__ = ("_busy", "_busy_w", "_clock", "_due_s", "_empty", "_idle_w", "_left_j", "_on", "_since_s",
                 "capacity_j", "is_empty")  # fmt: skip

    def __init__(
        self, clock: Clock, capacity_j: float, idle_w: float, busy_w: float, empty: Callable[[], None]
    ) -> None:
        self._clock, self._empty, self._idle_w, self._busy_w = clock, empty, idle_w, busy_w
        self.capacity_j = self._left_j = capacity_j
        self.is_empty, self._on, self._busy = False, True, 0
        self._since_s, self._due_s = 0.0, math.inf
        self._foresee()

    def busy(self, more: int, now_s: float) -> None:
        """So many more slots work, or fewer if it is below 0."""
        self._settle(now_s)
        self._busy += more
        self._foresee()

    def drain(self, joules: float, now_s: float) -> None:
        """Something takes energy at once: a message on the radio."""
        self._settle(now_s)
        self._left_j -= joules
        self._foresee()

    def switch(self, on: bool, now_s: float) -> None:
        """Its node goes up or down. One that is down draws nothing, and nothing runs on it."""
        self._settle(now_s)
        self._on, self._busy = on, 0
        self._foresee()

    def left_j(self, now_s: float) -> float:
        return 0.0 if self.is_empty else max(0.0, self._left_j - self._power_w * (now_s - self._since_s))

    @property
    def _power_w(self) -> float:
        return self._idle_w + self._busy_w * self._busy if self._on else 0.0

    def _settle(self, now_s: float) -> None:
        self._left_j -= self._power_w * (now_s - self._since_s)
        self._since_s = now_s

    def _foresee(self) -> None:
        if self.is_empty:
            return
        now, power = self._since_s, self._power_w
        due_s = now if self._left_j <= 0 else now + self._left_j / power if power else math.inf
        if due_s < self._due_s:
            self._due_s = due_s
            self._clock.call(due_s, lambda: self._due(due_s))

    def _due(self, now_s: float) -> None:
        if now_s != self._due_s:  # superseded by an earlier one
            return
        self._due_s = math.inf
        self._settle(now_s)
        if self._left_j <= 2 * math.ulp(now_s) * self._power_w:  # a rounding of now
            self.is_empty = True
            self._empty()
        else:
            self._foresee()
