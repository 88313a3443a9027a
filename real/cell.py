"""One node of a testbed during one cell: what it computes, and what it passes on. Emulated or physical.

Knows messages and time. Its node's sessions and peers it has from its server; how links are crossed is in
`crossing.py`, when parts begin and end in `slots.py`, requests and their dispatcher are in `source.py`. It knows no Ray
and no ONNX Runtime.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import numpy as np

from isthmus.policies.dispatch import Answer, Compiler, Start
from isthmus.policies.plan import Compiled, Message
from isthmus.policies.records import Kind, Span
from isthmus.real.backend import Array
from isthmus.real.crossing import Crossings
from isthmus.real.intake import check, check_span
from isthmus.real.letters import Cell, Collected, Letter, Tensors, Version, Work, refusal_from, took
from isthmus.real.pressure import Usage, usage
from isthmus.real.residents import Residents
from isthmus.real.slots import CannotRun, EmulatedSlots, HostSlots, Job, Shaped, Slots, Together
from isthmus.real.source import SourceCell
from isthmus.real.timeline import Clock, Timeline
from isthmus.real.together import run_together
from isthmus.workloads.affliction import afflicted
from isthmus.workloads.codecs import codec
from isthmus.workloads.errors import InputError, IsthmusError, RunFailure
from isthmus.workloads.memory import Memory
from isthmus.workloads.model import Part
from isthmus.workloads.nodes import Node
from isthmus.workloads.random import Uniforms
from isthmus.workloads.requests import Request
from isthmus.workloads.service import Synthetic
from isthmus.workloads.testbed import Testbed

TOLERANCE = 1e-5
"""Largest relative difference from the whole model's answer that counts as the same; more where a backend says so."""

_SAID = 300
"""Characters of a reason that go on: part of it may be what a stranger said."""


class Server(Protocol):
    """What a cell has from its node, which outlives it."""

    name: str
    node: Node
    testbed: Testbed
    residents: Residents

    @property
    def tolerance(self) -> float: ...

    def payload(self, request: Request, version: str) -> tuple[Tensors, Tensors]:
        """Inputs of a request, and that version's answer to them. CannotRun for a version that is not here."""

    def send(self, node: str, letter: Letter, arrays: Sequence[Array]) -> None: ...

    def note(self, node: str, what: str, letter: Letter, value: Any) -> None:
        """Tell another node's cell something about an attempt: call `what` there, with number, attempt and value."""


@dataclass(slots=True)
class _Gathering:
    """What has come of the messages that a stage, or the answer, waits for."""

    missing: set[int]
    """Of its plan's messages."""
    tensors: dict[str, Array] = field(default_factory=dict)
    spans: dict[tuple[object, ...], Span] = field(default_factory=dict)
    ready_s: float = 0.0
    tolerance: float = TOLERANCE
    overruns: int = 0


