"""A simulated node: slots and a FIFO queue. Knows SimPy's clock and tokens; of plans nothing.

First come, first served, and what is served cannot be stopped: so when a token begins and ends is known when it
comes, and there is one event per token and no queue.
"""

from __future__ import annotations

from heapq import heapreplace

from isthmus.sim.clock import Callbacks, Clock
from isthmus.sim.token import Token


class FifoNode:
    """`slots` tokens at a time. `computed` is called with each at its end; `life` counts how often the node went."""

    __slots__ = ("_computed", "_free_s", "_push", "_tick", "life", "name", "slots", "up")

    def __init__(self, clock: Clock, name: str, slots: int, computed: Callbacks) -> None:
        self._push, self._tick, self._computed = clock.push, clock.tick, computed
        self.name, self.slots = name, slots
        self._free_s = [0.0] * slots  # a heap: when each slot is free again
        self.up, self.life = True, 0

    def submit(self, token: Token, seconds: float, now_s: float) -> None:
        """A token comes. A node that is down loses it."""
        if not self.up:
            return
        free_s = self._free_s[0]
        token.ready_s, token.begun_s = now_s, now_s if now_s > free_s else free_s
        end_s = token.begun_s + seconds
        heapreplace(self._free_s, end_s)
        token.life = self.life
        token.at_s, token.callbacks = end_s, self._computed
        self._push((end_s, 1, self._tick(), token))

    def go_down(self) -> None:
        """All that waits or runs is lost."""
        self.up, self.life = False, self.life + 1
        self._free_s = [0.0] * self.slots

    def come_up(self) -> None:
        self.up = True
