"""What faults do to the physics of a run. Knows testbeds and faults; when nodes and links go is the simulator's.

Faults are known before a run begins, so an outage of a link is a rate of 0 for a while, and a straggler is a speed:
what is on the way feels them exactly, without an event.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from isthmus.sim.token import Token
from isthmus.workloads.errors import InputError, unknown
from isthmus.workloads.faults import Fault, LinkFault, LostMessages, SlowNode, factor
from isthmus.workloads.random import Uniforms
from isthmus.workloads.rate import Rate
from isthmus.workloads.routing import LinkId
from isthmus.workloads.testbed import Testbed


def check_place(fault: Fault, testbed: Testbed) -> None:
    """InputError when a fault is of a node or link that the testbed does not have."""
    node, link = getattr(fault, "node", None), getattr(fault, "link", None)
    if node is not None and node not in testbed.nodes:
        raise unknown("node", node, testbed.nodes, where="faults")
    if link is not None and link not in testbed.links:
        raise InputError(f"there is no link between {link[0]!r} and {link[1]!r}", where="faults")


def afflicted(testbed: Testbed, faults: Sequence[Fault]) -> Testbed:
    """The testbed with rates and speeds as faults leave them. Nobody who decides is shown it."""
    outages: dict[LinkId, list[tuple[float, float, float]]] = {}
    straggling: dict[str, list[tuple[float, float, float]]] = {}
    for fault in faults:
        if isinstance(fault, LinkFault):
            for link in (fault.link, fault.link[::-1]):
                outages.setdefault(link, []).append((fault.down, fault.end_s, 0.0))
        elif isinstance(fault, SlowNode):
            straggling.setdefault(fault.node, []).append((fault.start, fault.end_s, 1 / fault.slower))
    if not outages and not straggling:
        return testbed
    links, nodes = dict(testbed.links), dict(testbed.nodes)
    for link, spans in outages.items():
        links[link] = replace(links[link], rate=links[link].rate.times(as_rate(spans)))
    for name, spans in straggling.items():
        usual = nodes[name].speed or Rate.constant(1.0)
        nodes[name] = replace(nodes[name], speed=usual.times(as_rate(spans)))
    return replace(testbed, links=links, nodes=nodes)


def as_rate(spans: Iterable[tuple[float, float, float]]) -> Rate:
    """A factor over time; it may end at 0, for what is never put right."""
    pieces = factor(spans)
    return Rate(tuple(t for t, _ in pieces), tuple(v for _, v in pieces), may_end=True)


class Losses:
    """Which messages never arrive. A draw belongs to (seed, link, source, request, message), not to when it is made."""

    def __init__(self, faults: Sequence[Fault], seed: int) -> None:
        self._seed = seed
        self._by_place: dict[str, list[tuple[float, float, float]]] = {}
        self._noise: dict[tuple[str, str], Uniforms] = {}
        for fault in faults:
            if isinstance(fault, LostMessages):
                while_s = fault.start, fault.end_s, fault.lose
                for a, b in (fault.link, fault.link[::-1]):
                    self._by_place.setdefault(f"{a}>{b}", []).append(while_s)

    def takes(self, token: Token, now_s: float) -> bool:
        """Whether a message that enters a link now is lost there."""
        place = token.way[token.hop].place
        survives = math.prod(1 - lose for start, end, lose in self._by_place.get(place, ()) if start <= now_s < end)
        if survives == 1:
            return False
        request, attempt = token.start.request, token.start.attempt
        key = place, request.source
        noise = self._noise.setdefault(key, Uniforms(self._seed, "loss", *key))
        return noise[(request.number * 8 + attempt) * 64 + token.leg.load % 64] >= survives