class NodeCell:
    """The state of one node during one cell."""

    def __init__(self, server: Server, cell: Cell) -> None:
        self.server, self.cell, self.name = server, cell, server.name
        self.testbed = server.testbed.at_seed(cell.seed)
        self.clock = Clock(cell.epoch)
        self.failure: BaseException | None = None
        self._world = afflicted(self.testbed, cell.faults)
        self._node = self._world.nodes[self.name]
        self._compile = Compiler(self.testbed)
        self._gathering: dict[tuple[str, int, int, str, int], _Gathering] = {}
        self._lock = threading.Lock()
        self._noise: dict[str, Uniforms] = {}
        self.refusals: deque[str] = deque()
        self._spoilt: dict[Version, str] = {}
        self._slots = self._make_slots()
        self._send = Timeline(self.clock, "send", self.failed)
        self._crossings = Crossings(
            self.name, self._world, cell, self.clock, self._pass_on, self._tell_sent, self._send
        )
        self._source: SourceCell | None = None
        self._before = usage()

    def failed(self, error: BaseException) -> None:
        """Remember the first thing that went wrong, for the driver to raise."""
        known = isinstance(error, IsthmusError)
        said = error if known else RunFailure(f"node {self.name!r} failed: {type(error).__name__}: {error}")
        self.failure = self.failure or said

    def close(self) -> Usage:
        used = usage() - self._before  # before threads end, and take their counters with them
        if self._source is not None:
            self._source.close()
        self._slots.close()
        self._send.close()
        return used

    def start(self, work: Work) -> None:
        """Requests arise here."""
        self._source = SourceCell(
            self.name, self.testbed, self.cell, self.clock, self._compile, work.policy, work.versions,
            self._pace, self._begin, self.failed,
        )  # fmt: skip
        for node in work.away:
            self._source.node_is(node, up=False)
        self._source.start(work.requests, work.end_s)

    def use(self, model: str, version: str) -> None:
        if self._source is not None:
            self._source.use(model, version)

    def node_is(self, node: str, up: bool) -> None:
        if self._source is not None:
            self._source.node_is(node, up=up)

    # Notes of other nodes, about requests that arose here

    def lost(self, number: int, attempt: int, reason: str) -> None:
        """An attempt will not be answered."""
        if self._source is not None:
            self._source.lost(number, attempt, reason)

    def refused(self, number: int, attempt: int, why: Sequence[Any]) -> None:
        """A node had no room for a stage of an attempt."""
        if self._source is not None:
            reason, spans = refusal_from(why)
            for span in spans:
                check_span(span, self.testbed)
            self._source.refused(number, attempt, reason, spans)

    def got(self, number: int, attempt: int, load: int) -> None:
        """The first node of a physical link has what the source sent: its last byte left about a round trip ago."""
        if self._source is not None:
            self._source.sent(number, attempt, load, self.clock.now_s)

    def collect(self) -> Collected:
        records, decisions, done = ([], [], True) if self._source is None else self._source.collect()
        refusals = [self.refusals.popleft() for _ in range(len(self.refusals))]
        versions: frozenset[Version] = frozenset() if self._source is None else self._source.versions()
        with self._lock:
            spoilt, self._spoilt = self._spoilt, {}
        return Collected(records, decisions, done, self.failure, refusals, spoilt, versions)

    def _pace(self, begun_s: float, cpu_s: float) -> float:
        """When work that began at that time is over on this node; it took so long on a processor of the host."""
        return self.clock.now_s if self._node.physical else begun_s + cpu_s * self._node.slowdown

    def _begin(self, action: Start, version: str, since_s: float, begin_s: float) -> None:
        """Carry out a plan that was decided on from one time to the other."""
        spans = took(Kind.DECIDE, self.name, since_s, begin_s, action.attempt)
        letter = Letter(
            self.cell.id, action.compiled.plan, action.request, action.attempt, version, -1, 0, begin_s, spans, 0,
            down=action.compiled.down,
        )  # fmt: skip
        payload, _ = self.server.payload(action.request, version)
        self._send_all(action.compiled, -1, letter, payload, begin_s)

    # Messages

    def _send_all(self, compiled: Compiled, stage: int, letter: Letter, tensors: Tensors, at_s: float) -> None:
        """What leaves a stage (-1: the request) at that time."""
        for message in compiled.sends[stage]:
            number = compiled.messages.index(message)
            sent = replace(letter, message=number, hop=0, at_s=at_s)
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
        entry_s = letter.at_s
        if letter.plan.codecs:
            entry_s = self._pace(letter.at_s, time.thread_time() - began)
        spans = took(Kind.ENCODE, self.name, letter.at_s, entry_s, letter.attempt, message.source)
        self._crossings.enter(message, replace(letter, at_s=entry_s, spans=letter.spans + spans), arrays)

    def _pass_on(self, node: str, letter: Letter, arrays: Sequence[Array]) -> None:
        self.server.send(node, letter, arrays)

    def _is_source(self, letter: Letter) -> bool:
        return self._source is not None and letter.request.source == self.name

    def _tell_sent(self, letter: Letter, load: int, left_s: float) -> None:
        if self._source is not None and self._is_source(letter):
            self._source.sent(letter.number, letter.attempt, load, left_s)

    def delivered(self, letter: Letter, arrays: Sequence[Array]) -> None:
        """A message is here. What is wrong with it is the sender's fault: its attempt is lost, and the node goes on."""
        try:
            compiled, message = check(letter, arrays, self.name, self.testbed, self._compile)
            if letter.request.source == self.name and not (self._source and self._source.asked(letter.request)):
                return  # of a time before this actor was started
            letter = self._crossings.came(message, letter)
            if letter.hop < len(message.links):
                self._crossings.enter(message, letter, arrays)
                self._acknowledge(letter, message)
                return
            began = time.thread_time()
            tensors: dict[str, Array] = {}
            rest = list(arrays)
            for name, c in zip(message.tensors, message.codecs, strict=True):
                parts = tuple(rest.pop(0) for _ in range(codec(c).arrays))
                tensors[name] = codec(c).decode(parts, np.dtype(compiled.model.tensors[name].dtype))
        except InputError as error:
            self._refuse(letter, f"refused a message: {error}")
            return
        ready_s = letter.at_s
        if letter.plan.codecs:
            ready_s = self._pace(letter.at_s, time.thread_time() - began)
        spans = took(Kind.DECODE, self.name, letter.at_s, ready_s, letter.attempt, message.source)
        self._arrived(compiled, message, replace(letter, at_s=ready_s, spans=letter.spans + spans), tensors)
        self._acknowledge(letter, message)

    def _acknowledge(self, letter: Letter, message: Message) -> None:
        """A source learns what has left its physical links; when the part has begun, so that it need not wait."""
        link = message.links[letter.hop - 1]
        if link[0] == letter.request.source and self.testbed.is_physical(link):
            self.server.note(link[0], "got", letter, message.load + letter.hop - 1)

    def _refuse(self, letter: Letter, why: str) -> None:
        """Nothing comes of a letter: its source has to know, and the driver."""
        said = f"{self.name} {why}"[:_SAID]
        self.refusals.append(said)
        with self._lock:
            self._spoilt[letter.request.model, letter.version] = said
        self.server.note(letter.request.source, "lost", letter, said)

    def _arrived(self, compiled: Compiled, message: Message, letter: Letter, tensors: Tensors) -> None:
        """Tensors for a stage here, ready at `letter.at_s`; when all that it waits for is known, it can run."""
        stage = message.target
        key = (letter.request.source, letter.number, letter.attempt, letter.version, stage)
        with self._lock:
            gathering = self._gathering.get(key)
            if gathering is None:
                awaited = {number for number, one in enumerate(compiled.messages) if one.target == stage}
                gathering = self._gathering[key] = _Gathering(awaited)
            if letter.message not in gathering.missing:
                self.refusals.append(f"message {letter.message} has come twice")
                return
            gathering.tensors.update(tensors)
            gathering.spans.update((_identity(span), span) for span in letter.spans)
            gathering.ready_s = max(gathering.ready_s, letter.at_s)
            gathering.overruns += letter.overruns
            gathering.tolerance = max(gathering.tolerance, letter.tolerance)
            gathering.missing.discard(letter.message)
            if gathering.missing:
                return
            del self._gathering[key]
        if stage == -1:
            self._answer(letter, gathering)
            return
        self._slots.submit(
            Job(
                compiled.plan.stages[stage].part,
                letter.version,
                gathering.tensors,
                letter.request,
                letter.attempt,
                stage,
                gathering.ready_s,
                partial(self._cost_s, compiled, stage, letter.request),
                partial(self._computed, compiled, stage, letter, gathering),
                partial(self._full, letter, gathering),
                lambda error: self._refuse(letter, str(error)),
            )
        )

    def _answer(self, letter: Letter, gathering: _Gathering) -> None:
        source, request = self._source, letter.request
        if source is None:
            return

        def compare() -> None:
            now_s = self.clock.now_s
            try:
                _, expected = self.server.payload(request, letter.version)
            except CannotRun as gone:  # of an attempt that was given up; its version has gone since
                self._refuse(letter, str(gone))
                return
            error, correct = _compare(gathering.tensors, expected, gathering.tolerance, lossy=bool(letter.plan.codecs))
            answer = Answer(tuple(gathering.spans.values()), correct, error, gathering.overruns, letter.version)
            source.answered(request, letter.attempt, answer, now_s)

        source.at(gathering.ready_s, compare)

    # Parts

    def _make_slots(self) -> Slots:
        node, budget = self._node, self._node.memory_bytes
        if node.physical:
            memory = None if budget is None else Memory(budget, self._takes)
            return HostSlots(node, self.clock, self._load, self.server.residents.keep, memory, self.failed)
        factor = partial(self.testbed.batch_factor, self.name)
        emulated = None if budget is None else Memory[Shaped](budget, lambda it: self.testbed.needs(self.name, it[0]))
        return EmulatedSlots(node, self.clock, self._compute, factor, emulated, self.failed)

    def _takes(self, shaped: Shaped) -> tuple[float, float]:
        """The memory that a session takes on the host; how long it takes to load is seen when it is."""
        part, _, size = shaped
        return self.testbed.models[part.model].memory_bytes(part, size), 0.0

    def _load(self, part: Part, version: str, size: int) -> tuple[Together, bool]:
        session, load_s = self.server.residents.session(part, version, size)
        model = self.testbed.models[part.model]

        def run(feeds: Sequence[Tensors]) -> Sequence[Tensors]:
            try:
                return run_together(session, model, feeds, size)
            except Exception as error:
                raise CannotRun(f"cannot run {part} on what has come: {error}") from None

        return run, load_s > 0

    def _compute(self, part: Part, version: str, tensors: Tensors) -> tuple[Tensors, float, float]:
        """Outputs, CPU seconds, CPU seconds of loading."""
        session, load_s = self.server.residents.session(part, version)
        try:
            outputs, cpu_s = session.timed(tensors)
        except Exception as error:  # such as an index out of range: a runtime has errors of its own
            raise CannotRun(f"cannot run {part} on what has come: {error}") from None
        return outputs, cpu_s, load_s

    def _cost_s(self, compiled: Compiled, stage: int, request: Request, cpu_s: float) -> float:
        """How long the emulated hardware takes: the host's CPU time, slowed down; or what a made-up node takes."""
        service = self.testbed.services.get((self.name, request.model))
        if not isinstance(service, Synthetic):
            return cpu_s * self._node.slowdown
        if request.source not in self._noise:
            self._noise[request.source] = Uniforms(self.cell.seed, "service", self.name, request.source)
        return service.draw_s(compiled.plan.stages[stage].part, self._noise[request.source], request.number)

    def _computed(
        self,
        compiled: Compiled,
        stage: int,
        letter: Letter,
        gathering: _Gathering,
        outputs: Tensors,
        end_s: float,
        spans: tuple[Span, ...],
        overruns: int,
    ) -> None:
        if self._source is not None and self._is_source(letter):
            self._source.stage_done(letter.request, letter.attempt, stage, end_s)
        passed = replace(
            letter,
            spans=(*gathering.spans.values(), *spans),
            overruns=gathering.overruns + overruns,
            tolerance=max(gathering.tolerance, self.server.tolerance),
        )
        self._send_all(compiled, stage, passed, outputs, end_s)

    def _full(self, letter: Letter, gathering: _Gathering) -> None:
        """There is no room for a stage: the request's source has to know, with what took time until then."""
        spans, reason = tuple(gathering.spans.values()), f"no room at {self.name}"
        if self._source is not None and self._is_source(letter):
            self._source.refused(letter.number, letter.attempt, reason, spans)
        else:
            self.server.note(letter.request.source, "refused", letter, [reason, spans])


def _identity(span: Span) -> tuple[object, ...]:
    """Branches of a plan that meet again bring the spans that they share twice."""
    return (span.kind, span.place, span.start_s, span.end_s, span.stage)


def _compare(answer: Tensors, expected: Mapping[str, Array], tolerance: float, *, lossy: bool) -> tuple[float, bool]:
    """Largest relative difference, and whether the answer counts as the same.

    With a lossy codec the numbers differ by design: then the largest entry of each output has to be the same.
    """
    right = {n: e.astype(np.float64) for n, e in expected.items()}  # whole numbers would wrap around
    error = max(float(np.max(np.abs(answer[n] - e)) / (np.max(np.abs(e)) or 1.0)) for n, e in right.items())
    if lossy:
        return error, all(np.argmax(answer[n]) == np.argmax(e) for n, e in expected.items())
    return error, error <= tolerance
