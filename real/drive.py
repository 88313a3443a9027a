"""One cell, driven: requests arise, records flow, nodes go and come back, and every request has one outcome.

The driver. It decides nothing about requests: dispatchers live with their sources. Knows actors through their fleet.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import numpy as np

from isthmus.policies.contract import Policy
from isthmus.policies.records import Outcome, Record
from isthmus.real.fleet import Fleet
from isthmus.real.letters import Cell, Version
from isthmus.real.power import Energy
from isthmus.real.pressure import Pressure, stalled_share
from isthmus.real.rollout import Rollouts
from isthmus.workloads.affliction import check_place
from isthmus.workloads.faults import Fault, NodeFault, merged
from isthmus.workloads.requests import Request
from isthmus.workloads.updates import Update

_LEAD_S = 0.3
"""From opening a cell on the actors to its time 0."""
_COLLECT_S = 0.5
_LATEST = 500
"""Answers that live figures are of."""

Tick = Callable[[int, str], None]
"""Told now and then how many requests are closed, and how they fare."""


class Driven(NamedTuple):
    """What is known of a cell besides its records."""

    pressure: Pressure
    energy: Mapping[str, Energy]
    """Of physical nodes whose hosts measure it, from time 0 to the end."""


class Ground(Protocol):
    """What carries the nodes, where the run has a hand on it, as in the lab: links that fade and machines that go."""

    def begin(self, epoch: float, seed: int, faults: Sequence[Fault]) -> None:
        """Let links be what they are from this reading of the monotonic clock on: faults of links as well."""

    def kill(self, node: str) -> None:
        """End the machine of a node: all of it that Ray started."""

    def restart(self, node: str) -> None:
        """Let the machine come back."""


def run_cell(
    fleet: Fleet,
    requests: Mapping[str, Sequence[Request]],
    policies: Mapping[str, Policy],
    sink: Callable[[Record], None],
    *,
    seed: int,
    name: str = "policy",
    faults: Sequence[Fault] = (),
    updates: Sequence[Update] = (),
    drain_s: float = 60.0,
    ground: Ground | None = None,
    decided: Callable[[Mapping[str, Any]], None] | None = None,
    updated: Callable[[Mapping[str, Any]], None] | None = None,
    tick: Tick | None = None,
) -> Driven:
    """Run one policy's requests in real time; `sink` gets each record soon after it was closed.

    Every request gets exactly one record, also those whose source dies: they have failed. A node whose actor dies
    without being told to is started anew. `updated` is told at the end what became of each update. Raises PolicyFailure
    when a policy raises or plans the impossible, RunFailure when an actor breaks.
    """
    for fault in faults:
        check_place(fault, fleet.testbed)
    faults = merged(faults)
    asked = {source: {request.model for request in of} for source, of in requests.items()}
    rollouts = Rollouts(fleet, asked, updates)
    fleet.read_clocks()
    lead_s = _LEAD_S
    while True:
        epoch = time.monotonic() + lead_s
        cell = Cell(fleet.next_cell(), epoch, seed, name, tuple(faults), cuts_links=ground is not None)
        fleet.call_all("open", {node: (at_host(cell, fleet, node),) for node in fleet.alive})
        late_s = time.monotonic() - epoch
        if late_s <= 0:
            break
        lead_s = _LEAD_S + 2 * late_s  # opening took long on a busy host: begin anew, with nothing lost
    if ground is not None:
        ground.begin(epoch, seed, faults)
    driving = _Driving(fleet, cell, requests, policies, sink, faults, rollouts, drain_s, ground, decided, tick)
    for source in requests:
        driving.start(source)
    try:
        return driving.drive()
    finally:
        if updated is not None:
            for row in rollouts.rows:
                updated(row)


def at_host(cell: Cell, fleet: Fleet, node: str) -> Cell:
    """The cell on the clock of a node's host."""
    return replace(cell, epoch=cell.epoch + (fleet.offsets[node].offset_s if node in fleet.offsets else 0.0))


