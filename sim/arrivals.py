"""What arrives next, over all sources. Knows the clock and requests in order of time; not what becomes of them.

Requests are taken from their sources a window of time at a time and sorted, so that the heap holds one arrival and not
one per source: with a hundred thousand sources in it every other event would pay for its depth.
"""

from __future__ import annotations

import math
from array import array
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

    __slots__ = ("_arrive", "_clock", "_end_s", "_exhausted", "_homes", "_later", "_next", "_next_s", "_requests",
                 "_rest", "_this", "_waiting", "_width_s", "_window")  # fmt: skip

    def __init__(
        self,
        clock: Clock,
        sources: Sequence[tuple[Home, Iterator[Request]]],
        arrive: Callable[[Home, Request, float], None],
        exhausted: Callable[[float], None],
    ) -> None:
        self._clock, self._arrive, self._exhausted, self._this = clock, arrive, exhausted, (self._happen,)
        self._homes, self._rest = [home for home, _ in sources], [requests for _, requests in sources]
        self._waiting = [next(requests, None) for requests in self._rest]  # the next one of each
        self._next_s = np.array([math.inf if it is None else it.arrival_s for it in self._waiting], dtype=float)
        # A first arrival is about one interval from the start; windows adapt to what they hold.
        first_s = self._next_s[self._next_s < math.inf]
        self._width_s = float(first_s.mean()) if len(first_s) else 0.0
        self._end_s = 0.0
        self._requests: list[Request] = []  # what was taken
        self._later: list[tuple[float, int, Request]] = []  # what of it comes after this window, and of which source
        # The rest of this window in order: when, of which source, and the place among the requests. Arrays read from
        # the front are in the processor's caches; a request is not, so it is left alone until it is its time.
        self._window: Iterator[tuple[float, int, int]] = iter(())
        self._next = 0, 0

    def begin(self) -> None:
        self._await(0.0)

    def _happen(self, _: Arrivals[Home]) -> None:
        now, (source, this) = self.at_s, self._next
        request = self._requests[this]
        self._await(now)
        self._arrive(self._homes[source], request, now)

    def _await(self, now: float) -> None:
        found = next(self._window, None)
        if found is None:
            if not self._fill():
                self._exhausted(now)
                return
            found = next(self._window)
        at_s, source, this = found
        self._next = source, this
        self._clock.arm(self, at_s, self._this)

    def _fill(self) -> bool:
        """Take the requests of the next window, in which there is one at least; False when no source has any."""
        times_s, which = array("d"), array("q")
        requests: list[Request] = []
        for at_s, source, request in self._later:
            times_s.append(at_s)
            which.append(source)
            requests.append(request)
        next_s, waiting = self._next_s, self._waiting
        first_s = float(next_s.min(initial=times_s[0] if requests else math.inf))
        if first_s == math.inf:
            return False
        begin_s = self._end_s if first_s <= self._end_s + self._width_s else first_s
        end_s = max(begin_s + self._width_s, math.nextafter(first_s, math.inf))
        for source in np.flatnonzero(next_s < end_s).tolist():
            rest = self._rest[source]
            following, taken = waiting[source], 0
            while following is not None and (at_s := following.arrival_s) < end_s:
                if taken >= MOST and at_s > times_s[-1]:
                    end_s = at_s
                    break
                times_s.append(at_s)
                which.append(source)
                requests.append(following)
                taken += 1
                following = next(rest, None)
            waiting[source] = following
            next_s[source] = math.inf if following is None else following.arrival_s
        when, of = np.asarray(times_s), np.asarray(which)
        order = np.lexsort((of, when))  # of those that are of the same time, in order of the sources
        inside = int(np.searchsorted(when[order], end_s))
        this = order[:inside]
        self._window = zip(when[this].data, of[this].data, this.data, strict=True)
        self._later = [(times_s[i], which[i], requests[i]) for i in order[inside:].tolist()]
        self._requests, self._end_s = requests, end_s
        wanted = max(PER_SOURCE * int(np.count_nonzero(next_s < math.inf)), MOST)
        self._width_s = (end_s - begin_s) * min(max(wanted / inside, 0.25), 4.0)
        return True
