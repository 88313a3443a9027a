"""What waits at a node, and who is next: by discipline, one by one or in batches. The same in both worlds.

Disciplines are non-preemptive: they say who begins next, not who goes on. Knows no slot, no clock, and nothing of what
waits but its key, its request and when it was ready.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Generic, NamedTuple, TypeVar

from isthmus.workloads.nodes import Batch
from isthmus.workloads.requests import Request

Key = TypeVar("Key")
"""What the jobs of a batch have in common, such as their part."""
Item = TypeVar("Item")


def _deadline(request: Request) -> float:
    return math.inf if request.deadline_s is None else request.deadline_s


ORDERS: dict[str, Callable[[Request], float]] = {
    "fifo": lambda request: 0.0,
    "edf": _deadline,
    "priority": lambda request: -request.priority,
}
"""The least goes first, and among equals the one that came first."""


class Entry(NamedTuple, Generic[Key, Item]):
    """A job that waits. Entries compare by who is first."""

    order: float
    ready_s: float
    number: int
    key: Key
    item: Item


class Waiting(Generic[Key, Item]):
    """One queue for all jobs, served one by one."""

    __slots__ = ("_heap", "_number", "_order")

    def __init__(self, discipline: str) -> None:
        self._order = ORDERS[discipline]
        self._heap: list[Entry[Key, Item]] = []
        self._number = 0

    def push(self, item: Item, key: Key, request: Request, ready_s: float) -> None:
        self._number += 1
        heappush(self._heap, Entry(self._order(request), ready_s, self._number, key, item))

    def next(self, now_s: float) -> list[Entry[Key, Item]] | None:
        """The queue to serve from now, whose first job is the next of all; None if there is nothing to begin yet."""
        return self._heap or None

    def take(self, queue: list[Entry[Key, Item]]) -> list[Entry[Key, Item]]:
        """The jobs that begin together, the first one first."""
        return [heappop(queue)]

    def due_s(self) -> float:
        """When there is something to begin, if nothing comes before and nothing could begin now."""
        return math.inf

    def __len__(self) -> int:
        return len(self._heap)

    def clear(self) -> None:
        self._heap.clear()


class _Queue(NamedTuple, Generic[Key, Item]):
    """The jobs of one key: by order, and by when they came. `begun` are numbers that `came` still holds."""

    jobs: list[Entry[Key, Item]]
    came: deque[Entry[Key, Item]]
    begun: set[int]

    def oldest_s(self) -> float:
        """When the job came that has waited longest."""
        while self.came[0].number in self.begun:
            self.begun.discard(self.came.popleft().number)
        return self.came[0].ready_s


class Batching(Waiting[Key, Item]):
    """A queue for each key. One is served when it fills a batch, or when a job of it has waited for `wait`."""

    __slots__ = ("_batch", "_queues")

    def __init__(self, discipline: str, batch: Batch) -> None:
        super().__init__(discipline)
        self._batch = batch
        self._queues: dict[Key, _Queue[Key, Item]] = {}

    def push(self, item: Item, key: Key, request: Request, ready_s: float) -> None:
        self._number += 1
        job = Entry(self._order(request), ready_s, self._number, key, item)
        queue = self._queues.setdefault(key, _Queue([], deque(), set()))
        heappush(queue.jobs, job)
        queue.came.append(job)

    def next(self, now_s: float) -> list[Entry[Key, Item]] | None:
        size, wait = self._batch.size, self._batch.wait
        waiting = (q for q in self._queues.values() if q.jobs)
        ripe = (q.jobs for q in waiting if len(q.jobs) >= size or q.oldest_s() + wait <= now_s)
        return min(ripe, key=lambda jobs: jobs[0], default=None)

    def take(self, queue: list[Entry[Key, Item]]) -> list[Entry[Key, Item]]:
        jobs = [heappop(queue) for _ in range(min(self._batch.size, len(queue)))]
        self._queues[jobs[0].key].begun.update(job.number for job in jobs)
        return jobs

    def due_s(self) -> float:
        return min((q.oldest_s() + self._batch.wait for q in self._queues.values() if q.jobs), default=math.inf)

    def __len__(self) -> int:
        return sum(len(queue.jobs) for queue in self._queues.values())

    def clear(self) -> None:
        self._queues.clear()
