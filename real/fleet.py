"""The actors of a testbed, one per node, each where it belongs: started, introduced to each other, healed, ended.

Knows Ray's actors and where they run. What goes on in a cell is in `drive.py` and `cell.py`.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

from isthmus.policies.plan import Plan
from isthmus.real.clocks import Offset, Reading, offset
from isthmus.real.cluster import ActorGone, on_this_machine, results, start_actor
from isthmus.real.letters import Version
from isthmus.real.model_files import packed
from isthmus.real.node import NodeServer
from isthmus.real.release import Release
from isthmus.real.wire import Address
from isthmus.workloads.cluster import resource
from isthmus.workloads.errors import IsthmusError, RunFailure
from isthmus.workloads.model import Part
from isthmus.workloads.profile import Machine
from isthmus.workloads.testbed import Testbed

_PATIENCE_S = 120
_ANSWER_S = 30
"""After which an actor that does not answer counts as gone, where a run cannot go on without the answer;"""
_SOON_S = 5
"""so long where the other nodes wait meanwhile,"""
_AT_ONCE_S = 1
"""and so long for what will reach them anyhow."""
_READINGS = 12
_DEATHS = 5
"""So often a node is started anew that dies before it is let in."""


@dataclass
class _Spare:
    """An actor that is being made ready to take its node's place."""

    actor: Any
    asked: list[Any]
    """What it was asked to do before."""
    staging: Version | None = None


