"""Measuring a link between two machines: letters of several sizes over the wire that a run will use.

Knows the wire and clocks; its class is made an actor by who measures.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import count, islice, product
from random import Random
from typing import Any

import numpy as np

from isthmus.policies.plan import Plan
from isthmus.real.clocks import Offset, Reading, offset, reading
from isthmus.real.cluster import own_address
from isthmus.real.letters import Letter
from isthmus.real.session import Array
from isthmus.real.wire import Address, Wire
from isthmus.workloads.errors import RunFailure
from isthmus.workloads.fit import fit_line
from isthmus.workloads.link_costs import LinkCost
from isthmus.workloads.links import SlowStart
from isthmus.workloads.rate import Rate
from isthmus.workloads.requests import Request
from isthmus.workloads.routing import LinkId
from isthmus.workloads.transport import MSS_BYTES, rested, slow_start

_LONGEST_S = 0.2
"""What the longest message of a measurement may take."""
_LEAST_BYTES, _MOST_BYTES = 50_000, 1_600_000
_REPEATS = 8
_TRAIN = 12
_GAP_S = 0.02
_PAUSES_S = (4.0, 1.3, 0.9, 0.6, 0.4, 0.25, 0.12)
_PAUSED = 3
_IDLE_S = np.geomspace(0.05, 2.0, 60)
_MOST_PACKETS = 65
_NOTICED = 0.1
_PATIENCE_S = 60.0


class LinkEnd:
    """One end of the links of a machine. A plain class; calls do not overlap."""

    def __init__(self, address: str | None, encrypted: bool) -> None:
        """`address` is what its wire listens on; by default that of its machine in the cluster."""
        self._arrivals: dict[int, float] = {}
        self._changed = threading.Condition()
        self._wire = Wire(
            address or own_address(), self._take, lambda note: None, lambda why: None, encrypted=encrypted
        )

    def address(self) -> Address:
        return self._wire.address

    def connect(self, peers: Mapping[str, Address]) -> None:
        self._wire.connect(peers)

    def reading(self) -> Reading:
        return reading()

    def send(self, peer: str, numbers: Sequence[int], sizes: Sequence[int], gaps_s: Sequence[float]) -> list[float]:
        """Messages of these sizes, each after a gap: when each went, on this clock. Nothing waits for answers here."""
        went_s = []
        for number, size, gap_s in zip(numbers, sizes, gaps_s, strict=True):
            values = np.zeros(size, dtype=np.uint8)
            request = Request(number, "probe", "probe", 0.0)
            letter = Letter(-1, Plan(()), request, 0, "", 0, 0, 0.0, (), 0)
            time.sleep(gap_s)
            went_s.append(time.monotonic())
            self._wire.send(peer, letter, [values])
        return went_s

    def arrivals(self, numbers: Sequence[int]) -> list[float]:
        """When these came, on this clock; waits for them. A message that never came is infinitely late."""
        with self._changed:
            self._changed.wait_for(lambda: all(n in self._arrivals for n in numbers), timeout=_PATIENCE_S)
            return [self._arrivals.get(n, float("inf")) for n in numbers]

    def close(self) -> None:
        self._wire.close()

    def _take(self, letter: Letter, arrays: Sequence[Array]) -> None:
        with self._changed:
            self._arrivals[letter.number] = time.monotonic()
            self._changed.notify_all()


Ask = Callable[..., Any]
"""Calls a method of a node's end: the node, the method, its arguments; the answer."""


