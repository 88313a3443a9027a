"""A simulated node: slots and a FIFO queue. Knows SimPy, and of plans nothing: a job is a time and a callback."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from simpy import Environment, Event


@dataclass(slots=True, eq=False)
class Job:
    """Work for a node. `done(start_s)` is called at its end with the time at which it began."""

    service_s: float
    done: Callable[[float], None]


class SimNode:
    """`slots` jobs at a time, the rest wait in order of arrival. One heap event per job."""

    def __init__(self, env: Environment, slots: int) -> None:
        self._env, self._free = env, slots
        self._slots = slots
        self._queue: deque[Job] = deque()
        self._life = 0  # counts the times it went down: what was running then never ends
        self.up = True

    def submit(self, job: Job) -> None:
        """A job arrives now. A node that is down loses it."""
        if not self.up:
            return
        if self._free:
            self._free -= 1
            self._begin(job)
        else:
            self._queue.append(job)

    def go_down(self) -> None:
        """Everything waiting or running is lost."""
        self.up, self._free, self._life = False, self._slots, self._life + 1
        self._queue.clear()

    def come_up(self) -> None:
        self.up = True

    def _begin(self, job: Job) -> None:
        start, life = self._env.now, self._life

        def end(_: Event) -> None:
            if life != self._life:
                return
            if self._queue:
                self._begin(self._queue.popleft())
            else:
                self._free += 1
            job.done(start)

        self._env.timeout(job.service_s).callbacks.append(end)
