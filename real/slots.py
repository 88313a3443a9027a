"""The slots of a node: when a part begins, and when it has ended. Emulated hardware, or the host as it is.

Knows jobs and time. Must not know messages, links, Ray or ONNX Runtime: how a part is computed it is told.

Emulated times chain: a part begins at the later of its tensors being there and the end of the one before it, and lasts
its CPU time times the node's slowdown. So a host that is late now and then shifts nothing; when it is too late to keep
an emulated time, that is an overrun: it is counted, and the time it really took is used.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from heapq import heappop, heappush
from itertools import count
from typing import Protocol

from isthmus.policies.records import Kind, Span
from isthmus.real.letters import Tensors, took
from isthmus.real.timeline import Clock, Timeline
from isthmus.workloads.errors import InputError
from isthmus.workloads.model import Part
from isthmus.workloads.nodes import Node
from isthmus.workloads.requests import Request

Compute = Callable[[Part, str, Tensors], tuple[Tensors, float, float]]
"""Runs a part of a version of its model: its outputs, the CPU seconds of that, and those of loading it."""


class CannotRun(InputError):
    """A part does not run on the tensors of a job, or is of a version that is not here."""


@dataclass(frozen=True, slots=True)
class Job:
    """A stage that has all its tensors. `cost_s` makes the node's time of the host's CPU seconds.

    `ended` is told the outputs, when that was, what took time meanwhile, and how often the host was late; `broke` why
    there are none.
    """

    part: Part
    version: str
    tensors: Tensors
    request: Request
    attempt: int
    stage: int
    ready_s: float
    cost_s: Callable[[float], float]
    ended: Callable[[Tensors, float, tuple[Span, ...], int], None]
    broke: Callable[[CannotRun], None]


class Slots(Protocol):
    def submit(self, job: Job) -> None:
        """A job whose time has come, or comes at `ready_s`."""

    def close(self) -> None: ...


def _rank(discipline: str, request: Request, ready_s: float) -> tuple[float, float]:
    """Who is served first has the smallest."""
    match discipline:
        case "edf":
            return math.inf if request.deadline_s is None else request.deadline_s, ready_s
        case "priority":
            return -request.priority, ready_s
        case _:
            return ready_s, 0.0


def _spans(job: Job, place: str, begun_s: float, loaded_s: float, end_s: float) -> tuple[Span, ...]:
    return (
        *took(Kind.WAIT, place, job.ready_s, begun_s, job.attempt, job.stage),
        *took(Kind.LOAD, place, begun_s, loaded_s, job.attempt, job.stage),
        *took(Kind.COMPUTE, place, loaded_s, end_s, job.attempt, job.stage),
    )


@dataclass(slots=True)
class _Waiting:
    """Jobs in the order in which they are served."""

    discipline: str
    _jobs: list[tuple[tuple[float, float], int, Job, Future[tuple[Tensors, float, float]] | None]] = field(
        default_factory=list
    )
    _order: count[int] = field(default_factory=count)

    def push(self, job: Job, result: Future[tuple[Tensors, float, float]] | None = None) -> None:
        heappush(self._jobs, (_rank(self.discipline, job.request, job.ready_s), next(self._order), job, result))

    def pop(self) -> tuple[Job, Future[tuple[Tensors, float, float]] | None]:
        return heappop(self._jobs)[2:]

    def __len__(self) -> int:
        return len(self._jobs)


class EmulatedSlots:
    """Parts are computed as soon as their tensors are here, ahead of emulated time where the host can.

    All that is decided is decided on the `commit` thread, in order of emulated time.
    """

    def __init__(self, node: Node, clock: Clock, compute: Compute, failed: Callable[[BaseException], None]) -> None:
        self._node, self._clock, self._compute = node, clock, compute
        self._idle_since_s = [0.0] * node.slots  # of the slots that are free on the emulated hardware
        self._waiting = _Waiting(node.discipline)
        self._pool = ThreadPoolExecutor(node.slots, thread_name_prefix="compute")
        self._commit = Timeline(clock, "commit", failed)

    def submit(self, job: Job) -> None:
        result = self._pool.submit(self._compute, job.part, job.version, job.tensors)
        self._commit.at(job.ready_s, partial(self._ready, job, result))

    def close(self) -> None:
        self._commit.close()
        self._pool.shutdown(cancel_futures=True)

    def _ready(self, job: Job, result: Future[tuple[Tensors, float, float]]) -> None:
        """A job is due. Jobs become due in order."""
        self._waiting.push(job, result)
        self._fill()

    def _free(self, since_s: float) -> None:
        self._idle_since_s.append(since_s)
        self._fill()

    def _fill(self) -> None:
        while self._waiting and self._idle_since_s:
            job, result = self._waiting.pop()
            assert result is not None
            idle_s = min(self._idle_since_s)
            self._idle_since_s.remove(idle_s)
            begun_s = max(job.ready_s, idle_s)
            # The host may still be computing; the other slots do not wait for it.
            result.add_done_callback(partial(self._is_there, job, begun_s))

    def _is_there(self, job: Job, begun_s: float, result: Future[tuple[Tensors, float, float]]) -> None:
        if not result.cancelled():
            self._commit.at(begun_s, partial(self._computed, job, begun_s, result))

    def _computed(self, job: Job, begun_s: float, result: Future[tuple[Tensors, float, float]]) -> None:
        """A job began at that time on the emulated hardware, and the host has its result: when does it end there?"""
        try:
            outputs, cpu_s, load_s = result.result()
        except CannotRun as error:
            self._free(begun_s)
            job.broke(error)
            return
        finish = _at_once if self._node.speed is None else self._node.speed.finish_s
        loaded_s = finish(begun_s, load_s * self._node.slowdown)
        end_s = finish(loaded_s, job.cost_s(cpu_s))
        now, overruns = self._clock.now_s, 0
        if now > end_s:
            end_s, overruns = now, 1
        self._commit.at(end_s, partial(self._free, end_s))
        job.ended(outputs, end_s, _spans(job, self._node.name, begun_s, loaded_s, end_s), overruns)


def _at_once(start_s: float, seconds: float) -> float:
    return start_s + seconds


class HostSlots:
    """A thread per slot. What takes long takes long; a straggler is held back for as much longer as it is slower."""

    def __init__(self, node: Node, clock: Clock, compute: Compute, failed: Callable[[BaseException], None]) -> None:
        self._node, self._clock, self._compute, self._failed = node, clock, compute, failed
        self._waiting = _Waiting(node.discipline)
        self._changed = threading.Condition()
        self._closed = False
        self._due = Timeline(clock, "due", failed)
        self._threads = [threading.Thread(target=self._serve, name=f"slot-{i}", daemon=True) for i in range(node.slots)]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job) -> None:
        if job.ready_s > self._clock.now_s:
            self._due.at(job.ready_s, partial(self._ready, job))
        else:
            self._ready(job)

    def _ready(self, job: Job) -> None:
        with self._changed:
            self._waiting.push(job)
            self._changed.notify()

    def close(self) -> None:
        self._due.close()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _next(self) -> Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._waiting))
            return None if self._closed else self._waiting.pop()[0]

    def _serve(self) -> None:
        while (job := self._next()) is not None:
            try:
                self._work(job)
            except BaseException as error:
                self._failed(error)

    def _work(self, job: Job) -> None:
        begun_s = self._clock.now_s
        try:
            outputs, _, load_s = self._compute(job.part, job.version, job.tensors)
        except CannotRun as error:
            job.broke(error)
            return
        end_s = self._clock.now_s
        if self._node.speed is not None:
            end_s = self._node.speed.finish_s(begun_s, end_s - begun_s)
            self._clock.sleep_until(end_s)
            end_s = max(end_s, self._clock.now_s)
        loaded_s = min(begun_s + load_s, end_s)
        job.ended(outputs, end_s, _spans(job, self._node.name, begun_s, loaded_s, end_s), 0)
