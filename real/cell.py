"""One node of an emulated testbed during one cell: when its parts begin and end, and what it passes on.

Knows the dispatcher, messages and emulated time. Its node's sessions and peers it has from its server; it knows
neither Ray nor ONNX Runtime.

Three threads, each with calls in order of emulated time, and a pool that computes:

    compute  runs parts as soon as their tensors are here, ahead of emulated time where it can
    commit   decides when each part began and ended on the emulated hardware
    send     works out when the link delivers a message, and passes it on at once
    source   arrivals, answers and timers of a node where requests arise, and its dispatcher

Times chain: a part begins at the later of its delivery and the end of the one before it, and lasts its CPU time times
the node's slowdown. So a host that is late now and then shifts nothing; when it is too late to keep an emulated time,
that is an overrun: it is counted, and the time it really took is used.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np

from isthmus.policies.contract import Policy, View, decision_row, is_oracle
from isthmus.policies.dispatch import Action, Answer, Compiler, Dispatcher, Start, Timer
from isthmus.policies.plan import Compiled, Message, Plan
from isthmus.policies.records import Kind, Record, Span
from isthmus.real.pressure import Usage, usage
from isthmus.real.session import Array, PartSession
from isthmus.real.timeline import Clock, Timeline
from isthmus.workloads.codecs import codec
from isthmus.workloads.errors import IsthmusError, RunFailure
from isthmus.workloads.model import Part
from isthmus.workloads.nodes import Node
from isthmus.workloads.random import Uniforms
from isthmus.workloads.requests import Request
from isthmus.workloads.service import Synthetic
from isthmus.workloads.testbed import Testbed
from isthmus.workloads.transmitter import Transmitter

TOLERANCE = 1e-5
"""Largest relative difference from the whole model's answer that counts as the same answer."""

Tensors = Mapping[str, Array]
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Letter:
    """A message under way: which one, of which attempt, how far it has come, and what happened to it so far."""

    cell: int
    plan: Plan
    model: str
    source: str
    number: int
    attempt: int
    message: int
    hop: int
    deliver_at_s: float
    spans: tuple[Span, ...]
    overruns: int


@dataclass(slots=True)
class _Gathering:
    """What has come of the messages that a stage, or the answer, waits for."""

    missing: int
    tensors: dict[str, Array] = field(default_factory=dict)
    spans: dict[tuple[object, ...], Span] = field(default_factory=dict)
    ready_s: float = 0.0
    overruns: int = 0


@dataclass(frozen=True)
class Cell:
    """One policy under one seed: what the actors need to know of it. `epoch` is its time 0 on the host's clock."""

    id: int
    epoch: float
    seed: int
    name: str


@dataclass
class Collected:
    """What a source hands over now and then."""

    records: list[Record]
    decisions: list[dict[str, Any]]
    """As `decision_row` makes them."""
    done: bool
    failure: BaseException | None


class Server(Protocol):
    """What a cell has from its node, which outlives it."""

    name: str
    node: Node
    testbed: Testbed

    def session(self, part: Part) -> tuple[PartSession, float]: ...

    def payload(self, request: Request) -> tuple[Tensors, Tensors]: ...

    def send(self, node: str, letter: Letter, arrays: Sequence[Array]) -> None: ...


@dataclass(frozen=True, slots=True)
class _Job:
    """A stage that has all its tensors: what the pool computes, and what is needed to send the result on."""

    compiled: Compiled
    stage: int
    letter: Letter
    gathered: _Gathering
    result: Future[tuple[Tensors, float, float]]


