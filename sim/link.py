"""A simulated link, in one direction, as most are: a FIFO transmitter of a rate that may change, then a latency.

Knows SimPy's clock and tokens; of plans nothing. When a message leaves and arrives is known when it enters, so there
is one event per hop and no queue. Other links are in sim/links.py.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

from isthmus.policies.records import Kind, Span
from isthmus.sim.clock import Callbacks, Clock
from isthmus.sim.node import Place
from isthmus.sim.token import Token
from isthmus.workloads.links import Link

SEND, WAIT, INFINITY = Kind.SEND, Kind.WAIT, math.inf
new = tuple.__new__  # makes a named tuple in half the time


class LinkTotals(NamedTuple):
    """What a link has done until a time. What is told of a message counts from when it enters, but not its time."""

    link: str
    """As spans name it: `a>b`."""
    messages: int
    bytes: int
    """Of the messages: without overhead, and without what was sent again."""
    busy_s: float
    """How long a message was being sent, pauses in the middle included."""
    air_s: float
    """The same, of every message by itself: two at once for one second are two."""
    waited_s: float
    """What the messages wait together before their first byte goes; of those that still wait, all of it.

    What stands on a link that was cut for ever, or waits there, counts in none of these times.
    """
    lost_packets: int


class Carrier(Protocol):
    """One direction of a link, however it works."""

    place: str
    """As spans name it: `a>b`."""
    ends: tuple[Place, Place]
    """The nodes that it leads from and to."""

    def carry(self, token: Token, now_s: float) -> float | None:
        """A message enters. When its last byte leaves; None where that depends on what else comes."""

    def lose(self, token: Token) -> None:
        """A message that is on the link takes its time there, and never arrives."""

    def reset(self, now_s: float) -> None:
        """All that has not left is given up, and what has left and not arrived is no concern of the link."""

    def totals(self, now_s: float) -> LinkTotals: ...


class FifoLink:
    """What enters first leaves first. `arrived` is called with each token at the far end."""

    __slots__ = (
        "_arrived",
        "_busy_s",
        "_constant",
        "_free_s",
        "_latency_s",
        "_messages",
        "_more_bytes",
        "_push",
        "_rate",
        "_size",
        "_tick",
        "_waited_s",
        "ends",
        "place",
    )

    ends: tuple[Place, Place]

    def __init__(self, clock: Clock, link: Link, arrived: Callbacks) -> None:
        self._push, self._tick, self._arrived = clock.push, clock.tick, arrived
        self._rate, self._latency_s = link.rate, link.latency_s
        # A constant rate is above 0, unless the link is cut from the beginning and for ever.
        self._constant = (link.rate.mean_bytes_per_s or None) if link.rate.is_constant else None
        self._free_s = self._busy_s = self._waited_s = 0.0
        self._messages = self._size = self._more_bytes = 0
        self.place = f"{link.id[0]}>{link.id[1]}"

    def carry(self, token: Token, now_s: float) -> float:
        """A message enters; the time at which its last byte leaves, infinity where the link is cut for ever."""
        leg, constant, start_s = token.leg, self._constant, self._free_s
        size = leg.bytes
        if start_s > now_s:
            if start_s < INFINITY:
                self._waited_s += start_s - now_s
        else:
            start_s = now_s
        if constant is not None:
            left_s = start_s + size / constant  # its busy time follows from its bytes
        elif start_s == INFINITY:
            left_s = INFINITY  # the link was cut for ever, and others wait already
        else:
            left_s = self._rate.finish_s(start_s, size)
            if left_s < INFINITY:
                self._busy_s += left_s - start_s
        self._messages += 1
        if size != self._size:
            self._differs(size)
        self._free_s = left_s
        arrived_s = left_s + self._latency_s
        spans = token.spans
        if spans is not None:
            attempt = token.start.attempt
            if start_s > now_s:
                spans.append(new(Span, (WAIT, self.place, now_s, start_s, attempt, leg.source, None)))
            if arrived_s > start_s:
                spans.append(new(Span, (SEND, self.place, start_s, arrived_s, attempt, leg.source, size)))
        token.at_s, token.callbacks = arrived_s, self._arrived
        if arrived_s < INFINITY:
            self._push((arrived_s, 1, self._tick(), token))
        return left_s

    def _differs(self, size: int) -> None:
        """A message is not as large as the others: the first one, or one of another plan or stage."""
        if self._messages == 1:
            self._size = size
        else:
            self._more_bytes += size - self._size

    @property
    def _bytes(self) -> int:
        return self._messages * self._size + self._more_bytes

    def lose(self, token: Token) -> None:
        token.callbacks = ()

    def reset(self, now_s: float) -> None:
        if self._free_s > now_s:
            if self._free_s < INFINITY:
                self._busy_s -= self._free_s - now_s
            self._free_s = now_s

    def totals(self, now_s: float) -> LinkTotals:
        busy_s = self._busy_s + (0.0 if self._constant is None else self._bytes / self._constant)
        # It is busy without a break from now until it is free.
        busy_s -= max(self._free_s - now_s, 0.0) if self._free_s < INFINITY else 0.0
        return LinkTotals(self.place, self._messages, self._bytes, busy_s, busy_s, self._waited_s, 0)
