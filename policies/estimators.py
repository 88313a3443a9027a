"""What a controller believes, from what it has seen. The same code in both worlds, fed by the same events.

Knows the nominal testbed. Never sees a trace or a queue.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from isthmus.policies.contract import LinkBelief, NodeBelief
from isthmus.policies.plan import Compiled
from isthmus.policies.records import Kind, Span
from isthmus.workloads.model import Part
from isthmus.workloads.testbed import LinkId, Testbed

GAIN = 0.4
"""Weight of the newest observation of a rate."""
FORGET_S = 10.0
"""A rate not observed for so long counts 1/e; the nominal one takes its place, or nothing would be tried again."""


@dataclass(slots=True)
class _LinkState:
    nominal_bytes_per_s: float
    rtt_s: float
    rate_bytes_per_s: float
    seen_s: float | None = None
    queued_bytes: float = 0.0

    def observe(self, rate_bytes_per_s: float, now_s: float) -> None:
        self.rate_bytes_per_s = self.estimate(now_s) * (1 - GAIN) + GAIN * rate_bytes_per_s
        self.seen_s = now_s

    def estimate(self, now_s: float) -> float:
        if self.seen_s is None:
            return self.nominal_bytes_per_s
        trust = math.exp(-(now_s - self.seen_s) / FORGET_S)
        return trust * self.rate_bytes_per_s + (1 - trust) * self.nominal_bytes_per_s


@dataclass(slots=True)
class _NodeState:
    slots: int
    work_s: float = 0.0
    stages: int = 0
    seen_s: float | None = None
    up: bool = True


@dataclass
class _Open:
    """What one attempt still has outstanding: stages by number, messages by (from, to) stage and link."""

    compiled: Compiled
    stages: set[int]
    messages: dict[tuple[int, int, LinkId], int] = field(default_factory=dict)


class Estimators:
    """Beliefs of the controller of one source. `links` and `nodes` are what it says, the rest is what it is told."""

    def __init__(self, testbed: Testbed) -> None:
        self._testbed = testbed
        self._links = {
            (a, b): _LinkState(
                link.rate.mean_bytes_per_s,
                link.latency_s + testbed.links[b, a].latency_s,
                link.rate.mean_bytes_per_s,
            )
            for (a, b), link in testbed.links.items()
        }
        self._nodes = {name: _NodeState(node.slots) for name, node in testbed.nodes.items()}
        self._open: dict[tuple[int, int], _Open] = {}
        self._leaving: list[tuple[float, int, int, int, int, LinkId]] = []

    def start(self, number: int, attempt: int, compiled: Compiled) -> None:
        """An attempt was started: its work is outstanding on the nodes and links that it will use."""
        messages = {(m.source, m.target, link): m.wire_bytes for m in compiled.messages for link in m.links}
        for (_, _, link), size in messages.items():
            self._links[link].queued_bytes += size
        for stage in compiled.plan.stages:
            state = self._nodes[stage.node]
            state.work_s += self._work_s(compiled, stage.node, stage.part)
            state.stages += 1
        self._open[number, attempt] = _Open(compiled, set(range(len(compiled.plan.stages))), messages)

    def stage_done(self, number: int, attempt: int, stage: int, now_s: float) -> None:
        """A stage of an attempt is known to be done. Telling it twice, or too late, changes nothing."""
        opened = self._open.get((number, attempt))
        if opened is None or stage not in opened.stages:
            return
        self._nodes[self._release(opened, stage)].seen_s = now_s

    def _release(self, opened: _Open, stage: int) -> str:
        """A stage is no longer outstanding on its node."""
        opened.stages.discard(stage)
        where = opened.compiled.plan.stages[stage]
        state = self._nodes[where.node]
        state.stages -= 1
        state.work_s -= self._work_s(opened.compiled, where.node, where.part)
        if not state.stages:
            state.work_s = 0.0  # not what roundings left of it
        return where.node

    def sent(self, number: int, attempt: int, source: int, target: int, link: LinkId, at_s: float) -> None:
        """The last byte of a message leaves a link at `at_s`; told ahead of it, believed from then on."""
        heapq.heappush(self._leaving, (at_s, number, attempt, source, target, link))

    def _settle(self, now_s: float) -> None:
        while self._leaving and self._leaving[0][0] <= now_s:
            _, number, attempt, source, target, link = heapq.heappop(self._leaving)
            self._left(number, attempt, source, target, link)

    def _left(self, number: int, attempt: int, source: int, target: int, link: LinkId) -> None:
        opened = self._open.get((number, attempt))
        if opened is not None and (size := opened.messages.pop((source, target, link), None)) is not None:
            self._links[link].queued_bytes -= size

    def end(self, number: int, attempt: int, spans: Sequence[Span], now_s: float) -> None:
        """An attempt is over, answered or given up: nothing of it is outstanding, and its spans are evidence."""
        opened = self._open.get((number, attempt))
        if opened is None:
            return
        for stage in list(opened.stages):
            self._release(opened, stage)
        for source, target, link in list(opened.messages):
            self._left(number, attempt, source, target, link)
        del self._open[number, attempt]
        for span in spans:
            if span.kind is Kind.COMPUTE:
                self._nodes[span.place].seen_s = now_s
            elif span.kind is Kind.SEND and span.bytes:
                a, _, b = span.place.partition(">")
                flowing_s = span.end_s - span.start_s - self._testbed.links[a, b].latency_s
                if flowing_s > 0:
                    self._links[a, b].observe(span.bytes / flowing_s, now_s)

    def node_is(self, node: str, *, up: bool, now_s: float) -> None:
        """A node has gone, with all that was under way over it, or is back."""
        self._nodes[node].up = up
        self._nodes[node].seen_s = now_s
        if not up:
            lost = [key for key, opened in self._open.items() if node in opened.compiled.nodes]
            for number, attempt in lost:
                self.end(number, attempt, (), now_s)

    def links(self, now_s: float) -> dict[LinkId, LinkBelief]:
        self._settle(now_s)
        return {
            link: LinkBelief(
                s.estimate(now_s),
                s.rtt_s,
                max(s.queued_bytes, 0.0),
                None if s.seen_s is None else now_s - s.seen_s,
            )
            for link, s in self._links.items()
        }

    def nodes(self, now_s: float) -> dict[str, NodeBelief]:
        return {
            name: NodeBelief(
                max(s.work_s, 0.0) / s.slots, s.stages, None if s.seen_s is None else now_s - s.seen_s, s.up
            )
            for name, s in self._nodes.items()
        }

    def _work_s(self, compiled: Compiled, node: str, part: Part) -> float:
        return self._testbed.service(node, compiled.model.name).mean_s(part)
