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
class Leg:
    """A message, but for the links that it takes: those of its plan from place `load` on, and before `end`.

    `tells` is whether its source node sends on each link, and `nth` the how-manieth of its plan's messages it is there.
    """

    source: int
    target: int
    bytes: int
    load: int
    end: int
    encode_s: float
    decode_s: float
    tells: tuple[bool, ...]
    nth: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """A stage: its node, how long it takes, and what it sends. `constant_s` where the service does not vary."""

    node: Place
    own: bool
    constant_s: float | None
    service: Service
    part: Part
    sends: tuple[Leg, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Wired:
    """A plan: its steps, what the request itself sends, and how many messages each stage waits for.

    `needs` is None where each waits for one: then nobody has to count. `links` are those of all legs, one after the
    other. `noise` is by stage, and empty where no service varies. What is not of these two, a group shares.
    """

    compiled: Compiled
    steps: tuple[Step, ...]
    first: tuple[Leg, ...]
    needs: tuple[int, ...] | None
    links: tuple[Carrier, ...]
    noise: tuple[Uniforms, ...]


Shape = tuple[tuple[Step, ...], tuple[Leg, ...], tuple[int, ...] | None]


class Wiring:
    """Wires each compiled plan once."""

    def __init__(
        self, testbed: Testbed, nodes: Mapping[str, Place], links: Mapping[LinkId, Carrier], seed: int
    ) -> None:
        self._testbed, self._nodes, self._links, self._seed = testbed, nodes, links, seed
        self._wired: dict[Compiled, Wired] = {}
        self._shapes: dict[Shape, Shape] = {}  # one of all that are equal

    def __call__(self, compiled: Compiled) -> Wired:
        wired = self._wired.get(compiled)
        if wired is None:
            wired = self._wired[compiled] = self._wire(compiled)
        return wired

    def _wire(self, compiled: Compiled) -> Wired:
        legs = [self._leg(compiled, message) for message in compiled.messages]
        steps = tuple([self._step(compiled, stage, legs) for stage in range(len(compiled.plan.stages))])
        first = tuple([leg for leg in legs if leg.source == -1])
        needs = None if set(compiled.needs) == {1} else compiled.needs
        shape = steps, first, needs
        steps, first, needs = self._shapes.setdefault(shape, shape)
        links = tuple([self._links[link] for link, _ in compiled.loads])
        noise: tuple[Uniforms, ...] = ()
        if any(step.constant_s is None for step in steps):
            noise = tuple([Uniforms(self._seed, "service", step.node.name, compiled.source) for step in steps])
        return Wired(compiled, steps, first, needs, links, noise)

    def _step(self, compiled: Compiled, stage: int, legs: Sequence[Leg]) -> Step:
        where, model = compiled.plan.stages[stage], compiled.model.name
        service = self._testbed.service(where.node, model)
        return Step(
            self._nodes[where.node],
            where.node == compiled.source,
            None if service.varies else service.mean_s(where.part),
            service,
            where.part,
            tuple([leg for leg in legs if leg.source == stage]),
        )

    def _leg(self, compiled: Compiled, message: Message) -> Leg:
        overheads, path = self._testbed.overheads, message.path
        before = [link for link, _ in compiled.loads[: message.load]]

        def code(cost_s: Callable[[str, float], float], node: str) -> float:
            if len(path) == 1:
                return 0.0
            seconds = sum(cost_s(c, raw) for c, raw in zip(message.codecs, message.raw_bytes, strict=True))
            return seconds * self._testbed.nodes[node].slowdown

        return Leg(
            message.source,
            message.target,
            message.wire_bytes,
            message.load,
            message.load + len(path) - 1,
            code(overheads.encode_s, path[0]),
            code(overheads.decode_s, path[-1]),
            tuple([node == compiled.source for node in path[:-1]]),
            tuple([before.count(link) for link in message.links]),
        )