class _Driving:
    """One cell under way, seen from the driver."""

    def __init__(
        self,
        fleet: Fleet,
        cell: Cell,
        requests: Mapping[str, Sequence[Request]],
        policies: Mapping[str, Policy],
        sink: Callable[[Record], None],
        faults: Sequence[Fault],
        rollouts: Rollouts,
        drain_s: float,
        ground: Ground | None,
        decided: Callable[[Mapping[str, Any]], None] | None,
        tick: Tick | None,
    ) -> None:
        self.fleet, self.cell, self.requests, self.policies = fleet, cell, requests, policies
        self.sink, self.ground, self.decided, self.tick = sink, ground, decided, tick
        self.rollouts = rollouts
        self.under_way: dict[str, frozenset[Version]] = {}
        self.end_s = max((r[-1].arrival_s for r in requests.values() if r), default=0.0) + drain_s
        self.closed: dict[str, set[int]] = {source: set() for source in requests}
        self.running: set[str] = set()
        self.overruns = 0
        self.refusals: Counter[str] = Counter()
        self.live = _Live()
        nodes = [fault for fault in faults if isinstance(fault, NodeFault)]
        self.falls = sorted(((f.down, f.node, f.up) for f in nodes), key=lambda fall: fall[:2])
        self.reviving: dict[str, float] = {}  # not to come before when

    def start(self, source: str, after_s: float = 0.0) -> None:
        """Let a source's requests arise, those after some time; earlier ones that are open have failed."""
        for request in self._open(source):
            if request.arrival_s < after_s:
                self._keep(_lost(request, Outcome.FAILED, f"source {source} down"))
        requests, policy = self._open(source), self.policies[source]
        self.fleet.call(source, "start", requests, policy, self.end_s, self.rollouts.versions)
        self.running.add(source)
        self.under_way.pop(source, None)
        for node in self.fleet.testbed.nodes:
            if node not in self.fleet.alive:
                self.fleet.call(source, "node_is", node, False)

    def drive(self) -> Driven:
        try:
            while self._goes_on():
                self._let_fall()
                self._notice_deaths()
                self._welcome()
                for node in self.fleet.alive:
                    self._collect(node)
                self.rollouts.step(self._now_s, {node: self.under_way.get(node, frozenset()) for node in self.running})
                if self.tick is not None:
                    self.tick(sum(map(len, self.closed.values())), self.live.text())
                time.sleep(self._pause_s() if self._goes_on() else 0.0)
            self._give_up(Outcome.FAILED, "source down")
        except KeyboardInterrupt:
            for source in list(self.running):
                self._collect(source)
            self._give_up(Outcome.UNFINISHED, "interrupted")
            raise
        finally:
            lasted_s = max(self._now_s, 1e-9)
            closed = {node: self.fleet.call(node, "close") for node in self.fleet.alive}
        used = [it[0] for it in closed.values() if it is not None]
        energy = {node: it[1] for node, it in closed.items() if it is not None and it[1] is not None}
        felt = Pressure(
            self.overruns / max(sum(map(len, self.requests.values())), 1),
            sum(u.run_delay_s for u in used) / lasted_s / max(len(used), 1),
            sum(u.cpu_s for u in used) / lasted_s,
            stalled_share(),
            sum(self.refusals.values()),
        )
        return Driven(felt, energy)

    @property
    def _now_s(self) -> float:
        return time.monotonic() - self.cell.epoch

    def _open(self, source: str) -> list[Request]:
        return [r for r in self.requests[source] if r.number not in self.closed[source]]

    def _goes_on(self) -> bool:
        return bool(self.running) or self._awaits_a_source() or self.rollouts.going

    def _awaits_a_source(self) -> bool:
        """Whether a source that is away will be back with requests to make."""
        return self._now_s < self.end_s and any(self._open(node) for node in self.reviving if node in self.requests)

    def _pause_s(self) -> float:
        due = [fall[0] for fall in self.falls[:1]] + [at_s for at_s in self.reviving.values() if at_s > self._now_s]
        due += [] if self.rollouts.going else [self.rollouts.next_s]
        soon_s = 0.05 if self.reviving or self.rollouts.going else _COLLECT_S
        return max(0.0, min([soon_s, *(at_s - self._now_s for at_s in due)]))

    # Nodes that go and come

    def _let_fall(self) -> None:
        while self.falls and self.falls[0][0] <= self._now_s:
            _, node, up = self.falls.pop(0)
            if node not in self.fleet.alive:
                continue
            self._collect(node)  # what it had closed before it goes
            if self.ground is not None:
                self.ground.kill(node)
            self.fleet.kill(node)
            self._mourn([other for other in self.fleet.died() if other != node])
            self._tell(node, up=False)
            if up is not None:
                if self.ground is not None:
                    self.ground.restart(node)
                # It takes seconds to start, so that begins now; it is let in when it is due.
                self.fleet.revive(node)
                self.reviving[node] = up

    def _notice_deaths(self) -> None:
        self._mourn(self.fleet.died())

    def _mourn(self, nodes: Sequence[str]) -> None:
        """These went without being told to: they are started anew."""
        for node in nodes:
            self._tell(node, up=False)
            self.fleet.revive(node)
            self.reviving[node] = 0.0

    def _welcome(self) -> None:
        for node, at_s in list(self.reviving.items()):
            if not self.fleet.is_ready(node) or self._now_s < at_s:
                continue
            del self.reviving[node]
            self.fleet.welcome(node)
            self.fleet.call(node, "open", at_host(self.cell, self.fleet, node))
            self._tell(node, up=True)
            if node in self.requests:
                self.start(node, after_s=self._now_s)

    def _tell(self, node: str, *, up: bool) -> None:
        if not up:
            self.running.discard(node)
        for source in self.running:
            self.fleet.call(source, "node_is", node, up)

    # Records

    def _collect(self, node: str) -> None:
        collected = self.fleet.call(node, "collect")
        if collected is None:
            return  # it is gone: `died` says so next time
        if collected.failure is not None:
            raise collected.failure
        for record in collected.records:
            self._keep(record)
        if self.decided is not None:
            for decision in collected.decisions:
                self.decided(decision)
        self.refusals.update(collected.refusals)
        self.under_way[node] = collected.versions
        self.rollouts.hear(collected.spoilt)
        if collected.done and node in self.running:
            self.running.discard(node)

    def _give_up(self, outcome: Outcome, reason: str) -> None:
        """Every request has an outcome, also those that nobody can speak for any more."""
        for source in self.requests:
            for request in self._open(source):
                self._keep(_lost(request, outcome, reason))

    def _keep(self, record: Record) -> None:
        if record.number not in self.closed[record.source]:
            self.closed[record.source].add(record.number)
            self.overruns += bool(record.overruns)
            self.live.see(record)
            self.rollouts.see(record)
            self.sink(record)