class Staging(NamedTuple):
    """A node that is being given a version."""

    node: str
    version: Version
    actor: Any
    done: Any


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
    _addresses: dict[str, Address] = field(default_factory=dict)
    _watches: dict[Any, str] = field(default_factory=dict)
    _spares: dict[str, _Spare] = field(default_factory=dict)
    _deaths: Counter[str] = field(default_factory=Counter)
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
        started = {node: self._start(node) for node in self.testbed.nodes}
        for node, address in zip(started, self._get([of.address.remote() for of in started.values()]), strict=True):
            self._join(node, started[node], address)
        self._get([actor.connect.remote(self._addresses) for actor in self._actors.values()])

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

        Models are in the version that the testbed has, whatever was rolled out before. Nodes that are gone, or go
        meanwhile, are started anew.
        """
        if self._offers or self._retired:
            for of in (self._offers, self._staged, self._retired, self.broken, self._loaded, self._answers):
                of.clear()
        wanted: dict[str, set[Part]] = defaultdict(set)
        for plan in plans:
            for stage in plan.stages:
                wanted[stage.node].add(stage.part)
        for left in reversed(range(_DEATHS)):
            self.heal()
            # Also where nothing else is wanted than before: what was loaded on the way in the last cell goes.
            self._loaded = {node: frozenset(wanted[node]) for node in self._actors}
            ready = [self.begin(node, "load", sorted(parts, key=_order)) for node, parts in self._loaded.items()]
            for node, model in sources.items():
                if self._answers.get(node) != (model, seed):
                    self._answers[node] = (model, seed)
                    ready.append(self.begin(node, "prepare_answers", model, seed))
            try:
                self._get(ready)
                return
            except ActorGone:
                if not left:
                    raise
                time.sleep(0.5)  # until Ray knows who it is

    def read_clocks(self) -> None:
        """Find out anew how the clocks of all hosts differ from this one's."""
        for node, actor in self._actors.items():
            try:
                self.offsets[node] = self._offset(actor)
            except RunFailure:
                self.ray.kill(actor)  # it does not answer: `died` will say so

    def drifts_s(self, nodes: Iterable[str]) -> dict[str, float]:
        """How far the clocks of these have gone since they were read, beyond what they may be known wrong by."""
        drifts = {}
        for node in nodes:
            with suppress(RunFailure):
                drifts[node] = self._offset(self._actors[node]).drifted_s(self.offsets[node])
        return drifts

    def _offset(self, actor: Any) -> Offset:
        """RunFailure when it does not answer."""

        def read() -> Reading:
            whose, shows = results(self.ray, [actor.reading.remote()], _SOON_S)[0]
            return whose, shows

        return offset(read, _READINGS)

    def machines(self) -> dict[str, Machine]:
        """Where each node is, as its actor finds it."""
        nodes = list(self._actors)
        found = self._get([self._actors[n].machine.remote(self.testbed.nodes[n].host or "host") for n in nodes])
        return dict(zip(nodes, found, strict=True))

    def next_cell(self) -> int:
        return int(next(self._cells))

    @property
    def alive(self) -> list[str]:
        return list(self._actors)

    def begin(self, node: str, method: str, *arguments: Any) -> Any:
        """Call a node's actor; what to wait for."""
        return getattr(self._actors[node], method).remote(*arguments)

    def answered(self, begun: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """What those answer, by node, that do so until then; of one that is gone the error that says so."""
        waiting = list(begun.values())
        done = self.ray.wait(waiting, num_returns=len(waiting), timeout=timeout_s)[0] if waiting else []
        answers: dict[str, Any] = {}
        for node in [node for node, of in begun.items() if of in done]:
            try:
                [answers[node]] = self._get([begun[node]])
            except ActorGone as gone:
                answers[node] = gone
        return answers

    def ask(self, node: str, method: str, *arguments: Any) -> None:
        """Call a node's actor, and wait for half a minute at most."""
        self.ask_all(method, {node: arguments})

    def ask_all(self, method: str, arguments: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
        """Call actors at the same time, each with arguments of its own: what they answer, by node.

        Those that are gone are left out. So are those that do not answer for half a minute; they are ended, so that
        what they were asked does not happen later.
        """
        begun = {node: self.begin(node, method, *given) for node, given in arguments.items() if node in self._actors}
        answers = self.answered(begun, _ANSWER_S)
        for node in begun.keys() - answers.keys():
            self.ray.kill(self._actors[node])
        return {node: answer for node, answer in answers.items() if not isinstance(answer, ActorGone)}

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
            self.ray.kill(self._actors.pop(node))  # one that only cannot be reached is not to come back
            self._addresses.pop(node)
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
        """Whether a revived actor can be let in. Calling it again and again is what makes it ready.

        One that dies meanwhile is started anew; ActorGone when that has happened too often.
        """
        spare = self._spares[node]
        while self.are_done(spare.asked):
            try:
                self._get(spare.asked)
            except ActorGone as gone:
                self._start_again(node, gone)
                return False
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

    def welcome(self, node: str) -> bool:
        """Let a revived actor take its node's place, unless it is gone or does not answer: then it is started anew.

        Its machine may have been started anew as well, and its clock with it.
        """
        actor = self._spares[node].actor
        try:
            self.offsets[node] = self._offset(actor)
            [address] = results(self.ray, [actor.address.remote()], _SOON_S)
            known = {**self._addresses, node: address}
            results(self.ray, [actor.connect.remote(known)], _SOON_S)  # it first: it has to know who speaks to it
        except RunFailure as gone:
            self._start_again(node, gone)
            return False
        del self._spares[node], self._deaths[node]
        self._join(node, actor, address)
        self.answered({n: self.begin(n, "connect", known) for n in self._actors if n != node}, _AT_ONCE_S)
        return True

    def heal(self) -> None:
        """Fresh actors for nodes that are gone, so that a fault of one cell does not reach into the next.

        RunFailure for a node that does not come back for minutes.
        """
        self.died()
        missing = [node for node in self.testbed.nodes if node not in self._actors]
        for node in missing:
            self._loaded.pop(node, None)
            self._answers.pop(node, None)
            if node not in self._spares:
                self.revive(node)
        until_s = time.monotonic() + _PATIENCE_S
        while missing:
            missing = [node for node in missing if not (self.is_ready(node) and self.welcome(node))]
            if missing and time.monotonic() > until_s:
                where = self.testbed.nodes[missing[0]].host or "this machine"
                raise RunFailure(f"node {missing[0]!r} cannot be started again: {where} has no place for it")
            time.sleep(0.02 if missing else 0.0)

    def _start_again(self, node: str, gone: RunFailure) -> None:
        self._deaths[node] += 1
        if self._deaths[node] >= _DEATHS:
            raise ActorGone(f"node {node!r} dies whenever it is started: {gone}")
        self.ray.kill(self._spares[node].actor)
        self.revive(node)

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

    def stage(self, node: str, version: Version) -> Staging:
        """Begin to give a node a version; wait for its `done`, and then tell `staged`."""
        actor = self._actors[node]
        return Staging(node, version, actor, self._stage(actor, node, version))

    def staged(self, it: Staging) -> None:
        """A node has been given a version. Raises why that failed."""
        self._get([it.done])
        if self._actors.get(it.node) is it.actor:  # not one that has come in its place since
            self._staged[it.node].add(it.version)

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

    def _join(self, node: str, actor: Any, address: Address) -> None:
        self._actors[node], self._addresses[node] = actor, address
        self._watches[actor.watch.remote()] = node

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
