"""What moves through a simulation: one attempt at a request, wherever it is. Knows plans as they are wired.

A token is in one place at a time: deciding, on a link, waiting, computing. Where a stage sends to several others it
forks, and where a stage waits for several the last one to come goes on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from isthmus.policies.dispatch import Start
from isthmus.policies.records import Span
from isthmus.sim.clock import Armed

if TYPE_CHECKING:
    from isthmus.sim.link import Carrier
    from isthmus.sim.simulator import Home
    from isthmus.sim.wiring import Leg, Wired


class Token(Armed):
    """`spans` and `missing` are shared by all tokens of an attempt; None where nobody asks for them."""

    __slots__ = (
        "begun_s",
        "ends",
        "home",
        "hop",
        "left_s",
        "leg",
        "life",
        "loaded_s",
        "met",
        "missing",
        "ready_s",
        "spans",
        "start",
        "way",
        "wired",
    )  # fmt: skip

    leg: Leg
    way: tuple[Carrier, ...]
    """The links of its plan; it is on that numbered `hop`, or was last, or is next."""
    hop: int
    ready_s: float
    begun_s: float
    loaded_s: float
    """When its part was there; only at a node whose memory is limited."""
    life: int
    ends: tuple[int, int]
    """The lives of both ends of the link that it is on; where nodes can go."""
    left_s: float
    """When its last byte left that link, as far as is known; where nodes can go."""
    met: dict[int, int]
    """By stage that waits for several: the life of its node when the first of them came."""

    def __init__(
        self, start: Start, home: Home, wired: Wired, spans: list[Span] | None, missing: list[int] | None
    ) -> None:
        self.start, self.home, self.wired, self.spans, self.missing = start, home, wired, spans, missing
        if missing is not None:
            self.met = {}

    def fork(self) -> Token:
        """Another one of the same attempt."""
        other = Token(self.start, self.home, self.wired, self.spans, self.missing)
        if self.missing is not None:
            other.met = self.met
        return other
