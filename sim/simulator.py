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

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import NamedTuple, Protocol

from isthmus.policies.contract import Policy, View, is_oracle
from isthmus.policies.dispatch import Action, Answer, Compiler, Dispatcher, Start, Timer
from isthmus.policies.plan import Compiled, Plan
from isthmus.policies.records import Kind, Record, Span
from isthmus.sim.arrivals import Arrivals
from isthmus.sim.cell_link import CellLink
from isthmus.sim.clock import Clock, few_collections
from isthmus.sim.link import Carrier, LinkTotals
from isthmus.sim.links import link_maker
from isthmus.sim.node import NodeTotals, Place
from isthmus.sim.nodes import make_node
from isthmus.sim.token import Token
from isthmus.sim.wiring import Leg, Wired, Wiring
from isthmus.workloads.affliction import Losses, afflicted, check_place
from isthmus.workloads.errors import InputError
from isthmus.workloads.faults import Fault, LinkFault, LostMessages, NodeFault, merged
from isthmus.workloads.requests import ClosedLoop, Request
from isthmus.workloads.routing import NONE_DOWN, LinkId
from isthmus.workloads.testbed import Testbed

Watch = Callable[[Request, int, View, Plan], None]

COMPUTE, LOAD, WAIT = Kind.COMPUTE, Kind.LOAD, Kind.WAIT
NO_SPANS = Answer()
new = tuple.__new__  # makes a named tuple in half the time


class Durations(Protocol):
    """How long things took that are otherwise drawn from the testbed."""

    def decide_s(self, request: Request, attempt: int) -> float: ...

    def compute_s(self, request: Request, attempt: int, stage: int, compiled: Compiled) -> float: ...


class Totals(NamedTuple):
    """What every node and every link did in a run."""

    nodes: list[NodeTotals]
    links: list[LinkTotals]


def simulate(
    testbed: Testbed,
    requests: Mapping[str, Iterable[Request] | ClosedLoop],
    policies: Mapping[str, Policy],
    sink: Callable[[Record], None],
    *,
    seed: int,
    name: str = "policy",
    faults: Sequence[Fault] = (),
    drain_s: float = 60.0,
    durations: Durations | None = None,
    watch: Watch | None = None,
    spans: bool = True,
) -> Totals:
    """Simulate the requests of every source, each under its own policy; `sink` gets each record as it is closed.

    Requests are taken one by one, in order of their arrival, so they may be drawn meanwhile. A closed loop is told when
    a request has ended, and asked for the next. The run ends when nothing is left to happen, and at the latest
    `drain_s` after the last arrival; what is open then is `unfinished`. Returned is what every node and link did.
    `durations` replaces drawn service and decision times (a real run's own, for the structural error). Without `spans`
    records have none. Raises PolicyFailure when a policy raises or plans the impossible.
    """
    for fault in faults:
        check_place(fault, testbed)
    run = _Simulation(testbed, requests, policies, sink, seed, name, merged(faults), drain_s, durations, watch, spans)
    run.run()
    return run.totals()