class Probe:
    """Measures links, given their ends. How the clocks of their hosts differ it finds out anew for each: they drift."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._offsets: Mapping[str, Offset] = {}
        self._number = count()

    def measure(self, link: LinkId, declared_bytes_per_s: float | None = None) -> LinkCost:
        """What one direction carries, and how long that takes. RunFailure when messages do not arrive."""
        self._offsets = {node: offset(partial(self._read, node)) for node in link}
        rate = self._train(link, _LEAST_BYTES)
        largest = int(min(max(_LONGEST_S * rate, _LEAST_BYTES), _MOST_BYTES))
        rate = self._train(link, largest // 4)  # TCP's window is as wide now as the link needs it
        sizes = Random(0).sample([largest // share for share in (16, 4, 2, 1)] * _REPEATS, 4 * _REPEATS)
        gaps = [_GAP_S, *(_GAP_S + size / rate for size in sizes[:-1])]  # each finds the link free, but not for long
        times = self._send(link, sizes, gaps)
        latency_s, per_byte = _fit(sizes, times)
        rate = 1 / max(per_byte, 1e-12)
        return LinkCost(
            link=link,
            rate_bytes_per_s=rate,
            latency_s=latency_s,
            jitter_s=_spread(sizes, times),
            slow_start=self._slow_start(link, largest // 2, rate, latency_s),
            declared_bytes_per_s=declared_bytes_per_s,
            clock_error_s=sum(self._offsets[node].error_s for node in link),
            samples=tuple((size, round(seconds, 7)) for size, seconds in zip(sizes, times, strict=True)),
        )

    def _read(self, node: str) -> Reading:
        whose, shows = self._ask(node, "reading")
        return whose, shows

    def _train(self, link: LinkId, size: int) -> float:
        """Bytes per second of messages that follow each other at once: how far apart the later ones arrive."""
        times = self._send(link, [size] * _TRAIN, [0.0] * _TRAIN, since_first=True)
        later = times[_TRAIN // 3 :]
        return size * (len(later) - 1) / max(later[-1] - later[0], 1e-9)

    def _slow_start(self, link: LinkId, size: int, rate: float, latency_s: float) -> SlowStart | None:
        """From which window messages start after long pauses, and in which time it shrinks to that."""
        warm_s = latency_s + size / rate
        excess: dict[float, float] = {}
        for pause_s in _PAUSES_S:
            # The first one finds what came before these pauses; each of the others, as in a run, the one before.
            times = self._send(link, [size] * (1 + _PAUSED), [warm_s + pause_s] * (1 + _PAUSED))
            excess[pause_s] = float(np.median(times[1:])) - warm_s
        if excess[_PAUSES_S[0]] < max(_NOTICED * warm_s, 1e-3):
            return None
        steady = Rate.constant(rate)

        def off(window: int, idle_s: float) -> float:
            late_s = {pause_s: _late_s(steady, size, window, idle_s, latency_s, pause_s) for pause_s in excess}
            return sum((late_s[pause_s] - excess[pause_s]) ** 2 for pause_s in excess)

        windows = [MSS_BYTES * n for n in range(1, _MOST_PACKETS)]
        fits = {(window, idle_s): off(window, idle_s) for window, idle_s in product(windows, _IDLE_S)}
        least = min(fits.values())
        best = [slow for slow, error in fits.items() if error <= least * (1 + 1e-9)]
        window = max(window for window, _ in best)  # several may be as good: between the pauses nothing is known
        return SlowStart(window=window, idle=float(np.median([idle_s for w, idle_s in best if w == window])))

    def _send(
        self, link: LinkId, sizes: Sequence[int], gaps_s: Sequence[float], *, since_first: bool = False
    ) -> list[float]:
        """Seconds from handing over to having, of each message; or from handing over the first."""
        a, b = link
        numbers = list(islice(self._number, len(sizes)))
        went = self._ask(a, "send", b, numbers, list(sizes), list(gaps_s))
        came = self._ask(b, "arrivals", numbers)
        apart_s = self._offsets[b].offset_s - self._offsets[a].offset_s
        began = [went[0]] * len(went) if since_first else went
        times = [there - here - apart_s for here, there in zip(began, came, strict=True)]
        if not np.isfinite(times).all():
            raise RunFailure(f"messages from {a!r} to {b!r} do not arrive")
        return times


def _late_s(rate: Rate, size: int, window: int, idle_s: float, latency_s: float, pause_s: float) -> float:
    """By how much messages with such pauses before them are later than warm ones, by the model."""
    late_s, grown = 0.0, 2.0 * window
    while rate.finish_s(0.0, grown) < 2 * latency_s:  # what the messages before have made of it
        grown *= 2
    for _ in range(3):  # then each finds what the one before it has left
        start = rested(grown, window, latency_s + pause_s, idle_s)
        left_s, grown = slow_start(rate.finish_s, 0.0, size, start, 2 * latency_s)
        late_s = left_s - rate.finish_s(0.0, size)
    return late_s


def _medians(sizes: Sequence[int], times_s: Sequence[float]) -> tuple[list[int], list[float]]:
    known = sorted(set(sizes))
    return known, [float(np.median([t for s, t in zip(sizes, times_s, strict=True) if s == size])) for size in known]


def _fit(sizes: Sequence[int], times_s: Sequence[float]) -> tuple[float, float]:
    """Latency, and seconds per byte, of typical messages: some always meet a busy host."""
    return fit_line(*_medians(sizes, times_s))


def _spread(sizes: Sequence[int], times_s: Sequence[float]) -> float:
    """Of messages of one size."""
    typical = dict(zip(*_medians(sizes, times_s), strict=True))
    return float(np.std([t - typical[s] for s, t in zip(sizes, times_s, strict=True)]))
