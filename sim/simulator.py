"""The simulator: a shell around the dispatcher in which time passes in SimPy.

It carries out the dispatcher's actions with the physics of nodes and links, and tells it what happened. It decides
nothing. One policy object per source; every random draw belongs to (seed, node, request), so that two policies meet
the same noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import simpy

from isthmus.policies.contract import Policy, View, is_oracle
from isthmus.policies.dispatch import Action, Answer, Close, Compiler, Dispatcher, Start, Timer
from isthmus.policies.plan import Compiled, Message, Plan
from isthmus.policies.records import Kind, Record, Span
from isthmus.sim.node import Job, SimNode
from isthmus.workloads.errors import unknown
from isthmus.workloads.faults import NodeFault
from isthmus.workloads.random import Uniforms
from isthmus.workloads.requests import Request
from isthmus.workloads.testbed import Testbed
from isthmus.workloads.transmitter import Transmitter

Watch = Callable[[Request, int, View, Plan], None]


class Durations(Protocol):
    """How long things take that are drawn or measured, not derived."""

    def decide_s(self, request: Request, attempt: int) -> float: ...

    def compute_s(self, request: Request, attempt: int, stage: int, compiled: Compiled) -> float: ...


class Drawn:
    """Durations from the testbed: service times drawn per (seed, node, source, request), calibrated decision times."""

    def __init__(self, testbed: Testbed, policy: str, *, charge_decisions: bool, seed: int) -> None:
        self._testbed, self._seed = testbed, seed
        self._decide_s = testbed.overheads.decide_s.get(policy, 0.0) if charge_decisions else 0.0
        self._noise: dict[tuple[str, str], Uniforms] = {}

    def decide_s(self, request: Request, attempt: int) -> float:
        return self._decide_s * self._testbed.nodes[request.source].slowdown

    def compute_s(self, request: Request, attempt: int, stage: int, compiled: Compiled) -> float:
        where = compiled.plan.stages[stage]
        key = where.node, request.source
        noise = self._noise.get(key)
        if noise is None:
            noise = self._noise[key] = Uniforms(self._seed, "service", *key)
        return self._testbed.service(where.node, request.model).draw_s(where.part, noise, request.number)


def simulate(
    testbed: Testbed,
    requests: Mapping[str, Sequence[Request]],
    policies: Mapping[str, Policy],
    sink: Callable[[Record], None],
    *,
    seed: int,
    name: str = "policy",
    faults: Sequence[NodeFault] = (),
    drain_s: float = 60.0,
    durations: Durations | None = None,
    watch: Watch | None = None,
) -> None:
    """Simulate the requests of every source, each under its own policy; `sink` gets each record as it is closed.

    The run ends when nothing is left to happen, and at the latest `drain_s` after the last arrival; what is open then
    is `unfinished`. `durations` replaces drawn service and decision times (a real run's own, for the structural error).
    Raises PolicyFailure when a policy raises or plans the impossible.
    """
    for fault in faults:
        if fault.node not in testbed.nodes:
            raise unknown("node", fault.node, testbed.nodes, where="faults")
    _Simulation(testbed, requests, policies, sink, seed, name, faults, drain_s, durations, watch).run()


class _Simulation:
    def __init__(
        self,
        testbed: Testbed,
        requests: Mapping[str, Sequence[Request]],
        policies: Mapping[str, Policy],
        sink: Callable[[Record], None],
        seed: int,
        name: str,
        faults: Sequence[NodeFault],
        drain_s: float,
        durations: Durations | None,
        watch: Watch | None,
    ) -> None:
        self.env = simpy.Environment()
        self.testbed, self.sink, self.requests = testbed, sink, requests
        self.nodes = {n: SimNode(self.env, node.slots) for n, node in testbed.nodes.items()}
        self.links = {i: Transmitter(link) for i, link in testbed.links.items()}
        compiler = Compiler(testbed)
        self.dispatchers = {
            source: Dispatcher(source, policy, testbed, compiler, name=name, watch=watch)
            for source, policy in policies.items()
        }
        self.durations: dict[str, Durations] = {
            source: durations or Drawn(testbed, name, charge_decisions=not is_oracle(policy), seed=seed)
            for source, policy in policies.items()
        }
        last = max((r[-1].arrival_s for r in requests.values() if r), default=0.0)
        self._end_s = last + drain_s
        self._left = sum(len(r) for r in requests.values())
        self._over = self.env.event()
        for source in requests:
            self._next_arrival(source, 0)
        for fault in faults:
            self._at(fault.down, partial(self._node_is, fault.node, up=False))
            if fault.up is not None:
                self._at(fault.up, partial(self._node_is, fault.node, up=True))

    def run(self) -> None:
        try:
            if self._left:
                self.env.run(until=self.env.any_of([self._over, self.env.timeout(self._end_s)]))
        except KeyboardInterrupt:
            self._close_all("interrupted")
            raise
        self._close_all("run ended")

    def _close_all(self, reason: str) -> None:
        for dispatcher in self.dispatchers.values():
            self.carry_out(dispatcher, dispatcher.end(reason=reason))

    def carry_out(self, dispatcher: Dispatcher, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Start():
                    _Execution(self, dispatcher, action).begin()
                case Timer(at_s, number, attempt):
                    self._at(at_s, partial(self._timer, dispatcher, number, attempt))
                case Close(record):
                    self.sink(record)
                    self._left -= 1
                    if self._left == 0 and not self._over.triggered:
                        self._over.succeed()

    def after(self, delay_s: float, call: Callable[[], None]) -> None:
        """Call later; a delay of nothing is now."""
        if delay_s > 0:
            self.env.timeout(delay_s).callbacks.append(lambda _: call())
        else:
            call()

    def _at(self, time_s: float, call: Callable[[], None]) -> None:
        self.env.timeout(max(time_s - self.env.now, 0.0)).callbacks.append(lambda _: call())

    def _next_arrival(self, source: str, index: int) -> None:
        if index < len(self.requests[source]):
            self._at(self.requests[source][index].arrival_s, partial(self._arrive, source, index))

    def _arrive(self, source: str, index: int) -> None:
        self._next_arrival(source, index + 1)
        dispatcher, request = self.dispatchers[source], self.requests[source][index]
        self.carry_out(dispatcher, dispatcher.arrive(request, self.env.now))

    def _timer(self, dispatcher: Dispatcher, number: int, attempt: int) -> None:
        self.carry_out(dispatcher, dispatcher.timer(number, attempt, self.env.now))

    def _node_is(self, node: str, *, up: bool) -> None:
        if up:
            self.nodes[node].come_up()
        else:
            self.nodes[node].go_down()
        for dispatcher in self.dispatchers.values():
            self.carry_out(dispatcher, dispatcher.node_is(node, up=up, now_s=self.env.now))


@dataclass(slots=True, eq=False)
class _Execution:
    """One attempt under way: what each stage still waits for, and the spans so far."""

    world: _Simulation
    dispatcher: Dispatcher
    action: Start
    missing: list[int]
    spans: list[Span]

    def __init__(self, world: _Simulation, dispatcher: Dispatcher, action: Start) -> None:
        self.world, self.dispatcher, self.action = world, dispatcher, action
        self.missing, self.spans = list(action.compiled.needs), []

    def begin(self) -> None:
        request = self.action.request
        durations = self.world.durations[request.source]
        decide_s = durations.decide_s(request, self.action.attempt) if self.action.decided else 0.0
        now = self.world.env.now
        self._took(Kind.DECIDE, request.source, now, now + decide_s, -1)
        self.world.after(decide_s, partial(self._send_all, -1))

    def _took(self, kind: Kind, place: str, start: float, end: float, stage: int, size: int | None = None) -> None:
        if end > start:
            self.spans.append(Span(kind, place, start, end, self.action.attempt, stage, size))

    def _send_all(self, stage: int) -> None:
        for message in self.action.compiled.sends[stage]:
            if message.links:
                self._encode(message)
            else:
                self._received(message)

    def _encode(self, message: Message) -> None:
        overheads, sender = self.world.testbed.overheads, message.path[0]
        coded = zip(message.codecs, message.raw_bytes, strict=True)
        cost = sum(overheads.encode_s(c, raw) for c, raw in coded) * self.world.testbed.nodes[sender].slowdown
        now = self.world.env.now
        self._took(Kind.ENCODE, sender, now, now + cost, message.source)
        self.world.after(cost, partial(self._hop, message, 0))

    def _hop(self, message: Message, hop: int) -> None:
        """The message is at node `hop` of its path; a node that is down neither sends, receives nor forwards."""
        world, here = self.world, message.path[hop]
        if not world.nodes[here].up:
            return
        if hop == len(message.links):
            self._decode(message)
            return
        link = message.links[hop]
        now = world.env.now
        start, left, arrived = world.links[link].send(now, message.wire_bytes)
        if here == self.dispatcher.source:
            number, attempt = self.action.request.number, self.action.attempt
            self.dispatcher.sent(number, attempt, message.source, message.target, link, left)
        place = f"{link[0]}>{link[1]}"
        self._took(Kind.WAIT, place, now, start, message.source)
        self._took(Kind.SEND, place, start, arrived, message.source, message.wire_bytes)
        world.after(arrived - now, partial(self._hop, message, hop + 1))

    def _decode(self, message: Message) -> None:
        overheads, receiver = self.world.testbed.overheads, message.path[-1]
        coded = zip(message.codecs, message.raw_bytes, strict=True)
        cost = sum(overheads.decode_s(c, raw) for c, raw in coded) * self.world.testbed.nodes[receiver].slowdown
        now = self.world.env.now
        self._took(Kind.DECODE, receiver, now, now + cost, message.source)
        self.world.after(cost, partial(self._received, message))

    def _received(self, message: Message) -> None:
        stage = message.target
        self.missing[stage] -= 1
        if self.missing[stage]:
            return
        if stage == -1:
            self.world.after(self.world.testbed.overheads.wake_s, self._answered)
            return
        request, compiled = self.action.request, self.action.compiled
        seconds = self.world.durations[request.source].compute_s(request, self.action.attempt, stage, compiled)
        ready_s = self.world.env.now
        self.world.nodes[compiled.plan.stages[stage].node].submit(Job(seconds, partial(self._computed, stage, ready_s)))

    def _computed(self, stage: int, ready_s: float, start_s: float) -> None:
        node, now = self.action.compiled.plan.stages[stage].node, self.world.env.now
        self._took(Kind.WAIT, node, ready_s, start_s, stage)
        self._took(Kind.COMPUTE, node, start_s, now, stage)
        if node == self.dispatcher.source:
            self.dispatcher.stage_done(self.action.request.number, self.action.attempt, stage, now)
        self._send_all(stage)

    def _answered(self) -> None:
        request, attempt = self.action.request, self.action.attempt
        answer = Answer(self.spans)
        self.world.carry_out(
            self.dispatcher, self.dispatcher.answer(request.number, attempt, answer, self.world.env.now)
        )
