"""A simulated link, in one direction: a FIFO transmitter of a rate that may change, then a latency.

Knows SimPy's clock and tokens; of plans nothing. When a message leaves and arrives is known when it enters, so there
is one event per hop and no queue.
"""

from __future__ import annotations

import math
from typing import Protocol

from isthmus.policies.records import Kind, Span
from isthmus.sim.clock import Callbacks, Clock
from isthmus.sim.token import Token
from isthmus.workloads.testbed import Link

SEND, WAIT, INFINITY = Kind.SEND, Kind.WAIT, math.inf
new = tuple.__new__  # makes a named tuple in half the time


class Carrier(Protocol):
    """What carries messages in one direction between two nodes."""

    place: str

    def carry(self, token: Token, now_s: float) -> float: ...


class FifoLink:
    """What enters first leaves first. `arrived` is called with each token at the far end."""

    __slots__ = ("_arrived", "_constant", "_free_s", "_latency_s", "_push", "_rate", "_tick", "place")

    def __init__(self, clock: Clock, link: Link, arrived: Callbacks) -> None:
        self._push, self._tick, self._arrived = clock.push, clock.tick, arrived
        self._rate, self._latency_s = link.rate, link.latency_s
        # A constant rate is above 0, unless the link is cut from the beginning and for ever.
        self._constant = (link.rate.mean_bytes_per_s or None) if link.rate.is_constant else None
        self._free_s = 0.0
        self.place = f"{link.id[0]}>{link.id[1]}"

    def reset(self, now_s: float) -> None:
        """What is under way is given up: it is free at once."""
        self._free_s = min(self._free_s, now_s)

    def carry(self, token: Token, now_s: float) -> float:
        """A message enters; the time at which its last byte leaves, infinity where the link is cut for ever."""
        leg = token.leg
        start_s = now_s if now_s > self._free_s else self._free_s
        if self._constant is not None:
            left_s = start_s + leg.bytes / self._constant
        else:
            left_s = self._rate.finish_s(start_s, leg.bytes)
        self._free_s = left_s
        arrived_s = left_s + self._latency_s
        if token.spans is not None:
            attempt = token.start.attempt
            if start_s > now_s:
                token.spans.append(new(Span, (WAIT, self.place, now_s, start_s, attempt, leg.source, None)))
            if arrived_s > start_s:
                token.spans.append(new(Span, (SEND, self.place, start_s, arrived_s, attempt, leg.source, leg.bytes)))
        token.at_s, token.callbacks = arrived_s, self._arrived
        if arrived_s < INFINITY:
            self._push((arrived_s, 1, self._tick(), token))
        return left_s
