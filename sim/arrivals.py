"""What arrives next, over all sources. Knows the clock and requests in order of time; not what becomes of them.

Requests are taken from their sources a window of time at a time and sorted, so that the heap holds one arrival and not
one per source: with a hundred thousand sources in it every other event would pay for its depth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import numpy as np

from isthmus.sim.clock import Armed, Clock
from isthmus.workloads.requests import Request

PER_SOURCE = 4
"""Requests that a window shall hold per source: more of them wait in memory, fewer make more windows."""

Home = TypeVar("Home")


class Arrivals(Armed, Generic[Home]):
    """Armed for the next request. `arrive` is told home, request and time; `exhausted`, the time of the last one."""

    __slots__ = ("_arrive", "_clock", "_end_s", "_exhausted", "_homes", "_next", "_order", "_requests", "_sources",
                 "_this", "_width_s")  # fmt: skip

    def __init__(
        self,
        clock: Clock,
        sources: list[tuple[Home, Iterator[Request]]],
        arrive: Callable[[Home, Request, float], None],
        exhausted: Callable[[float], None],
    ) -> None:
        self._clock, self._arrive, self._exhausted, self._this = clock, arrive, exhausted, (self._happen,)
        firsts = [(home, requests, next(requests, None)) for home, requests in sources]
        self._sources = [(home, requests, first) for home, requests, first in firsts if first is not None]
        # A first arrival is about one interval from the start; windows adapt to what they hold.
        gaps_s = [first.arrival_s for _, _, first in self._sources]
        self._width_s = max(sum(gaps_s) / len(gaps_s), 1e-9) if gaps_s else 0.0
        self._end_s = 0.0
        self._homes: list[Home] = []
        self._requests: list[Request] = []
        self._order: list[int] = []
        self._next = 0

    def begin(self) -> None:
        self._await(0.0)

    def _happen(self, _: Arrivals[Home]) -> None:
        now, which = self.at_s, self._order[self._next]
        self._next += 1
        home, request = self._homes[which], self._requests[which]
        self._await(now)
        self._arrive(home, request, now)

    def _await(self, now: float) -> None:
        while self._next == len(self._order):
            if not self._sources:
                self._exhausted(now)
                return
            self._fill()
        self._clock.arm(self, self._requests[self._order[self._next]].arrival_s, self._this)

    def _fill(self) -> None:
        """The requests of the next window that holds any."""
        if min(first.arrival_s for _, _, first in self._sources) > self._end_s + self._width_s:
            self._end_s = min(first.arrival_s for _, _, first in self._sources)
        end_s = self._end_s = self._end_s + self._width_s
        homes, requests, sources = list[Home](), list[Request](), list[tuple[Home, Iterator[Request], Request]]()
        for home, rest, first in self._sources:
            request: Request | None = first
            while request is not None and request.arrival_s <= end_s:
                homes.append(home)
                requests.append(request)
                request = next(rest, None)
            if request is not None:
                sources.append((home, rest, request))
        self._homes, self._requests, self._sources = homes, requests, sources
        self._order = np.argsort([request.arrival_s for request in requests], kind="stable").tolist()
        self._next = 0
        self._width_s *= min(max(PER_SOURCE * max(len(sources), 1) / max(len(requests), 1), 0.25), 4.0)
