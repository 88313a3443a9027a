"""Plans: what runs where, and what crosses. Checked once, compiled once; the shells execute the compiled form.

Knows models and topology. Knows no policy, no queue, no clock.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

from isthmus.workloads.codecs import codec
from isthmus.workloads.errors import InputError, unknown
from isthmus.workloads.model import Model, Part
from isthmus.workloads.routing import LinkId
from isthmus.workloads.testbed import Testbed
from isthmus.workloads.units import show_bytes

RAW = "fp32"
"""The codec that sends a tensor as it is, whatever its type."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A part on a node. `after` are stages (by position) to wait for besides those that it takes tensors from."""

    node: str
    part: Part
    after: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Plan:
    """A policy's answer: stages that together run every layer once. A value: immutable, comparable, hashable.

    `codecs` says how crossing tensors are written for the wire, as (tensor, codec) pairs; the rest goes raw.
    """

    stages: tuple[Stage, ...]
    codecs: tuple[tuple[str, str], ...] = ()
    exit: str | None = None

    @cached_property
    def _hash(self) -> int:
        return hash((self.stages, self.codecs, self.exit))

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[object, ...]:
        return Plan, (self.stages, self.codecs, self.exit)  # a cached hash of strings is another in another process

    def __str__(self) -> str:
        return " → ".join(f"{stage.part} on {stage.node}" for stage in self.stages)

    def to_json(self) -> str:
        """The plan as data, for records: layers as hexadecimal bit masks."""
        return self._json

    @cached_property
    def _json(self) -> str:
        stages = [[s.node, s.part.model, f"{s.part.layers:x}", s.after] for s in self.stages]
        return json.dumps({"stages": stages, "codecs": self.codecs, "exit": self.exit}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote. InputError when the text is something else."""
        try:
            data = json.loads(text)
            stages = tuple(
                Stage(
                    _str(node), Part(_str(model), _layers(layers)), None if after is None else tuple(map(_int, after))
                )
                for node, model, layers, after in data["stages"]
            )
            exit_ = None if data["exit"] is None else _str(data["exit"])
            return cls(stages, tuple((_str(t), _str(c)) for t, c in data["codecs"]), exit_)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise InputError(f"not a plan: {error!r}"[:200]) from None


def _str(value: object) -> str:
    if type(value) is not str:
        raise TypeError(f"{type(value).__name__} where a name belongs")
    return value


def _int(value: object) -> int:
    if type(value) is not int:
        raise TypeError(f"{type(value).__name__} where a number belongs")
    return value


def _layers(value: object) -> int:
    layers = int(_str(value), 16)
    if layers < 0:  # as a set it would have no end
        raise ValueError(f"layers {layers}")
    return layers


def whole_on(model: Model, node: str) -> Plan:
    """The whole model on one node."""
    return _part_on(model.whole(), node)


@lru_cache(maxsize=4096)
def _part_on(part: Part, node: str) -> Plan:
    """One for all sources that ask for the same: equal plans are then one object, with one text."""
    return Plan((Stage(node, part),))


def split(model: Model, cuts: tuple[int, ...], nodes: tuple[str, ...]) -> Plan:
    """A chain: `nodes[0]` runs up to `cuts[0]`, `nodes[1]` from there to `cuts[1]`, …; a node with nothing is left out.

    `len(nodes) == len(cuts) + 1`, and cuts do not decrease.
    """
    if len(nodes) != len(cuts) + 1:
        raise InputError(f"a split over {len(nodes)} nodes needs {len(nodes) - 1} cuts, got {len(cuts)}")
    last = len(model.blocks)
    bounds = (0, *cuts, last)
    if any(not 0 <= a <= b <= last for a, b in pairwise(bounds)):
        raise InputError(f"cuts {cuts} of {model.name!r} do not increase within 0 to {last}")
    pieces = zip(nodes, bounds, bounds[1:], strict=False)
    return Plan(tuple(Stage(node, model.span(a, b)) for node, a, b in pieces if a < b))


@dataclass(frozen=True, slots=True)
class Message:
    """Tensors that go together from one stage to another. `source` -1 is the request, `target` -1 its answer."""

    source: int
    target: int
    tensors: tuple[str, ...]
    codecs: tuple[str, ...]
    raw_bytes: tuple[int, ...]
    wire_bytes: int
    path: tuple[str, ...]
    """Nodes from sender to receiver; one node only where nothing crosses a link."""
    load: int
    """Which of its plan's loads is its first hop."""

    @property
    def links(self) -> tuple[LinkId, ...]:
        return tuple(zip(self.path, self.path[1:], strict=False))


@dataclass(frozen=True, slots=True, eq=False)
class Compiled:
    """A checked plan, laid out for execution: which messages leave each stage, and how many each waits for."""

    plan: Plan
    model: Model
    source: str
    messages: tuple[Message, ...]
    sends: tuple[tuple[Message, ...], ...]
    """By stage; the last entry is what the request itself sends."""
    needs: tuple[int, ...]
    """Messages each stage waits for; the last entry is what the answer waits for."""
    loads: tuple[tuple[LinkId, int], ...]
    """Every link that every message crosses, with the bytes on it, in order of `messages` and hops."""
    nodes: frozenset[str]
    """Every node that computes or forwards."""
    text: str
    """The plan as records have it."""
    down: frozenset[LinkId]
    """Links that its routes avoid, as far as there is another way."""


@dataclass(frozen=True, slots=True, eq=False)
class Checked:
    """A plan that is possible, and its messages without their paths: the same for all sources."""

    plan: Plan
    model: Model
    messages: tuple[tuple[int, int, tuple[str, ...], tuple[str, ...], tuple[int, ...], int], ...]
    """The fields of each, from `source` to `wire_bytes`."""
    needs: tuple[int, ...]
    text: str


def compile_plan(plan: Plan, model: Model, source: str, testbed: Testbed) -> Compiled:
    """Check a plan and lay it out. InputError says what is impossible about it, and where."""
    return lay_out(check_plan(plan, model, testbed), source, testbed)


def check_plan(plan: Plan, model: Model, testbed: Testbed) -> Checked:
    """InputError says what is impossible about a plan, whoever the source is."""
    if not isinstance(plan, Plan):
        raise InputError(f"a policy answers with a Plan, not with {type(plan).__name__}")
    for number, stage in enumerate(plan.stages):
        if not isinstance(stage, Stage) or not isinstance(stage.part, Part):
            raise InputError(f"stage {number} is not a Stage of a Part: {stage!r}")
    if plan.exit is not None:
        raise InputError(f"model {model.name!r} has no exit {plan.exit!r}", allowed="None")
    codecs = dict(plan.codecs)
    for tensor, name in codecs.items():
        codec(name)
        if tensor not in model.tensors:
            raise InputError(f"a codec is given for {tensor!r}, which is no tensor of {model.name!r}")
    _check_parts(plan, model, testbed)
    made_by = {t: i for i, s in enumerate(plan.stages) for t in model.part_outputs(s.part)}

    wanted: dict[tuple[int, int], list[str]] = {}
    for target, stage in enumerate(plan.stages):
        for tensor in model.part_inputs(stage.part):
            wanted.setdefault((made_by.get(tensor, -1), target), []).append(tensor)
        if not model.part_inputs(stage.part):
            wanted[-1, target] = []  # it starts when the request does
    for tensor in model.outputs:
        wanted.setdefault((made_by[tensor], -1), []).append(tensor)
    for target, stage in enumerate(plan.stages):
        for before in stage.after or ():
            if not 0 <= before < len(plan.stages):
                raise InputError(f"stage {target} is to come after stage {before}, which does not exist")
            wanted.setdefault((before, target), [])
    _check_acyclic(wanted, len(plan.stages))

    messages = []
    for (origin, target), tensors in wanted.items():
        names = tuple(codecs.get(t, RAW) for t in tensors)
        wire = sum(codec(c).size_bytes(model.tensors[t]) for t, c in zip(tensors, names, strict=True))
        raw = tuple(model.tensors[t].bytes for t in tensors)
        messages.append((origin, target, tuple(tensors), names, raw, wire))
    needs = tuple(sum(target == end for _, target in wanted) for end in (*range(len(plan.stages)), -1))
    return Checked(plan, model, tuple(messages), needs, plan.to_json())


def lay_out(checked: Checked, source: str, testbed: Testbed) -> Compiled:
    """A checked plan as a source carries it out. InputError where there is no route."""
    plan = checked.plan
    places = [*(stage.node for stage in plan.stages), source]  # -1 is the source
    messages: list[Message] = []
    loads: list[tuple[LinkId, int]] = []
    for message in checked.messages:
        origin, target, *_, wire = message
        laid = Message(*message, testbed.route(places[origin], places[target]), len(loads))
        loads += [(link, wire) for link in laid.links]
        messages.append(laid)
    sends = tuple([tuple([m for m in messages if m.source == end]) for end in (*range(len(plan.stages)), -1)])
    nodes = frozenset(places[:-1]).union(*[m.path for m in messages])
    text, needs = checked.text, checked.needs
    return Compiled(plan, checked.model, source, tuple(messages), sends, needs, tuple(loads), nodes, text, testbed.down)


def _check_parts(plan: Plan, model: Model, testbed: Testbed) -> None:
    if not plan.stages:
        raise InputError("a plan without stages")
    seen = 0
    for number, stage in enumerate(plan.stages):
        where = f"stage {number}"
        if stage.node not in testbed.nodes:
            raise unknown("node", stage.node, testbed.nodes, where=where)
        if stage.part.model != model.name:
            raise InputError(f"a part of {stage.part.model!r} in a plan for {model.name!r}", where=where)
        layers = stage.part.layers
        if layers <= 0 or layers > model.everything:
            raise InputError(f"layers {layers:#x} are none, or not all of {model.name!r}", where=where)
        if layers & seen:
            raise InputError(f"{stage.part} repeats layers of an earlier stage", where=where)
        if not model.is_convex(layers):
            raise InputError(f"{stage.part} is not convex: data leaves it and comes back", where=where)
        node = testbed.nodes[stage.node]
        if not node.holds(model, stage.part):
            needs, has = show_bytes(node.needs_bytes(model, stage.part)), show_bytes(node.memory_bytes or 0)
            raise InputError(f"{stage.part} needs {needs} of memory, and node {stage.node!r} has {has}", where=where)
        seen |= layers
    if missing := model.everything & ~seen:
        raise InputError(f"layers missing from the plan: {Part(model.name, missing)}")


def _check_acyclic(edges: dict[tuple[int, int], list[str]], stages: int) -> None:
    waiting = {i: {a for a, b in edges if b == i and a != -1} for i in range(stages)}
    while ready := [i for i, before in waiting.items() if not before]:
        for i in ready:
            del waiting[i]
        for before in waiting.values():
            before.difference_update(ready)
    if waiting:
        raise InputError(f"stages {sorted(waiting)} wait for each other")
