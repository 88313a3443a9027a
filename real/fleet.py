"""The actors of a testbed, one per node, each where it belongs: started, introduced to each other, healed, ended.

Knows Ray's actors and where they run. What goes on in a cell is in `drive.py` and `cell.py`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

from isthmus.policies.plan import Plan
from isthmus.real.clocks import Offset, Reading, offset
from isthmus.real.cluster import ActorGone, on_this_machine, results, start_actor
from isthmus.real.letters import Version
from isthmus.real.model_files import packed
from isthmus.real.node import NodeServer
from isthmus.real.release import Release
from isthmus.workloads.cluster import resource
from isthmus.workloads.errors import IsthmusError, RunFailure
from isthmus.workloads.model import Part
from isthmus.workloads.profile import Machine
from isthmus.workloads.testbed import Testbed

_PATIENCE_S = 120
_READINGS = 12


@dataclass
class _Spare:
    """An actor that is being made ready to take its node's place."""

    actor: Any
    asked: list[Any]
    """What it was asked to do before."""
    staging: Version | None = None


@dataclass
class Fleet:
    """Actors for every node of a testbed. Use within `connect`; `close` ends the actors.

    Nodes with a `host` are pinned to that machine of the testbed's cluster; without a cluster everything is here.
    """

    ray: Any
    testbed: Testbed
    offsets: dict[str, Offset] = field(default_factory=dict)
    """By node: how its host's clock differs from this one's."""
    _actors: dict[str, Any] = field(default_factory=dict)
    _watches: dict[Any, str] = field(default_factory=dict)
    _spares: dict[str, _Spare] = field(default_factory=dict)
    _shared: Any = None
    _files: Any = None
    _cells: Any = field(default_factory=count)
    _loaded: dict[str, frozenset[Part]] = field(default_factory=dict)
    _answers: dict[str, tuple[str, int]] = field(default_factory=dict)
    _offers: dict[Version, tuple[Release, Any]] = field(default_factory=dict)
    _staged: dict[str, set[Version]] = field(default_factory=lambda: defaultdict(set))
    _retired: set[Version] = field(default_factory=set)
    broken: dict[Version, str] = field(default_factory=dict)
    """Versions that did not work where a node came back, and why."""

    def __post_init__(self) -> None:
        self._check_hosts()
        self._shared = self.ray.put(self.testbed)
        self._files = self.ray.put({name: packed(model) for name, model in self.testbed.models.items()})
        for node in self.testbed.nodes:
            self._join(node, self._start(node))
        self._get([actor.ready.remote() for actor in self._actors.values()])
        self._introduce()

    def close(self) -> None:
        for actor in (*self._actors.values(), *(spare.actor for spare in self._spares.values())):
            self.ray.kill(actor)
        self._actors.clear()
        self._spares.clear()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def prepare(self, plans: Iterable[Plan], sources: Mapping[str, str], seed: int) -> None:
        """Load and warm what these plans need, and the answers that `sources` (node: model) compare with.

        Models are in the version that the testbed has, whatever was rolled out before.
        """
        if self._offers or self._retired:
            for of in (self._offers, self._staged, self._retired, self.broken, self._loaded, self._answers):
                of.clear()
        self._heal()
        wanted: dict[str, set[Part]] = defaultdict(set)
        for plan in plans:
            for stage in plan.stages:
                wanted[stage.node].add(stage.part)
        parts = {node: frozenset(wanted[node]) for node in self._actors}
        ready = [
            self._actors[node].load.remote(sorted(parts[node], key=_order))
            for node in self._actors
            if self._loaded.get(node) != parts[node]
        ]
        self._loaded = parts
        for node, model in sources.items():
            if self._answers.get(node) != (model, seed):
                self._answers[node] = (model, seed)
                ready.append(self._actors[node].prepare_answers.remote(model, seed))
        self._get(ready)

    def read_clocks(self) -> None:
        """Find out anew how the clocks of all hosts differ from this one's."""
        for node, actor in self._actors.items():
            self.offsets[node] = offset(partial(self._read, actor), _READINGS)

    def _read(self, actor: Any) -> Reading:
        whose, shows = self._get([actor.reading.remote()])[0]
        return whose, shows

    def machines(self) -> dict[str, Machine]:
        """Where each node is, as its actor finds it."""
        nodes = list(self._actors)
        found = self._get([self._actors[n].machine.remote(self.testbed.nodes[n].host or "host") for n in nodes])
        return dict(zip(nodes, found, strict=True))

    def clocks(self) -> dict[str, dict[str, float]]:
        """For the record: the offsets as they were read last, and how well they are known."""
        return {n: {"offset_s": o.offset_s, "error_s": o.error_s} for n, o in self.offsets.items()}

    def next_cell(self) -> int:
        return int(next(self._cells))

    @property
    def alive(self) -> list[str]:
        return list(self._actors)

    def call(self, node: str, method: str, *arguments: Any) -> Any:
        """Call a node's actor and wait; None when it is gone."""
        if node not in self._actors:
            return None
        try:
            return results(self.ray, [getattr(self._actors[node], method).remote(*arguments)], _PATIENCE_S)[0]
        except ActorGone:
            return None

    def call_all(self, method: str, arguments: Mapping[str, tuple[Any, ...]]) -> None:
        """Call actors at the same time, each with arguments of its own, and wait for all."""
        self._get([getattr(self._actors[node], method).remote(*given) for node, given in arguments.items()])

    # Nodes that go and come

    def kill(self, node: str) -> None:
        """End a node's actor, as a crash would, and wait until it is gone."""
        self.ray.kill(self._actors[node])
        self.ray.wait([ref for ref, of in self._watches.items() if of == node], timeout=_PATIENCE_S)

    def died(self) -> list[str]:
        """Nodes whose actors have gone since the last call."""
        if not self._watches:
            return []
        done, _ = self.ray.wait(list(self._watches), num_returns=len(self._watches), timeout=0)
        gone = [self._watches.pop(ref) for ref in done]
        for node in gone:
            del self._actors[node]
        return gone

    def revive(self, node: str) -> None:
        """Begin to start a fresh actor for a node, with the same parts resident and the versions that are on offer.

        It takes seconds, and longer where the whole machine has to come back; `welcome` lets it in when it `is_ready`.
        """
        actor = self._start(node)
        parts = [p for p in self._loaded.get(node, ()) if self._first(p.model) not in self._retired]
        asked = [actor.ready.remote(), actor.load.remote(sorted(parts, key=_order))]
        if node in self._answers:
            asked.append(actor.prepare_answers.remote(*self._answers[node]))
        self._staged.pop(node, None)
        self._spares[node] = _Spare(actor, asked)

    def is_ready(self, node: str) -> bool:
        """Whether a revived actor can be let in. Calling it again and again is what makes it ready."""
        spare = self._spares[node]
        while self.are_done(spare.asked):
            try:
                self._get(spare.asked)
            except ActorGone:
                raise
            except IsthmusError as error:
                if spare.staging is None:
                    raise
                self.broken[spare.staging] = f"{node}: {error}"
            if spare.staging in self._offers:
                self._staged[node].add(spare.staging)
            lacking = [version for version in self._offers if version not in self._staged[node]]
            if not lacking:
                return True
            spare.staging = lacking[0]
            spare.asked = [self._stage(spare.actor, node, spare.staging)]
        return False

    def welcome(self, node: str) -> None:
        """Let a revived actor take its node's place. Its machine may have been started anew, and its clock with it."""
        actor = self._spares.pop(node).actor
        self.offsets[node] = offset(partial(self._read, actor), _READINGS)
        self._join(node, actor)
        self._introduce(node)

    # Versions of models: which is used where, `rollout.py` decides

    def parts_of(self, model: str) -> set[Part]:
        """What was loaded of a model, anywhere."""
        return {part for parts in self._loaded.values() for part in parts if part.model == model}

    def offer(self, release: Release) -> None:
        """A version that every node shall have: who is here when it is staged, others before they are let in."""
        version = release.model.name, release.model.version
        self._offers[version] = release, self.ray.put(release.files)
        self._retired.discard(version)
        self.broken.pop(version, None)

    def lacking(self, version: Version) -> str | None:
        """The next node that does not have a version."""
        return next((node for node in self._actors if version not in self._staged[node]), None)

    def stage(self, node: str, version: Version) -> Any:
        """Begin to give a node a version; what to wait for, and then tell `staged`."""
        return self._stage(self._actors[node], node, version)

    def staged(self, node: str, version: Version, done: Any) -> None:
        """A node has been given a version. Raises why that failed."""
        self._get([done])
        self._staged[node].add(version)

    def withdraw(self, version: Version) -> None:
        """A version is wanted no longer: nodes forget it."""
        self._offers.pop(version, None)
        self._retired.add(version)
        for staged in self._staged.values():
            staged.discard(version)
        for actor in (*self._actors.values(), *(spare.actor for spare in self._spares.values())):
            actor.forget.remote(*version)

    def are_done(self, references: Sequence[Any]) -> bool:
        """Whether actors have done what they were asked, or are gone."""
        return not references or not self.ray.wait(list(references), num_returns=len(references), timeout=0)[1]

    def _stage(self, actor: Any, node: str, version: Version) -> Any:
        release, files = self._offers[version]
        mine = self._loaded.get(node, frozenset())
        probes = {part: probe for part, probe in release.probes.items() if part in mine}
        model, seed = self._answers.get(node, (None, None))
        return actor.stage.remote(release.model, files, probes, seed if model == version[0] else None)

    def _first(self, model: str) -> Version:
        """The version that the testbed has."""
        return model, self.testbed.models[model].version

    def _heal(self) -> None:
        """Fresh actors for nodes that are gone, so that a fault of one cell does not reach into the next."""
        self.died()
        missing = [node for node in self.testbed.nodes if node not in self._actors]
        for node in missing:
            self._loaded.pop(node, None)
            self._answers.pop(node, None)
        for node in missing:
            if node not in self._spares:
                self.revive(node)
        for node in missing:
            self._get(self._spares[node].asked)
            self.welcome(node)

    def _check_hosts(self) -> None:
        if self.testbed.spec.cluster is None:
            return
        there = self.ray.cluster_resources()
        for name, node in self.testbed.nodes.items():
            if node.host is not None and resource(node.host) not in there:
                known = sorted(r.removeprefix(resource("")) for r in there if r.startswith(resource("")))
                raise RunFailure(
                    f"node {name!r} is host {node.host!r}, which is not in the cluster "
                    f"(there are: {', '.join(known) or 'none'}; see `isthmus cluster check`)"
                )

    def _start(self, node: str) -> Any:
        where = placed(self.ray, self.testbed, node)
        address = "127.0.0.1" if self.testbed.spec.cluster is None else None
        return start_actor(self.ray, NodeServer, node, self._shared, self._files, address, **where)

    def _join(self, node: str, actor: Any) -> None:
        self._actors[node] = actor
        self._watches[actor.watch.remote()] = node

    def _introduce(self, fresh: str | None = None) -> None:
        """Let all actors know where the others are; a fresh one first, so that it knows who speaks to it."""
        nodes = list(self._actors)
        peers = dict(zip(nodes, self._get([self._actors[n].address.remote() for n in nodes]), strict=True))
        for some in [[fresh], [n for n in nodes if n != fresh]] if fresh else [nodes]:
            self._get([self._actors[n].connect.remote(peers) for n in some])

    def _get(self, references: list[Any]) -> list[Any]:
        return results(self.ray, references)


def placed(ray: Any, testbed: Testbed, node: str) -> dict[str, Any]:
    """Ray's options for an actor that belongs on the machine of a node."""
    if testbed.spec.cluster is None:
        return {}
    host = testbed.nodes[node].host
    return on_this_machine(ray) if host is None else {"resources": {resource(host): 0.001}}


def _order(part: Part) -> tuple[str, int]:
    return part.model, part.layers
