"""The slots of a node: when a part begins, and when it has ended. Emulated hardware, or the host as it is.

Knows jobs and time. Must not know messages, links, Ray or ONNX Runtime: how a part is computed it is told. Who is next,
in which batch, and what is resident, is decided by what the simulator has for it, in `workloads`.

Emulated times chain: a part begins at the later of its tensors being there and the end of the one before it, and lasts
its CPU time times the node's slowdown. So a host that is late now and then shifts nothing; when it is too late to keep
an emulated time, that is an overrun: it is counted, and the time it really took is used.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Generic, NamedTuple, Protocol, TypeVar

from isthmus.policies.records import Kind, Span
from isthmus.real.letters import Tensors, took
from isthmus.real.timeline import Clock, Timeline
from isthmus.workloads.errors import InputError
from isthmus.workloads.memory import Finish, Memory
from isthmus.workloads.model import Part
from isthmus.workloads.nodes import Node
from isthmus.workloads.requests import Request
from isthmus.workloads.waiting import Batching, Waiting

Item = TypeVar("Item")
Shaped = tuple[Part, str, int]
"""A part of a version of its model, and the requests at once that it is shaped for."""
Compute = Callable[[Part, str, Tensors], tuple[Tensors, float, float]]
"""Runs a part of a version of its model: its outputs, the CPU seconds of that, and those of loading it."""
Together = Callable[[Sequence[Tensors]], Sequence[Tensors]]
"""Runs a part that is loaded, for one request or for several at once."""
Load = Callable[[Part, str, int], tuple[Together, bool]]
"""Has a part ready for so many requests at once; whether it had to be loaded, or waited for, just now."""
Result = Future[tuple[Tensors, float, float]]


class CannotRun(InputError):
    """A part does not run on the tensors of a job, or is of a version that is not here."""


@dataclass(frozen=True, slots=True)
class Job:
    """A stage that has all its tensors. `cost_s` makes the node's time of the host's CPU seconds.

    `ended` is told the outputs, when that was, what took time meanwhile, and how often the host was late. Or else
    `refused` is called, when the node has no room, or `broke` told why there are no outputs.
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
    refused: Callable[[], None]
    broke: Callable[[CannotRun], None]


class Slots(Protocol):
    def submit(self, job: Job) -> None:
        """A job whose time has come, or comes at `ready_s`."""

    def close(self) -> None: ...


def _spans(job: Job, place: str, begun_s: float, loaded_s: float, end_s: float) -> tuple[Span, ...]:
    return (
        *took(Kind.WAIT, place, job.ready_s, begun_s, job.attempt, job.stage),
        *took(Kind.LOAD, place, begun_s, loaded_s, job.attempt, job.stage),
        *took(Kind.COMPUTE, place, loaded_s, end_s, job.attempt, job.stage),
    )


def _at_once(start_s: float, seconds: float) -> float:
    return start_s + seconds


class _Begun(NamedTuple, Generic[Item]):
    """Jobs that began together, the first one first, with what belongs to each."""

    jobs: list[tuple[Job, Item]]
    needs: Shaped
    begun_s: float
    loaded_s: float
    """When its part is there, as far as `memory` knows."""


class _Line(Generic[Item]):
    """The jobs at a node: how many it takes, which begin together, and what they need in its memory.

    Who is next waits for memory at the head of the line: nobody overtakes. `session` says which one runs so many jobs
    like this one.
    """

    def __init__(
        self, node: Node, finish: Finish, memory: Memory[Shaped] | None, session: Callable[[Job, int], Shaped]
    ) -> None:
        self._room = math.inf if node.room is None else node.room
        self._most = 1 if node.batch is None else node.batch.size
        self._finish, self._memory, self._session = finish, memory, session
        self._held = 0
        self._waiting: Waiting[tuple[Part, str], tuple[Job, Item]] = (
            Waiting(node.discipline) if node.batch is None else Batching(node.discipline, node.batch)
        )

    def takes(self, job: Job, item: Item) -> bool:
        """Whether there was room for a job, which then waits."""
        if self._held >= self._room:
            return False
        self._held += 1
        self._waiting.push((job, item), (job.part, job.version), job.request, job.ready_s)
        return True

    def begin(self, now_s: float) -> _Begun[Item] | None:
        """The jobs that begin next in a slot that is free; None if there is nothing to begin yet."""
        queue = self._waiting.next(now_s)
        if queue is None:
            return None
        needs = self._session(queue[0].item[0], min(len(queue), self._most))
        if self._memory is not None and not self._memory.admits(needs):
            return None
        entries = self._waiting.take(queue)
        begun_s = max(now_s, *(entry.ready_s for entry in entries))
        loaded_s = begun_s if self._memory is None else self._memory.use(needs, begun_s, self._finish)
        return _Begun([entry.item for entry in entries], needs, begun_s, loaded_s)

    def end(self, begun: _Begun[Item]) -> None:
        self._held -= len(begun.jobs)
        if self._memory is not None:
            self._memory.release(begun.needs)

    def due_s(self, now_s: float) -> float:
        """When there is something to begin, if nothing comes or ends before."""
        return math.inf if self._waiting.next(now_s) else self._waiting.due_s()


