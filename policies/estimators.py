"""What a controller believes, from what it has seen. The same code in both worlds, fed by the same events.

Knows the nominal testbed. Never sees a trace or a queue. Holds state only for the links and nodes that its source has
used, so that a source among a hundred thousand costs little; of the others the nominal values are believed.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

from isthmus.policies.contract import LinkBelief, NodeBelief
from isthmus.policies.plan import Compiled
from isthmus.policies.records import Kind, Span
from isthmus.workloads.routing import NONE_DOWN, LinkId
from isthmus.workloads.testbed import Testbed

GAIN = 0.4
"""Weight of the newest observation of a rate."""
FORGET_S = 10.0
"""A rate not observed for so long counts 1/e; the nominal one takes its place, or nothing would be tried again."""

Name = TypeVar("Name")
Belief = TypeVar("Belief")


class _Link(NamedTuple):
    """State of a link. Values, not objects that change: a view keeps those that it was made from."""

    rate_bytes_per_s: float
    seen_s: float | None = None
    queued_bytes: float = 0.0


class _Node(NamedTuple):
    work_s: float = 0.0
    stages: int = 0
    seen_s: float | None = None
    up: bool = True


_UNSEEN = _Node()


class Beliefs(Mapping[Name, Belief], Generic[Name, Belief]):
    """What was believed at one time, by name; made when it is looked at, and the same ever after."""

    __slots__ = ("_made", "_make", "_names")

    def __init__(self, names: Mapping[Name, object], make: Callable[[Name], Belief]) -> None:
        self._names, self._make = names, make
        self._made: dict[Name, Belief] = {}

    def __getitem__(self, name: Name) -> Belief:
        made = self._made.get(name)
        if made is None:
            if name not in self._names:
                raise KeyError(name)
            made = self._made[name] = self._make(name)
        return made

    def __iter__(self) -> Iterator[Name]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return repr(dict(self))

    def __reduce__(self) -> tuple[object, ...]:
        return dict, (dict(self),)


class _Open:
    """What one attempt still has outstanding: a bit for each stage, then one for each load of its plan."""

    __slots__ = ("compiled", "left")

    def __init__(self, compiled: Compiled) -> None:
        self.compiled = compiled
        self.left = (1 << len(compiled.plan.stages) + len(compiled.loads)) - 1


class Estimators:
    """Beliefs of the controller of one source. `links` and `nodes` are what it says, the rest is what it is told."""

    def __init__(self, testbed: Testbed) -> None:
        self._known = testbed.nominal
        self._links: dict[LinkId, _Link] = {}
        self._nodes: dict[str, _Node] = {}
        self._open: dict[tuple[int, int], _Open] = {}
        self._leaving: list[tuple[float, int, int, int]] = []
        self._work: dict[Compiled, tuple[float, ...]] = {}
        self._battery_j: dict[str, float] = {}
        self._down: frozenset[LinkId] = NONE_DOWN

    def start(self, number: int, attempt: int, compiled: Compiled) -> None:
        """An attempt was started: its work is outstanding on the nodes and links that it will use."""
        links, nodes = self._links, self._nodes
        for link, size in compiled.loads:
            state = links.get(link) or self._fresh(link)
            links[link] = _Link(state[0], state[1], state[2] + size)
        for stage, seconds in zip(compiled.plan.stages, self._work_s(compiled), strict=True):
            node = nodes.get(stage.node, _UNSEEN)
            nodes[stage.node] = _Node(node[0] + seconds, node[1] + 1, node[2], node[3])
        self._open[number, attempt] = _Open(compiled)

    def stage_done(self, number: int, attempt: int, stage: int, now_s: float) -> None:
        """A stage of an attempt is known to be done. Telling it twice, or too late, changes nothing."""
        opened = self._open.get((number, attempt))
        if opened is not None and opened.left >> stage & 1:
            self._release_stage(opened, stage)
            self._saw(opened.compiled.plan.stages[stage].node, now_s)

    def sent(self, number: int, attempt: int, load: int, at_s: float) -> None:
        """The last byte of a load of the plan leaves its link at `at_s`; told ahead of it, believed from then on."""
        heapq.heappush(self._leaving, (at_s, number, attempt, load))

    def end(self, number: int, attempt: int, spans: Sequence[Span], now_s: float) -> None:
        """An attempt is over, answered or given up: nothing of it is outstanding, and its spans are evidence."""
        opened = self._open.pop((number, attempt), None)
        if opened is None:
            return
        stages = len(opened.compiled.plan.stages)
        for stage in range(stages):
            if opened.left >> stage & 1:
                self._release_stage(opened, stage)
        for load in range(len(opened.compiled.loads)):
            if opened.left >> stages + load & 1:
                self._release_load(opened, load)
        for span in spans:
            if span.kind is Kind.COMPUTE:
                self._saw(span.place, now_s)
            elif span.kind is Kind.SEND and span.bytes:
                a, _, b = span.place.partition(">")
                known = self._known.links[a, b]
                flowing_s = span.end_s - span.start_s - known.latency_s
                if flowing_s > 0:
                    state = self._links.get((a, b)) or self._fresh((a, b))
                    seen = (span.bytes + known.overhead_bytes) / flowing_s
                    rate = self._rate((a, b), state, now_s) * (1 - GAIN) + GAIN * seen
                    self._links[a, b] = _Link(rate, now_s, state.queued_bytes)

    def node_is(self, node: str, *, up: bool, now_s: float) -> None:
        """A node has gone, with all that was under way over it, or is back."""
        if not up:
            for number, attempt in [key for key, o in self._open.items() if node in o.compiled.nodes]:
                self.end(number, attempt, (), now_s)
        state = self._nodes.get(node, _UNSEEN)
        self._nodes[node] = state._replace(seen_s=now_s, up=up)

    def battery_is(self, node: str, joules: float) -> None:
        """What is left in the battery of a node; nobody but its own controller is told."""
        self._battery_j = {node: joules}  # not changed in place: a view keeps the one that it was made from

    def links_are(self, down: frozenset[LinkId]) -> None:
        """Exactly these links are down."""
        self._down = down

    def links(self, now_s: float) -> Mapping[LinkId, LinkBelief]:
        """What is believed of every link now."""
        self._settle(now_s)
        states, known, down = self._links.copy(), self._known.links, self._down

        def belief(link: LinkId) -> LinkBelief:
            state = states.get(link) or self._fresh(link)
            return LinkBelief(
                self._rate(link, state, now_s),
                known[link].latency_s + known[link[1], link[0]].latency_s,
                max(state.queued_bytes, 0.0),
                None if state.seen_s is None else now_s - state.seen_s,
                link not in down,
            )

        return Beliefs(known, belief)

    def nodes(self, now_s: float) -> Mapping[str, NodeBelief]:
        """What is believed of every node now."""
        states, known, battery_j = self._nodes.copy(), self._known.nodes, self._battery_j

        def belief(node: str) -> NodeBelief:
            work_s, stages, seen_s, up = states.get(node, _UNSEEN)
            age_s = None if seen_s is None else now_s - seen_s
            return NodeBelief(max(work_s, 0.0) / known[node].slots, stages, age_s, up, battery_j.get(node))

        return Beliefs(known, belief)

    def _fresh(self, link: LinkId) -> _Link:
        return _Link(self._known.links[link].rate.mean_bytes_per_s)

    def _rate(self, link: LinkId, state: _Link, now_s: float) -> float:
        nominal = self._known.links[link].rate.mean_bytes_per_s
        if state.seen_s is None:
            return nominal
        trust = math.exp(-(now_s - state.seen_s) / FORGET_S)
        return trust * state.rate_bytes_per_s + (1 - trust) * nominal

    def _saw(self, node: str, now_s: float) -> None:
        state = self._nodes.get(node, _UNSEEN)
        self._nodes[node] = _Node(state[0], state[1], now_s, state[3])

    def _release_stage(self, opened: _Open, stage: int) -> None:
        """A stage is no longer outstanding on its node."""
        opened.left &= ~(1 << stage)
        node = opened.compiled.plan.stages[stage].node
        work_s, stages, seen_s, up = self._nodes[node]
        # Nothing outstanding is no work: not what roundings left of it.
        left_s = work_s - self._work_s(opened.compiled)[stage] if stages > 1 else 0.0
        self._nodes[node] = _Node(left_s, stages - 1, seen_s, up)

    def _release_load(self, opened: _Open, load: int) -> None:
        """A message is no longer outstanding on one of its links."""
        opened.left &= ~(1 << len(opened.compiled.plan.stages) + load)
        link, size = opened.compiled.loads[load]
        rate, seen_s, queued = self._links[link]
        self._links[link] = _Link(rate, seen_s, queued - size)

    def _settle(self, now_s: float) -> None:
        """What was told ahead and has come."""
        while self._leaving and self._leaving[0][0] <= now_s:
            _, number, attempt, load = heapq.heappop(self._leaving)
            opened = self._open.get((number, attempt))
            if opened is not None and opened.left >> len(opened.compiled.plan.stages) + load & 1:
                self._release_load(opened, load)

    def _work_s(self, compiled: Compiled) -> tuple[float, ...]:
        """Mean seconds of every stage of a plan."""
        work = self._work.get(compiled)
        if work is None:
            model = compiled.model.name
            work = self._work[compiled] = tuple(
                self._known.service(s.node, model).mean_s(s.part) for s in compiled.plan.stages
            )
        return work
