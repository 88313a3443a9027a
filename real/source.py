"""A source during one cell: its arrivals, and the dispatcher that decides what becomes of them, on one thread.

Knows the dispatcher and time. Must not know how messages travel, Ray or ONNX Runtime: plans are begun for it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from isthmus.policies.contract import Policy, View, decision_row, is_oracle
from isthmus.policies.dispatch import Action, Answer, Compiler, Dispatcher, Start, Timer
from isthmus.policies.plan import Plan
from isthmus.policies.records import Record, Span
from isthmus.real.letters import Cell, Version
from isthmus.real.timeline import Clock, Timeline
from isthmus.workloads.faults import LinkFault
from isthmus.workloads.requests import Request
from isthmus.workloads.testbed import Testbed

Item = TypeVar("Item")


class SourceCell:
    """`begin` carries out a plan with a version of its model: since when it was decided on, and when that was done.

    `versions` are those to begin attempts with, by model, until it is told to `use` others.

    `pace` says when work that began at a time and took so many CPU seconds here is over on this node.
    """

    def __init__(
        self,
        name: str,
        testbed: Testbed,
        cell: Cell,
        clock: Clock,
        compiler: Compiler,
        policy: Policy,
        versions: Mapping[str, str],
        pace: Callable[[float, float], float],
        begin: Callable[[Start, str, float, float], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        self._dispatcher = Dispatcher(name, policy, testbed, compiler, name=cell.name, watch=self._decided)
        self._clock, self._pace, self._begin, self._cell = clock, pace, begin, cell
        self._decides_for_free = is_oracle(policy)
        self._timeline = Timeline(clock, "source", failed)
        self._records: deque[Record] = deque()
        self._decisions: deque[tuple[Request, int, View, Plan]] = deque()
        self._left = 0
        self._use = dict(versions)
        self._begun: dict[int, set[Version]] = {}  # of requests that are open
        self._versions = threading.Lock()
        self._asked: dict[int, Request] = {}

    def start(self, requests: Sequence[Request], end_s: float) -> None:
        """Let these arise; what is open at the end stays unfinished."""
        self._left = len(requests)
        self._asked = {request.number: request for request in requests}
        for request in requests:
            self._timeline.at(request.arrival_s, partial(self._arrive, request))
        self._timeline.at(end_s, partial(self._carry_out_since, self._dispatcher.end))
        cuts = [fault for fault in self._cell.faults if isinstance(fault, LinkFault)]
        for at_s in sorted({t for fault in cuts for t in (fault.down, fault.up) if t is not None}):
            down = [f.link for f in cuts if f.down <= at_s < f.end_s]
            both = frozenset(way for link in down for way in (link, link[::-1]))
            self._timeline.at(at_s, partial(self._dispatcher.links_are, both))

    def close(self) -> None:
        self._timeline.close()

    def collect(self) -> tuple[list[Record], list[dict[str, Any]], bool]:
        """What was closed and decided since the last call, and whether all is closed."""
        done = self._left == 0  # read first: what closed the last request is in the queue by then
        decisions = [decision_row(*decision) for decision in _drained(self._decisions)]
        return _drained(self._records), decisions, done

    def use(self, model: str, version: str) -> None:
        """Begin attempts with this version from now on."""
        with self._versions:
            self._use[model] = version

    def versions(self) -> frozenset[Version]:
        """With which the answers may still come."""
        with self._versions:
            return frozenset(version for begun in self._begun.values() for version in begun)

    def asked(self, request: Request) -> bool:
        """Whether this is one of its requests."""
        return self._asked.get(request.number) == request

    # What it is told; each is carried out on its own thread, in order of time

    def answered(self, request: Request, attempt: int, answer: Answer, at_s: float) -> None:
        """An answer came at that time. Called on its own thread, by what was put there with `at`."""
        self._carry_out_since(partial(self._dispatcher.answer, request.number, attempt, answer, at_s), at_s)

    def at(self, at_s: float, call: Callable[[], None]) -> None:
        """Something that has to be done before the dispatcher is told."""
        self._timeline.at(at_s, call)

    def sent(self, number: int, attempt: int, load: int, at_s: float) -> None:
        self._timeline.at(at_s, lambda: self._dispatcher.sent(number, attempt, load, at_s))

    def stage_done(self, request: Request, attempt: int, stage: int, at_s: float) -> None:
        self._timeline.at(at_s, lambda: self._dispatcher.stage_done(request.number, attempt, stage, at_s))

    def node_is(self, node: str, *, up: bool) -> None:
        self._say(self._clock.now_s, lambda now: self._dispatcher.node_is(node, up=up, now_s=now))

    def lost(self, number: int, attempt: int, reason: str, spans: Sequence[Span] = ()) -> None:
        self._say(self._clock.now_s, lambda now: self._dispatcher.lost(number, attempt, reason, now, spans))

    def refused(self, number: int, attempt: int, reason: str, spans: Sequence[Span] = ()) -> None:
        self._say(self._clock.now_s, lambda now: self._dispatcher.refused(number, attempt, reason, now, spans))

    # On its thread

    def _decided(self, request: Request, attempt: int, view: View, plan: Plan) -> None:
        self._decisions.append((request, attempt, view, plan))  # made into data later, off the clock

    def _arrive(self, request: Request) -> None:
        self._carry_out_since(partial(self._dispatcher.arrive, request, self._clock.now_s), request.arrival_s)

    def _say(self, at_s: float, tell: Callable[[float], Sequence[Action]]) -> None:
        def now() -> None:
            now_s = self._clock.now_s
            self._carry_out_since(partial(tell, now_s), now_s)

        self._timeline.at(at_s, now)

    def _carry_out_since(self, tell: Callable[[], Sequence[Action]], since_s: float | None = None) -> None:
        """Do what the dispatcher answers; the CPU time that it takes to say so goes into the plans that it starts."""
        since_s = self._clock.now_s if since_s is None else since_s
        began = time.thread_time()
        actions = tell()
        thought_s = time.thread_time() - began
        thought_s /= max(sum(isinstance(action, Start) for action in actions), 1)
        for action in actions:
            match action:
                case Start():
                    free = self._decides_for_free or not action.decided
                    begin_s = since_s if free else self._pace(since_s, thought_s)
                    self._begin(action, self._version(action.request), since_s, begin_s)
                case Timer(at_s, number, attempt):
                    self._say(at_s, partial(self._dispatcher.timer, number, attempt))
                case Record():
                    self._records.append(action)
                    with self._versions:
                        self._begun.pop(action.number, None)
                    self._left -= 1

    def _version(self, request: Request) -> str:
        """Of an attempt at a request that begins now."""
        with self._versions:
            version = self._use[request.model]
            self._begun.setdefault(request.number, set()).add((request.model, version))
            return version


def _drained(queue: deque[Item]) -> list[Item]:
    """Take all that is in a queue which another thread appends to."""
    return [queue.popleft() for _ in range(len(queue))]
