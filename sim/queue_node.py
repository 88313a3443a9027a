"""A simulated node with a real queue: disciplines, room, batches, memory, speed, battery and scaling, non-preemptive.

Knows SimPy's clock and tokens. What waits and what is resident is in `workloads`, where real runs have it from as well,
the rest of what it may have in files of their own; here is when a job begins: when there is a slot, something to begin,
and memory for it. Who is next waits for memory at the head of the line: nobody overtakes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from isthmus.sim.battery import Battery
from isthmus.sim.clock import Armed, Callbacks, Clock
from isthmus.sim.node import LimitedNode, Refuse
from isthmus.sim.slots import ElasticSlots, Slots
from isthmus.sim.token import Token
from isthmus.workloads.memory import Finish, Memory
from isthmus.workloads.model import Part
from isthmus.workloads.nodes import Node
from isthmus.workloads.waiting import Batching, Entry, Waiting

Work = tuple[Token, float]
"""A token, and the seconds that it takes alone."""


class _Service(Armed):
    """What one slot works on: a token, or a batch of them."""

    __slots__ = ("life", "part", "tokens")

    def __init__(self, tokens: list[Token], part: Part, life: int) -> None:
        self.tokens, self.part, self.life = tokens, part, life


def _at_once(start_s: float, seconds: float) -> float:
    return start_s + seconds


class QueueNode(LimitedNode):
    """`factor` says how many times longer than one job a batch of a model takes."""

    __slots__ = ("_computed", "_ended_at", "_factor", "_finish", "_slots", "_waiting",
                 "_wake_s")  # fmt: skip

    def __init__(
        self,
        clock: Clock,
        node: Node,
        computed: Callbacks,
        refuse: Refuse,
        factor: Callable[[str, int], float],
        memory: Memory[Part] | None,
        battery: Battery | None,
    ) -> None:
        super().__init__(clock, node, refuse)
        [self._computed] = computed
        self._factor = factor
        self.memory, self.battery = memory, battery
        self._ended_at = (self._ended,)
        self._finish: Finish = _at_once if node.speed is None else node.speed.finish_s
        self._waiting: Waiting[Part, Work] = (
            Waiting(node.discipline) if node.batch is None else Batching(node.discipline, node.batch)
        )
        self._slots = (
            Slots(node.slots) if node.scale is None else ElasticSlots(clock, node.slots, node.scale, self._begin_all)
        )
        self._wake_s = math.inf

    def submit(self, token: Token, seconds: float, now_s: float) -> None:
        if not self._admits(token, now_s):
            return
        self._held += 1
        token.ready_s, token.life = now_s, self.life
        part = token.wired.steps[token.leg.target].part
        self._waiting.push((token, seconds), part, token.start.request, now_s)
        self._begin_all(now_s)
        if not self._slots.free and len(self._waiting):
            self._slots.order(now_s)

    def busy_s(self, now_s: float) -> float:
        return self._slots.busy.read(now_s)

    def rented_s(self, now_s: float) -> float | None:
        return None if self._slots.rented is None else self._slots.rented.read(now_s)

    def go_down(self, now_s: float) -> None:
        super().go_down(now_s)
        self._waiting.clear()
        self._slots.go_down(now_s)
        self._held = 0

    def come_up(self, now_s: float) -> None:
        if not self.up:
            self._slots.come_up(now_s)
        super().come_up(now_s)

    def _begin_all(self, now_s: float) -> None:
        """Begin whatever can begin now."""
        waiting, slots = self._waiting, self._slots
        while slots.free:
            queue = waiting.next(now_s)
            if queue is None:
                due_s = waiting.due_s()
                if due_s < self._wake_s:
                    self._wake_s = due_s
                    self._clock.call(due_s, partial(self._woken, due_s))
                return
            if self.memory is not None and not self.memory.admits(queue[0].key):
                return
            self._begin(waiting.take(queue), now_s)

    def _woken(self, now_s: float) -> None:
        if now_s == self._wake_s:
            self._wake_s = math.inf
            self._begin_all(now_s)

    def _begin(self, jobs: list[Entry[Part, Work]], now_s: float) -> None:
        """A batch takes as long as its first job would, times its factor."""
        part, (_, seconds) = jobs[0].key, jobs[0].item
        if len(jobs) > 1:
            seconds *= self._factor(part.model, len(jobs))
        loaded_s = now_s if self.memory is None else self.memory.use(part, now_s, self._finish)
        tokens = [job.item[0] for job in jobs]
        for token in tokens:
            token.begun_s, token.loaded_s = now_s, loaded_s
        self._slots.take(now_s)
        if self.battery is not None:
            self.battery.busy(1, now_s)
        service = _Service(tokens, part, self.life)
        self._clock.arm(service, self._finish(loaded_s, seconds), self._ended_at)

    def _ended(self, service: _Service) -> None:
        if service.life != self.life:
            return
        now_s = service.at_s
        self._held -= len(service.tokens)
        self._slots.give(now_s)
        if self.battery is not None:
            self.battery.busy(-1, now_s)
        if self.memory is not None:
            self.memory.release(service.part)
        self._begin_all(now_s)
        for token in service.tokens:
            token.at_s = now_s
            self._computed(token)