class Home:
    """A source: its dispatcher, and its closed loop if it has one."""

    __slots__ = ("asks", "battery", "decide_s", "dispatcher", "estimates", "loop", "node", "spans", "wired")

    wired: Wired | None
    """The plan that it used last."""
    asks: bool
    """Of a closed loop: whether there may still be a request."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        node: Place,
        loop: ClosedLoop | None,
        decide_s: float,
        spans: bool,
    ) -> None:
        self.dispatcher, self.node, self.loop, self.decide_s, self.wired = dispatcher, node, loop, decide_s, None
        self.battery = node.battery
        self.asks = loop is not None
        self.estimates, self.spans = dispatcher.estimates, spans or dispatcher.wants_spans


class _Simulation:
    def __init__(
        self,
        testbed: Testbed,
        requests: Mapping[str, Iterable[Request] | ClosedLoop],
        policies: Mapping[str, Policy],
        sink: Callable[[Record], None],
        seed: int,
        name: str,
        faults: Sequence[Fault],
        drain_s: float,
        durations: Durations | None,
        watch: Watch | None,
        spans: bool,
    ) -> None:
        self.clock = Clock()
        self.testbed, self.sink, self.drain_s, self.durations, self.spans = testbed, sink, drain_s, durations, spans
        self._arrived_at, self._received_at = (self._arrived,), (self._decoded,)
        self._answered_at = (self._answered,)
        world, computed = afflicted(testbed, faults), (self._computed,)
        self.nodes = {
            n: make_node(self.clock, testbed, it, computed, self._refused, partial(self._node_is, n, up=False))
            for n, it in world.nodes.items()
        }
        moving = {name for name, node in testbed.nodes.items() if node.mobility is not None}
        batteries = {n: node.battery for n, node in self.nodes.items() if node.battery is not None}
        make = link_maker(world, self.clock, seed, self._left, batteries)
        self.links: dict[LinkId, Carrier] = {
            i: CellLink(partial(make, link), self._arrived_at)
            if moving and not moving.isdisjoint(i)
            else make(link, self._arrived_at)
            for i, link in world.links.items()
        }
        for (a, b), carrier in self.links.items():
            carrier.ends = self.nodes[a], self.nodes[b]
        self._mortal = any(isinstance(f, NodeFault) for f in faults) or bool(batteries)
        self._cut = NONE_DOWN  # links that a fault holds up
        self._away = dict.fromkeys(moving, NONE_DOWN)  # links to cells that do not serve a node
        self._stranded: list[tuple[Token, float]] = []  # messages for which there is no way now, and since when
        self._following = 0  # nodes whose next change of links is in the clock's heap
        self._quiet_s: float | None = None  # since when nodes move and nothing else happens
        self._losses = Losses(faults, seed) if any(isinstance(f, LostMessages) for f in faults) else None
        self._wire = Wiring(testbed, self.nodes, self.links, seed)
        self._wake_s = testbed.overheads.wake_s
        compiler = Compiler(testbed)
        self._open = 0
        open_loops: list[tuple[Home, Iterator[Request]]] = []
        self.homes: dict[str, Home] = {}
        if lacking := sorted(requests.keys() - policies.keys()):
            raise InputError(f"no policy is given for the requests of {lacking[0]!r}")
        for source, policy in policies.items():
            dispatcher = Dispatcher(source, policy, testbed, compiler, name=name, watch=watch)
            decide_s = 0.0 if is_oracle(policy) else testbed.overheads.decide_s.get(name, 0.0)
            if (slowdown := testbed.nodes[source].slowdown) != 1:  # else one number for all
                decide_s *= slowdown
            asked = requests.get(source, ())
            loop = asked if isinstance(asked, ClosedLoop) else None
            home = self.homes[source] = Home(dispatcher, self.nodes[source], loop, decide_s, spans)
            if not isinstance(asked, ClosedLoop):
                open_loops.append((home, iter(asked)))
        loops = [home for home in self.homes.values() if home.loop is not None]
        self._sources = 1 + len(loops)
        # What goes wrong at some time has gone wrong before what arrives at that time.
        for fault in faults:
            if isinstance(fault, NodeFault):
                self.clock.call(fault.down, partial(self._node_is, fault.node, up=False))
                if fault.up is not None:
                    self.clock.call(fault.up, partial(self._node_is, fault.node, up=True))
            elif isinstance(fault, LinkFault):
                both = frozenset((fault.link, fault.link[::-1]))
                self.clock.call(fault.down, partial(self._link_is, both, up=False))
                if fault.up is not None:
                    self.clock.call(fault.up, partial(self._link_is, both, up=True))
        for node in sorted(moving):
            self._follow(node, testbed.handovers(node, seed))
        self._arrivals = Arrivals(self.clock, open_loops, self._arrive, self._exhausted)
        self._arrivals.begin()
        for home in loops:
            self._begin_loop(home)

    def run(self) -> None:
        try:
            with few_collections():
                self.clock.run()  # until it is stopped, or nothing is left to happen
        except KeyboardInterrupt:
            self._close_all("interrupted")
            raise
        self._close_all("run ended")

    def totals(self) -> Totals:
        now = float(self.clock.now)
        links = {i: link.totals(now) for i, link in self.links.items()}
        radio_j, sent = dict.fromkeys(self.nodes, 0.0), dict.fromkeys(self.nodes, 0)
        for (a, b), link in links.items():
            radio_j[a] += self.testbed.nodes[a].power.tx * link.air_s
            radio_j[b] += self.testbed.nodes[b].power.rx * link.air_s
            sent[a] += link.bytes
        nodes = [node.totals(now, radio_j=radio_j[n], sent_bytes=sent[n]) for n, node in self.nodes.items()]
        return Totals(nodes, list(links.values()))

    def _close_all(self, reason: str) -> None:
        for home in self.homes.values():
            for record in home.dispatcher.end(reason=reason):
                assert isinstance(record, Record)
                self.sink(record)

    # Requests come and go

    def _exhausted(self, now: float) -> None:
        """Of all open sources together, or of a closed loop, nothing more will come."""
        self._sources -= 1
        if not self._sources:
            self.clock.call(now + self.drain_s, self.clock.stop)

    def _arrive(self, home: Home, request: Request, now: float) -> None:
        self._open += 1
        if home.battery is not None:
            self._look_at_battery(home, now)
        self._carry_out(home, home.dispatcher.arrive(request, now), now)

    def _begin_loop(self, home: Home) -> None:
        loop = home.loop
        assert loop is not None
        if loop.until_s < math.inf:
            self.clock.call(loop.until_s, partial(self._loop_ends, home))
        for request in loop.first():
            self._ask(home, loop, request)

    def _loop_ends(self, home: Home) -> None:
        """The time of a closed loop is up, or its last request has come."""
        if home.asks:
            home.asks = False
            self._exhausted(float(self.clock.now))

    def _ask(self, home: Home, loop: ClosedLoop, request: Request) -> None:
        """A user of a closed loop will ask."""
        self._open += 1  # from now on: who is thinking is not done
        self.clock.call(request.arrival_s, partial(self._asked, home, loop, request))

    def _asked(self, home: Home, loop: ClosedLoop, request: Request) -> None:
        now = request.arrival_s
        self._look_at_battery(home, now)
        actions = home.dispatcher.arrive(request, now)
        if loop.is_last(request):
            self._loop_ends(home)
        self._carry_out(home, actions, now)

    def _ask_again(self, home: Home, loop: ClosedLoop, now: float) -> None:
        request = loop.after(now)
        if request is not None:
            self._ask(home, loop, request)

    def _carry_out(self, home: Home, actions: Sequence[Action], now: float) -> None:
        for action in actions:
            if type(action) is Start:
                self._begin(home, action, now)
            elif type(action) is Record:
                if home.loop is not None:
                    self._ask_again(home, home.loop, now)
                self._keep(action)
            else:
                assert type(action) is Timer
                self.clock.call(action.at_s, partial(self._timer, home, action))

    def _keep(self, record: Record) -> None:
        self.sink(record)
        self._open -= 1
        if not self._open and not self._sources:
            self.clock.stop()

    def _look_at_battery(self, home: Home, now: float) -> None:
        """Before its dispatcher decides: what is left at the source."""
        if home.battery is not None:
            home.dispatcher.battery_is(home.battery.left_j(now))

    def _timer(self, home: Home, timer: Timer) -> None:
        self._look_at_battery(home, timer.at_s)
        self._carry_out(home, home.dispatcher.timer(timer.number, timer.attempt, timer.at_s), timer.at_s)

    def _node_is(self, node: str, *, up: bool) -> None:
        now, place = float(self.clock.now), self.nodes[node]
        if not up:
            place.go_down(now)
        elif place.battery is not None and place.battery.is_empty:
            return
        else:
            place.come_up(now)
        for home in self.homes.values():
            self._look_at_battery(home, now)
            self._carry_out(home, home.dispatcher.node_is(node, up=up, now_s=now), now)

    # Links come and go

    def _link_is(self, links: frozenset[LinkId], *, up: bool) -> None:
        self._cut = self._cut - links if up else self._cut | links
        for home in self.homes.values():
            self._tell_links(home)

    def _tell_links(self, home: Home) -> None:
        away = self._away.get(home.dispatcher.source)
        home.dispatcher.links_are(self._cut | away if away else self._cut)

    def _follow(self, node: str, changes: Iterator[tuple[float, frozenset[LinkId]]]) -> None:
        """A node moves on: wait for its next change of links."""
        change = next(changes, None)
        if change is not None:
            at_s, down = change
            self._following += 1
            self.clock.call(at_s, partial(self._moved, node, down, at_s, changes))

    def _moved(
        self,
        node: str,
        down: frozenset[LinkId],
        now: float,
        changes: Iterator[tuple[float, frozenset[LinkId]]],
    ) -> None:
        self._following -= 1
        before, self._away[node] = self._away[node], down
        if before != down:
            again: list[tuple[Token, float]] = []
            for link in sorted(before ^ down):
                it = self.links[link]
                assert isinstance(it, CellLink)
                if link in down:
                    again.extend((token, now) for token in it.cut(now))
                else:
                    it.up = True
            if node in self.homes:
                self._tell_links(self.homes[node])
            stranded, self._stranded = self._stranded, []
            for token, since_s in (*stranded, *again):
                self._reroute(token, since_s, now)
        if self.clock.pending > self._following:
            self._quiet_s = None
        elif self._quiet_s is None:
            self._quiet_s = now
        if self._quiet_s is None or (self._stranded and now - self._quiet_s <= self.drain_s):
            self._follow(node, changes)
        # else nodes move, and nothing else will ever happen

    def _reroute(self, token: Token, since_s: float, now: float) -> None:
        """A message goes on from where it is by the way that there is now; where there is none, it waits.

        Around faults if it can, else over what is cut, to stand still there: only cells that do not serve are no way.
        """
        leg, hop = token.leg, token.hop
        sender, receiver = token.way[hop].ends[0], token.way[leg.end - 1].ends[1]
        if token.life != sender.life:
            return  # the node went meanwhile
        here, there = sender.name, receiver.name
        away = self._away.get(here, NONE_DOWN) | self._away.get(there, NONE_DOWN)
        for down in (self._cut | away, away):
            path = self.testbed.routes.find(here, there, down)
            links = tuple(pairwise(path))
            if away.isdisjoint(links):
                break
        else:
            self._stranded.append((token, since_s))
            return
        # The source knows the loads of its plan; of those of another way it only knows that the message left.
        first, nth = leg.load, leg.nth[hop - leg.load]
        tells = (leg.tells[0] and hop == first, *(False for _ in links[1:]))
        token.leg = replace(leg, end=first + len(links), tells=tells, nth=(nth,) * len(links))
        token.way, token.hop = token.way[:first] + tuple(self.links[link] for link in links), first
        if now > since_s and token.spans is not None:
            span = Span(WAIT, token.way[first].place, since_s, now, token.start.attempt, leg.source)
            token.spans.append(span)
        self._enter(token, now)

    # One attempt

    def _begin(self, home: Home, start: Start, now: float) -> None:
        wired = home.wired
        if wired is None or wired.compiled is not start.compiled:
            wired = home.wired = self._wire(start.compiled)
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
        if token.life == token.home.node.life:
            self._send(token, token.wired.first, token.at_s)

    def _send(self, token: Token, legs: tuple[Leg, ...], now: float) -> None:
        """What leaves a stage, or the source. The token goes with the last message, forks of it with the others."""
        if len(legs) > 1:
            for leg in legs[:-1]:
                self._send(token.fork(), (leg,), now)
        leg = token.leg = legs[-1]
        way, hop = token.wired.links, leg.load
        token.way, token.hop = way, hop
        if hop == leg.end:
            self._received(token, now)
        elif leg.encode_s > 0:
            self._took(token, Kind.ENCODE, way[hop].ends[0], now, now + leg.encode_s, leg.source)
            self.clock.arm(token, now + leg.encode_s, (self._encoded,))
        else:
            self._enter(token, now)

    def _encoded(self, token: Token) -> None:
        if token.life == token.way[token.hop].ends[0].life:
            self._enter(token, token.at_s)

    def _enter(self, token: Token, now: float) -> None:
        """The next link. A node that is up knows where others have moved to."""
        link = token.way[token.hop]
        if self._away and any(isinstance(it, CellLink) and not it.up for it in token.way[token.hop : token.leg.end]):
            token.life = link.ends[0].life
            self._reroute(token, now, now)
            return
        left_s = link.carry(token, now)
        if self._mortal:
            sender, receiver = link.ends
            token.ends = sender.life, receiver.life
            token.left_s = math.inf if left_s is None else left_s
        if self._losses is not None:
            start = token.start
            if self._losses.takes(link.place, start.request, start.attempt, token.leg.load, now):
                link.lose(token)
        if left_s is not None and token.home.estimates:
            self._tell_sent(token, left_s)

    def _left(self, token: Token, at_s: float) -> None:
        """The last byte leaves a link that did not know when it would."""
        token.left_s = at_s
        if token.home.estimates:
            self._tell_sent(token, at_s)

    def _tell_sent(self, token: Token, at_s: float) -> None:
        leg, hop, start = token.leg, token.hop, token.start
        if leg.tells[hop - leg.load]:
            token.home.dispatcher.sent(start.request.number, start.attempt, hop, at_s)

    def _arrived(self, token: Token) -> None:
        """At the far end of a link. A node that is down neither receives nor forwards."""
        leg = token.leg
        hop = token.hop = token.hop + 1
        now = token.at_s
        if self._mortal and self._broke_off(token):
            home, start = token.home, token.start
            said = home.dispatcher.lost(start.request.number, start.attempt, "a node on its way went down", now)
            self._carry_out(home, said, now)
        elif hop < leg.end:
            self._enter(token, now)
        elif leg.decode_s > 0:
            self._took(token, Kind.DECODE, token.way[hop - 1].ends[1], now, now + leg.decode_s, leg.source)
            self.clock.arm(token, now + leg.decode_s, self._received_at)
        else:
            self._received(token, now)

    def _broke_off(self, token: Token) -> bool:
        """Whether the receiver went while a message was on its link, or the sender before it had left."""
        sender, receiver = token.way[token.hop - 1].ends
        sent, received = token.ends
        return receiver.life != received or (sender.life != sent and sender.went_s < token.left_s)

    def _decoded(self, token: Token) -> None:
        if token.life == token.way[token.hop - 1].ends[1].life:
            self._received(token, token.at_s)

    def _received(self, token: Token, now: float) -> None:
        """A message is there; when its stage has all that it waits for, it goes to its node."""
        stage, missing = token.leg.target, token.missing
        if missing is not None:
            missing[stage] -= 1
            if stage >= 0:
                life = token.wired.steps[stage].node.life
                if token.met.setdefault(stage, life) != life:
                    return  # the node went, with what it had of it
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
            seconds = step.service.draw_s(step.part, token.wired.noise[stage], start.request.number)
        step.node.submit(token, seconds, now)

    def _computed(self, token: Token) -> None:
        stage, now = token.leg.target, token.at_s
        step = token.wired.steps[stage]
        node = step.node
        if token.life != node.life:
            return  # the node went meanwhile
        spans, begun_s, ready_s = token.spans, token.begun_s, token.ready_s
        node.served += 1
        node.waited_s += begun_s - ready_s
        if spans is not None:
            attempt = token.start.attempt
            if begun_s > ready_s:
                spans.append(new(Span, (WAIT, node.name, ready_s, begun_s, attempt, stage, None)))
            if node.memory is not None and token.loaded_s > begun_s:
                spans.append(new(Span, (LOAD, node.name, begun_s, token.loaded_s, attempt, stage, None)))
                begun_s = token.loaded_s
            if now > begun_s:
                spans.append(new(Span, (COMPUTE, node.name, begun_s, now, attempt, stage, None)))
        if step.own and token.home.estimates:
            token.home.dispatcher.stage_done(token.start.request.number, token.start.attempt, stage, now)
        self._send(token, step.sends, now)

    def _refused(self, token: Token, reason: str, now_s: float) -> None:
        """A node had no room for a token."""
        home, start = token.home, token.start
        # Of branches that go on, what has ended: the rest will be on no record.
        spans = [span for span in token.spans or () if span.end_s <= now_s]
        said = home.dispatcher.refused(start.request.number, start.attempt, reason, now_s, spans)
        self._carry_out(home, said, now_s)

    def _answered(self, token: Token) -> None:
        home, start, now = token.home, token.start, token.at_s
        answer = NO_SPANS if token.spans is None else new(Answer, (token.spans, None, None, None, None))
        self._carry_out(home, home.dispatcher.answer(start.request.number, start.attempt, answer, now), now)

    def _took(self, token: Token, kind: Kind, node: Place, start_s: float, end_s: float, stage: int) -> None:
        token.life = node.life
        node.work_aside(end_s, start_s)
        if token.spans is not None:
            token.spans.append(Span(kind, node.name, start_s, end_s, token.start.attempt, stage))
