"""The life of a request, decided in one place for both worlds: admit, decide, start, retry, fall back, close, learn.

The dispatcher serves one source. It has no clock, no sleep and no handle on a shell: it is told what happened and
when, and returns what to do next. A shell carries the actions out and reports back:

    arrive ──> Start ──> (the shell runs the plan) ──> answer ──> Close
                 └─> Timer ──> timer ─┐
    node_is(down) ────────────────────┼─> attempt lost ──> Start again | Close
    lost ─────────────────────────────┘
    end ──> Close, for all that is still open

An attempt that is lost is followed by one in which the policy decides anew, that by the whole model on the source,
and that by the outcome `failed`. The first answer to a request counts, whichever attempt it is of; later ones do not.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath

from isthmus.policies.contract import Learner, Policy, Truth, View, is_oracle
from isthmus.policies.energy import energy_j
from isthmus.policies.estimators import Estimators
from isthmus.policies.plan import Compiled, Plan, compile_plan, whole_on
from isthmus.policies.records import Outcome, Record, Span
from isthmus.workloads.errors import InputError, RunFailure
from isthmus.workloads.requests import Request
from isthmus.workloads.testbed import LinkId, Testbed

RETRIES = 1
"""Attempts in which the policy decides anew after one was lost, before the source falls back to itself."""


@dataclass(frozen=True, slots=True)
class Start:
    """Carry out a plan for a request. `decided`: the policy was asked, and its time is charged."""

    request: Request
    attempt: int
    compiled: Compiled
    decided: bool


@dataclass(frozen=True, slots=True)
class Timer:
    """Call `timer` with this number and attempt at that time."""

    at_s: float
    number: int
    attempt: int


@dataclass(frozen=True, slots=True)
class Close:
    """The request is over: keep its record."""

    record: Record


Action = Start | Timer | Close


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back to the source for one attempt."""

    spans: Sequence[Span] = ()
    correct: bool | None = None
    answer_error: float | None = None
    overruns: int | None = None


class PolicyFailure(RunFailure):
    """A policy raised, or answered with an impossible plan."""


@dataclass(slots=True)
class _Open:
    request: Request
    attempt: int = 0
    compiled: Compiled | None = None
    spans: list[Span] = field(default_factory=list)


class Compiler:
    """Compiles each plan once. Shared by the dispatchers of one run."""

    def __init__(self, testbed: Testbed) -> None:
        self._testbed = testbed
        self._compiled: dict[tuple[Plan, str, str], Compiled] = {}

    def __call__(self, plan: Plan, model: str, source: str) -> Compiled:
        key = (plan, model, source)
        try:
            return self._compiled[key]
        except KeyError:
            pass
        except TypeError:  # unhashable: not a plan; compile_plan says so
            key = None  # type: ignore[assignment]
        compiled = compile_plan(plan, self._testbed.models[model], source, self._testbed)
        if key is not None:
            self._compiled[key] = compiled
        return compiled