class NodeCell:
    """The state of one node during one cell."""

    def __init__(self, server: Server, cell: Cell) -> None:
        self.server, self.cell = server, cell
        self.name, self.testbed, self.slowdown = server.name, server.testbed.at_seed(cell.seed), server.node.slowdown
        self.clock = Clock(cell.epoch)
        self.failure: BaseException | None = None
        self._compile = Compiler(self.testbed)
        self._idle_since_s = [0.0] * server.node.slots  # of the slots that are free on the emulated hardware
        self._waiting: deque[_Job] = deque()
        self._transmitters = {i: Transmitter(link) for i, link in self.testbed.links.items() if i[0] == self.name}
        self._gathering: dict[tuple[str, int, int, int], _Gathering] = {}
        self._lock = threading.Lock()
        self._noise: dict[str, Uniforms] = {}
        self._pool = ThreadPoolExecutor(server.node.slots, thread_name_prefix="compute")
        self._commit = Timeline(self.clock, "commit", self.failed)
        self._send = Timeline(self.clock, "send", self.failed)
        self._source = Timeline(self.clock, "source", self.failed)
        self._dispatcher: Dispatcher | None = None
        self._charge_decisions = True
        self._records: deque[Record] = deque()
        self._decisions: deque[tuple[Request, int, View, Plan]] = deque()
        self._left = 0
        self._before = usage()

    def failed(self, error: BaseException) -> None:
        """Remember the first thing that went wrong, for the driver to raise."""
        known = isinstance(error, IsthmusError)
        said = error if known else RunFailure(f"node {self.name!r} failed: {type(error).__name__}: {error}")
        self.failure = self.failure or said

    def close(self) -> Usage:
        used = usage() - self._before  # before threads end, and take their counters with them
        for timeline in (self._source, self._commit, self._send):
            timeline.close()
        self._pool.shutdown(cancel_futures=True)
        return used

    # The source of requests and its dispatcher: all on the source thread

    def start(self, requests: Sequence[Request], policy: Policy, end_s: float) -> None:
        self._dispatcher = Dispatcher(
            self.name, policy, self.testbed, self._compile, name=self.cell.name, watch=self._decided
        )
        self._charge_decisions = not is_oracle(policy)
        self._left = len(requests)
        for request in requests:
            self._source.at(request.arrival_s, partial(self._arrive, request))
        self._source.at(end_s, self._end)

    def _decided(self, request: Request, attempt: int, view: View, plan: Plan) -> None:
        self._decisions.append((request, attempt, view, plan))  # made into data later, off the clock

    def _arrive(self, request: Request) -> None:
        assert self._dispatcher is not None
        began = time.thread_time()
        actions = self._dispatcher.arrive(request, self.clock.now_s)
        self._carry_out(actions, request.arrival_s, time.thread_time() - began)

    def _end(self) -> None:
        assert self._dispatcher is not None
        self._carry_out(self._dispatcher.end(), self.clock.now_s, 0.0)

    def node_is(self, node: str, up: bool) -> None:
        def tell() -> None:
            if self._dispatcher is not None:
                began, now = time.thread_time(), self.clock.now_s
                actions = self._dispatcher.node_is(node, up=up, now_s=now)
                self._carry_out(actions, now, time.thread_time() - began)

        self._source.at(self.clock.now_s, tell)

    def _carry_out(self, actions: Sequence[Action], since_s: float, thought_s: float) -> None:
        """`thought_s` of CPU time went into the actions together, since that time."""
        thought_s /= max(sum(isinstance(action, Start) for action in actions), 1)
        for action in actions:
            match action:
                case Start():
                    self._begin(action, since_s, thought_s)
                case Timer(at_s, number, attempt):
                    self._source.at(at_s, partial(self._timer, number, attempt))
                case Record():
                    self._records.append(action)
                    self._left -= 1

    def _begin(self, action: Start, since_s: float, thought_s: float) -> None:
        begin_s = since_s + (thought_s * self.slowdown if self._charge_decisions and action.decided else 0.0)
        request = action.request
        letter = Letter(
            cell=self.cell.id,
            plan=action.compiled.plan,
            model=request.model,
            source=self.name,
            number=request.number,
            attempt=action.attempt,
            message=-1,
            hop=0,
            deliver_at_s=begin_s,
            spans=_took(Kind.DECIDE, self.name, since_s, begin_s, action.attempt),
            overruns=0,
        )
        payload, _ = self.server.payload(request)
        self._send_all(action.compiled, -1, letter, payload, begin_s)

    def _timer(self, number: int, attempt: int) -> None:
        assert self._dispatcher is not None
        began, now = time.thread_time(), self.clock.now_s
        actions = self._dispatcher.timer(number, attempt, now)
        self._carry_out(actions, now, time.thread_time() - began)

    def _answered(self, letter: Letter, gathered: _Gathering) -> None:
        assert self._dispatcher is not None
        now = self.clock.now_s
        _, expected = self.server.payload(Request(letter.number, self.name, letter.model, 0.0))
        error, correct = _compare(gathered.tensors, expected, lossy=bool(letter.plan.codecs))
        answer = Answer(tuple(gathered.spans.values()), correct, error, gathered.overruns)
        began = time.thread_time()
        actions = self._dispatcher.answer(letter.number, letter.attempt, answer, now)
        self._carry_out(actions, now, time.thread_time() - began)

    def collect(self) -> Collected:
        done = self._left == 0  # read first: what closed the last request is in the queue by then
        decisions = [decision_row(*decision) for decision in _drained(self._decisions)]
        return Collected(_drained(self._records), decisions, done, self.failure)

    # Messages

    def _send_all(self, compiled: Compiled, stage: int, letter: Letter, tensors: Tensors, at_s: float) -> None:
        """What leaves a stage (-1: the request) at that time."""
        for message in compiled.sends[stage]:
            number = compiled.messages.index(message)
            sent = replace(letter, message=number, hop=0, deliver_at_s=at_s)
            given = {name: tensors[name] for name in message.tensors}
            if message.links:
                self._encode(message, sent, given)
            else:
                self._arrived(compiled, message, sent, given)

    def _encode(self, message: Message, letter: Letter, tensors: Tensors) -> None:
        began = time.thread_time()
        arrays = [
            a for name, c in zip(message.tensors, message.codecs, strict=True) for a in codec(c).encode(tensors[name])
        ]
        entry_s = letter.deliver_at_s
        if letter.plan.codecs:
            entry_s += (time.thread_time() - began) * self.slowdown
        spans = _took(Kind.ENCODE, self.name, letter.deliver_at_s, entry_s, letter.attempt, message.source)
        letter = replace(letter, deliver_at_s=entry_s, spans=letter.spans + spans)
        self._send.at(entry_s, partial(self._hop, message, letter, arrays))

    def _hop(self, message: Message, letter: Letter, arrays: Sequence[Array]) -> None:
        """Over the next link, entered at `letter.deliver_at_s`; on the send thread, so entries are in order."""
        link = message.links[letter.hop]
        entry_s = letter.deliver_at_s
        start, left, arrived = self._transmitters[link].send(entry_s, message.wire_bytes)
        place = f"{link[0]}>{link[1]}"
        spans = _took(Kind.WAIT, place, entry_s, start, letter.attempt, message.source)
        spans += _took(Kind.SEND, place, start, arrived, letter.attempt, message.source, message.wire_bytes)
        onward = replace(letter, hop=letter.hop + 1, deliver_at_s=arrived, spans=letter.spans + spans)
        self.server.send(link[1], onward, arrays)
        if self._dispatcher is not None and letter.source == self.name:
            self._source.at(left, partial(self._sent, letter, message.load + letter.hop, left))

    def _sent(self, letter: Letter, load: int, left_s: float) -> None:
        assert self._dispatcher is not None
        self._dispatcher.sent(letter.number, letter.attempt, load, left_s)

    def delivered(self, letter: Letter, arrays: Sequence[Array]) -> None:
        """A message is here, normally ahead of its time; if not, it is as late as it is, and that is an overrun."""
        now = self.clock.now_s
        if now > letter.deliver_at_s:
            letter = replace(letter, deliver_at_s=now, overruns=letter.overruns + 1)
        compiled = self._compile(letter.plan, letter.model, letter.source)
        message = compiled.messages[letter.message]
        if letter.hop < len(message.links):
            self._send.at(letter.deliver_at_s, partial(self._hop, message, letter, arrays))
            return
        began = time.thread_time()
        tensors: dict[str, Array] = {}
        rest = list(arrays)
        for name, c in zip(message.tensors, message.codecs, strict=True):
            parts = tuple(rest.pop(0) for _ in range(codec(c).arrays))
            tensors[name] = codec(c).decode(parts, np.dtype(compiled.model.tensors[name].dtype))
        ready_s = letter.deliver_at_s
        if letter.plan.codecs:
            ready_s += (time.thread_time() - began) * self.slowdown
        spans = _took(Kind.DECODE, self.name, letter.deliver_at_s, ready_s, letter.attempt, message.source)
        self._arrived(compiled, message, replace(letter, deliver_at_s=ready_s, spans=letter.spans + spans), tensors)

    def _arrived(self, compiled: Compiled, message: Message, letter: Letter, tensors: Tensors) -> None:
        """Tensors for a stage here, ready at `letter.deliver_at_s`; when all that it waits for is known, it can run."""
        stage = message.target
        key = (letter.source, letter.number, letter.attempt, stage)
        with self._lock:
            gathering = self._gathering.setdefault(key, _Gathering(compiled.needs[stage]))
            gathering.tensors.update(tensors)
            gathering.spans.update((_identity(span), span) for span in letter.spans)
            gathering.ready_s = max(gathering.ready_s, letter.deliver_at_s)
            gathering.overruns += letter.overruns
            gathering.missing -= 1
            if gathering.missing:
                return
            del self._gathering[key]
        if stage == -1:
            self._source.at(gathering.ready_s, partial(self._answered, letter, gathering))
            return
        result = self._pool.submit(self._compute, compiled.plan.stages[stage].part, gathering.tensors)
        self._commit.at(gathering.ready_s, partial(self._ready, _Job(compiled, stage, letter, gathering, result)))

    def _compute(self, part: Part, tensors: Tensors) -> tuple[Tensors, float, float]:
        """On the compute pool: outputs, CPU seconds, CPU seconds of loading."""
        session, load_s = self.server.session(part)
        outputs, cpu_s = session.timed(tensors)
        return outputs, cpu_s, load_s

    # Emulated slots, all on the commit thread

    def _ready(self, job: _Job) -> None:
        """A job is due. Jobs become due in order, so the queue is FIFO."""
        self._waiting.append(job)
        self._fill_slots()

    def _slot_free(self, since_s: float) -> None:
        self._idle_since_s.append(since_s)
        self._fill_slots()

    def _fill_slots(self) -> None:
        while self._waiting and self._idle_since_s:
            job = self._waiting.popleft()
            idle_s = min(self._idle_since_s)
            self._idle_since_s.remove(idle_s)
            start_s = max(job.gathered.ready_s, idle_s)
            # The host may still be computing; the other slots do not wait for it.
            job.result.add_done_callback(partial(self._result_is_there, job, start_s))

    def _result_is_there(self, job: _Job, start_s: float, result: Future[Any]) -> None:
        if not result.cancelled():
            self._commit.at(start_s, partial(self._computed, job, start_s))

    def _computed(self, job: _Job, start_s: float) -> None:
        """A job began at that time on the emulated hardware, and the host has its result: when does it end there?"""
        letter, stage = job.letter, job.stage
        outputs, cpu_s, load_s = job.result.result()
        loaded_s = start_s + load_s * self.slowdown
        end_s = loaded_s + self._service_s(job.compiled, stage, letter, cpu_s)
        now, overruns = self.clock.now_s, job.gathered.overruns
        if now > end_s:
            end_s, overruns = now, overruns + 1
        self._commit.at(end_s, partial(self._slot_free, end_s))
        spans = (
            *job.gathered.spans.values(),
            *_took(Kind.WAIT, self.name, job.gathered.ready_s, start_s, letter.attempt, stage),
            *_took(Kind.LOAD, self.name, start_s, loaded_s, letter.attempt, stage),
            *_took(Kind.COMPUTE, self.name, loaded_s, end_s, letter.attempt, stage),
        )
        if self._dispatcher is not None and letter.source == self.name:
            self._source.at(end_s, partial(self._stage_done, letter, stage, end_s))
        self._send_all(job.compiled, stage, replace(letter, spans=spans, overruns=overruns), outputs, end_s)

    def _stage_done(self, letter: Letter, stage: int, at_s: float) -> None:
        assert self._dispatcher is not None
        self._dispatcher.stage_done(letter.number, letter.attempt, stage, at_s)

    def _service_s(self, compiled: Compiled, stage: int, letter: Letter, cpu_s: float) -> float:
        """How long the emulated hardware takes: the host's CPU time, slowed down; or what a made-up node takes."""
        service = self.testbed.services.get((self.name, letter.model))
        if not isinstance(service, Synthetic):
            return cpu_s * self.slowdown
        if letter.source not in self._noise:
            self._noise[letter.source] = Uniforms(self.cell.seed, "service", self.name, letter.source)
        return service.draw_s(compiled.plan.stages[stage].part, self._noise[letter.source], letter.number)


def _drained(queue: deque[Item]) -> list[Item]:
    """Take all that is in a queue which another thread appends to."""
    return [queue.popleft() for _ in range(len(queue))]


def _took(
    kind: Kind, place: str, start_s: float, end_s: float, attempt: int, stage: int = -1, size: int | None = None
) -> tuple[Span, ...]:
    return (Span(kind, place, start_s, end_s, attempt, stage, size),) if end_s > start_s else ()


def _identity(span: Span) -> tuple[object, ...]:
    """Branches of a plan that meet again bring the spans that they share twice."""
    return (span.kind, span.place, span.start_s, span.end_s, span.stage)


def _compare(answer: Tensors, expected: Tensors, *, lossy: bool) -> tuple[float, bool]:
    """Largest relative difference, and whether the answer counts as the same.

    With a lossy codec the numbers differ by design: then the largest entry of each output has to be the same.
    """
    error = max(float(np.max(np.abs(answer[n] - e)) / (np.max(np.abs(e)) or 1.0)) for n, e in expected.items())
    if lossy:
        return error, all(np.argmax(answer[n]) == np.argmax(e) for n, e in expected.items())
    return error, error <= TOLERANCE
