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
from pydantic import BaseModel, ConfigDict, Field, model_validator

from isthmus.workloads.documents import parse, read_yaml
from isthmus.workloads.errors import InputError, unknown
from isthmus.workloads.model import Model, load_model
from isthmus.workloads.overheads import Overheads
from isthmus.workloads.profile import Profile
from isthmus.workloads.random import stream
from isthmus.workloads.rate import Rate
from isthmus.workloads.rates import Constant, Drawn, RateSpec, Schedule
from isthmus.workloads.service import Measured, Service, Synthetic, SyntheticSpec
from isthmus.workloads.trace_file import TraceFile
from isthmus.workloads.units import Seconds, Watt

LinkId = tuple[str, str]  # (from, to): one direction
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
    """A link between two nodes. `back` is the second node to the first; what it leaves out is as on the way there.

    A rate that is drawn is drawn for each direction, also where both are described alike.
    """

    between: tuple[str, str]
    rate: RateSpec
    period: Seconds | None = Field(default=None, description="after which a schedule of rates repeats")
    latency: Seconds = 0.0
    back: DirectionSpec = DirectionSpec()

    @model_validator(mode="after")
    def _periods_are_of_schedules(self) -> LinkSpec:
        self.directions()
        return self

    def directions(self) -> tuple[tuple[LinkId, RateSpec, float], ...]:
        """There and back: ends, rate, latency in seconds."""
        (a, b), back = self.between, self.back
        rate = self.rate if back.rate is None else back.rate
        period = self.period if back.rate is None and back.period is None else back.period
        latency = self.latency if back.latency is None else back.latency
        return (
            ((a, b), _repeating(self.rate, self.period), self.latency),
            ((b, a), _repeating(rate, period), latency),
        )


def _repeating(rate: RateSpec, period: float | None) -> RateSpec:
    """A rate with the `period` that stands beside it."""
    if period is None or isinstance(rate, Constant):
        return rate
    if isinstance(rate, Schedule):
        return rate.model_copy(update={"period": period})
    raise ValueError(f"has a `period`, and a rate of the kind {rate.kind!r}, which has its own (allowed: a schedule)")


class TestbedSpec(_Spec):
    """The testbed file."""

    __test__ = False  # not a pytest class

    name: str = "testbed"
    models: dict[str, str] = Field(min_length=1, description="name: a file.onnx, or a name that `isthmus models` lists")
    nodes: dict[NodeName, NodeSpec] = Field(min_length=1)
    links: tuple[LinkSpec, ...] = ()
    profiles: str = Field(default="profiles", description="folder with the measured profiles, relative to this file")

    @property
    def traces(self) -> list[str]:
        """The trace files of its links."""
        rates = (rate for link in self.links for rate in (link.rate, link.back.rate))
        return list(dict.fromkeys(rate.file for rate in rates if isinstance(rate, TraceFile)))

    def with_traces(self, name: Callable[[str], str]) -> TestbedSpec:
        """The same testbed with its trace files under other names."""

        def renamed(rate: RateSpec | None) -> RateSpec | None:
            return rate.model_copy(update={"file": name(rate.file)}) if isinstance(rate, TraceFile) else rate

        links = [
            link.model_copy(
                update={
                    "rate": renamed(link.rate),
                    "back": link.back.model_copy(update={"rate": renamed(link.back.rate)}),
                }
            )
            for link in self.links
        ]
        return self.model_copy(update={"links": tuple(links)})

    def moved(self, way: Path, folder: Path) -> TestbedSpec:
        """As it reads in `folder`, when its own folder is `way` from there: profiles, traces, and models in files."""
        models = {n: str(way / m) if (folder / way / m).is_file() else m for n, m in self.models.items()}
        spec = self.with_traces(lambda file: str(way / file))
        return spec.model_copy(update={"models": models, "profiles": str(way / self.profiles)})


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
    """What it was built from, with trace files by absolute path."""

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
        seed: int = 1,
    ) -> Testbed:
        """From a description. `folder` is what its relative paths start from; `seed` is that of rates that are drawn.

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
        links = realise_links(spec, folder=folder, where=where, seed=seed)
        services: dict[tuple[str, str], Service] = {}
        store = folder / spec.profiles
        for name, node in spec.nodes.items():
            for model in models.values():
                if node.service is not None:
                    services[name, model.name] = Synthetic(model, node.service)
                elif need_profiles:
                    services[name, model.name] = Measured(model, _profile(store, model, node.profile), node.slowdown)
        spec = spec.with_traces(lambda file: str((folder / file).resolve()))
        return cls(spec.name, models, nodes, links, services, Overheads.find(store), spec)

    def at_seed(self, seed: int) -> Testbed:
        """The same testbed with the rates that this seed draws; itself where nothing is drawn."""
        drawn = {
            ends: replace(self.links[ends], rate=rate.draw(stream(seed, *ends, "rate")))
            for link in self.spec.links
            for ends, rate, _ in link.directions()
            if isinstance(rate, Drawn)
        }
        return replace(self, links={**self.links, **drawn}) if drawn else self

    @cached_property
    def nominal(self) -> Testbed:
        """The same testbed as a controller may know it: every link at its mean rate, always, in its `spec` as well."""

        def told(spec: LinkSpec) -> LinkSpec:
            a, b = spec.between
            known = (self.links[i].rate.mean_bytes_per_s for i in ((a, b), (b, a)))
            there, back = ({"rate": Constant(rate=rate), "period": None} for rate in known)
            return spec.model_copy(update={**there, "back": spec.back.model_copy(update=back)})

        links = {i: replace(x, rate=Rate.constant(x.rate.mean_bytes_per_s)) for i, x in self.links.items()}
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


def realise_links(
    spec: TestbedSpec, *, folder: Path = Path(), where: object = None, seed: int = 1
) -> dict[LinkId, Link]:
    """Both directions of every link, with the rates that files hold and that the seed draws.

    InputError names the field, and the line of a trace file.
    """
    links: dict[LinkId, Link] = {}
    known: dict[RateSpec, Rate] = {}  # a file is read once, whoever names it
    for number, link in enumerate(spec.links):
        field = f"{where or spec.name}: links[{number}]"
        for end in link.between:
            if end not in spec.nodes:
                raise unknown("node", end, spec.nodes, where=f"{field}.between")
        a, b = link.between
        if a == b:
            raise InputError(f"{a!r} is linked to itself", where=f"{field}.between")
        if (a, b) in links:
            raise InputError(f"{a!r} and {b!r} are linked twice", where=f"{field}.between")
        for (ends, rate, latency_s), part in zip(link.directions(), ("rate", "back.rate"), strict=True):
            try:
                made = known.get(rate) or rate.realise(folder, stream(seed, *ends, "rate"))
            except InputError as error:
                problem = error.problem if error.where is None else f"{error.where}: {error.problem}"
                raise InputError(problem, where=f"{field}.{part}", allowed=error.allowed) from None
            if not isinstance(rate, Drawn):
                known[rate] = made
            links[ends] = Link(ends, made, latency_s)
    return links


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
