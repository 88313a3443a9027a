"""The actors of a testbed, one per node, each where it belongs: started, introduced to each other, healed, ended.

Knows Ray's actors and where they run. What goes on in a cell is in `drive.py` and `cell.py`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

from isthmus.policies.plan import Plan
from isthmus.real.clocks import Offset, Reading, offset
from isthmus.real.cluster import ActorGone, on_this_machine, results, start_actor
from isthmus.real.model_files import packed
from isthmus.real.node import NodeServer
from isthmus.workloads.cluster import resource
from isthmus.workloads.errors import RunFailure
from isthmus.workloads.model import Part
from isthmus.workloads.profile import Machine
from isthmus.workloads.testbed import Testbed

_PATIENCE_S = 120
_READINGS = 12


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
    _spares: dict[str, Any] = field(default_factory=dict)
    _shared: Any = None
    _files: Any = None
    _cells: Any = field(default_factory=count)
    _loaded: dict[str, frozenset[Part]] = field(default_factory=dict)
    _answers: dict[str, tuple[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_hosts()
        self._shared = self.ray.put(self.testbed)
        self._files = self.ray.put({name: packed(model) for name, model in self.testbed.models.items()})
        for node in self.testbed.nodes:
            self._join(node, self._start(node))
        self._get([actor.ready.remote() for actor in self._actors.values()])
        self._introduce()

    def close(self) -> None:
        for actor in (*self._actors.values(), *self._spares.values()):
            self.ray.kill(actor)
        self._actors.clear()
        self._spares.clear()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def prepare(self, plans: Iterable[Plan], sources: Mapping[str, str], seed: int) -> None:
        """Load and warm what these plans need, and the answers that `sources` (node: model) compare with."""
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

    def revive(self, node: str) -> Any:
        """Begin to start a fresh actor for a node, with the same parts resident; what to wait for.

        It takes seconds, and longer where the whole machine has to come back; `welcome` lets it in.
        """
        actor = self._spares[node] = self._start(node)
        actor.load.remote(sorted(self._loaded.get(node, ()), key=_order))
        if node in self._answers:
            actor.prepare_answers.remote(*self._answers[node])
        return actor.ready.remote()

    def welcome(self, node: str) -> None:
        """Let a revived actor take its node's place."""
        self._join(node, self._spares.pop(node))
        self._introduce(node)

    def _heal(self) -> None:
        """Fresh actors for nodes that are gone, so that a fault of one cell does not reach into the next."""
        self.died()
        missing = [node for node in self.testbed.nodes if node not in self._actors]
        for node in missing:
            self._loaded.pop(node, None)
            self._answers.pop(node, None)
        ready = [self.revive(node) for node in missing if node not in self._spares]
        self._get(ready)
        for node in missing:
            self._get([self._spares[node].ready.remote()])
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
