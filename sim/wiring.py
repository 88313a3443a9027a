"""A compiled plan bound to the simulated nodes and links that will carry it out, so that nothing is looked up twice.

Knows compiled plans, and nodes and links by what they do. Holds no state of a request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from isthmus.policies.plan import Compiled, Message
from isthmus.sim.link import Carrier
from isthmus.sim.node import Place
from isthmus.workloads.model import Part
from isthmus.workloads.random import Uniforms
from isthmus.workloads.routing import LinkId
from isthmus.workloads.service import Service
from isthmus.workloads.testbed import Testbed


@dataclass(frozen=True, slots=True)
class Cargo:
    """What is sent: all about a message but its way, and so the same for all sources of a group.

    `tells` is whether its source node sends on each link of the way, and `nth` the how-manieth of its plan's messages
    it is there.
    """

    source: int
    target: int
    bytes: int
    load: int
    encode_s: float
    decode_s: float
    tells: tuple[bool, ...]
    nth: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Leg:
    """A message on its way: the nodes of its path, and the links between them."""

    cargo: Cargo
    nodes: tuple[Place, ...]
    links: tuple[Carrier, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """A stage: its node, how long it takes, and what it sends. `mean_s` is what it always takes where there is no `noise`."""

    node: Place
    own: bool
    mean_s: float
    service: Service
    part: Part
    noise: Uniforms | None
    sends: tuple[Leg, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Wired:
    """A plan: its steps, what the request itself sends, and how many messages each stage waits for.

    `needs` is None where each waits for one: then nobody has to count.
    """

    compiled: Compiled
    steps: tuple[Step, ...]
    first: tuple[Leg, ...]
    needs: tuple[int, ...] | None


class Wiring:
    """Wires each compiled plan once."""

    def __init__(
        self, testbed: Testbed, nodes: Mapping[str, Place], links: Mapping[LinkId, Carrier], seed: int
    ) -> None:
        self._testbed, self._nodes, self._links, self._seed = testbed, nodes, links, seed
        self._wired: dict[Compiled, Wired] = {}
        self._cargoes: dict[Cargo, Cargo] = {}  # one of all that are equal

    def __call__(self, compiled: Compiled) -> Wired:
        wired = self._wired.get(compiled)
        if wired is None:
            wired = self._wired[compiled] = self._wire(compiled)
        return wired

    def _wire(self, compiled: Compiled) -> Wired:
        steps = tuple(self._step(compiled, stage) for stage in range(len(compiled.plan.stages)))
        needs = None if set(compiled.needs) == {1} else compiled.needs
        return Wired(compiled, steps, self._legs(compiled, compiled.sends[-1]), needs)

    def _step(self, compiled: Compiled, stage: int) -> Step:
        where, source, model = compiled.plan.stages[stage], compiled.source, compiled.model.name
        service = self._testbed.service(where.node, model)
        return Step(
            self._nodes[where.node],
            where.node == source,
            service.mean_s(where.part),
            service,
            where.part,
            Uniforms(self._seed, "service", where.node, source) if service.varies else None,
            self._legs(compiled, compiled.sends[stage]),
        )

    def _legs(self, compiled: Compiled, messages: Sequence[Message]) -> tuple[Leg, ...]:
        return tuple(self._leg(compiled, message) for message in messages)

    def _leg(self, compiled: Compiled, message: Message) -> Leg:
        overheads, path = self._testbed.overheads, message.path
        before = [link for link, _ in compiled.loads[: message.load]]

        def code(cost_s: Callable[[str, float], float], node: str) -> float:
            if len(path) == 1:
                return 0.0
            seconds = sum(cost_s(c, raw) for c, raw in zip(message.codecs, message.raw_bytes, strict=True))
            return seconds * self._testbed.nodes[node].slowdown

        links = message.links
        cargo = Cargo(
            message.source,
            message.target,
            message.wire_bytes,
            message.load,
            code(overheads.encode_s, path[0]),
            code(overheads.decode_s, path[-1]),
            tuple([node == compiled.source for node in path[:-1]]),
            tuple([before.count(link) for link in links]),
        )
        cargo = self._cargoes.setdefault(cargo, cargo)
        return Leg(cargo, tuple([self._nodes[node] for node in path]), tuple([self._links[link] for link in links]))
