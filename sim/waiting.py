"""What waits at a node, and who is next: by discipline, one by one or in batches. Knows tokens; no slot, no clock.

Disciplines are non-preemptive: they say who begins next, not who goes on.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush
from typing import NamedTuple

from isthmus.sim.token import Token
from isthmus.workloads.model import Part
from isthmus.workloads.nodes import Batch
from isthmus.workloads.requests import Request


def _deadline(request: Request) -> float:
    return math.inf if request.deadline_s is None else request.deadline_s


ORDERS: dict[str, Callable[[Request], float]] = {
    "fifo": lambda request: 0.0,
    "edf": _deadline,
    "priority": lambda request: -request.priority,
}
"""The least goes first, and among equals the one that came first."""


class Job(NamedTuple):
    """A token that waits. Jobs compare by who is first."""

    order: float
    number: int
    token: Token
    seconds: float


def part_of(token: Token) -> Part:
    """What its stage is to compute."""
    return token.wired.steps[token.leg.target].part


class Waiting:
    """One queue for all jobs, served one by one."""

    __slots__ = ("_heap", "_number", "_order")

    def __init__(self, discipline: str) -> None:
        self._order = ORDERS[discipline]
        self._heap: list[Job] = []
        self._number = 0

    def push(self, token: Token, seconds: float) -> None:
        self._number += 1
        heappush(self._heap, Job(self._order(token.start.request), self._number, token, seconds))

    def next(self, now_s: float) -> list[Job] | None:
        """The queue to serve from now, whose first job is the next of all; None if there is nothing to begin yet."""
        return self._heap or None

    def take(self, queue: list[Job]) -> list[Job]:
        """The jobs that begin together, the first one first."""
        return [heappop(queue)]

    def due_s(self) -> float:
        """When there is something to begin, if nothing comes before and nothing could begin now."""
        return math.inf

    def __len__(self) -> int:
        return len(self._heap)

    def clear(self) -> None:
        self._heap.clear()


class _Queue(NamedTuple):
    """The jobs of one part: by order, and by when they came. `begun` are numbers that `came` still holds."""

    jobs: list[Job]
    came: deque[Job]
    begun: set[int]

    def oldest_s(self) -> float:
        """When the job came that has waited longest."""
        while self.came[0].number in self.begun:
            self.begun.discard(self.came.popleft().number)
        return self.came[0].token.ready_s


class Batching(Waiting):
    """A queue for each part. One is served when it fills a batch, or when a job of it has waited for `wait`."""

    __slots__ = ("_batch", "_queues")

    def __init__(self, discipline: str, batch: Batch) -> None:
        super().__init__(discipline)
        self._batch = batch
        self._queues: dict[Part, _Queue] = {}

    def push(self, token: Token, seconds: float) -> None:
        self._number += 1
        job = Job(self._order(token.start.request), self._number, token, seconds)
        queue = self._queues.setdefault(part_of(token), _Queue([], deque(), set()))
        heappush(queue.jobs, job)
        queue.came.append(job)

    def next(self, now_s: float) -> list[Job] | None:
        size, wait = self._batch.size, self._batch.wait
        waiting = (q for q in self._queues.values() if q.jobs)
        ripe = (q.jobs for q in waiting if len(q.jobs) >= size or q.oldest_s() + wait <= now_s)
        return min(ripe, key=lambda jobs: jobs[0], default=None)

    def take(self, queue: list[Job]) -> list[Job]:
        jobs = [heappop(queue) for _ in range(min(self._batch.size, len(queue)))]
        self._queues[part_of(jobs[0].token)].begun.update(job.number for job in jobs)
        return jobs

    def due_s(self) -> float:
        return min((q.oldest_s() + self._batch.wait for q in self._queues.values() if q.jobs), default=math.inf)

    def __len__(self) -> int:
        return sum(len(queue.jobs) for queue in self._queues.values())

    def clear(self) -> None:
        self._queues.clear()