class EmulatedSlots:
    """Parts are computed as soon as their tensors are here, ahead of emulated time where the host can.

    All that is decided is decided on the `commit` thread, in order of emulated time. The host computes every job by
    itself, and has all parts loaded: what a batch costs (`factor` of a model and a size) and what `memory` holds, and
    how long it takes to load, is emulated.
    """

    def __init__(
        self,
        node: Node,
        clock: Clock,
        compute: Compute,
        factor: Callable[[str, int], float],
        memory: Memory[Shaped] | None,
        failed: Callable[[BaseException], None],
    ) -> None:
        self._node, self._clock, self._compute, self._factor = node, clock, compute, factor
        self._finish: Finish = _at_once if node.speed is None else node.speed.finish_s
        self._line = _Line[Result](node, self._finish, memory, lambda job, together: (job.part, "", 1))
        self._loads = memory is not None
        self._idle_since_s = [0.0] * node.slots  # of the slots that are free on the emulated hardware
        self._wake_s = math.inf
        self._pool = ThreadPoolExecutor(node.slots, thread_name_prefix="compute")
        self._commit = Timeline(clock, "commit", failed)

    def submit(self, job: Job) -> None:
        result = self._pool.submit(self._compute, job.part, job.version, job.tensors)
        self._commit.at(job.ready_s, partial(self._ready, job, result))

    def close(self) -> None:
        self._commit.close()
        self._pool.shutdown(cancel_futures=True)

    def _ready(self, job: Job, result: Result) -> None:
        """A job is due. Jobs become due in order."""
        if self._line.takes(job, result):
            self._begin_all(job.ready_s)
        else:
            result.cancel()
            job.refused()

    def _begin_all(self, now_s: float) -> None:
        while self._idle_since_s:
            idle_s = min(self._idle_since_s)
            now_s = max(now_s, idle_s)
            begun = self._line.begin(now_s)
            if begun is None:
                self._wake(self._line.due_s(now_s))
                return
            self._idle_since_s.remove(idle_s)
            _Computing(begun, self._commit, self._computed)

    def _wake(self, due_s: float) -> None:
        if due_s < self._wake_s:
            self._wake_s = due_s
            self._commit.at(due_s, partial(self._woken, due_s))

    def _woken(self, now_s: float) -> None:
        if now_s == self._wake_s:
            self._wake_s = math.inf
            self._begin_all(now_s)

    def _computed(self, begun: _Begun[Result]) -> None:
        """The host has the results of jobs that began at that time on the emulated hardware: when do they end there?"""
        done: list[tuple[Job, Tensors]] = []
        costs_s, loads_s = [], 0.0
        for job, result in begun.jobs:
            try:
                outputs, cpu_s, load_s = result.result()
            except CannotRun as error:
                job.broke(error)
                continue
            done.append((job, outputs))
            costs_s.append(job.cost_s(cpu_s))
            loads_s += load_s
        if not done:
            self._ended(begun, begun.begun_s)
            return
        loaded_s, seconds = begun.loaded_s, costs_s[0]
        if not self._loads:
            loaded_s = self._finish(begun.begun_s, loads_s * self._node.slowdown)
        if len(done) > 1:
            seconds *= self._factor(begun.needs[0].model, len(done))
        end_s = self._finish(loaded_s, seconds)
        now, overruns = self._clock.now_s, 0
        if now > end_s:
            end_s, overruns = now, 1
        self._commit.at(end_s, partial(self._ended, begun, end_s))
        for job, outputs in done:
            job.ended(outputs, end_s, _spans(job, self._node.name, begun.begun_s, loaded_s, end_s), overruns)

    def _ended(self, begun: _Begun[Result], end_s: float) -> None:
        self._line.end(begun)
        self._idle_since_s.append(end_s)
        self._begin_all(end_s)


