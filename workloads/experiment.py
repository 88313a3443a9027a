"""The experiment file: which testbed, workload, policies and seeds. Knows no shell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from isthmus.workloads.documents import parse, read_yaml
from isthmus.workloads.errors import InputError, unknown
from isthmus.workloads.faults import Fault, FaultSpec, NodeFault, Recurring, draw_faults, places
from isthmus.workloads.requests import ClosedLoop, Request, Source
from isthmus.workloads.routing import LinkId
from isthmus.workloads.testbed import TestbedSpec
from isthmus.workloads.units import Seconds
from isthmus.workloads.updates import UpdateSpec


class ExperimentSpec(BaseModel):
    """What people write. `testbed` is a file beside this one, or the testbed itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = "experiment"
    testbed: TestbedSpec | str
    workload: tuple[Source, ...] = Field(min_length=1)
    policies: tuple[str | dict[str, dict[str, Any]], ...] = Field(min_length=1)
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(1,), min_length=1)
    faults: tuple[FaultSpec, ...] = ()
    updates: tuple[UpdateSpec, ...] = ()
    drain: Seconds = Field(default=60.0, description="how long after the last arrival answers are waited for")

    @classmethod
    def load(cls, path: str | Path) -> ExperimentSpec:
        """Read an experiment file with its testbed inside. InputError names file, field, value and what is allowed."""
        return cls.of(read_yaml(path), Path(path).parent, where=path)

    @classmethod
    def of(cls, fields: Any, folder: Path, where: object = "experiment") -> ExperimentSpec:
        """From the fields of a file; `folder` is what its relative paths start from."""
        spec = parse(cls, fields, where=where)
        workload = tuple(source.resolved(folder) for source in spec.workload)
        updates = tuple(update.resolved(folder) for update in spec.updates)
        spec = spec.model_copy(update={"workload": workload, "updates": updates})
        if isinstance(spec.testbed, str):
            file = folder / spec.testbed
            testbed = parse(TestbedSpec, read_yaml(file), where=file)
            spec = spec.model_copy(update={"testbed": testbed.moved(Path(spec.testbed).parent, folder)})
        spec.check(where=where)
        return spec

    def check(self, where: object = None) -> None:
        """InputError for names that do not exist, and for workloads without an end."""
        assert isinstance(self.testbed, TestbedSpec)
        seen: set[str] = set()
        for number, source in enumerate(self.workload):
            field = f"{where or self.name}: workload[{number}]"
            try:
                members = self.testbed.members(source.node)
            except KeyError:
                raise unknown("node", source.node, self.testbed.nodes, where=f"{field}.node") from None
            if source.model not in self.testbed.models:
                raise unknown("model", source.model, self.testbed.models, where=f"{field}.model")
            if twice := seen.intersection(members):
                raise InputError(f"node {min(twice)!r} has two sources", where=f"{field}.node", allowed="one per node")
            seen.update(members)
            endless = source.arrivals.kind != "replay"
            if endless and source.requests is None and source.duration is None:
                raise InputError("never ends", where=field, allowed="`requests` or `duration`")
        recurs = any(isinstance(fault, Recurring) for fault in self.faults)
        for number, source in enumerate(self.workload):
            if recurs and source.arrivals.closed and source.duration is None:
                field = f"{where or self.name}: workload[{number}].duration"
                raise InputError(
                    "is missing: faults that recur have to know how long a closed loop goes on", where=field
                )
        asked = {source.model for source in self.workload}
        for number, update in enumerate(self.updates):
            if update.model not in asked:
                raise unknown("model", update.model, asked, where=f"{where or self.name}: updates[{number}].model")
        if len(set(self.seeds)) < len(self.seeds):
            raise InputError("a seed is given twice", where=f"{where or self.name}: seeds")
        for number, fault in enumerate(self.faults):
            field = f"{where or self.name}: faults[{number}]"
            try:
                if not places(fault, self.testbed.members, self._links):
                    linked = ", ".join(f"{a}–{b}" for a, b in (link.between for link in self.testbed.links))
                    a, b = getattr(fault, "link", ("", ""))
                    raise InputError(
                        f"there is no link between {a!r} and {b!r}",
                        where=f"{field}.link",
                        allowed=linked or "none are defined",
                    )
            except KeyError as error:
                at = "link" if getattr(fault, "link", None) else "node"
                raise unknown("node", error.args[0], self.testbed.nodes, where=f"{field}.{at}") from None
            for other in self.faults[:number]:
                if isinstance(fault, NodeFault) and isinstance(other, NodeFault) and fault.overlaps(other):
                    raise InputError(f"node {fault.node!r} is down already at that time", where=field)

    @cached_property
    def _links(self) -> frozenset[LinkId]:
        assert isinstance(self.testbed, TestbedSpec)
        pairs = {pair for link in self.testbed.links for pair in self.testbed.pairs(link)}
        return frozenset(pairs | {(b, a) for a, b in pairs})

    def draw_faults(self, seed: int) -> list[Fault]:
        """What goes wrong in one run, in order of time: the same for every policy.

        What recurs is drawn up to half as long again as the workload is expected to last.
        """
        assert isinstance(self.testbed, TestbedSpec)
        until_s = 1.5 * max(source.expected_s for source in self.sources.values()) + self.drain
        return draw_faults(self.faults, self.testbed.members, self._links, seed, until_s)

    @cached_property
    def sources(self) -> Mapping[str, Source]:
        """Every source by its node; each member of a group is one."""
        assert isinstance(self.testbed, TestbedSpec)
        return {
            node: source if node == source.node else source.model_copy(update={"node": node})
            for source in self.workload
            for node in self.testbed.members(source.node)
        }

    def draw(self, seed: int) -> Mapping[str, list[Request]]:
        """The requests of every source. The same seed gives the same requests, whatever the policy."""
        return {node: source.draw(seed) for node, source in self.sources.items()}

    def arrive(self, seed: int) -> Mapping[str, Iterator[Request] | ClosedLoop]:
        """The same, drawn one by one as they are taken; and closed loops, for a simulation."""
        return {
            node: source.loop(seed) if source.arrivals.closed else source.arrive(seed)
            for node, source in self.sources.items()
        }

    @property
    def expected_requests(self) -> int:
        """About how many requests one run will have, for progress."""
        return sum(source.expected for source in self.sources.values())


def read_testbed(path: Path) -> tuple[TestbedSpec, ExperimentSpec | None]:
    """The testbed in a file, or that of the experiment in it, and the experiment. InputError for what is neither."""
    fields = read_yaml(path)
    if not isinstance(fields, dict) or {"testbed", "workload"}.isdisjoint(fields):
        return parse(TestbedSpec, fields, where=path), None
    experiment = ExperimentSpec.of(fields, path.parent, where=path)
    assert isinstance(experiment.testbed, TestbedSpec)
    return experiment.testbed, experiment
