"""Simulated links that are more than a transmitter and a latency, and which link a description asks for.

    FifoLink      sim/link.py  one message after the other
    TcpFifoLink   the same, with overhead, lost packets, slow start or jitter, or at a node with a battery
    FairLink      messages share the rate of the link, or with those of other links the rate of a medium

What these add is worked out in workloads/transport.py. Knows SimPy's clock and tokens; of plans nothing.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

from isthmus.policies.records import Span
from isthmus.sim.clock import Callbacks, Clock
from isthmus.sim.link import INFINITY, SEND, WAIT, Carrier, FifoLink, LinkTotals
from isthmus.sim.node import Place
from isthmus.sim.sharing import Flow, Sharing
from isthmus.sim.token import Token
from isthmus.workloads.links import Link
from isthmus.workloads.rate import Rate
from isthmus.workloads.routing import LinkId
from isthmus.workloads.testbed import Testbed
from isthmus.workloads.transport import Luck, Passage, grown, losses, packets, rested, slow_start, timeout_s

Left = Callable[[Token, float], None]
"""Told of a message whose last byte leaves now, by a link that did not know it ahead."""
Radio = Callable[[float, float], None]
"""Told for how many seconds both ends of a link had their radios on, when that is over."""


class Battery(Protocol):
    """What radios drain."""

    def drain(self, joules: float, now_s: float) -> None: ...


def link_maker(
    testbed: Testbed, clock: Clock, seed: int, left: Left, batteries: Mapping[str, Battery] | None = None
) -> Callable[[Link, Callbacks], Carrier]:
    """What makes the links of a testbed, each with what is called with every token at its far end.

    `batteries` are those of nodes, by name.
    """
    caps: dict[str, dict[LinkId, Rate]] = defaultdict(dict)
    for link in testbed.links.values():
        if link.medium is not None and link.rate != link.medium.rate:
            caps[link.medium.name][link.id] = link.rate
    media: dict[str, Sharing] = {}

    def make(link: Link, arrived: Callbacks) -> Carrier:
        radio = _radio(link, testbed, batteries or {})
        if link.is_plain and radio is None:
            return FifoLink(clock, link, arrived)
        rtt_s = link.latency_s + testbed.links[link.id[::-1]].latency_s
        if link.discipline == "fifo":
            return TcpFifoLink(clock, link, rtt_s, seed, arrived, radio)
        if link.medium is None:
            sharing = Sharing(clock, link.rate)
        else:
            name = link.medium.name
            if name not in media:
                media[name] = Sharing(clock, link.medium.rate, caps=caps[name])
            sharing = media[name]
        return FairLink(clock, link, rtt_s, seed, arrived, radio, sharing, left)

    return make


def _radio(link: Link, testbed: Testbed, batteries: Mapping[str, Battery]) -> Radio | None:
    """Drains the batteries at the ends of a link: transmit power at the first, receive power at the second."""
    sender, receiver = link.id
    powers = (sender, testbed.nodes[sender].power.tx), (receiver, testbed.nodes[receiver].power.rx)
    drained = [(batteries[node], watts) for node, watts in powers if watts and node in batteries]
    if not drained:
        return None

    def on(air_s: float, now_s: float) -> None:
        for battery, watts in drained:
            battery.drain(watts * air_s, now_s)

    return on


class _TcpLink:
    """What both have in common: who lost what, when a message that has left arrives, and what they have done."""

    ends: tuple[Place, Place]

    def __init__(
        self, clock: Clock, link: Link, rtt_s: float, seed: int, arrived: Callbacks, radio: Radio | None
    ) -> None:
        self.place = f"{link.id[0]}>{link.id[1]}"
        self._clock, self._link, self._rtt_s, self._arrived, self._radio = clock, link, rtt_s, arrived, radio
        self._luck = Luck(seed, self.place)
        slow = link.slow_start
        self._first_window = math.inf if slow is None else slow.window
        self._timeout_s = (slow and slow.idle) or timeout_s(rtt_s)
        self._window = self._first_window
        self._messages = self._bytes = self._lost = 0
        self._busy_s = self._waited_s = 0.0

    def _enter(self, token: Token) -> tuple[float, list[float]]:
        """The bytes of a message on the wire, and those that are sent again in each round."""
        size = token.leg.bytes
        self._messages += 1
        self._bytes += size
        wire = size + self._link.overhead_bytes
        if not self._link.loss:
            return wire, []
        count = packets(wire)
        lost = losses(count, self._link.loss, self._luck, _passage(token))
        self._lost += sum(lost)
        return wire, [number * wire / count for number in lost]

    def _leave(self, token: Token, entered_s: float, start_s: float, left_s: float, not_before_s: float = 0.0) -> float:
        """The last byte leaves at `left_s`, which may be to come. When it arrives: after the latency and the jitter."""
        arrived_s = left_s + self._link.latency_s
        if self._link.jitter is not None:
            arrived_s += self._link.jitter.quantile_s(self._luck("jitter", _passage(token)))
        arrived_s = max(arrived_s, not_before_s)
        if token.spans is not None:
            attempt, stage, size = token.start.attempt, token.leg.source, token.leg.bytes
            if start_s > entered_s:
                token.spans.append(Span(WAIT, self.place, entered_s, start_s, attempt, stage))
            if arrived_s > start_s:
                token.spans.append(Span(SEND, self.place, start_s, arrived_s, attempt, stage, size))
        self._clock.arm(token, arrived_s, self._arrived)
        return arrived_s


def _passage(token: Token) -> Passage:
    request, leg = token.start.request, token.leg
    return Passage(request.source, request.number, token.start.attempt, leg.nth[token.hop - leg.load])


class TcpFifoLink(_TcpLink):
    """One connection: one message after the other, the pauses for acknowledgements included, delivered in order.

    When a message leaves and arrives is known when it enters.
    """

    def __init__(
        self, clock: Clock, link: Link, rtt_s: float, seed: int, arrived: Callbacks, radio: Radio | None
    ) -> None:
        super().__init__(clock, link, rtt_s, seed, arrived, radio)
        self._free_s = self._arrived_s = 0.0
        self._on_air: list[tuple[float, float]] = []  # with a radio: from when until when, of what has not left

    def _off_air(self, start_s: float, left_s: float) -> None:
        """A message has left, if it was not given up."""
        if (start_s, left_s) in self._on_air:
            self._on_air.remove((start_s, left_s))
            assert self._radio is not None
            self._radio(left_s - start_s, left_s)

    def carry(self, token: Token, now_s: float) -> float:
        finish, radio = self._link.rate.finish_s, self._radio
        wire, again = self._enter(token)
        start_s = max(now_s, self._free_s)
        window = rested(self._window, self._first_window, start_s - self._free_s, self._timeout_s)
        left_s, self._window = slow_start(finish, start_s, wire, window, self._rtt_s)
        for size in again:
            left_s = finish(left_s + self._rtt_s, size)
        self._free_s = left_s
        if start_s < INFINITY:
            self._waited_s += start_s - now_s
        if left_s < INFINITY:  # else the link was cut for ever
            self._busy_s += left_s - start_s
        if radio is not None and start_s < INFINITY:
            self._on_air.append((start_s, left_s))
            self._clock.call(left_s, partial(self._off_air, start_s, left_s))
        self._arrived_s = self._leave(token, now_s, start_s, left_s, self._arrived_s)
        return left_s

    def lose(self, token: Token) -> None:
        token.callbacks = ()

    def reset(self, now_s: float) -> None:
        self._window = self._first_window
        if self._free_s > now_s:
            if self._free_s < INFINITY:
                self._busy_s -= self._free_s - now_s
            self._free_s = now_s
        self._arrived_s = now_s
        on_air, self._on_air = self._on_air, []
        for start_s, _ in on_air:
            if self._radio is not None and start_s < now_s:
                self._radio(now_s - start_s, now_s)

    def totals(self, now_s: float) -> LinkTotals:
        ahead_s = max(self._free_s - now_s, 0.0) if self._free_s < INFINITY else 0.0
        busy_s = self._busy_s - ahead_s
        return LinkTotals(self.place, self._messages, self._bytes, busy_s, busy_s, self._waited_s, self._lost)


class _Crossing:
    """A message under way on a fair link: what is still to be sent, and again, and the window of its round."""

    __slots__ = ("again", "flow", "left_bytes", "lost", "round_bytes", "round_s", "start_s", "token", "window")

    flow: Flow

    def __init__(self, token: Token, start_s: float, left_bytes: float, again: list[float], window: float) -> None:
        self.token, self.start_s, self.left_bytes, self.again, self.window = token, start_s, left_bytes, again, window
        self.round_s, self.round_bytes, self.lost = start_s, 0.0, False


class FairLink(_TcpLink):
    """A connection for each message; all share the rate max–min fairly. `sharing` may serve other links besides.

    While a message waits for acknowledgements its share is the others'. One may overtake another.
    """

    def __init__(
        self,
        clock: Clock,
        link: Link,
        rtt_s: float,
        seed: int,
        arrived: Callbacks,
        radio: Radio | None,
        sharing: Sharing,
        left: Left,
    ) -> None:
        super().__init__(clock, link, rtt_s, seed, arrived, radio)
        self._sharing, self._left = sharing, left
        self._under_way: dict[Token, _Crossing] = {}
        self._air_s = 0.0
        self._since_s = 0.0  # since when there is none under way, or some

    def carry(self, token: Token, now_s: float) -> None:
        wire, again = self._enter(token)
        if not self._under_way:
            self._window = rested(self._window, self._first_window, now_s - self._since_s, self._timeout_s)
            self._since_s = now_s
        crossing = self._under_way[token] = _Crossing(token, now_s, wire, again, self._window)
        self._round(crossing)

    def lose(self, token: Token) -> None:
        if token in self._under_way:
            self._under_way[token].lost = True

    def reset(self, now_s: float) -> None:
        crossings = list(self._under_way.values())
        self._under_way.clear()
        for crossing in crossings:
            self._sharing.leave(crossing.flow)
            self._over(crossing, now_s)
            token = crossing.token
            if token.spans is not None and now_s > crossing.start_s:
                sent = Span(SEND, self.place, crossing.start_s, now_s, token.start.attempt, token.leg.source)
                token.spans.append(sent)  # without bytes: it is no evidence of a rate
        self._window = self._first_window

    def _later(self, at_s: float, call: Callable[[], None], crossing: _Crossing) -> None:
        """When acknowledgements have come, unless all is given up by then."""
        self._clock.call(at_s, lambda: call() if self._under_way.get(crossing.token) is crossing else None)

    def _round(self, crossing: _Crossing) -> None:
        """A window of it, as fast as its share allows."""
        size = min(crossing.window, crossing.left_bytes)
        crossing.left_bytes -= size
        crossing.round_s, crossing.round_bytes = self._clock.now, size
        self._send(crossing, size)

    def _send(self, crossing: _Crossing, size: float) -> None:
        crossing.flow = self._sharing.join(size, partial(self._sent, crossing), self._link.id)

    def _sent(self, crossing: _Crossing) -> None:
        now_s: float = self._clock.now
        acknowledged_s = crossing.round_s + self._rtt_s
        if now_s < acknowledged_s:
            crossing.window = grown(crossing.window, crossing.round_bytes)
        if crossing.left_bytes:
            if now_s < acknowledged_s:
                self._later(acknowledged_s, partial(self._round, crossing), crossing)
            else:  # the rate has become the limit
                size, crossing.left_bytes = crossing.left_bytes, 0.0
                self._send(crossing, size)
        elif crossing.again:
            self._later(now_s + self._rtt_s, partial(self._send, crossing, crossing.again.pop(0)), crossing)
        else:
            self._end(crossing, now_s)

    def _end(self, crossing: _Crossing, now_s: float) -> None:
        token = crossing.token
        self._window = max(self._window, crossing.window)
        del self._under_way[token]
        self._over(crossing, now_s)
        self._left(token, now_s)
        self._leave(token, crossing.start_s, crossing.start_s, now_s)
        if crossing.lost:
            token.callbacks = ()

    def _over(self, crossing: _Crossing, now_s: float) -> None:
        """Its radios go off; with the last one so does the link."""
        if not self._under_way:
            self._busy_s += now_s - self._since_s
            self._since_s = now_s
        self._air_s += now_s - crossing.start_s
        if self._radio is not None:
            self._radio(now_s - crossing.start_s, now_s)

    def totals(self, now_s: float) -> LinkTotals:
        busy_s = self._busy_s + (now_s - self._since_s if self._under_way else 0.0)
        air_s = self._air_s + sum(now_s - crossing.start_s for crossing in self._under_way.values())
        return LinkTotals(self.place, self._messages, self._bytes, busy_s, air_s, 0.0, self._lost)
