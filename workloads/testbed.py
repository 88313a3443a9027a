"""The testbed: nodes, links and models, read from one YAML file that serves the simulator and the real run.

`TestbedSpec` is what people write (pydantic; its JSON Schema is for editors). `Testbed` is what everything else
uses: models loaded, profiles found and checked, links in both directions, routes. It is immutable and it pickles.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import chain, product
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from isthmus.workloads.backend import DEFAULT, BackendSpec
from isthmus.workloads.cluster import ClusterSpec
from isthmus.workloads.documents import parse, read_yaml
from isthmus.workloads.errors import InputError, unknown, within
from isthmus.workloads.link_costs import LinkCost, LinkCosts
from isthmus.workloads.links import (
    Link,
    LinkSpec,
    Medium,
    MediumName,
    MediumSpec,
    Way,
    at_rates,
    files,
    named_media,
    smooth,
    way_back,
    with_files,
)
from isthmus.workloads.mobility import ANYWHERE, Positions, serving
from isthmus.workloads.model import Model, Part, load_model
from isthmus.workloads.nodes import Node, NodeSpec
from isthmus.workloads.overheads import Overheads
from isthmus.workloads.profile import Profile
from isthmus.workloads.random import stream
from isthmus.workloads.rate import Rate
from isthmus.workloads.rates import Drawn, RateSpec
from isthmus.workloads.routing import NONE_DOWN, LinkId, Routes
from isthmus.workloads.service import Measured, Service, Synthetic

NodeName = Annotated[str, Field(pattern=r"^[^\s>]+$")]  # records write a link as `a>b`


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TestbedSpec(_Spec):
    """The testbed file."""

    __test__ = False  # not a pytest class

    name: str = "testbed"
    models: dict[str, str] = Field(min_length=1, description="name: a file.onnx, or a name that `isthmus models` lists")
    nodes: dict[NodeName, NodeSpec] = Field(min_length=1)
    links: tuple[LinkSpec, ...] = ()
    media: dict[MediumName, MediumSpec] = Field(default={}, description="what several links share, by name")
    cluster: ClusterSpec | None = Field(default=None, description="the machines that nodes with a `host` are")
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

    @property
    def is_encrypted(self) -> bool:
        """Whether what its machines say to each other is encrypted."""
        return self.cluster is not None and self.cluster.certificates is not None

    def is_physical(self, link: LinkId) -> bool:
        """Whether the ends of a link are on different machines."""
        a, b = (self._hosts.get(end) for end in link)
        return a != b

    @cached_property
    def _hosts(self) -> dict[str, str]:
        return {name: node.host for name, node in self.nodes.items() if node.host is not None}

    def directed(self, link: LinkSpec) -> Iterator[tuple[list[LinkId], Way]]:
        """The links that one entry stands for, there and then back, with what is said of them."""
        pairs = self.pairs(link)
        there, back = link.ways()
        yield pairs, there
        yield [(b, a) for a, b in pairs], back

    @property
    def traces(self) -> list[str]:
        """The files with rates and delays of its links, and with positions of its nodes."""
        links = (file for spec in (*self.links, *self.media.values()) for file in files(spec))
        paths = (node.mobility for node in self.nodes.values())
        return list(dict.fromkeys((*links, *(it.file for it in paths if isinstance(it, Positions)))))

    def with_traces(self, name: Callable[[str], str]) -> TestbedSpec:
        """The same testbed with its trace files under other names."""
        links = tuple(with_files(link, name) for link in self.links)
        media = {medium: with_files(spec, name) for medium, spec in self.media.items()}
        nodes = {
            n: node.model_copy(update={"mobility": node.mobility.model_copy(update={"file": name(node.mobility.file)})})
            if isinstance(node.mobility, Positions)
            else node
            for n, node in self.nodes.items()
        }
        return self.model_copy(update={"links": links, "media": media, "nodes": nodes})

    def moved(self, way: Path, folder: Path) -> TestbedSpec:
        """As it reads in `folder`, when its own folder is `way` from there: profiles, traces, and models in files."""
        models = {n: str(way / m) if os.path.isfile(folder / way / m) else m for n, m in self.models.items()}
        spec = self.with_traces(lambda file: str(way / file))
        cluster = None if self.cluster is None else self.cluster.moved(way)
        return spec.model_copy(update={"models": models, "profiles": str(way / self.profiles), "cluster": cluster})


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
    measured_links: Mapping[LinkId, LinkCost] = field(default_factory=dict)
    """Those between machines, as calibration found them; `links` are so already."""

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
        as_declared: bool = False,
    ) -> Testbed:
        """From a description. `folder` is what its relative paths start from; `seed` is that of rates that are drawn.

        Without `need_profiles` nodes that take a measured profile get no service times: calibration starts so.
        `only_models` leaves the others out, so that a testbed of many models asks for the profiles it needs. Links are
        as they were measured, where they were, unless `as_declared`.
        """
        models = {}
        for name, source in spec.models.items():
            if only_models is None or name in only_models:
                found = folder / source
                try:
                    models[name] = load_model(found if os.path.isfile(found) else source, name=name)
                except InputError as error:
                    raise InputError(str(error), where=f"{where or spec.name}: models.{name}") from None
        nodes: dict[str, Node] = {}
        for name, s in spec.nodes.items():
            nodes |= {node.name: node for node in s.realise(spec.members(name), folder)}
        kept = LinkCosts.find(folder / spec.profiles).by_link
        costs = {link: cost for link, cost in kept.items() if spec.is_physical(link) and not as_declared}
        unknown_rate = None if need_profiles else _ANY
        links = realise_links(spec, folder=folder, where=where, seed=seed, measured=costs, unknown_rate=unknown_rate)
        services: dict[tuple[str, str], Service] = {}
        store = folder / spec.profiles
        for name, node in spec.nodes.items():
            for model in models.values():
                service: Service
                if node.service is not None:
                    service = Synthetic(model, node.service)
                elif need_profiles:
                    service = Measured(model, _profile(store, model, node), node.slowdown)
                else:
                    continue
                _check_batches(node, service, f"{where or spec.name}: nodes.{name}.batch")
                services |= dict.fromkeys(product(spec.members(name), [model.name]), service)
        spec = spec.with_traces(lambda file: str((folder / file).resolve()))
        return cls(spec.name, models, nodes, links, services, Overheads.find(store), spec, measured_links=costs)

    def at_seed(self, seed: int) -> Testbed:
        """The same testbed with the rates that this seed draws; itself where nothing is drawn."""
        media = {
            name: Medium(name, rate.draw(stream(seed, name, "rate")))
            for name, rate in named_media(self.spec.media)
            if isinstance(rate, Drawn)
        }
        drawn: dict[LinkId, Link] = {}
        for spec in self.spec.links:
            for ways, said in self.spec.directed(spec):
                for way in ways:
                    link = self.links[way]
                    medium = link.medium and media.get(link.medium.name)
                    if medium is not None:
                        rate = medium.rate if said.rate is None else link.rate
                        link = drawn[way] = replace(link, medium=medium, rate=rate)
                    if isinstance(said.rate, Drawn):
                        link = replace(link, rate=said.rate.draw(stream(seed, *way, "rate")))
                        drawn[way] = self.measured_links[way].of(link) if way in self.measured_links else link
        return self._like(links={**self.links, **drawn}) if drawn else self

    @cached_property
    def nominal(self) -> Testbed:
        """The same testbed as a controller may know it, in its `spec` as well.

        Every link and node at its mean rate; no jitter, losses or slow start; of what moves only that it does.
        """

        means: dict[float, Rate] = {}  # links of a group share their rate

        def mean(bytes_per_s: float) -> Rate:
            found = means.get(bytes_per_s)
            if found is None:
                found = means[bytes_per_s] = Rate.constant(bytes_per_s)
            return found

        def known(link: Link) -> Link:
            if link.is_plain and link.rate.is_constant:
                return link  # there is nothing to hide
            medium = link.medium and replace(link.medium, rate=mean(link.medium.rate.mean_bytes_per_s))
            rate = mean(link.bottleneck.mean_bytes_per_s)
            return replace(link, rate=rate, medium=medium, jitter=None, loss=0.0, slow_start=None)

        def told(spec: LinkSpec) -> LinkSpec:
            a, b = self.spec.pairs(spec)[0]  # of a group, its first
            steady = at_rates(spec, *(self.links[way].bottleneck.mean_bytes_per_s for way in ((a, b), (b, a))))
            return smooth(steady)

        links = {i: known(link) for i, link in self.links.items()}
        nodes = {
            n: replace(it, speed=it.speed and _steady(it.speed), mobility=it.mobility and ANYWHERE)
            if it.speed is not None or it.mobility is not None
            else it
            for n, it in self.nodes.items()
        }
        described = {
            n: it if (speed := it.relative_speed) is None else it.at_speed(_steady(speed).mean_bytes_per_s)
            for n, it in self.spec.nodes.items()
        }
        described = {
            n: it if it.mobility is None else it.model_copy(update={"mobility": ANYWHERE})
            for n, it in described.items()
        }
        shared = {it.medium.name: it.medium.rate.mean_bytes_per_s for it in links.values() if it.medium is not None}
        media = {n: at_rates(spec, shared[n], shared[way_back(n)]) for n, spec in self.spec.media.items()}
        update = {"links": tuple(told(link) for link in self.spec.links), "media": media, "nodes": described}
        return self._like(nodes=nodes, links=links, spec=self.spec.model_copy(update=update))

    @cached_property
    def rates(self) -> Mapping[LinkId, Rate]:
        """The true rate of every link, for a message that is alone."""
        return {link: it.bottleneck for link, it in self.links.items()}

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

    def is_physical(self, link: LinkId) -> bool:
        """Whether a real run sends over it what it carries: its ends are on different machines."""
        return self.spec.is_physical(link)

    def declares(self, link: LinkId) -> bool:
        """Whether the testbed file says what rate a link has."""
        return any(
            link in ways and (said.rate is not None or spec.medium is not None)
            for spec in self.spec.links
            for ways, said in self.spec.directed(spec)
        )

    def reachable(self, source: str) -> list[str]:
        """The other nodes that serve and that there is a route to, and so one back, in the order of the testbed."""
        servers = self._servers
        regions = self.routes.regions[source]
        found = sorted({p for region in regions for p in servers.get(region, ())})
        return [name for _, name in found if name != source]

    @cached_property
    def _servers(self) -> dict[int, list[tuple[int, str]]]:
        """The nodes that serve, and their place in the testbed, by region."""
        servers: dict[int, list[tuple[int, str]]] = {}
        for place, (name, node) in enumerate(self.nodes.items()):
            if node.serves:
                for region in self.routes.regions[name]:
                    servers.setdefault(region, []).append((place, name))
        return servers

    def service(self, node: str, model: str) -> Service:
        """Service times of a model on a node. KeyError is a bug: names are checked before."""
        return self.services[node, model]

    def batch_factor(self, node: str, model: str, size: int) -> float:
        """How many times longer than one job a batch takes, on a node that batches."""
        batch = self.nodes[node].batch
        if batch is not None and batch.cost is not None:
            return batch.factor(size)
        return self.service(node, model).batch_factor(size)

    def needs(self, node: str, part: Part) -> tuple[float, float]:
        """What a part takes in the memory of a node: bytes, and seconds to load."""
        size = self.nodes[node].needs_bytes(self.models[part.model], part)
        return size, self.service(node, part.model).load_s(part)

    def __getstate__(self) -> dict[str, Any]:
        # What follows from the fields is found again where it is needed.
        return {f.name: getattr(self, f.name) for f in fields(self)}


_ANY = Rate.constant(125e6)
"""Of links that are still to be measured."""


def _steady(rate: Rate) -> Rate:
    return Rate.constant(rate.mean_bytes_per_s)


def _check_batches(node: NodeSpec, service: Service, where: str) -> None:
    """InputError when it is not known what the batches of a node cost."""
    if node.batch is not None and node.batch.cost is None:
        try:
            service.batch_factor(node.batch.size)
        except InputError as error:
            raise InputError(error.problem, where=where, allowed=error.allowed) from None


def realise_links(
    spec: TestbedSpec,
    *,
    folder: Path = Path(),
    where: object = None,
    seed: int = 1,
    measured: Mapping[LinkId, LinkCost] = MappingProxyType({}),
    unknown_rate: Rate | None = None,
) -> dict[LinkId, Link]:
    """Both directions of every link, with the rates that files hold and that the seed draws.

    Links between machines are as they were `measured`, where they were. `unknown_rate` is for those that were not, and
    are not given a rate.

    InputError names the field, and the line of a trace file.
    """
    links: dict[LinkId, Link] = {}
    place = where or spec.name
    known: dict[RateSpec, Rate] = {}  # a file is read once, whoever names it

    def realise(rate: RateSpec, *names: str) -> Rate:
        if isinstance(rate, Drawn):
            return rate.draw(stream(seed, *names, "rate"))
        if rate not in known:
            known[rate] = rate.realise(folder)
        return known[rate]

    media: dict[str, Medium] = {}
    for name, described in named_media(spec.media):
        with within(f"{place}: media.{name.replace(' ', '.')}.rate"):
            media[name] = Medium(name, realise(described, name))
    members = {member for name in spec.nodes for member in spec.members(name)}
    for number, link in enumerate(spec.links):
        field = f"{place}: links[{number}]"
        for end in link.between:
            if end not in members and end not in spec.nodes:
                raise unknown("node", end, spec.nodes, where=f"{field}.between")
        if link.medium is not None and link.medium not in spec.media:
            raise unknown("medium", link.medium, spec.media, where=f"{field}.medium")
        for a, b in spec.pairs(link):
            if a == b:
                raise InputError(f"{a!r} is linked to itself", where=f"{field}.between")
            if (a, b) in links:
                raise InputError(f"{a!r} and {b!r} are linked twice", where=f"{field}.between")
        shared = (None, None) if link.medium is None else (media[link.medium], media[way_back(link.medium)])
        for (ways, said), medium, part in zip(spec.directed(link), shared, (field, f"{field}.back"), strict=True):
            with within(f"{part}.jitter"):
                more = said.more(folder)
            for way in ways:
                with within(f"{part}.rate"):
                    if said.rate is not None:
                        rate = realise(said.rate, *way)
                    elif medium is not None:
                        rate = medium.rate
                    elif way in measured:
                        rate = Rate.constant(measured[way].rate_bytes_per_s)
                    elif unknown_rate is not None and spec.is_physical(way):
                        rate = unknown_rate
                    else:
                        allowed = "a rate, a `medium` that has one, or between two hosts `isthmus calibrate`"
                        raise InputError("is missing", allowed=allowed)
                made = Link(way, rate, said.latency, medium=medium, **more)
                links[way] = measured[way].of(made) if way in measured else made
    if unused := set(spec.media) - {link.medium for link in spec.links}:
        where = f"{place}: media.{min(unused)}"
        raise InputError("no link is on it", where=where, allowed="the `medium` of a link is its name")
    return links


def _profile(store: Path, model: Model, node: NodeSpec) -> Profile:
    path = profile_path(store, model.name, node.label, node.backend)
    if not os.path.exists(path):  # as Path.exists, and False for a name that no file can have
        other = node.backend != DEFAULT
        with_backend, option = (f" with {node.backend}", f" --backend '{node.backend}'") if other else ("", "")
        raise InputError(
            f"no profile of {model.name!r} on {node.label!r}{with_backend}",
            where=path,
            allowed="make one: `isthmus calibrate EXPERIMENT`, "
            f"or `isthmus profile {model.source}{option} --out {path}`",
        )
    profile = Profile.load(path)
    if profile.measured_with != node.backend:
        raise InputError(
            f"was measured with {profile.measured_with}, and a node that takes it computes with {node.backend}",
            where=path,
            allowed="a profile of the node's `backend`: other backends take other times",
        )
    return profile


def profile_path(store: Path, model: str, label: str, backend: BackendSpec = DEFAULT) -> Path:
    """Where the profile of a model on a machine is kept; that of ONNX Runtime, unless another `backend` is given."""
    return store / (f"{model}@{label}+{backend.key}.json" if backend.key else f"{model}@{label}.json")
