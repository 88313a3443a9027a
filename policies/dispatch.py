"""The life of a request, decided in one place for both worlds: admit, decide, start, retry, fall back, close, learn.

The dispatcher serves one source. It has no clock, no sleep and no handle on a shell: it is told what happened and
when, and returns what to do next. A shell carries the actions out and reports back:

    arrive ──> Start ──> (the shell runs the plan) ──> answer ──> Record
                 └─> Timer ──> timer ─┐
    node_is(down) ────────────────────┼─> attempt lost ──> Start again | Record
    lost ─────────────────────────────┘
    refused ──> Record
    end ──> Record, for all that is still open

An attempt that is lost is followed by one in which the policy decides anew, that by the whole model on the source,
and that, or a source that cannot hold the whole model, by the outcome `failed`. The first answer to a request counts,
whichever attempt it is of; later ones do not. A node that has no room refuses a request, and that is its end:
`dropped`; trying again would only add to the load.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import PurePath
from typing import NamedTuple

from isthmus.policies.bill import energy_j, money_usd
from isthmus.policies.contract import Policy, Truth, View, is_blind, is_oracle
from isthmus.policies.estimators import Estimators
from isthmus.policies.plan import Checked, Compiled, Plan, check_plan, lay_out, whole_on
from isthmus.policies.records import Outcome, Record, Span
from isthmus.workloads.errors import InputError, RunFailure
from isthmus.workloads.requests import Request
from isthmus.workloads.routing import NONE_DOWN, LinkId
from isthmus.workloads.testbed import Testbed

COMPLETED, LATE = Outcome.COMPLETED, Outcome.LATE
NO_NODES: frozenset[str] = frozenset()
new = tuple.__new__  # makes a named tuple in half the time

RETRIES = 1
"""Attempts in which the policy decides anew after one was lost, before the source falls back to itself."""


class Start(NamedTuple):
    """Carry out a plan for a request. `decided`: the policy was asked, and its time is charged."""

    request: Request
    attempt: int
    compiled: Compiled
    decided: bool


class Timer(NamedTuple):
    """Call `timer` with this number and attempt at that time."""

    at_s: float
    number: int
    attempt: int


Action = Start | Timer | Record
"""What a shell is to do; a Record is to be kept: its request is over."""


class Answer(NamedTuple):
    """What came back to the source for one attempt."""

    spans: Sequence[Span] = ()
    correct: bool | None = None
    answer_error: float | None = None
    overruns: int | None = None
    version: str | None = None


class PolicyFailure(RunFailure):
    """A policy raised, or answered with an impossible plan."""


class Compiler:
    """Compiles each plan once. Shared by the dispatchers of one run."""

    def __init__(self, testbed: Testbed) -> None:
        self._testbed = testbed
        beliefs = Estimators(testbed)
        self.unseen = beliefs.links(0.0), beliefs.nodes(0.0)
        """What is believed of links and nodes of which nothing was seen: for policies that do not look."""
        self._checked: dict[tuple[Plan, str], Checked] = {}
        self._compiled: dict[tuple[Plan, str, str, frozenset[LinkId]], Compiled] = {}
        # Nodes that move are each told of links of their own: room for some hundreds of them, at a few cells each.
        self.known = lru_cache(maxsize=1024)(testbed.nominal.without)
        """The nominal testbed while some links are down: one for all sources that are told the same."""

    def __call__(self, plan: Plan, model: str, source: str, down: frozenset[LinkId] = NONE_DOWN) -> Compiled:
        """The plan laid out over routes that avoid the links that are `down`."""
        key = (plan, model, source, down)
        try:
            return self._compiled[key]
        except KeyError:
            pass
        except TypeError:  # unhashable: not a plan, or not one to keep
            return lay_out(self._check(plan, model), source, self._testbed.without(down))
        checked = self._checked.get((plan, model))
        if checked is None:
            checked = self._checked[plan, model] = self._check(plan, model)
        testbed = self._testbed.without(down) if down else self._testbed
        compiled = self._compiled[key] = lay_out(checked, source, testbed)
        return compiled

    def _check(self, plan: Plan, model: str) -> Checked:
        return check_plan(plan, self._testbed.models[model], self._testbed)


class Dispatcher:
    """The controller of one source. `watch`, where given, sees each decision: request, attempt, view, plan."""

    # With very many sources a request finds its dispatcher out of the processor's caches, and pays for every object of
    # its own that it touches. Therefore slots, and nothing in them that is empty: None, or what all have in common.
    __slots__ = ("_bills", "_compile", "_compiled", "_down", "_estimators", "_known", "_learn", "_lost", "_model",
                 "_open", "_plan", "_testbed", "_truth", "_watch", "name", "policy", "source")  # fmt: skip

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
        self._truth = Truth(testbed.rates) if is_oracle(policy) else None
        self._estimators = None if is_blind(policy) else Estimators(testbed)
        # The last decision: a plan for a model, and what it was compiled to.
        self._plan: Plan | None = None
        self._model = ""
        self._compiled: Compiled | None = None
        self._bills = testbed.has_power or testbed.has_prices
        self._learn: Callable[[Record], None] | None = getattr(policy, "learn", None)
        self._down = NO_NODES
        self._open: dict[int, Start] | None = None
        self._lost: dict[int, list[Span]] | None = None
        self._watch = watch

    @property
    def open(self) -> int:
        """Requests that arrived and are not closed."""
        return len(self._open or ())

    @property
    def estimates(self) -> bool:
        """Whether it wants to be told what is done and what is sent."""
        return self._estimators is not None

    @property
    def wants_spans(self) -> bool:
        """Whether anything here is made from the spans of an answer."""
        return self.estimates or self._bills or self._learn is not None

    def view(self, now_s: float) -> View:
        """What the controller knows now."""
        if self._estimators is None:
            links, nodes = self._compile.unseen
            return new(View, (now_s, self.source, self._known, links, nodes, self._truth))
        links, nodes = self._estimators.links(now_s), self._estimators.nodes(now_s)
        return View(now_s, self.source, self._known, links, nodes, self._truth)

    # What the shell tells

    def battery_is(self, joules: float) -> None:
        """What is left in the battery of the source; told before what a decision may follow from."""
        if self._estimators is not None:
            self._estimators.battery_is(self.source, joules)

    def arrive(self, request: Request, now_s: float) -> Sequence[Action]:
        """A request arrived."""
        if self._down and self.source in self._down:
            return (self._close(request, 0, None, Outcome.FAILED, f"source {self.source} down"),)
        return self._start(request, 1, now_s)

    def stage_done(self, number: int, attempt: int, stage: int, now_s: float) -> None:
        """A stage on the source's own node is done."""
        if self._estimators is not None:
            self._estimators.stage_done(number, attempt, stage, now_s)

    def sent(self, number: int, attempt: int, load: int, at_s: float) -> None:
        """The last byte of a load of the plan leaves the source's own node at `at_s`; may be told ahead."""
        if self._estimators is not None:
            self._estimators.sent(number, attempt, load, at_s)

    def answer(self, number: int, attempt: int, answer: Answer, now_s: float) -> Sequence[Action]:
        """The answer to an attempt is back at the source."""
        if self._estimators is not None:
            self._estimators.end(number, attempt, answer.spans, now_s)
        start = self._open and self._open.get(number)
        if not start:
            return ()
        deadline = start.request.deadline_s
        outcome = COMPLETED if deadline is None or now_s <= deadline else LATE
        return (self._close(*start[:3], outcome, None, now_s, answer),)

    def timer(self, number: int, attempt: int, now_s: float) -> Sequence[Action]:
        """The time of an attempt is up."""
        return self.lost(number, attempt, "timeout", now_s)

    def lost(
        self, number: int, attempt: int, reason: str, now_s: float, spans: Sequence[Span] = ()
    ) -> Sequence[Action]:
        """An attempt will not be answered."""
        start = self._given_up(number, attempt, now_s, spans)
        if start is None:
            return ()
        if attempt > RETRIES + 1 or (attempt > 1 and start.compiled.nodes == {self.source}):
            return (self._close(*start[:3], Outcome.FAILED, reason),)
        return self._start(start.request, attempt + 1, now_s)

    def refused(
        self, number: int, attempt: int, reason: str, now_s: float, spans: Sequence[Span] = ()
    ) -> Sequence[Action]:
        """A node had no room for a stage of an attempt."""
        start = self._given_up(number, attempt, now_s, spans)
        return () if start is None else (self._close(*start[:3], Outcome.DROPPED, reason),)

    def node_is(self, node: str, *, up: bool, now_s: float) -> Sequence[Action]:
        """A node is known to have gone, or to be back. What was under way there is lost; all of it, at the source."""
        if self._estimators is not None:
            self._estimators.node_is(node, up=up, now_s=now_s)
        if up:
            self._down -= {node}
            return ()
        self._down |= {node}
        if node == self.source:
            return self.end(Outcome.FAILED, f"source {node} down")
        hit = [start for start in (self._open or {}).values() if node in start.compiled.nodes]
        return [a for s in hit for a in self.lost(s.request.number, s.attempt, f"node {node} down", now_s)]

    def links_are(self, down: frozenset[LinkId]) -> None:
        """Exactly these links are known to be down. What is under way stands still or is sent again; it is not lost."""
        self._known, self._plan = self._compile.known(down), None
        if self._estimators is not None:
            self._estimators.links_are(down)

    def end(self, outcome: Outcome = Outcome.UNFINISHED, reason: str = "run ended") -> Sequence[Action]:
        """Nothing more will come of what is open: close it all."""
        return [self._close(*start[:3], outcome, reason) for start in list((self._open or {}).values())]

    # What follows from it

    def _given_up(self, number: int, attempt: int, now_s: float, spans: Sequence[Span]) -> Start | None:
        """Nothing more is expected of an attempt; the request's, if it is still open and this was its last attempt."""
        if self._estimators is not None:
            self._estimators.end(number, attempt, spans, now_s)
        start = self._open and self._open.get(number)
        if not start or start.attempt != attempt:
            return None
        if spans:
            if self._lost is None:
                self._lost = {}
            self._lost.setdefault(number, []).extend(spans)
        return start

    def _start(self, request: Request, attempt: int, now_s: float) -> Sequence[Action]:
        decided = attempt <= RETRIES + 1
        compiled = self._decide(request, attempt, now_s) if decided else self._fallback(request)
        if compiled is None:
            return (self._close(request, attempt, None, Outcome.FAILED, f"{self.source} cannot hold {request.model}"),)
        start: Start = new(Start, (request, attempt, compiled, decided))
        if self._open is None:
            self._open = {request.number: start}
        else:
            self._open[request.number] = start
        if self._estimators is not None:
            self._estimators.start(request.number, attempt, compiled)
        if request.timeout_s is None:
            return (start,)
        return start, Timer(now_s + request.timeout_s, request.number, attempt)

    def _fallback(self, request: Request) -> Compiled | None:
        """The whole model on the source; None where its memory is too small for that."""
        model = self._testbed.models[request.model]
        if not self._testbed.nodes[self.source].holds(model, model.whole()):
            return None
        return self._compile(whole_on(model, self.source), request.model, self.source)

    def _decide(self, request: Request, attempt: int, now_s: float) -> Compiled | None:
        view = self.view(now_s)
        try:
            plan = self.policy.decide(request, view)
        except InputError as error:
            raise InputError(error.problem, where=f"policy {self.name!r}", allowed=error.allowed) from error
        except Exception as error:
            raise self._raised(error, request) from error
        compiled = self._compiled
        if compiled is None or plan is not self._plan or request.model != self._model:
            try:
                compiled = self._compile(plan, request.model, self.source, self._known.down)
            except InputError as error:
                raise PolicyFailure(
                    f"policy {self.name!r} gave an impossible plan for request {request.number}: {error}"
                ) from error
            self._plan, self._model, self._compiled = plan, request.model, compiled
        if self._watch is not None:
            self._watch(request, attempt, view, plan)
        if self._down and compiled.nodes & self._down:
            return self._fallback(request)
        return compiled

    def _close(
        self,
        request: Request,
        attempt: int,
        compiled: Compiled | None,
        outcome: Outcome,
        reason: str | None,
        now_s: float | None = None,
        answer: Answer | None = None,
    ) -> Record:
        """`now_s` and `answer` are of an answered request."""
        number = request.number
        spans: Sequence[Span] = () if answer is None else answer.spans
        if self._lost and number in self._lost:
            spans = [*self._lost.pop(number), *spans]
        energy = money = correct = error = overruns = version = None
        if answer is not None:
            _, correct, error, overruns, version = answer
            if self._bills:
                energy, money = energy_j(spans, self._testbed), money_usd(spans, self._testbed)
        plan = None if compiled is None else compiled.text
        record: Record = new(
            Record,
            (number, self.source, request.model, request.arrival_s, request.deadline_s, now_s, outcome, reason, plan,
             attempt, energy, money, correct, error, overruns, version, spans),
        )  # fmt: skip
        if self._open is not None:
            self._open.pop(number, None)
            if not self._open:
                self._open = None
        if self._learn is not None:
            try:
                self._learn(record)
            except Exception as error:
                raise self._raised(error, request) from error
        return record

    def _raised(self, error: Exception, request: Request) -> PolicyFailure:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{PurePath(last.filename).name}:{last.lineno}"
        return PolicyFailure(f"policy {self.name!r} raised on request {request.number}: {text} ({place})")
