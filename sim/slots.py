"""The slots of a node that has a queue: how many are free, and, where the node scales, how many there are.

Knows SimPy's clock. Must not know what is served.
"""

from __future__ import annotations

from collections.abc import Callable

from isthmus.sim.clock import Clock
from isthmus.sim.meter import Meter
from isthmus.workloads.nodes import Scale


class Slots:
    """A fixed number of them. `busy` counts those that work."""

    __slots__ = ("_least", "busy", "free")

    rented: Meter | None = None

    def __init__(self, least: int) -> None:
        self._least = self.free = least
        self.busy = Meter()

    def take(self, now_s: float) -> None:
        """A free one begins to work."""
        self.free -= 1
        self.busy.set(self.busy.level + 1, now_s)

    def give(self, now_s: float) -> None:
        """One that worked is free again."""
        self.free += 1
        self.busy.set(self.busy.level - 1, now_s)

    def order(self, now_s: float) -> None:
        """A job came and found none free."""

    def go_down(self, now_s: float) -> None:
        """None is there any more."""
        self.free = 0
        self.busy.set(0, now_s)

    def come_up(self, now_s: float) -> None:
        self.free = self._least


class ElasticSlots(Slots):
    """More are ordered while they are needed, and given back when they idle: those first that have idled longest.

    A slot is rented from when it is ordered. `ready` is called when one that was ordered is there.
    """

    __slots__ = ("_clock", "_have", "_idle_since", "_life", "_looking", "_ready", "_scale", "rented")

    rented: Meter

    def __init__(self, clock: Clock, least: int, scale: Scale, ready: Callable[[float], None]) -> None:
        super().__init__(least)
        self._clock, self._scale, self._ready = clock, scale, ready
        self._life, self._looking = 0, False
        self._have = least
        self._idle_since = [0.0] * least  # of the free ones, the longest first
        self.rented = Meter(least)

    def take(self, now_s: float) -> None:
        super().take(now_s)
        self._idle_since.pop()  # so that one which idles long goes on idling

    def give(self, now_s: float) -> None:
        super().give(now_s)
        self._idle_since.append(now_s)
        self._look_later()

    def order(self, now_s: float) -> None:
        if self.rented.level < self._scale.most:
            self.rented.set(self.rented.level + 1, now_s)
            there_s, life = now_s + self._scale.start_up, self._life
            self._clock.call(there_s, lambda: self._there(life, there_s))

    def go_down(self, now_s: float) -> None:
        super().go_down(now_s)
        self._life += 1
        self._idle_since.clear()
        self._have = 0
        self.rented.set(0, now_s)

    def come_up(self, now_s: float) -> None:
        super().come_up(now_s)
        self._have = self._least
        self._idle_since = [now_s] * self._least
        self.rented.set(self._least, now_s)

    def _there(self, life: int, now_s: float) -> None:
        if life == self._life:
            self._have += 1
            self.free += 1
            self._idle_since.append(now_s)
            self._ready(now_s)
            self._look_later()

    def _look_later(self) -> None:
        """One event at a time, for the slot that has idled longest."""
        if not self._looking and self._idle_since and self._have > self._least:
            self._looking = True
            due_s = self._idle_since[0] + self._scale.idle
            self._clock.call(due_s, lambda: self._look(due_s))

    def _look(self, now_s: float) -> None:
        self._looking = False
        while self._have > self._least and self._idle_since and self._idle_since[0] + self._scale.idle <= now_s:
            self._idle_since.pop(0)
            self._have -= 1
            self.free -= 1
            self.rented.set(self.rented.level - 1, now_s)
        self._look_later()
