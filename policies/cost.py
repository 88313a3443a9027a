"""What a plan will cost, as a controller believes: the physics of DESIGN §4 on estimates. Knows no shell.

`predict` costs any one plan, span by span. `Splits` costs every way of splitting a model along one route at once;
the two agree (a test). Queues count as the view reports them; what else may arrive meanwhile is not known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from heapq import heappop, heappush, heapreplace
from itertools import combinations, combinations_with_replacement, count

import numpy as np
import numpy.typing as npt

from isthmus.policies.contract import View
from isthmus.policies.plan import Compiled, Message, Plan, split
from isthmus.policies.records import Kind, Span
from isthmus.workloads.errors import InputError
from isthmus.workloads.model import Model
from isthmus.workloads.routing import LinkId
from isthmus.workloads.testbed import Testbed

Floats = npt.NDArray[np.float64]
Finish = Callable[[LinkId, Floats, Floats], Floats]
"""When transfers over a link end, given when they start and their bytes. Seconds from now."""

TIERS = 3
"""Nodes of one route that may share a model."""


def predict(compiled: Compiled, view: View) -> list[Span]:
    """The spans that the plan is expected to have, in seconds from now. The last to end is the answer's way back.

    The same steps as a shell takes, in order of time: branches of a plan queue behind each other as they come.
    """
    testbed, overheads = view.testbed, view.testbed.overheads
    slots = {name: [belief.backlog_s] * testbed.nodes[name].slots for name, belief in view.nodes.items()}
    link_free = {i: belief.queued_bytes / belief.rate_bytes_per_s for i, belief in view.links.items()}
    missing = list(compiled.needs)
    spans: list[Span] = []
    todo: list[tuple[float, int, Callable[[float], None]]] = []
    order = count()

    def at(time: float, call: Callable[[float], None]) -> None:
        heappush(todo, (time, next(order), call))

    def took(kind: Kind, place: str, start: float, end: float, stage: int, size: int | None = None) -> None:
        if end > start:
            spans.append(Span(kind, place, start, end, stage=stage, bytes=size))

    def send_all(stage: int, now: float) -> None:
        for message in compiled.sends[stage]:
            if message.links:
                code(Kind.ENCODE, overheads.encode_s, message, message.path[0], now, partial(hop, message, 0))
            else:
                receive(message, now)

    def code(
        kind: Kind,
        cost_s: Callable[[str, float], float],
        message: Message,
        node: str,
        now: float,
        then: Callable[[float], None],
    ) -> None:
        seconds = sum(cost_s(c, raw) for c, raw in zip(message.codecs, message.raw_bytes, strict=True))
        end = now + seconds * testbed.nodes[node].slowdown
        took(kind, node, now, end, message.source)
        at(end, then)

    def hop(message: Message, number: int, now: float) -> None:
        if number == len(message.links):
            code(Kind.DECODE, overheads.decode_s, message, message.path[-1], now, partial(receive, message))
            return
        link = message.links[number]
        place = f"{link[0]}>{link[1]}"
        start = max(now, link_free[link])
        wire = message.wire_bytes + testbed.links[link].overhead_bytes
        left = link_free[link] = start + wire / view.links[link].rate_bytes_per_s
        arrived = left + testbed.links[link].latency_s
        took(Kind.WAIT, place, now, start, message.source)
        took(Kind.SEND, place, start, arrived, message.source, message.wire_bytes)
        at(arrived, partial(hop, message, number + 1))

    def receive(message: Message, now: float) -> None:
        target = message.target
        missing[target] -= 1
        if missing[target] or target == -1:
            return
        stage = compiled.plan.stages[target]
        start = max(now, slots[stage.node][0])
        end = start + testbed.service(stage.node, compiled.model.name).mean_s(stage.part)
        heapreplace(slots[stage.node], end)
        took(Kind.WAIT, stage.node, now, start, target)
        took(Kind.COMPUTE, stage.node, start, end, target)
        at(end, partial(send_all, target))

    at(0.0, partial(send_all, -1))
    while todo:
        time, _, call = heappop(todo)
        call(time)
    return spans


def latency_s(spans: list[Span]) -> float:
    """When the last of the spans ends."""
    return max((span.end_s for span in spans), default=0.0)


@dataclass(frozen=True, eq=False)
class Splits:
    """Every split of a model along one route in which only `computing` nodes run a part, raw fp32 on the wire.

    What does not fit into the memory of its node is none. Rows are splits: `cuts` (n, nodes-1); `compute_s` (n, nodes)
    mean seconds on each node; `there_bytes` and `back_bytes` (n, nodes-1) over each link of the route and back.
    """

    model: Model
    route: tuple[str, ...]
    cuts: npt.NDArray[np.int64]
    compute_s: Floats
    there_bytes: Floats
    back_bytes: Floats

    @classmethod
    def along(cls, testbed: Testbed, model: Model, route: tuple[str, ...], computing: frozenset[str]) -> Splits:
        """InputError when there is no such split that fits into the memory of its nodes."""
        last, hops = len(model.blocks), len(route) - 1
        places = [i for i, node in enumerate(route) if node in computing]
        limited = [node for node in route if testbed.nodes[node].memory_bytes is not None]
        rows = []
        for inner in combinations_with_replacement(range(last + 1), len(places) - 1):
            bounds = dict(zip(places, (*inner, last), strict=True))  # after which cut each computing node stops
            stop, row = 0, []
            for i in range(hops):
                stop = bounds.get(i, stop)
                row.append(stop)
            if all(
                testbed.nodes[node].holds(model, model.span(a, b))
                for node, a, b in zip(route, (0, *row), (*row, last), strict=True)
                if a < b and node in limited
            ):
                rows.append(row)
        if not rows:
            raise InputError(f"no split of {model.name!r} fits into the memory of the nodes {', '.join(route)}")
        cuts = np.array(rows, dtype=np.int64).reshape(len(rows), hops)
        before = np.hstack([np.zeros((len(rows), 1), dtype=np.int64), cuts])
        after = np.hstack([cuts, np.full((len(rows), 1), last)])
        spans = [testbed.service(node, model.name).span_s() for node in route]
        compute = np.stack([s[before[:, i], after[:, i]] for i, s in enumerate(spans)], axis=1)
        crossing = np.array([cut.bytes for cut in model.cuts], dtype=float)
        goes_on = cuts < last
        there = np.where(goes_on, crossing[cuts], 0.0)
        answer = float(sum(model.tensors[t].bytes for t in model.outputs))
        return cls(model, route, cuts, compute, there, np.where(goes_on, answer, 0.0))

    def __len__(self) -> int:
        return len(self.cuts)

    @cached_property
    def runs(self) -> npt.NDArray[np.bool_]:
        """Which nodes run a part, (n, nodes): one that takes no time waits for its turn like any other."""
        edge = np.zeros((len(self), 1), dtype=np.int64)
        return np.diff(np.hstack([edge, self.cuts, edge + len(self.model.blocks)]), axis=1) > 0

    def plan(self, row: int) -> Plan:
        """The split in that row."""
        if row not in self._plans:
            self._plans[row] = split(self.model, tuple(int(c) for c in self.cuts[row]), self.route)
        return self._plans[row]

    @cached_property
    def _plans(self) -> dict[int, Plan]:
        return {}

    @cached_property
    def links(self) -> tuple[LinkId, ...]:
        return tuple(zip(self.route, self.route[1:], strict=False))

    def latency_s(self, view: View, *, queues: bool = True, finish: Finish | None = None) -> Floats:
        """Predicted seconds of every split, (n,). Without `queues` nothing waits; `finish` replaces believed rates."""
        links, known = view.links, view.testbed.links

        def believed(link: LinkId, start: Floats, size: Floats) -> Floats:
            return np.asarray(start + size / links[link].rate_bytes_per_s)

        end = finish or believed
        now = np.zeros(len(self))

        def cross(now: Floats, link: LinkId, size: Floats) -> Floats:
            start = now
            if queues and links[link].queued_bytes:
                free = end(link, np.zeros(1), np.full(1, links[link].queued_bytes))
                start = np.maximum(now, free)
            left = end(link, start, size + known[link].overhead_bytes)
            return np.where(size > 0, left + known[link].latency_s, now)

        for i, node in enumerate(self.route):
            seconds = self.compute_s[:, i]
            start = np.maximum(now, view.nodes[node].backlog_s) if queues else now
            now = np.where(self.runs[:, i], start + seconds, now)
            if i < len(self.links):
                now = cross(now, self.links[i], self.there_bytes[:, i])
        for i in reversed(range(len(self.links))):
            a, b = self.links[i]
            now = cross(now, (b, a), self.back_bytes[:, i])
        return now

    def source_energy_j(self, view: View) -> Floats:
        """Energy that every split takes from the source, (n,): computing and its radio, idling left out."""
        power = view.testbed.nodes[self.route[0]].power
        energy = power.busy * self.compute_s[:, 0]
        if self.links:
            a, b = self.links[0]
            for way, watts, size in (((a, b), power.tx, self.there_bytes), ((b, a), power.rx, self.back_bytes)):
                wire = size[:, 0] + view.testbed.links[way].overhead_bytes * (size[:, 0] > 0)
                energy = energy + watts * wire / view.links[way].rate_bytes_per_s
        return np.asarray(energy)

    def uses(self, view: View) -> npt.NDArray[np.bool_]:
        """Which splits touch, to compute or to forward, only nodes and links that are believed up; (n,)."""
        down = [i for i, node in enumerate(self.route) if not view.nodes[node].up]
        down += [i + 1 for i, (a, b) in enumerate(self.links) if not (view.links[a, b].up and view.links[b, a].up)]
        if not down:
            return np.ones(len(self), dtype=bool)
        first = min(down)
        if first == 0:
            return np.zeros(len(self), dtype=bool)
        return np.asarray(self.there_bytes[:, first - 1] == 0)


def all_splits(testbed: Testbed, model: Model, source: str) -> list[Splits]:
    """Splits along every route from the source, of at most `TIERS` computing nodes, the source's own among them.

    A split that uses the start of several routes only, such as the whole model on the source, appears for each.
    InputError when none fits into the memory of its nodes.
    """
    routes = [testbed.route(source, node) for node in testbed.reachable(source)]
    longest = [r for r in routes if not any(o != r and o[: len(r)] == r for o in routes)] or [(source,)]
    found: list[Splits] = []
    nothing = InputError(f"no split of {model.name!r}")
    for route in sorted(longest):
        groups = {frozenset((source, *rest)) for rest in combinations(route[1:], min(TIERS, len(route)) - 1)}
        for group in sorted(groups, key=sorted):
            try:
                found.append(Splits.along(testbed, model, route, group))
            except InputError as error:
                nothing = error
    if not found:
        raise nothing
    return found