class Dispatcher:
    """The controller of one source. `watch`, where given, sees each decision: request, attempt, view, plan."""

    def __init__(
        self,
        source: str,
        policy: Policy,
        testbed: Testbed,
        compiler: Compiler,
        *,
        name: str = "policy",
        watch: Callable[[Request, int, View, Plan], None] | None = None,
    ) -> None:
        self.source, self.policy, self.name = source, policy, name
        self._testbed, self._known, self._compile = testbed, testbed.nominal, compiler
        self._estimators = Estimators(testbed)
        self._truth = Truth({i: link.rate for i, link in testbed.links.items()}) if is_oracle(policy) else None
        self._learn = policy.learn if isinstance(policy, Learner) else None
        self._down: set[str] = set()
        self._open: dict[int, _Open] = {}
        self._watch = watch

    @property
    def open(self) -> int:
        """Requests that arrived and are not closed."""
        return len(self._open)

    def view(self, now_s: float) -> View:
        """What the controller knows now."""
        beliefs = self._estimators
        return View(now_s, self.source, self._known, beliefs.links(now_s), beliefs.nodes(now_s), self._truth)

    # What the shell tells

    def arrive(self, request: Request, now_s: float) -> list[Action]:
        """A request arrived."""
        opened = self._open[request.number] = _Open(request)
        if self.source in self._down:
            return [self._close(opened, Outcome.FAILED, f"source {self.source} down", now_s)]
        return self._start(opened, now_s)

    def stage_done(self, number: int, attempt: int, stage: int, now_s: float) -> None:
        """A stage on the source's own node is done."""
        self._estimators.stage_done(number, attempt, stage, now_s)

    def sent(self, number: int, attempt: int, source: int, target: int, link: LinkId, at_s: float) -> None:
        """The last byte of a message leaves the source's own node at `at_s`; may be told ahead."""
        self._estimators.sent(number, attempt, source, target, link, at_s)

    def answer(self, number: int, attempt: int, answer: Answer, now_s: float) -> list[Action]:
        """The answer to an attempt is back at the source."""
        self._estimators.end(number, attempt, answer.spans, now_s)
        opened = self._open.get(number)
        if opened is None:
            return []
        opened.spans.extend(answer.spans)
        deadline = opened.request.deadline_s
        outcome = Outcome.COMPLETED if deadline is None or now_s <= deadline else Outcome.LATE
        return [self._close(opened, outcome, None, now_s, answer)]

    def timer(self, number: int, attempt: int, now_s: float) -> list[Action]:
        """The time of an attempt is up."""
        return self.lost(number, attempt, "timeout", now_s)

    def lost(self, number: int, attempt: int, reason: str, now_s: float, spans: Sequence[Span] = ()) -> list[Action]:
        """An attempt will not be answered."""
        self._estimators.end(number, attempt, spans, now_s)
        opened = self._open.get(number)
        if opened is None or opened.attempt != attempt:
            return []
        opened.spans.extend(spans)
        assert opened.compiled is not None
        if opened.attempt > RETRIES + 1 or (opened.attempt > 1 and opened.compiled.nodes == {self.source}):
            return [self._close(opened, Outcome.FAILED, reason, now_s)]
        return self._start(opened, now_s)

    def node_is(self, node: str, *, up: bool, now_s: float) -> list[Action]:
        """A node is known to have gone, or to be back. What was under way there is lost; all of it, at the source."""
        self._estimators.node_is(node, up=up, now_s=now_s)
        if up:
            self._down.discard(node)
            return []
        self._down.add(node)
        if node == self.source:
            return self.end(Outcome.FAILED, f"source {node} down")
        hit = [o for o in self._open.values() if o.compiled is not None and node in o.compiled.nodes]
        return [a for o in hit for a in self.lost(o.request.number, o.attempt, f"node {node} down", now_s)]

    def end(self, outcome: Outcome = Outcome.UNFINISHED, reason: str = "run ended") -> list[Action]:
        """Nothing more will come of what is open: close it all."""
        return [self._close(opened, outcome, reason, None) for opened in list(self._open.values())]

    # What follows from it

    def _start(self, opened: _Open, now_s: float) -> list[Action]:
        opened.attempt += 1
        opened.compiled = compiled = self._plan(opened, now_s)
        request = opened.request
        self._estimators.start(request.number, opened.attempt, compiled)
        actions: list[Action] = [Start(request, opened.attempt, compiled, decided=opened.attempt <= RETRIES + 1)]
        if request.timeout_s is not None:
            actions.append(Timer(now_s + request.timeout_s, request.number, opened.attempt))
        return actions

    def _plan(self, opened: _Open, now_s: float) -> Compiled:
        request = opened.request
        fallback = whole_on(self._testbed.models[request.model], self.source)
        if opened.attempt > RETRIES + 1:
            return self._compile(fallback, request.model, self.source)
        view = self.view(now_s)
        try:
            plan = self.policy.decide(request, view)
        except InputError as error:
            raise InputError(error.problem, where=f"policy {self.name!r}", allowed=error.allowed) from error
        except Exception as error:
            raise self._raised(error, request) from error
        try:
            compiled = self._compile(plan, request.model, self.source)
        except InputError as error:
            raise PolicyFailure(
                f"policy {self.name!r} gave an impossible plan for request {request.number}: {error}"
            ) from error
        if self._watch is not None:
            self._watch(request, opened.attempt, view, plan)
        if compiled.nodes & self._down:
            return self._compile(fallback, request.model, self.source)
        return compiled

    def _close(
        self,
        opened: _Open,
        outcome: Outcome,
        reason: str | None,
        now_s: float | None,
        answer: Answer | None = None,
    ) -> Close:
        request, compiled = opened.request, opened.compiled
        answered = answer is not None
        record = Record(
            number=request.number,
            source=request.source,
            model=request.model,
            arrival_s=request.arrival_s,
            deadline_s=request.deadline_s,
            end_s=now_s if answered else None,
            outcome=outcome,
            reason=reason,
            plan=None if compiled is None else compiled.plan.to_json(),
            attempts=opened.attempt,
            energy_j=energy_j(opened.spans, self._testbed) if answered else None,
            correct=None if answer is None else answer.correct,
            answer_error=None if answer is None else answer.answer_error,
            overruns=None if answer is None else answer.overruns,
            spans=opened.spans,
        )
        del self._open[request.number]
        if self._learn is not None:
            try:
                self._learn(record)
            except Exception as error:
                raise self._raised(error, request) from error
        return Close(record)

    def _raised(self, error: Exception, request: Request) -> PolicyFailure:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{PurePath(last.filename).name}:{last.lineno}"
        return PolicyFailure(f"policy {self.name!r} raised on request {request.number}: {text} ({place})")
