"""A link between a node that moves and one of its cells, in one direction. Up while the cell serves the node.

Knows the link that carries while it is up, and nothing of positions. What is under way when the node moves on has to be
sent again, from its first byte, by whichever way there then is.
"""

from __future__ import annotations

from collections.abc import Callable

from isthmus.policies.records import Kind
from isthmus.sim.clock import Callbacks
from isthmus.sim.link import Carrier, LinkTotals
from isthmus.sim.node import Place
from isthmus.sim.token import Token


class CellLink:
    """`make` makes the link that carries. It carries nothing while it is not `up`; whoever sends has to look."""

    __slots__ = ("_arrived", "_inner", "_riders", "ends", "place", "up")

    ends: tuple[Place, Place]

    def __init__(self, make: Callable[[Callbacks], Carrier], arrived: Callbacks) -> None:
        self._inner = make((self._over,))
        self._arrived = arrived
        self._riders: dict[Token, None] = {}  # in the order in which they came
        self.place, self.up = self._inner.place, True

    def carry(self, token: Token, now_s: float) -> float | None:
        """A message enters; the time at which its last byte leaves, if that is known and nothing comes between."""
        self._riders[token] = None
        token.life = self.ends[0].life
        return self._inner.carry(token, now_s)

    def lose(self, token: Token) -> None:
        """It is not sent again either."""
        del self._riders[token]
        self._inner.lose(token)

    def reset(self, now_s: float) -> None:
        self._inner.reset(now_s)

    def totals(self, now_s: float) -> LinkTotals:
        return self._inner.totals(now_s)

    def cut(self, now_s: float) -> list[Token]:
        """The node has moved on. What was under way, as if it had not set out."""
        self.up = False
        self._inner.reset(now_s)
        again = []
        for token in self._riders:
            token.callbacks = ()  # it is in the heap, and nobody will be there
            self._take_back(token, now_s)
            fork = token.fork()
            fork.leg, fork.way, fork.hop, fork.life = token.leg, token.way, token.hop, token.life
            again.append(fork)
        self._riders.clear()
        return again

    def _over(self, token: Token) -> None:
        del self._riders[token]
        for call in self._arrived:
            call(token)

    def _take_back(self, token: Token, now_s: float) -> None:
        """Spans that were to be: a message waits and is sent until it is cut off, and that is no evidence of a rate."""
        spans, stage = token.spans, token.leg.source
        if spans is not None:
            for i in reversed(range(len(spans))):
                span = spans[i]
                if span.place == self.place and span.stage == stage and span.end_s > now_s:
                    if span.start_s >= now_s:
                        del spans[i]
                    else:
                        spans[i] = span._replace(end_s=now_s, bytes=None if span.kind is Kind.SEND else span.bytes)
