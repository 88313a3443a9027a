"""Simulated nodes: what all of them are, and the plainest. Knows SimPy's clock and tokens; of plans nothing.

The plain one serves first come, first served, and what is served cannot be stopped: so when a token begins and ends is
known when it comes, and there is one event per token and no queue. `sim/nodes.py` says which kind a node needs.
"""

from __future__ import annotations

import math
from heapq import heapreplace
from typing import NamedTuple, Protocol

from isthmus.sim.battery import Battery
from isthmus.sim.clock import Callbacks, Clock
from isthmus.sim.token import Token
from isthmus.workloads.memory import Memory
from isthmus.workloads.model import Part
from isthmus.workloads.nodes import Node


class NodeTotals(NamedTuple):
    """What a node did in a run. Two slots that work for one second have worked for two. Missing is None."""

    node: str
    served: int
    """Jobs that ended."""
    refused: int
    """Jobs for which it had no room."""
    up_s: float
    busy_s: float
    """Slots that computed or loaded, also what was lost in the end."""
    aside_s: float
    """Deciding, encoding and decoding, which take no slot."""
    waited_s: float
    """Waiting of the jobs that it served."""
    loads: int
    evictions: int
    rented_s: float | None
    """Slots, from when they were ordered; None of a node that does not scale."""
    money_usd: float | None
    """The time that it worked, or that its slots were rented, and the bytes that left it, at its prices."""
    energy_j: float | None
    """Idling, computing, and its radio."""
    battery_left_j: float | None


class Refuse(Protocol):
    def __call__(self, token: Token, reason: str, now_s: float) -> None: ...


class Place:
    """What every node is. `life` counts how often it went: what carries another number was lost.

    `served` and `waited_s` are counted by the simulator, which is told of each token that ends.
    """

    __slots__ = (
        "_clock", "_node", "_since_s", "_up_s", "aside_s", "battery", "life", "memory", "name", "refused",
        "served", "slots", "up", "waited_s", "went_s",
    )  # fmt: skip

    def __init__(self, clock: Clock, node: Node) -> None:
        self._clock, self._node = clock, node
        self.name, self.slots = node.name, node.slots
        self.up, self.life, self.went_s = True, 0, math.inf
        self._since_s = self._up_s = 0.0
        self.served = self.refused = 0
        self.waited_s = self.aside_s = 0.0
        self.battery: Battery | None = None
        self.memory: Memory[Part] | None = None

    def submit(self, token: Token, seconds: float, now_s: float) -> None:
        """A token comes, for so many seconds of work. A node that is down loses it."""
        raise NotImplementedError

    def busy_s(self, now_s: float) -> float:
        """Seconds that its slots have worked until now."""
        raise NotImplementedError

    def rented_s(self, now_s: float) -> float | None:
        """Seconds for which its slots were rented until now."""
        return None

    def work_aside(self, end_s: float, now_s: float) -> None:
        """It works on something that takes no slot, until `end_s`."""
        if self.up:
            self.aside_s += end_s - now_s
            if self.battery is not None:
                self.battery.busy(1, now_s)
                life = self.life
                self._clock.call(end_s, lambda: self._aside_done(life, end_s))

    def _aside_done(self, life: int, now_s: float) -> None:
        if life == self.life and self.battery is not None:
            self.battery.busy(-1, now_s)

    def go_down(self, now_s: float) -> None:
        """All that waits or runs, and all that was loaded, is lost."""
        self.life += 1
        self.went_s = now_s
        if self.up:
            self.up = False
            self._up_s += now_s - self._since_s
            if self.battery is not None:
                self.battery.switch(False, now_s)
            if self.memory is not None:
                self.memory.clear()

    def come_up(self, now_s: float) -> None:
        if not self.up:
            self.up, self._since_s = True, now_s
            if self.battery is not None:
                self.battery.switch(True, now_s)

    def totals(self, now_s: float, *, radio_j: float, sent_bytes: int) -> NodeTotals:
        """Until now; its links know what its radio took, and the bytes that left it."""
        node, memory, battery = self._node, self.memory, self.battery
        power, price = node.power, node.price
        money_usd = None
        up_s = self._up_s + (now_s - self._since_s if self.up else 0.0)
        busy_s, rented_s = self.busy_s(now_s), self.rented_s(now_s)
        left_j = energy_j = None
        if battery is not None:
            left_j = battery.left_j(now_s)
            energy_j = battery.capacity_j - left_j
        elif any((power.idle, power.busy, power.tx, power.rx)):
            energy_j = power.idle * up_s + power.busy * (busy_s + self.aside_s) + radio_j
        if price.per_s or price.per_byte:
            paid_s = busy_s + self.aside_s if rented_s is None else rented_s
            money_usd = price.per_s * paid_s + price.per_byte * sent_bytes
        return NodeTotals(
            node=self.name,
            served=self.served,
            refused=self.refused,
            up_s=up_s,
            busy_s=busy_s,
            aside_s=self.aside_s,
            waited_s=self.waited_s,
            loads=0 if memory is None else memory.loads,
            evictions=0 if memory is None else memory.evictions,
            rented_s=rented_s,
            money_usd=money_usd,
            energy_j=energy_j,
            battery_left_j=left_j,
        )


class LimitedNode(Place):
    """A node that may have room for so many tokens only, waiting and in service; it holds `_held` now."""

    __slots__ = ("_held", "_refuse", "_room")

    def __init__(self, clock: Clock, node: Node, refuse: Refuse) -> None:
        super().__init__(clock, node)
        self._room = math.inf if node.room is None else node.room
        self._refuse, self._held = refuse, 0

    def _admits(self, token: Token, now_s: float) -> bool:
        """Whether it takes a token now. One that is down loses it, one that is full refuses it."""
        if self.up and self._held >= self._room:
            self.refused += 1
            self._refuse(token, f"no room at {self.name}", now_s)
            return False
        return self.up


class FifoNode(Place):
    """`slots` tokens at a time, first come, first served. `computed` is called with each at its end."""

    __slots__ = ("_busy_s", "_computed", "_free_s", "_push", "_tick")

    def __init__(self, clock: Clock, node: Node, computed: Callbacks) -> None:
        super().__init__(clock, node)
        self._push, self._tick, self._computed = clock.push, clock.tick, computed
        self._free_s = [0.0] * node.slots  # a heap: when each slot is free again
        self._busy_s = 0.0  # also what is still to be done

    def submit(self, token: Token, seconds: float, now_s: float) -> None:
        if not self.up:
            return
        begun_s = self._free_s[0]
        if now_s > begun_s:
            begun_s = now_s
        end_s = begun_s + seconds
        heapreplace(self._free_s, end_s)
        self._busy_s += seconds
        token.ready_s, token.begun_s, token.life = now_s, begun_s, self.life
        token.at_s, token.callbacks = end_s, self._computed
        self._push((end_s, 1, self._tick(), token))

    def busy_s(self, now_s: float) -> float:
        # A slot that is not free yet works without a pause until it is: all that it will do has come.
        return self._busy_s - sum(free_s - now_s for free_s in self._free_s if free_s > now_s)

    def go_down(self, now_s: float) -> None:
        super().go_down(now_s)
        self._busy_s = self.busy_s(now_s)
        self._free_s = [0.0] * self.slots
