"""What a plan will cost, as a controller believes: the physics of DESIGN §4 on estimates. Knows no shell.

`predict` costs any one plan, span by span. `Splits` costs every way of splitting a model along one route at once;
the two agree (a test). Queues count as the view reports them; what else may arrive meanwhile is not known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from heapq import heappop, heappush, heapreplace
from itertools import chain, combinations, combinations_with_replacement, count, pairwise
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from isthmus.policies.contract import LinkBelief, View
from isthmus.policies.plan import Compiled, Message, Plan, split
from isthmus.policies.records import Kind, Span
from isthmus.workloads.errors import InputError
from isthmus.workloads.model import Model
from isthmus.workloads.routing import LinkId
from isthmus.workloads.service import Service
from isthmus.workloads.testbed import Testbed

Floats = npt.NDArray[np.float64]
Finish = Callable[[LinkId, Floats, Floats], Floats]
"""When transfers over a link end, given when they start and their bytes. Seconds from now."""

Ways = tuple[tuple[tuple[float, float], tuple[float, float]], ...]
"""Of every link of a route: latency and overhead of a message there, and back."""

Key = TypeVar("Key")
Value = TypeVar("Value")

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


class Crossing(NamedTuple):
    """What every split of a route sends over one direction of one of its links, (n,) each; 0 where nothing crosses."""

    crosses: npt.NDArray[np.bool_]
    wire_bytes: Floats
    latency_s: Floats


@dataclass(frozen=True, eq=False)
class Costs:
    """The numbers of `Splits`: they follow from services and links along a route, whatever the names of its nodes."""

    cuts: npt.NDArray[np.int64]
    runs: npt.NDArray[np.bool_]
    compute_s: Floats
    there: tuple[Crossing, ...]
    back: tuple[Crossing, ...]

    @classmethod
    def of(cls, cuts: npt.NDArray[np.int64], model: Model, services: tuple[Service, ...], ways: Ways) -> Costs:
        """Of these cuts, on nodes with these services, in the order of the route."""
        bounds = _bounds(cuts, len(model.blocks))
        before, after = bounds[:, :-1], bounds[:, 1:]
        spans = [service.span_s() for service in services]
        # A column is what is used at once: they lie in memory one after another.
        compute = np.stack([s[before[:, i], after[:, i]] for i, s in enumerate(spans)]).T
        crossing = np.array([cut.bytes for cut in model.cuts], dtype=float)
        answer = float(sum(model.tensors[t].bytes for t in model.outputs))
        there, back = [], []
        for i, (out, home) in enumerate(ways):
            goes_on = cuts[:, i] < len(model.blocks)
            there.append(_crossing(np.where(goes_on, crossing[cuts[:, i]], 0.0), *out))
            back.append(_crossing(np.where(goes_on, answer, 0.0), *home))
        made = cls(cuts, np.asfortranarray(after > before), compute, tuple(there), tuple(back))
        for array in (made.cuts, made.runs, made.compute_s, *chain(*there, *back)):
            array.flags.writeable = False  # many share them
        return made


def _crossing(size: Floats, latency_s: float, overhead_bytes: float) -> Crossing:
    crosses = size > 0
    return Crossing(crosses, np.where(crosses, size + overhead_bytes, 0.0), np.where(crosses, latency_s, 0.0))


def _cuts(last: int, places: tuple[int, ...], hops: int) -> npt.NDArray[np.int64]:
    """The cut at every hop, (n, hops), of every split among the nodes at `places` of a route."""
    inner = list(combinations_with_replacement(range(last + 1), len(places) - 1))
    stops = _bounds(np.array(inner, dtype=np.int64).reshape(len(inner), len(places) - 1), last)
    return np.asfortranarray(stops[:, [sum(place <= hop for place in places) for hop in range(hops)]])


def _bounds(cuts: npt.NDArray[np.int64], last: int) -> npt.NDArray[np.int64]:
    return np.pad(cuts, ((0, 0), (1, 1)), constant_values=((0, 0), (0, last)))


@lru_cache(maxsize=128)
def _shared(model: Model, services: tuple[Service, ...], ways: Ways, places: tuple[int, ...]) -> Costs:
    """One for all sources whose routes are alike."""
    return Costs.of(_cuts(len(model.blocks), places, len(ways)), model, services, ways)


@dataclass(frozen=True, eq=False)
class Splits:
    """Every split of a model along one route in which only `computing` nodes run a part, raw fp32 on the wire.

    What does not fit into the memory of its node is none. Rows are splits: `cuts` (n, nodes-1); `compute_s` (n, nodes)
    mean seconds on each node, and `runs`, which of them run a part: one that takes no time waits for its turn like any
    other.
    """

    model: Model
    route: tuple[str, ...]
    costs: Costs

    @classmethod
    def along(cls, testbed: Testbed, model: Model, route: tuple[str, ...], computing: frozenset[str]) -> Splits:
        """InputError when there is no such split that fits into the memory of its nodes."""
        places = tuple(i for i, node in enumerate(route) if node in computing)
        services = tuple(testbed.service(node, model.name) for node in route)
        links = [(testbed.links[a, b], testbed.links[b, a]) for a, b in pairwise(route)]
        ways = tuple(
            ((out.latency_s, out.overhead_bytes), (home.latency_s, home.overhead_bytes)) for out, home in links
        )
        limited = [i for i in places if testbed.nodes[route[i]].memory_bytes is not None]
        if not limited:
            return cls(model, route, _shared(model, services, ways, places))
        cuts = _cuts(len(model.blocks), places, len(ways))
        bounds = _bounds(cuts, len(model.blocks))
        fits = np.ones(len(cuts), dtype=bool)
        for i in limited:
            spans = list(map(tuple, bounds[:, i : i + 2].tolist()))
            node = testbed.nodes[route[i]]
            held = {(a, b): a == b or node.holds(model, model.span(a, b)) for a, b in set(spans)}
            fits &= [held[span] for span in spans]
        if not fits.any():
            raise InputError(f"no split of {model.name!r} fits into the memory of the nodes {', '.join(route)}")
        return cls(model, route, Costs.of(np.asfortranarray(cuts[fits]), model, services, ways))

    def __len__(self) -> int:
        return len(self.costs.cuts)

    @property
    def cuts(self) -> npt.NDArray[np.int64]:
        return self.costs.cuts

    @property
    def runs(self) -> npt.NDArray[np.bool_]:
        return self.costs.runs

    @property
    def compute_s(self) -> Floats:
        return self.costs.compute_s

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
        return tuple(pairwise(self.route))

    @cached_property
    def _crossings(self) -> list[tuple[LinkId, Crossing]]:
        """There, then back in the order of the answer."""
        there = list(zip(self.links, self.costs.there, strict=True))
        return there + [((b, a), it) for (a, b), it in reversed(list(zip(self.links, self.costs.back, strict=True)))]

    def latency_s(self, view: View, *, queues: bool = True, finish: Finish | None = None) -> Floats:
        """Predicted seconds of every split, (n,). Without `queues` nothing waits; `finish` replaces believed rates."""
        links, nodes = view.links, view.nodes
        compute_s, crossings = self.costs.compute_s, self._crossings
        now = np.zeros(len(self))
        for i, node in enumerate(self.route):
            backlog_s = nodes[node].backlog_s if queues else 0.0
            if backlog_s:
                now = np.where(self.runs[:, i], np.maximum(now, backlog_s) + compute_s[:, i], now)
            else:  # a node that runs nothing takes no time
                now = now + compute_s[:, i]
            if i < len(self.links):
                now = _cross(now, *crossings[i], links, queues, finish)
        for link, crossing in crossings[len(self.links) :]:
            now = _cross(now, link, crossing, links, queues, finish)
        return now

    def source_energy_j(self, view: View) -> Floats:
        """Energy that every split takes from the source, (n,): computing and its radio, idling left out."""
        power = view.testbed.nodes[self.route[0]].power
        energy = power.busy * self.compute_s[:, 0]
        if self.links:
            (a, b), there, back = self.links[0], self.costs.there[0], self.costs.back[0]
            for way, watts, crossing in (((a, b), power.tx, there), ((b, a), power.rx, back)):
                energy = energy + watts * crossing.wire_bytes / view.links[way].rate_bytes_per_s
        return np.asarray(energy)

    def uses(self, view: View) -> npt.NDArray[np.bool_] | None:
        """Which splits touch, to compute or to forward, only nodes and links that are believed up; (n,). None: all."""
        links, nodes = view.links, view.nodes
        if not nodes[self.route[0]].up:
            return np.zeros(len(self), dtype=bool)
        for (a, b), node, crossing in zip(self.links, self.route[1:], self.costs.there, strict=True):
            if not (nodes[node].up and links[a, b].up and links[b, a].up):
                return ~crossing.crosses
        return None


def _cross(
    now: Floats, link: LinkId, it: Crossing, links: Mapping[LinkId, LinkBelief], queues: bool, finish: Finish | None
) -> Floats:
    """When what was ready `now` is over a link."""
    belief = links[link]
    rate, queued = belief.rate_bytes_per_s, belief.queued_bytes if queues else 0.0
    if finish is None and not queued and rate > 0:  # what sends nothing takes no time
        return np.asarray(now + it.wire_bytes / rate + it.latency_s)
    start = now
    if queued:
        free = queued / rate if finish is None else float(finish(link, np.zeros(1), np.full(1, queued))[0])
        start = np.maximum(now, free)
    left = start + it.wire_bytes / rate if finish is None else finish(link, start, it.wire_bytes)
    return np.where(it.crosses, left + it.latency_s, now)


Along = Callable[[Testbed, Model, tuple[str, ...], frozenset[str]], Splits]


def all_splits(testbed: Testbed, model: Model, source: str, along: Along = Splits.along) -> list[Splits]:
    """Splits along every route from the source, of at most `TIERS` computing nodes, the source's own among them.

    A split that uses the start of several routes only, such as the whole model on the source, appears for each.
    InputError when none fits into the memory of its nodes. `along` may know some of them already.
    """
    routes = [testbed.route(source, node) for node in testbed.reachable(source)]
    longest = [r for r in routes if not any(o != r and o[: len(r)] == r for o in routes)] or [(source,)]
    found: list[Splits] = []
    nothing = InputError(f"no split of {model.name!r}")
    for route in sorted(longest):
        groups = {frozenset((source, *rest)) for rest in combinations(route[1:], min(TIERS, len(route)) - 1)}
        for group in sorted(groups, key=sorted):
            try:
                found.append(along(testbed, model, route, group))
            except InputError as error:
                nothing = error
    if not found:
        raise nothing
    return found


class Recent(Generic[Key, Value]):
    """What was made for the keys asked for last, at most `size` of them."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._made: dict[Key, Value] = {}

    def get(self, key: Key) -> Value | None:
        """None where it is not known, or no longer."""
        made = self._made.get(key)
        if made is not None:
            self._made[key] = self._made.pop(key)  # now the last that will be forgotten
        return made

    def put(self, key: Key, value: Value) -> Value:
        """Remember, and forget what was not asked for longest."""
        if len(self._made) >= self._size:
            del self._made[next(iter(self._made))]
        self._made[key] = value
        return value


class KnownSplits:
    """`Splits.along` with a memory: routes come back with the links, and most links that go are on none of them."""

    def __init__(self) -> None:
        self._known = Recent[tuple[str, tuple[str, ...], frozenset[str]], Splits](128)

    def along(self, testbed: Testbed, model: Model, route: tuple[str, ...], computing: frozenset[str]) -> Splits:
        key = model.name, route, computing
        known = self._known.get(key)
        return self._known.put(key, Splits.along(testbed, model, route, computing)) if known is None else known
