"""A simulated node that shares its processor: all that is there runs at once. Knows SimPy's clock and tokens.

n jobs on c slots get min(1, c/n) of a slot each (Kleinrock, Queueing Systems, vol. 2, 1976, §4.4).
"""

from __future__ import annotations

from functools import partial

from isthmus.sim.battery import Battery
from isthmus.sim.clock import Callbacks, Clock
from isthmus.sim.meter import Meter
from isthmus.sim.node import LimitedNode, Refuse
from isthmus.sim.sharing import Sharing
from isthmus.sim.token import Token
from isthmus.workloads.nodes import Node
from isthmus.workloads.rate import Rate


class SharingNode(LimitedNode):
    """Nothing waits here. It is as busy as slots have work: n jobs on c slots keep min(n, c) busy."""

    __slots__ = ("_busy", "_computed", "_sharing")

    def __init__(self, clock: Clock, node: Node, computed: Callbacks, refuse: Refuse, battery: Battery | None) -> None:
        super().__init__(clock, node, refuse)
        [self._computed] = computed
        self.battery = battery
        self._sharing = Sharing(clock, node.speed or Rate.constant(1.0), slots=node.slots)
        self._busy = Meter()

    def submit(self, token: Token, seconds: float, now_s: float) -> None:
        if not self._admits(token, now_s):
            return
        token.ready_s = token.begun_s = now_s
        token.life = self.life
        self._hold(self._held + 1, now_s)
        self._sharing.join(seconds, partial(self._ended, token))

    def busy_s(self, now_s: float) -> float:
        return self._busy.read(now_s)

    def go_down(self, now_s: float) -> None:
        super().go_down(now_s)
        self._sharing.clear()
        self._held = 0
        self._busy.set(0, now_s)

    def _hold(self, jobs: int, now_s: float) -> None:
        self._held = jobs
        before, busy = self._busy.level, min(jobs, self.slots)
        if busy != before:
            self._busy.set(busy, now_s)
            if self.battery is not None:
                self.battery.busy(busy - before, now_s)

    def _ended(self, token: Token) -> None:
        token.at_s = float(self._clock.now)
        self._hold(self._held - 1, token.at_s)
        self._computed(token)
