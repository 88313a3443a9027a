"""What arrives next, over all sources. Knows the clock and requests in order of time; not what becomes of them.

Requests are taken from their sources a window of time at a time and sorted, so that the heap holds one arrival and not
one per source: with a hundred thousand sources in it every other event would pay for its depth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

import numpy as np

from isthmus.sim.clock import Armed, Clock
from isthmus.workloads.requests import Request

PER_SOURCE = 4
"""Requests that a window shall hold per source: more of them wait in memory, fewer make more windows."""
MOST = 32
"""Requests that a window takes from one source, unless more are of the same time; it then ends early. Without a limit
a source that is much busier than the others, or suddenly is, would fill the memory."""

Home = TypeVar("Home")


class Arrivals(Armed, Generic[Home]):
    """Armed for the next request. `arrive` is told home, request and time; `exhausted`, the time of the last one."""

    __slots__ = ("_arrive", "_clock", "_end_s", "_exhausted", "_left", "_next", "_next_s", "_order", "_requests",
                 "_sources", "_this", "_waiting", "_which", "_width_s")  # fmt: skip

    def __init__(
        self,
        clock: Clock,
        sources: Sequence[tuple[Home, Iterator[Request]]],
        arrive: Callable[[Home, Request, float], None],
        exhausted: Callable[[float], None],
    ) -> None:
        self._clock, self._arrive, self._exhausted, self._this = clock, arrive, exhausted, (self._happen,)
        self._sources = sources
        self._waiting = [next(requests, None) for _, requests in sources]  # the next one of each
        self._next_s = np.array([math.inf if it is None else it.arrival_s for it in self._waiting], dtype=float)
        # A first arrival is about one interval from the start; windows adapt to what they hold.
        first_s = self._next_s[self._next_s < math.inf]
        self._width_s = float(first_s.mean()) if len(first_s) else 0.0
        self._end_s = 0.0
        self._requests: list[Request] = []  # what was taken, and of which source
        self._which: list[int] = []
        self._order: list[int] = []  # those of this window, in order
        self._left: list[int] = []  # those that are later
        self._next = 0

    def begin(self) -> None:
        self._await(0.0)

    def _happen(self, _: Arrivals[Home]) -> None:
        now, this = self.at_s, self._order[self._next]
        self._next += 1
        home, request = self._sources[self._which[this]][0], self._requests[this]
        self._await(now)
        self._arrive(home, request, now)

    def _await(self, now: float) -> None:
        if self._next == len(self._order) and not self._fill():
            self._exhausted(now)
            return
        self._clock.arm(self, self._requests[self._order[self._next]].arrival_s, self._this)

    def _fill(self) -> bool:
        """Take the requests of the next window, in which there is one at least; False when no source has any."""
        requests, which = [self._requests[i] for i in self._left], [self._which[i] for i in self._left]
        waiting, next_s = self._waiting, self._next_s
        first_s = float(next_s.min(initial=requests[0].arrival_s if requests else math.inf))
        if first_s == math.inf:
            return False
        begin_s = self._end_s if first_s <= self._end_s + self._width_s else first_s
        end_s = max(begin_s + self._width_s, math.nextafter(first_s, math.inf))
        for source in np.flatnonzero(next_s < end_s).tolist():
            _, rest = self._sources[source]
            request, taken = waiting[source], 0
            while request is not None and request.arrival_s < end_s:
                if taken >= MOST and request.arrival_s > requests[-1].arrival_s:
                    end_s = request.arrival_s
                    break
                requests.append(request)
                which.append(source)
                taken += 1
                request = next(rest, None)
            waiting[source] = request
            next_s[source] = math.inf if request is None else request.arrival_s
        times_s = np.array([request.arrival_s for request in requests])
        order = np.lexsort((np.array(which), times_s))  # of those that are of the same time, in order of the sources
        inside = int(np.searchsorted(times_s[order], end_s))
        self._requests, self._which, self._next = requests, which, 0
        self._order, self._left = order[:inside].tolist(), order[inside:].tolist()
        self._end_s = end_s
        wanted = max(PER_SOURCE * int(np.count_nonzero(next_s < math.inf)), MOST)
        self._width_s = (end_s - begin_s) * min(max(wanted / inside, 0.25), 4.0)
        return True