class _Computing:
    """Jobs that have begun, and that the host may still be computing; the other slots do not wait for it."""

    def __init__(self, begun: _Begun[Result], commit: Timeline, done: Callable[[_Begun[Result]], None]) -> None:
        self._begun, self._commit, self._done = begun, commit, done
        self._missing = len(begun.jobs)
        for _, result in begun.jobs:
            result.add_done_callback(self._one)

    def _one(self, result: Result) -> None:
        if not result.cancelled():
            self._commit.at(self._begun.begun_s, self._counted)

    def _counted(self) -> None:
        self._missing -= 1
        if not self._missing:
            self._done(self._begun)


class HostSlots:
    """A thread per slot. What takes long takes long; a straggler is held back for as much longer as it is slower.

    A batch runs in the smallest session that holds it, of those of the node's `batch.sizes`. With `memory`, sessions
    that have to go are dropped (`keep` is told which stay) before one that is needed is loaded.
    """

    def __init__(
        self,
        node: Node,
        clock: Clock,
        load: Load,
        keep: Callable[[Iterable[Shaped]], None],
        memory: Memory[Shaped] | None,
        failed: Callable[[BaseException], None],
    ) -> None:
        self._node, self._clock, self._load, self._keep, self._failed = node, clock, load, keep, failed
        sizes = (1,) if node.batch is None else node.batch.sizes
        self._line = _Line[None](
            node,
            _at_once,
            memory,
            lambda job, together: (job.part, job.version, next(n for n in sizes if n >= together)),
        )
        self._memory = memory
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
            taken = self._line.takes(job, None)
            self._changed.notify_all()
        if not taken:
            job.refused()

    def close(self) -> None:
        self._due.close()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _next(self) -> _Begun[None] | None:
        with self._changed:
            while not self._closed:
                now_s = self._clock.now_s
                begun = self._line.begin(now_s)
                if begun is not None:
                    if self._memory is not None:
                        self._keep(self._memory.resident)
                    return begun
                due_s = self._line.due_s(now_s)
                self._changed.wait(None if math.isinf(due_s) else max(due_s - now_s, 0.0))
            return None

    def _serve(self) -> None:
        while (begun := self._next()) is not None:
            try:
                self._work(begun)
            except BaseException as error:
                self._failed(error)
            finally:
                with self._changed:
                    self._line.end(begun)
                    self._changed.notify_all()

    def _work(self, begun: _Begun[None]) -> None:
        try:
            run, waited = self._load(*begun.needs)
        except CannotRun as error:
            for job, _ in begun.jobs:
                job.broke(error)
            return
        loaded_s = self._clock.now_s if waited else begun.begun_s
        done = _outputs(run, [job for job, _ in begun.jobs])
        end_s = self._clock.now_s
        if self._node.speed is not None:
            loaded_s = self._node.speed.finish_s(begun.begun_s, loaded_s - begun.begun_s)
            end_s = self._node.speed.finish_s(begun.begun_s, end_s - begun.begun_s)
            self._clock.sleep_until(end_s)
            end_s = max(end_s, self._clock.now_s)
        for job, outputs in done:
            job.ended(outputs, end_s, _spans(job, self._node.name, begun.begun_s, loaded_s, end_s), 0)


def _outputs(run: Together, jobs: list[Job]) -> list[tuple[Job, Tensors]]:
    """The jobs that could be run, together where they can. One that cannot takes none of the others with it."""
    try:
        return list(zip(jobs, run([job.tensors for job in jobs]), strict=True))
    except CannotRun as error:
        if len(jobs) == 1:
            jobs[0].broke(error)
            return []
    return [pair for job in jobs for pair in _outputs(run, [job])]