class _Live:
    """How requests have fared, for who watches."""

    def __init__(self) -> None:
        self._latencies_s: deque[float] = deque(maxlen=_LATEST)
        self._outcomes: Counter[str] = Counter()
        self._ends_s: deque[float] = deque(maxlen=_LATEST)

    def see(self, record: Record) -> None:
        self._outcomes[str(record.outcome)] += 1
        if record.latency_s is not None and record.end_s is not None:
            self._latencies_s.append(record.latency_s)
            self._ends_s.append(record.end_s)

    def text(self) -> str:
        """Such as `8.1/s, p50 57 ms, p95 105 ms, 3 failed`."""
        said = []
        if len(self._ends_s) > 1 and (span_s := max(self._ends_s) - min(self._ends_s)) > 0:
            p50, p95 = np.percentile(list(self._latencies_s), (50, 95))
            said.append(f"{(len(self._ends_s) - 1) / span_s:.3g}/s, p50 {1e3 * p50:.3g} ms, p95 {1e3 * p95:.3g} ms")
        said += [f"{n} {outcome}" for outcome, n in self._outcomes.items() if outcome != Outcome.COMPLETED]
        return ", ".join(said)


def _lost(request: Request, outcome: Outcome, reason: str) -> Record:
    return Record(
        number=request.number,
        source=request.source,
        model=request.model,
        arrival_s=request.arrival_s,
        deadline_s=request.deadline_s,
        end_s=None,
        outcome=outcome,
        reason=reason,
        plan=None,
        attempts=0,
    )
