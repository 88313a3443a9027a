"""The simulator: a shell around the dispatcher in which time passes in SimPy.

It carries out the dispatcher's actions with the physics of nodes and links, and tells it what happened. It decides
nothing. One policy object per source; every random draw belongs to (seed, node, request), so that two policies meet
the same noise.

What happens to a token, and which call does it (all are told the time, as `now`):

    _arrive ── dispatcher decides ── _begin ── _send ─┬─ encode ─ _enter (a link) ─ _arrived ─┬─ decode ─┐
                                       ^              └──────────── same node ────────────────┼──────────┤
                                       │                                 next link: _enter ───┘          │
                                    _computed ── the stage's node ── _received, when nothing is missing ─┤
                                                                     _answered, at the source ───────────┘
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Protocol

from isthmus.policies.contract import Policy, View, is_oracle
from isthmus.policies.dispatch import Action, Answer, Compiler, Dispatcher, Start, Timer
from isthmus.policies.plan import Compiled, Plan
from isthmus.policies.records import Kind, Record, Span
from isthmus.sim.clock import Armed, Clock, few_collections
from isthmus.sim.links import make_links
from isthmus.sim.node import FifoNode
from isthmus.sim.token import Token
from isthmus.sim.wiring import Leg, Wiring
from isthmus.workloads.errors import unknown
from isthmus.workloads.faults import NodeFault
from isthmus.workloads.requests import Request
from isthmus.workloads.testbed import Testbed

Watch = Callable[[Request, int, View, Plan], None]

COMPUTE, WAIT = Kind.COMPUTE, Kind.WAIT
NO_SPANS = Answer()
new = tuple.__new__  # makes a named tuple in half the time


class Durations(Protocol):
    """How long things took that are otherwise drawn from the testbed."""

    def decide_s(self, request: Request, attempt: int) -> float: ...

    def compute_s(self, request: Request, attempt: int, stage: int, compiled: Compiled) -> float: ...


def simulate(
    testbed: Testbed,
    requests: Mapping[str, Iterable[Request]],
    policies: Mapping[str, Policy],
    sink: Callable[[Record], None],
    *,
    seed: int,
    name: str = "policy",
    faults: Sequence[NodeFault] = (),
    drain_s: float = 60.0,
    durations: Durations | None = None,
    watch: Watch | None = None,
    spans: bool = True,
) -> None:
    """Simulate the requests of every source, each under its own policy; `sink` gets each record as it is closed.

    Requests are taken one by one, in order of their arrival, so they may be drawn meanwhile. The run ends when nothing
    is left to happen, and at the latest `drain_s` after the last arrival; what is open then is `unfinished`.
    `durations` replaces drawn service and decision times (a real run's own, for the structural error). Without `spans`
    records have none. Raises PolicyFailure when a policy raises or plans the impossible.
    """
    for fault in faults:
        if fault.node not in testbed.nodes:
            raise unknown("node", fault.node, testbed.nodes, where="faults")
    _Simulation(testbed, requests, policies, sink, seed, name, faults, drain_s, durations, watch, spans).run()


class Home(Armed):
    """A source: its dispatcher, and the requests that are still to arise there. Armed for the next one."""

    __slots__ = ("decide_s", "dispatcher", "estimates", "node", "request", "requests", "spans")

    request: Request

    def __init__(
        self, dispatcher: Dispatcher, node: FifoNode, requests: Iterator[Request], decide_s: float, spans: bool
    ) -> None:
        self.dispatcher, self.node, self.requests, self.decide_s = dispatcher, node, requests, decide_s
        self.estimates, self.spans = dispatcher.estimates, spans or dispatcher.wants_spans


class _Simulation:
    def __init__(
        self,
        testbed: Testbed,
        requests: Mapping[str, Iterable[Request]],
        policies: Mapping[str, Policy],
        sink: Callable[[Record], None],
        seed: int,
        name: str,
        faults: Sequence[NodeFault],
        drain_s: float,
        durations: Durations | None,
        watch: Watch | None,
        spans: bool,
    ) -> None:
        self.clock = Clock()
        self.testbed, self.sink, self.drain_s, self.durations, self.spans = testbed, sink, drain_s, durations, spans
        self._arrived_at, self._received_at = (self._arrived,), (self._received_later,)
        self._answered_at, self._arrives_at = (self._answered,), (self._arrive,)
        self.nodes = {n: FifoNode(self.clock, n, it.slots, (self._computed,)) for n, it in testbed.nodes.items()}
        links = make_links(testbed, self.clock, seed, self._arrived_at, self._left)
        self._wire = Wiring(testbed, self.nodes, links, seed)
        self._wake_s = testbed.overheads.wake_s
        compiler = Compiler(testbed)
        self._over = self.clock.event()
        self._open = self._sources = 0
        self.homes: dict[str, Home] = {}
        for source, policy in policies.items():
            dispatcher = Dispatcher(source, policy, testbed, compiler, name=name, watch=watch)
            decide_s = 0.0 if is_oracle(policy) else testbed.overheads.decide_s.get(name, 0.0)
            decide_s *= testbed.nodes[source].slowdown
            home = Home(dispatcher, self.nodes[source], iter(requests.get(source, ())), decide_s, spans)
            self.homes[source] = home
            self._sources += 1
            self._await_next(home, 0.0)
        for fault in faults:
            self.clock.call(fault.down, partial(self._node_is, fault.node, up=False))
            if fault.up is not None:
                self.clock.call(fault.up, partial(self._node_is, fault.node, up=True))

    def run(self) -> None:
        try:
            if self._sources or self._open:
                with few_collections():
                    self.clock.run(until=self._over)
        except KeyboardInterrupt:
            self._close_all("interrupted")
            raise
        self._close_all("run ended")

    def _close_all(self, reason: str) -> None:
        for home in self.homes.values():
            for record in home.dispatcher.end(reason=reason):
                assert isinstance(record, Record)
                self._keep(record)

    # Requests come and go

    def _await_next(self, home: Home, now: float) -> None:
        request = next(home.requests, None)
        if request is not None:
            home.request = request
            self.clock.arm(home, request.arrival_s, self._arrives_at)
            return
        self._sources -= 1
        if not self._sources:
            self.clock.call(now + self.drain_s, self._stop)

    def _arrive(self, home: Home) -> None:
        now, request = home.at_s, home.request
        self._open += 1
        actions = home.dispatcher.arrive(request, now)
        self._await_next(home, now)
        self._carry_out(home, actions, now)

    def _carry_out(self, home: Home, actions: Sequence[Action], now: float) -> None:
        for action in actions:
            if type(action) is Start:
                self._begin(home, action, now)
            elif type(action) is Record:
                self._keep(action)
            else:
                assert type(action) is Timer
                self.clock.call(action.at_s, partial(self._timer, home, action))

    def _keep(self, record: Record) -> None:
        self.sink(record)
        self._open -= 1
        if not self._open and not self._sources:
            self._stop()

    def _stop(self) -> None:
        if not self._over.triggered:
            self._over.succeed()

    def _timer(self, home: Home, timer: Timer) -> None:
        self._carry_out(home, home.dispatcher.timer(timer.number, timer.attempt, timer.at_s), timer.at_s)

    def _node_is(self, node: str, *, up: bool) -> None:
        now = float(self.clock.now)
        if up:
            self.nodes[node].come_up()
        else:
            self.nodes[node].go_down()
        for home in self.homes.values():
            self._carry_out(home, home.dispatcher.node_is(node, up=up, now_s=now), now)

    # One attempt

    def _begin(self, home: Home, start: Start, now: float) -> None:
        wired = self._wire(start.compiled)
        missing = None if wired.needs is None else list(wired.needs)
        token = Token(start, home, wired, [] if home.spans else None, missing)
        if start.decided:
            seconds = home.decide_s
            if self.durations is not None:
                seconds = self.durations.decide_s(start.request, start.attempt)
            if seconds > 0:
                self._took(token, Kind.DECIDE, home.node, now, now + seconds, -1)
                self.clock.arm(token, now + seconds, (self._decided,))
                return
        self._send(token, wired.first, now)

    def _decided(self, token: Token) -> None:
        self._send(token, token.wired.first, token.at_s)

    def _send(self, token: Token, legs: tuple[Leg, ...], now: float) -> None:
        """What leaves a stage, or the source. The token goes with the last message, forks of it with the others."""
        if len(legs) > 1:
            for leg in legs[:-1]:
                self._send(token.fork(), (leg,), now)
        leg = token.leg = legs[-1]
        token.hop = 0
        if not leg.links:
            self._received(token, now)
        elif leg.encode_s > 0:
            self._took(token, Kind.ENCODE, leg.nodes[0], now, now + leg.encode_s, leg.source)
            self.clock.arm(token, now + leg.encode_s, (self._enter_later,))
        else:
            self._enter(token, now)

    def _enter_later(self, token: Token) -> None:
        self._enter(token, token.at_s)

    def _enter(self, token: Token, now: float) -> None:
        """The next link. A node that is down neither sends nor forwards."""
        leg, hop = token.leg, token.hop
        if leg.nodes[hop].up:
            left_s = leg.links[hop].carry(token, now)
            if token.home.estimates and left_s is not None:
                self._left(token, left_s)

    def _left(self, token: Token, at_s: float) -> None:
        """The last byte leaves a link: at once, or at a time that was known when the message entered."""
        leg, hop, start = token.leg, token.hop, token.start
        if leg.tells[hop] and token.home.estimates:
            token.home.dispatcher.sent(start.request.number, start.attempt, leg.load + hop, at_s)

    def _arrived(self, token: Token) -> None:
        """At the far end of a link. A node that is down does not receive."""
        leg = token.leg
        hop = token.hop = token.hop + 1
        now = token.at_s
        if hop < len(leg.links):
            self._enter(token, now)
        elif leg.nodes[hop].up:
            if leg.decode_s > 0:
                self._took(token, Kind.DECODE, leg.nodes[hop], now, now + leg.decode_s, leg.source)
                self.clock.arm(token, now + leg.decode_s, self._received_at)
            else:
                self._received(token, now)

    def _received_later(self, token: Token) -> None:
        self._received(token, token.at_s)

    def _received(self, token: Token, now: float) -> None:
        """A message is there; when its stage has all that it waits for, it goes to its node."""
        stage, missing = token.leg.target, token.missing
        if missing is not None:
            missing[stage] -= 1
            if missing[stage]:
                return
        if stage == -1:
            if self._wake_s > 0:
                self.clock.arm(token, now + self._wake_s, self._answered_at)
            else:
                token.at_s = now
                self._answered(token)
            return
        step, start = token.wired.steps[stage], token.start
        if self.durations is not None:
            seconds = self.durations.compute_s(start.request, start.attempt, stage, start.compiled)
        elif step.constant_s is not None:
            seconds = step.constant_s
        else:
            seconds = step.service.draw_s(step.part, step.noise, start.request.number)
        step.node.submit(token, seconds, now)

    def _computed(self, token: Token) -> None:
        stage, now = token.leg.target, token.at_s
        step = token.wired.steps[stage]
        if token.life != step.node.life:
            return  # the node went meanwhile
        spans = token.spans
        if spans is not None:
            attempt, begun_s = token.start.attempt, token.begun_s
            if begun_s > token.ready_s:
                spans.append(new(Span, (WAIT, step.node.name, token.ready_s, begun_s, attempt, stage, None)))
            if now > begun_s:
                spans.append(new(Span, (COMPUTE, step.node.name, begun_s, now, attempt, stage, None)))
        if step.own and token.home.estimates:
            token.home.dispatcher.stage_done(token.start.request.number, token.start.attempt, stage, now)
        self._send(token, step.sends, now)

    def _answered(self, token: Token) -> None:
        home, start, now = token.home, token.start, token.at_s
        answer = NO_SPANS if token.spans is None else new(Answer, (token.spans, None, None, None))
        self._carry_out(home, home.dispatcher.answer(start.request.number, start.attempt, answer, now), now)

    def _took(self, token: Token, kind: Kind, node: FifoNode, start_s: float, end_s: float, stage: int) -> None:
        if token.spans is not None:
            token.spans.append(Span(kind, node.name, start_s, end_s, token.start.attempt, stage))
