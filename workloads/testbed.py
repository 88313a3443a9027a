"""The testbed: nodes, links and models, read from one YAML file that serves the simulator and the real run.

`TestbedSpec` is what people write (pydantic; its JSON Schema is for editors). `Testbed` is what everything else
uses: models loaded, profiles found and checked, links in both directions, routes. It is immutable and it pickles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import chain, product
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from isthmus.workloads.documents import parse, read_yaml
from isthmus.workloads.errors import InputError, unknown
from isthmus.workloads.mobility import Mobility, Position, Positions, RandomWaypoint, Waypoints, serving
from isthmus.workloads.model import Model, load_model
from isthmus.workloads.overheads import Overheads
from isthmus.workloads.profile import Profile
from isthmus.workloads.random import stream
from isthmus.workloads.rate import Rate
from isthmus.workloads.rates import Constant, Drawn, RateSpec, Schedule
from isthmus.workloads.routing import NONE_DOWN, LinkId, Routes
from isthmus.workloads.service import Measured, Service, Synthetic, SyntheticSpec
from isthmus.workloads.trace_file import TraceFile
from isthmus.workloads.units import Seconds, Watt

NodeName = Annotated[str, Field(pattern=r"^[^\s>]+$")]  # records write a link as `a>b`


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Power(_Spec):
    """Electrical power of a node above idling, in watts: while it computes, sends, receives."""

    busy: Watt = 0.0
    tx: Watt = 0.0
    rx: Watt = 0.0


class Price(_Spec):
    """What a node costs: by the second that it works, by the byte that leaves it. US dollars."""

    per_s: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    per_byte: float = Field(default=0.0, ge=0, allow_inf_nan=False)


class NodeSpec(_Spec):
    """A place that computes. With `service` its times are made up; without, they come from a profile.

    With `count` it is a group of alike: `cam` with a count of 3 is `cam-0`, `cam-1` and `cam-2`.
    """

    count: int | None = Field(default=None, ge=1, description="a group of so many: NAME-0, NAME-1, …")
    serves: bool | None = Field(
        default=None, description="whether policies may offload to it; by default all that are not in a group"
    )
    profile: str = Field(default="host", description="label of the machine whose profiles this node takes")
    slowdown: float = Field(default=1.0, gt=0, description="how many times slower than that machine")
    service: SyntheticSpec | None = None
    slots: int = Field(default=1, ge=1, description="requests that it computes at the same time")
    power: Power = Power()
    price: Price = Price()
    position: Position | None = Field(default=None, description="[x, y] in metres, of a cell that serves what moves")
    mobility: Mobility | None = Field(default=None, description="it moves, and is linked to the nearest cell only")

    @model_validator(mode="after")
    def _one_source_of_times(self) -> NodeSpec:
        if self.service is not None and (self.profile != "host" or self.slowdown != 1):
            raise ValueError("has both `service` and `profile` or `slowdown`: a node's times have one source")
        return self

    @model_validator(mode="after")
    def _cells_stand_still(self) -> NodeSpec:
        if self.position is not None and self.mobility is not None:
            raise ValueError("has both `position` and `mobility`: the position is of a cell, which does not move")
        return self


class DirectionSpec(_Spec):
    """The way back, where it differs from the way there."""

    rate: RateSpec | None = None
    period: Seconds | None = None
    latency: Seconds | None = None


class LinkSpec(_Spec):
    """A link between two nodes. `back` is the second node to the first; what it leaves out is as on the way there.

    Between a group and a node there is one link per member, between two groups members are dealt out evenly: each of
    the larger group has one link. What moves has a link to each, of which one at a time is up. A rate
    that is drawn is drawn for each of them and for each direction.
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

    def directions(self) -> tuple[tuple[RateSpec, float], tuple[RateSpec, float]]:
        """There and back: rate, and latency in seconds."""
        back = self.back
        rate = self.rate if back.rate is None else back.rate
        period = self.period if back.rate is None and back.period is None else back.period
        latency = self.latency if back.latency is None else back.latency
        return (_repeating(self.rate, self.period), self.latency), (_repeating(rate, period), latency)


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

    @model_validator(mode="after")
    def _one_node_of_a_name(self) -> TestbedSpec:
        for name in self.nodes:
            of, _, number = name.rpartition("-")
            group = self.nodes.get(of)
            if group is not None and group.count is not None and number in map(str, range(group.count)):
                raise ValueError(f"nodes.{name}: there are two nodes {name!r}: it is one of the group {of!r} as well")
        return self

    def members(self, name: str) -> tuple[str, ...]:
        """The nodes that a name stands for: itself, or the members of a group. KeyError for an unknown name."""
        return self._members[name]

    @cached_property
    def _members(self) -> dict[str, tuple[str, ...]]:
        found: dict[str, tuple[str, ...]] = {}
        for name, node in self.nodes.items():
            found[name] = (name,) if node.count is None else tuple(f"{name}-{i}" for i in range(node.count))
        # A member by its own name as well.
        return {member: (member,) for of in found.values() for member in of} | found

    def pairs(self, link: LinkSpec) -> list[LinkId]:
        """The links that one entry stands for, as (first, second) node."""
        first, second = (self.members(name) for name in link.between)
        if any(name in self.nodes and self.nodes[name].mobility is not None for name in link.between):
            return list(product(first, second))
        many = max(len(first), len(second))
        return [(first[i * len(first) // many], second[i * len(second) // many]) for i in range(many)]

    def directed(self, link: LinkSpec) -> Iterator[tuple[list[LinkId], RateSpec, float]]:
        """The links that one entry stands for, there and then back, with their rate and their latency in seconds."""
        pairs = self.pairs(link)
        there, back = link.directions()
        yield pairs, *there
        yield [(b, a) for a, b in pairs], *back

    @property
    def traces(self) -> list[str]:
        """The files with traces of its links' rates, and of its nodes' positions."""
        rates = (rate for link in self.links for rate in (link.rate, link.back.rate))
        paths = (node.mobility for node in self.nodes.values())
        return list(dict.fromkeys(it.file for it in (*rates, *paths) if isinstance(it, TraceFile | Positions)))

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
        nodes = {
            n: node.model_copy(update={"mobility": node.mobility.model_copy(update={"file": name(node.mobility.file)})})
            if isinstance(node.mobility, Positions)
            else node
            for n, node in self.nodes.items()
        }
        return self.model_copy(update={"links": tuple(links), "nodes": nodes})

    def moved(self, way: Path, folder: Path) -> TestbedSpec:
        """As it reads in `folder`, when its own folder is `way` from there: profiles, traces, and models in files."""
        models = {n: str(way / m) if (folder / way / m).is_file() else m for n, m in self.models.items()}
        spec = self.with_traces(lambda file: str(way / file))
        return spec.model_copy(update={"models": models, "profiles": str(way / self.profiles)})


@dataclass(frozen=True)
class Node:
    name: str
    serves: bool
    """Whether policies may offload to it."""
    slots: int
    power: Power
    price: Price
    slowdown: float
    """How many times slower than this machine an emulation of the node is; 1 for synthetic service times."""
    position: Position | None = None
    mobility: Waypoints | RandomWaypoint | None = None


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
    down: frozenset[LinkId] = NONE_DOWN
    """Links that routes lead around, where they can."""

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
        nodes: dict[str, Node] = {}
        for name, s in spec.nodes.items():
            serves = s.count is None if s.serves is None else s.serves
            members = spec.members(name)
            paths = (
                s.mobility.read(folder, members) if isinstance(s.mobility, Positions) else [s.mobility] * len(members)
            )
            for member, path in zip(members, paths, strict=True):
                nodes[member] = Node(member, serves, s.slots, s.power, s.price, s.slowdown, s.position, path)
        links = realise_links(spec, folder=folder, where=where, seed=seed)
        services: dict[tuple[str, str], Service] = {}
        store = folder / spec.profiles
        for name, node in spec.nodes.items():
            for model in models.values():
                service: Service
                if node.service is not None:
                    service = Synthetic(model, node.service)
                elif need_profiles:
                    service = Measured(model, _profile(store, model, node.profile), node.slowdown)
                else:
                    continue
                services |= dict.fromkeys(product(spec.members(name), [model.name]), service)
        spec = spec.with_traces(lambda file: str((folder / file).resolve()))
        return cls(spec.name, models, nodes, links, services, Overheads.find(store), spec)

    def at_seed(self, seed: int) -> Testbed:
        """The same testbed with the rates that this seed draws; itself where nothing is drawn."""
        drawn = {
            way: replace(self.links[way], rate=rate.draw(stream(seed, *way, "rate")))
            for link in self.spec.links
            for ways, rate, _ in self.spec.directed(link)
            if isinstance(rate, Drawn)
            for way in ways
        }
        return self._like(links={**self.links, **drawn}) if drawn else self

    @cached_property
    def nominal(self) -> Testbed:
        """The same testbed as a controller may know it: every link at its mean rate, always, in its `spec` as well."""

        means: dict[int, Rate] = {}  # links of a group share their rate

        def mean(link: LinkId) -> Rate:
            rate = self.links[link].rate
            if id(rate) not in means:
                means[id(rate)] = Rate.constant(rate.mean_bytes_per_s)
            return means[id(rate)]

        def told(spec: LinkSpec) -> LinkSpec:
            a, b = self.spec.pairs(spec)[0]  # of a group, its first
            known = (mean(way).bytes_per_s[0] for way in ((a, b), (b, a)))
            there, back = ({"rate": Constant(rate=rate), "period": None} for rate in known)
            return spec.model_copy(update={**there, "back": spec.back.model_copy(update=back)})

        links = {i: replace(link, rate=mean(i)) for i, link in self.links.items()}
        spec = self.spec.model_copy(update={"links": tuple(told(link) for link in self.spec.links)})
        return self._like(links=links, spec=spec)

    @cached_property
    def rates(self) -> Mapping[LinkId, Rate]:
        """The true rate of every link."""
        return {link: it.rate for link, it in self.links.items()}

    @cached_property
    def has_power(self) -> bool:
        """Whether the power of any node is known."""
        return any(node.power.busy or node.power.tx or node.power.rx for node in self.nodes.values())

    @cached_property
    def has_prices(self) -> bool:
        """Whether the price of any node is known."""
        return any(node.price.per_s or node.price.per_byte for node in self.nodes.values())

    def route(self, start: str, end: str) -> tuple[str, ...]:
        """The nodes from start to end, both included: the best way around the links that are `down`, if there is one.

        Least latency there and back, then fewest links, then the links that the testbed names first. InputError when
        there is no way, or no such node.
        """
        for name in (start, end):
            if name not in self.nodes:
                raise unknown("node", name, self.nodes)
        return self.routes.find(start, end, self.down)

    @cached_property
    def routes(self) -> Routes:
        ends = frozenset(name for name, node in self.nodes.items() if node.mobility is not None)
        return Routes(self.nodes, {i: link.latency_s for i, link in self.links.items()}, ends)

    def handovers(self, node: str, seed: int) -> Iterator[tuple[float, frozenset[LinkId]]]:
        """For a node that moves: when which of its links are down, from time 0 on.

        Up are the links to the nearest cell and to what has no position; none to a cell while it is handed over. Now
        and then it says the same again, on a path that goes on for ever.
        """
        mobility = self.nodes[node].mobility
        assert mobility is not None
        cells = [b for a, b in self.links if a == node and self.nodes[b].position is not None]
        if not cells:
            return
        at = [position for cell in cells if (position := self.nodes[cell].position) is not None]
        away = {cell: frozenset(((node, cell), (cell, node))) for cell in cells}
        everywhere = frozenset[LinkId]().union(*away.values())
        changes = serving(mobility.path(stream(seed, node, "mobility")), at)
        (_, cell), ready_s, connected = next(changes), 0.0, False
        for then_s, other in chain(changes, [(math.inf, -1)]):
            if not connected and ready_s < then_s:  # else it moves on before it is connected
                yield ready_s, everywhere - away[cells[cell]]
                connected = True
            if other == cell:
                yield then_s, everywhere - away[cells[cell]] if connected else everywhere
            elif then_s < math.inf:
                if mobility.handover:
                    yield then_s, everywhere
                ready_s, cell, connected = then_s + mobility.handover, other, False

    def without(self, down: frozenset[LinkId]) -> Testbed:
        """The same testbed while these links are down: routes lead around them."""
        return self._like(down=down)

    def _like(self, **changes: Any) -> Testbed:
        """The same with some fields changed that make no difference to its nodes, nor to its routes."""
        other = replace(self, **changes)
        other.__dict__.update(routes=self.routes, _servers=self._servers)
        return other

    def reachable(self, source: str) -> list[str]:
        """The other nodes that serve and that there is a route to, and so one back, in the order of the testbed."""
        return [node for node in self._servers if node != source and self.routes.exist(source, node)]

    @cached_property
    def _servers(self) -> list[str]:
        return [name for name, node in self.nodes.items() if node.serves]

    def service(self, node: str, model: str) -> Service:
        """Service times of a model on a node. KeyError is a bug: names are checked before."""
        return self.services[node, model]

    def __getstate__(self) -> dict[str, Any]:
        # What follows from the fields is found again where it is needed.
        return {field.name: getattr(self, field.name) for field in fields(self)}


def realise_links(
    spec: TestbedSpec, *, folder: Path = Path(), where: object = None, seed: int = 1
) -> dict[LinkId, Link]:
    """Both directions of every link, with the rates that files hold and that the seed draws.

    InputError names the field, and the line of a trace file.
    """
    links: dict[LinkId, Link] = {}
    known: dict[RateSpec, Rate] = {}  # a file is read once, whoever names it
    members = {member for name in spec.nodes for member in spec.members(name)}
    for number, link in enumerate(spec.links):
        field = f"{where or spec.name}: links[{number}]"
        for end in link.between:
            if end not in members and end not in spec.nodes:
                raise unknown("node", end, spec.nodes, where=f"{field}.between")
        for a, b in spec.pairs(link):
            if a == b:
                raise InputError(f"{a!r} is linked to itself", where=f"{field}.between")
            if (a, b) in links:
                raise InputError(f"{a!r} and {b!r} are linked twice", where=f"{field}.between")
        for (ways, rate, latency_s), part in zip(spec.directed(link), ("rate", "back.rate"), strict=True):
            try:
                if isinstance(rate, Drawn):
                    links |= {way: Link(way, rate.draw(stream(seed, *way, "rate")), latency_s) for way in ways}
                    continue
                if rate not in known:
                    known[rate] = rate.realise(folder)
            except InputError as error:
                problem = error.problem if error.where is None else f"{error.where}: {error.problem}"
                raise InputError(problem, where=f"{field}.{part}", allowed=error.allowed) from None
            links |= {way: Link(way, known[rate], latency_s) for way in ways}
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
