"""The testbed: nodes, links and models, read from one YAML file that serves the simulator and the real run.

`TestbedSpec` is what people write (pydantic; its JSON Schema is for editors). `Testbed` is what everything else
uses: models loaded, profiles found and checked, links in both directions, routes. It is immutable and it pickles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any

import networkx as nx
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from isthmus.workloads.documents import parse, read_yaml
from isthmus.workloads.errors import InputError, unknown
from isthmus.workloads.model import Model, load_model
from isthmus.workloads.overheads import Overheads
from isthmus.workloads.profile import Profile
from isthmus.workloads.rate import Rate
from isthmus.workloads.service import Measured, Service, Synthetic, SyntheticSpec
from isthmus.workloads.units import Seconds, Watt, parse_rate, parse_time

LinkId = tuple[str, str]  # (from, to): one direction


def _rate(value: Any) -> Any:
    """`20Mbit`, or a schedule `[[0s, 20Mbit], [5s, 4Mbit]]` in which 0 is an outage."""
    if not isinstance(value, list | tuple):
        return ((0.0, parse_rate(value)),)
    pairs = []
    for entry in value:
        if not isinstance(entry, list | tuple) or len(entry) != 2:
            raise InputError(f"{entry!r} is not a pair of time and rate", allowed="[[0s, 20Mbit], [5s, 4Mbit], …]")
        time, rate = entry
        pairs.append((parse_time(time), 0.0 if rate == 0 else parse_rate(rate)))
    return tuple(pairs)


def _rate_or_value_error(value: Any) -> Any:
    try:
        return _rate(value)
    except InputError as error:
        raise ValueError(str(error)) from None


_TYPED = {"type": ["string", "number"]}
RateSpec = Annotated[
    tuple[tuple[float, float], ...],
    BeforeValidator(_rate_or_value_error),
    WithJsonSchema(
        {
            "description": "rate, such as 20Mbit, or pairs of time and rate, such as [[0s, 20Mbit], [5s, 0]]",
            "anyOf": [
                _TYPED,
                {"type": "array", "items": {"type": "array", "items": _TYPED, "minItems": 2, "maxItems": 2}},
            ],
        }
    ),
]
NodeName = Annotated[str, Field(pattern=r"^[^\s>]+$")]  # records write a link as `a>b`


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Power(_Spec):
    """Electrical power of a node above idling, in watts: while it computes, sends, receives."""

    busy: Watt = 0.0
    tx: Watt = 0.0
    rx: Watt = 0.0


class NodeSpec(_Spec):
    """A place that computes. With `service` its times are made up; without, they come from a profile."""

    profile: str = Field(default="host", description="label of the machine whose profiles this node takes")
    slowdown: float = Field(default=1.0, gt=0, description="how many times slower than that machine")
    service: SyntheticSpec | None = None
    slots: int = Field(default=1, ge=1, description="requests that it computes at the same time")
    power: Power = Power()

    @model_validator(mode="after")
    def _one_source_of_times(self) -> NodeSpec:
        if self.service is not None and (self.profile != "host" or self.slowdown != 1):
            raise ValueError("has both `service` and `profile` or `slowdown`: a node's times have one source")
        return self


class DirectionSpec(_Spec):
    """The way back, where it differs from the way there."""

    rate: RateSpec | None = None
    period: Seconds | None = None
    latency: Seconds | None = None


class LinkSpec(_Spec):
    """A link between two nodes. `back` is the second node to the first; what it leaves out is as on the way there."""

    between: tuple[str, str]
    rate: RateSpec
    period: Seconds | None = Field(default=None, description="after which a schedule of rates repeats")
    latency: Seconds = 0.0
    back: DirectionSpec = DirectionSpec()


class TestbedSpec(_Spec):
    """The testbed file."""

    __test__ = False  # not a pytest class

    name: str = "testbed"
    models: dict[str, str] = Field(min_length=1, description="name: a file.onnx, or a name that `isthmus models` lists")
    nodes: dict[NodeName, NodeSpec] = Field(min_length=1)
    links: tuple[LinkSpec, ...] = ()
    profiles: str = Field(default="profiles", description="folder with the measured profiles, relative to this file")


@dataclass(frozen=True)
class Node:
    name: str
    slots: int
    power: Power
    slowdown: float
    """How many times slower than this machine an emulation of the node is; 1 for synthetic service times."""


@dataclass(frozen=True)
class Link:
    """One direction of a link: a FIFO transmitter of a rate that may change, then a constant latency."""

    id: LinkId
    rate: Rate
    latency_s: float


@dataclass(frozen=True)
class Testbed:
    """Nodes, links and models with everything known about them. Costs are per (node, model)."""

    __test__ = False

    name: str
    models: Mapping[str, Model]
    nodes: Mapping[str, Node]
    links: Mapping[LinkId, Link]
    services: Mapping[tuple[str, str], Service]
    overheads: Overheads
    spec: TestbedSpec

    @classmethod
    def load(cls, path: str | Path) -> Testbed:
        """Read a testbed file. Raises InputError naming the file, the field, the value and what is allowed."""
        spec = parse(TestbedSpec, read_yaml(path), where=path)
        return cls.build(spec, folder=Path(path).parent, where=path)

    @classmethod
    def build(
        cls,
        spec: TestbedSpec,
        *,
        folder: Path = Path(),
        where: object = None,
        need_profiles: bool = True,
        only_models: frozenset[str] | None = None,
    ) -> Testbed:
        """From a description. `folder` is what its relative paths start from.

        Without `need_profiles` nodes that take a measured profile get no service times: calibration starts so.
        `only_models` leaves the others out, so that a testbed of many models asks for the profiles it needs.
        """
        models = {}
        for name, source in spec.models.items():
            if only_models is None or name in only_models:
                found = folder / source
                try:
                    models[name] = load_model(found if found.is_file() else source, name=name)
                except InputError as error:
                    raise InputError(str(error), where=f"{where or spec.name}: models.{name}") from None
        nodes = {n: Node(n, s.slots, s.power, s.slowdown) for n, s in spec.nodes.items()}
        links: dict[LinkId, Link] = {}
        for number, link in enumerate(spec.links):
            field = f"{where or spec.name}: links[{number}]"
            for end in link.between:
                if end not in nodes:
                    raise unknown("node", end, nodes, where=f"{field}.between")
            there = link.between
            if there[0] == there[1]:
                raise InputError(f"{there[0]!r} is linked to itself", where=f"{field}.between")
            if there in links:
                raise InputError(f"{there[0]!r} and {there[1]!r} are linked twice", where=f"{field}.between")
            back = link.back
            back_rate = link.rate if back.rate is None else back.rate
            back_period = link.period if back.rate is None and back.period is None else back.period
            back_latency = link.latency if back.latency is None else back.latency
            for ends, rate, period, latency, part in (
                (there, link.rate, link.period, link.latency, "rate"),
                ((there[1], there[0]), back_rate, back_period, back_latency, "back.rate"),
            ):
                try:
                    made = Rate(tuple(t for t, _ in rate), tuple(r for _, r in rate), period)
                except InputError as error:
                    raise InputError(error.problem, where=f"{field}.{part}", allowed=error.allowed) from None
                links[ends] = Link(ends, made, latency)
        services: dict[tuple[str, str], Service] = {}
        store = folder / spec.profiles
        for name, node in spec.nodes.items():
            for model in models.values():
                if node.service is not None:
                    services[name, model.name] = Synthetic(model, node.service)
                elif need_profiles:
                    services[name, model.name] = Measured(model, _profile(store, model, node.profile), node.slowdown)
        return cls(spec.name, models, nodes, links, services, Overheads.find(store), spec)

    @cached_property
    def nominal(self) -> Testbed:
        """The same testbed as a controller may know it: every link at its mean rate, always, in its `spec` as well."""

        def mean(link: LinkId) -> Rate:
            return Rate.constant(self.links[link].rate.mean_bytes_per_s)

        def told(spec: LinkSpec) -> LinkSpec:
            a, b = spec.between
            there, back = ({"rate": ((0.0, *mean(i).bytes_per_s),), "period": None} for i in ((a, b), (b, a)))
            return spec.model_copy(update={**there, "back": spec.back.model_copy(update=back)})

        links = {i: replace(link, rate=mean(i)) for i, link in self.links.items()}
        spec = self.spec.model_copy(update={"links": tuple(told(link) for link in self.spec.links)})
        return replace(self, links=links, spec=spec)

    @cached_property
    def graph(self) -> nx.DiGraph[str]:
        """Nodes and directed links; `latency_s` on the edges."""
        graph: nx.DiGraph[str] = nx.DiGraph()
        graph.add_nodes_from(self.nodes)
        graph.add_edges_from((a, b, {"latency_s": link.latency_s}) for (a, b), link in self.links.items())
        return graph

    def route(self, start: str, end: str) -> tuple[str, ...]:
        """The nodes from start to end, both included. InputError when there is no way.

        Least latency there and back, then fewest links, then the links that the testbed names first. So there is
        one best route: the way back is the way there reversed, and a piece of a route is the route of its ends.
        """
        return self._routes(start, end)

    def reachable(self, source: str) -> list[str]:
        """The other nodes that there is a route to, and so one back, in the order of the testbed."""
        found = nx.descendants(self.graph, source)
        return [node for node in self.nodes if node in found]

    @cached_property
    def _routes(self) -> Callable[[str, str], tuple[str, ...]]:
        pairs = list(dict.fromkeys(frozenset(link) for link in self.links))
        number, count = {pair: i for i, pair in enumerate(pairs)}, len(pairs)

        def weight(a: str, b: str, _: object) -> int:
            # Integers, so that sums are exact and no two routes weigh the same: picoseconds, links, which links.
            picoseconds = round(1e12 * (self.links[a, b].latency_s + self.links[b, a].latency_s))
            return (picoseconds * (count + 1) + 1 << count) + (1 << number[frozenset((a, b))])

        @cache
        def route(start: str, end: str) -> tuple[str, ...]:
            for name in (start, end):
                if name not in self.nodes:
                    raise unknown("node", name, self.nodes)
            try:
                return tuple(nx.shortest_path(self.graph, start, end, weight=weight))
            except nx.NetworkXNoPath:
                raise InputError(f"there is no route from {start!r} to {end!r}") from None

        return route

    def service(self, node: str, model: str) -> Service:
        """Service times of a model on a node. KeyError is a bug: names are checked before."""
        return self.services[node, model]

    def __getstate__(self) -> dict[str, Any]:
        # Routes are found again where they are needed; the cache of a local function does not pickle.
        return {k: v for k, v in self.__dict__.items() if k not in ("_routes", "graph", "nominal")}


def _profile(store: Path, model: Model, label: str) -> Profile:
    path = profile_path(store, model.name, label)
    if not path.exists():
        raise InputError(
            f"no profile of {model.name!r} on {label!r}",
            where=path,
            allowed=f"make one: `isthmus calibrate EXPERIMENT`, or `isthmus profile {model.source} --out {path}`",
        )
    return Profile.load(path)


def profile_path(store: Path, model: str, label: str) -> Path:
    """Where the profile of a model on a machine is kept."""
    return store / f"{model}@{label}.json"
