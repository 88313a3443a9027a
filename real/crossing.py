"""The links of one node during one cell: how messages leave it, and what took time when they have come.

Knows messages, links, faults of links, and time. What a message is for, and who computes, it does not know.

Over an emulated link a message goes at once, with the time at which the link would deliver it; the receiver holds it
until then, and if it is late, that is an overrun. Over a physical link it goes when it is due, and arrives when it
arrives: the receiver works out how long it waited for those before it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from isthmus.policies.plan import Message
from isthmus.policies.records import Kind, Span
from isthmus.real.backend import Array
from isthmus.real.letters import Cell, Letter, place_of, took
from isthmus.real.timeline import Clock, Timeline
from isthmus.workloads.affliction import Losses
from isthmus.workloads.faults import LinkFault, LostMessages
from isthmus.workloads.routing import LinkId
from isthmus.workloads.testbed import Testbed
from isthmus.workloads.transmitter import Transmitter

Send = Callable[[str, Letter, Sequence[Array]], None]
"""Passes a message on to a node."""
Left = Callable[[Letter, int, float], None]
"""Told that the last byte of a message has left on an emulated link: which of its plan's loads that is, and when."""


class Crossings:
    """`world` is the testbed with the cell's faults in it."""

    def __init__(self, name: str, world: Testbed, cell: Cell, clock: Clock, send: Send, left: Left, due: Timeline):
        self._clock, self._send, self._left, self._due = clock, send, left, due
        self._world = world
        self._transmitters = {
            link: Transmitter(of) for link, of in world.links.items() if link[0] == name and not world.is_physical(link)
        }
        self._outages = [f for f in cell.faults if isinstance(f, LinkFault)] if not cell.cuts_links else []
        self._losses = Losses(cell.faults, cell.seed) if any(isinstance(f, LostMessages) for f in cell.faults) else None
        self._arrived_s: dict[LinkId, float] = {}  # over physical links: when the last message came
        self._lock = threading.Lock()

    def enter(self, message: Message, letter: Letter, arrays: Sequence[Array]) -> None:
        """The next link, at `letter.at_s`: emulated links in order of time, physical ones as soon as it is time."""
        cross = partial(self._cross, message, letter, arrays)
        if message.links[letter.hop] not in self._transmitters and letter.at_s <= self._clock.now_s:
            cross()
        else:
            self._due.at(letter.at_s, cross)

    def _cross(self, message: Message, letter: Letter, arrays: Sequence[Array]) -> None:
        link, entry_s = message.links[letter.hop], letter.at_s
        lost = self._losses is not None and self._losses.takes(
            place_of(link), letter.request, letter.attempt, message.load, entry_s
        )
        transmitter = self._transmitters.get(link)
        if transmitter is None:
            self._hand_over(message, letter, arrays, lost=lost)
            return
        start_s, left_s, arrived_s = transmitter.send(entry_s, message.wire_bytes)
        if not lost:
            self._send_on(message, letter, arrays, arrived_s, _spans(message, letter, start_s, arrived_s))
        self._left(letter, message.load + letter.hop, left_s)

    def _hand_over(self, message: Message, letter: Letter, arrays: Sequence[Array], *, lost: bool) -> None:
        """To a physical link. One that a fault holds up is given nothing until then."""
        link, now_s = message.links[letter.hop], self._clock.now_s
        ends_s = max((f.end_s for f in self._outages if {*f.link} == {*link} and f.down <= now_s < f.end_s), default=0)
        if ends_s > now_s:
            if ends_s < float("inf"):
                self._due.at(ends_s, partial(self._cross, message, letter, arrays))
        elif not lost:
            self._send_on(message, letter, arrays, now_s, _spans(message, letter, now_s, now_s))

    def _send_on(
        self, message: Message, letter: Letter, arrays: Sequence[Array], at_s: float, spans: tuple[Span, ...]
    ) -> None:
        onward = replace(letter, hop=letter.hop + 1, at_s=at_s, spans=letter.spans + spans)
        self._send(message.path[onward.hop], onward, arrays)

    def came(self, message: Message, letter: Letter) -> Letter:
        """A message that is here, with the time at which it was delivered, and what took time on its link."""
        now_s, link = self._clock.now_s, message.links[letter.hop - 1]
        if not self._world.is_physical(link):  # normally ahead of its time; if not, it is as late as it is
            late = now_s > letter.at_s
            return replace(letter, at_s=now_s, overruns=letter.overruns + 1) if late else letter
        with self._lock:
            before_s, self._arrived_s[link] = self._arrived_s.get(link, 0.0), now_s
        # The link is free for its first byte when the last byte of the one before has left.
        start_s = min(max(letter.at_s, before_s - self._world.links[link].latency_s), now_s)
        spans = _spans(message, replace(letter, hop=letter.hop - 1), start_s, now_s)
        return replace(letter, at_s=now_s, spans=letter.spans + spans)


def _spans(message: Message, letter: Letter, start_s: float, end_s: float) -> tuple[Span, ...]:
    """Of the next link of a letter: waiting since `letter.at_s`, and then on it."""
    place = place_of(message.links[letter.hop])
    waited = took(Kind.WAIT, place, letter.at_s, start_s, letter.attempt, message.source)
    return waited + took(Kind.SEND, place, start_s, end_s, letter.attempt, message.source, message.wire_bytes)
