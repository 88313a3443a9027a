"""One cell, driven: requests arise, records flow, nodes go and come back, and every request has one outcome.

The driver. It decides nothing about requests: dispatchers live with their sources. Knows actors through their fleet.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

from isthmus.policies.contract import Policy
from isthmus.policies.records import Outcome, Record
from isthmus.real.cluster import ActorGone
from isthmus.real.fleet import Fleet
from isthmus.real.interrupts import Interrupts
from isthmus.real.letters import Cell, Collected, Version, Work
from isthmus.real.live import Live
from isthmus.real.power import Energy, by_machine
from isthmus.real.pressure import Pressure
from isthmus.real.rollout import Rollouts
from isthmus.workloads.affliction import check_place
from isthmus.workloads.errors import IsthmusError
from isthmus.workloads.faults import Fault, NodeFault, merged
from isthmus.workloads.requests import Request
from isthmus.workloads.updates import Update

_LEAD_S = 0.3
"""From opening a cell on the actors to its time 0."""
_COLLECT_S = 0.5
_HEARD_S = 0.05
"""What actors have to say is waited for so long, and heard the next time otherwise;"""
_LAST_S = 5.0
"""so long where there is no next time."""
_DRIFT_S = 1e-3
"""What clocks may go apart in a cell."""
_OVERTIME_S = 60.0
"""After the end of a cell, for sources that do not say that they are done: then their requests have failed."""

Tick = Callable[[int, str], None]
"""Told now and then how many requests are closed, and how they fare."""


class Driven(NamedTuple):
    """What is known of a cell besides its records."""

    pressure: Pressure
    energy: Mapping[str, Energy]
    """Of physical nodes whose hosts measure it, from time 0 to the end."""
    sharing: Sequence[Sequence[str]]
    """Nodes that share a machine whose meters measure it: nobody knows what each of them took."""
    drifts_s: Mapping[str, float]
    """How far the clocks of nodes' hosts went from the driver's meanwhile."""

    def warnings(self) -> list[str]:
        """What makes its figures worse than they look."""
        said = self.pressure.warnings()
        for nodes in self.sharing:
            said.append(f"nodes {', '.join(nodes)} share a machine and its power meters: their energy is modelled")
        for node, drift_s in self.drifts_s.items():
            if drift_s > _DRIFT_S:
                said.append(f"the clock of {node} drifted by {1e3 * drift_s:.1f} ms: let NTP or chrony steer it there")
        return said


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
    ended: Callable[[Driven], None] | None = None,
    tick: Tick | None = None,
) -> None:
    """Run one policy's requests in real time; `sink` gets each record soon after it was closed.

    Every request gets exactly one record, also those whose source dies: they have failed. A node whose actor dies
    without being told to is started anew. In the end, also after Ctrl-C, `updated` is told what became of each update,
    and `ended` what else is known. Raises PolicyFailure when a policy raises or plans the impossible, RunFailure when
    an actor breaks.
    """
    for fault in faults:
        check_place(fault, fleet.testbed)
    asked = {source: {request.model for request in of} for source, of in requests.items()}
    rollouts = Rollouts(fleet, asked, updates)
    fleet.read_clocks()
    end_s = max((of[-1].arrival_s for of in requests.values() if of), default=0.0) + drain_s
    lead_s = _LEAD_S
    while True:
        epoch = time.monotonic() + lead_s
        cell = Cell(fleet.next_cell(), epoch, seed, name, tuple(merged(faults)), cuts_links=ground is not None)
        work = {node: Work(of, policies[node], end_s, rollouts.versions) for node, of in requests.items()}
        fleet.ask_all("open", {node: (at_host(cell, fleet, node), work.get(node)) for node in fleet.alive})
        late_s = time.monotonic() - epoch
        if late_s <= 0:
            break
        lead_s = _LEAD_S + 2 * late_s  # opening took long on a busy host: begin anew, with nothing lost
    if ground is not None:
        ground.begin(epoch, seed, cell.faults)
    driving = _Driving(fleet, cell, requests, policies, sink, rollouts, end_s, ground, decided, ended, tick)
    try:
        driving.drive()
    finally:
        if updated is not None:
            for row in rollouts.rows:
                updated(row)


def at_host(cell: Cell, fleet: Fleet, node: str) -> Cell:
    """The cell on the clock of a node's host."""
    return replace(cell, epoch=cell.epoch + (fleet.offsets[node].offset_s if node in fleet.offsets else 0.0))


@dataclass
class _Driving:
    """One cell under way, seen from the driver. It does not wait for actors that do not answer soon."""

    fleet: Fleet
    cell: Cell
    requests: Mapping[str, Sequence[Request]]
    policies: Mapping[str, Policy]
    sink: Callable[[Record], None]
    rollouts: Rollouts
    end_s: float
    ground: Ground | None
    decided: Callable[[Mapping[str, Any]], None] | None
    ended: Callable[[Driven], None] | None
    tick: Tick | None

    def __post_init__(self) -> None:
        self.closed: dict[str, set[int]] = {source: set() for source in self.requests}
        self.running = set(self.requests)
        self.under_way: dict[str, frozenset[Version]] = {}
        self.collecting: dict[str, Any] = {}
        self.heard: set[str] = set()  # by a question that was asked after the last step of a roll-out
        self.asked_before: set[str] = set()
        self.overruns = 0
        self.refusals: Counter[str] = Counter()
        self.live = Live()
        nodes = [fault for fault in self.cell.faults if isinstance(fault, NodeFault)]
        self.falls = sorted(((f.down, f.node, f.up) for f in nodes), key=lambda fall: fall[:2])
        self.reviving: dict[str, float] = {}  # not to come before when
        self.for_good: list[str] = []  # whose machines went, and do not come back in this cell

    def drive(self) -> None:
        with Interrupts() as interrupts:
            try:
                while self._goes_on() and not interrupts.came:
                    self._let_fall()
                    self._mourn(self.fleet.died())
                    self._welcome()
                    self._collect(_HEARD_S)
                    self._roll_out()
                    if self.tick is not None:
                        self.tick(sum(map(len, self.closed.values())), self.live.text())
                    time.sleep(self._pause_s() if self._goes_on() else 0.0)
                if interrupts.came:
                    self._hear_out(self.fleet.alive)
                    self._give_up(Outcome.UNFINISHED, "interrupted")
                    raise KeyboardInterrupt
                for source in self.requests:
                    what = "does not answer" if source in self.running else "down"
                    self._give_up(Outcome.FAILED, f"source {source} {what}", [source])
            except BaseException as error:
                if isinstance(error, ActorGone):
                    self._give_up(Outcome.UNFINISHED, "the run failed")
                with suppress(IsthmusError):  # it is not what this run ends by
                    self._end()
                raise
            self._end()

    def _end(self) -> None:
        lasted_s = max(self._now_s, 1e-9)
        closed = self.fleet.ask_all("close", dict.fromkeys(self.fleet.alive, ()))
        if self.ended is not None:
            loads = {node: it[0] for node, it in closed.items() if it is not None}
            energy = {node: it[1] for node, it in closed.items() if it is not None and it[1] is not None}
            overruns = self.overruns / max(sum(map(len, self.requests.values())), 1)
            felt = Pressure.of(overruns, list(loads.values()), lasted_s, self.refusals.total())
            alone, sharing = by_machine(energy, {node: load.host for node, load in loads.items()})
            self.ended(Driven(felt, alone, sharing, self.fleet.drifts_s(closed)))
        if self.ground is not None:
            for node in self.for_good:
                self.ground.restart(node)

    @property
    def _now_s(self) -> float:
        return time.monotonic() - self.cell.epoch

    def _open(self, source: str) -> list[Request]:
        return [r for r in self.requests[source] if r.number not in self.closed[source]]

    def _goes_on(self) -> bool:
        going = bool(self.running) or self._awaits_a_source() or self.rollouts.going
        return going and self._now_s < self.end_s + _OVERTIME_S

    def _awaits_a_source(self) -> bool:
        """Whether a source that is away will be back with requests to make."""
        coming = [node for node, at_s in self.reviving.items() if at_s < self.end_s and node in self.requests]
        return self._now_s < self.end_s and any(map(self._open, coming))

    def _pause_s(self) -> float:
        due = [fall[0] for fall in self.falls[:1]] + [at_s for at_s in self.reviving.values() if at_s > self._now_s]
        due += [] if self.rollouts.going else [self.rollouts.next_s]
        soon_s = 0.05 if self.reviving or self.rollouts.going else _COLLECT_S
        return max(0.0, min([soon_s, *(at_s - self._now_s for at_s in due)]))

    # Nodes that go and come

    def _let_fall(self) -> None:
        while self.falls and self.falls[0][0] <= self._now_s:
            _, node, up = self.falls.pop(0)
            back_s = math.inf if up is None else up
            if node in self.reviving:  # it is not back from the last time
                self.reviving[node] = max(self.reviving[node], back_s)
            if node not in self.fleet.alive:
                continue
            self._hear_out([node])  # what it had closed before it goes
            if self.ground is not None:
                self.ground.kill(node)
            self.fleet.kill(node)
            self._mourn([other for other in self.fleet.died() if other != node])
            self._tell(node, up=False)
            if up is None:
                self.for_good.append(node)
            else:
                if self.ground is not None:
                    self.ground.restart(node)
                # It takes seconds to start, so that begins now; it is let in when it is due.
                self.fleet.revive(node)
                self.reviving[node] = up

    def _mourn(self, nodes: Sequence[str]) -> None:
        """These went without being told to: they are started anew."""
        for node in nodes:
            self._tell(node, up=False)
            self.fleet.revive(node)
            self.reviving[node] = 0.0

    def _welcome(self) -> None:
        for node, at_s in list(self.reviving.items()):
            if not self.fleet.is_ready(node) or self._now_s < at_s or not self.fleet.welcome(node):
                continue
            del self.reviving[node]
            cell, work = at_host(self.cell, self.fleet, node), self._rest(node)
            if node not in self.fleet.ask_all("open", {node: (cell, work)}):
                continue  # it has gone again
            self._tell(node, up=True)
            if work is not None:
                self.running.add(node)
                self.heard.discard(node)

    def _rest(self, node: str) -> Work | None:
        """What still arises at a node that was away. What arose meanwhile has failed."""
        if node not in self.requests:
            return None
        for request in self._open(node):
            if request.arrival_s < self._now_s:
                self._keep(_lost(request, Outcome.FAILED, f"source {node} down"))
        away = [other for other in self.fleet.testbed.nodes if other not in self.fleet.alive]
        return Work(self._open(node), self.policies[node], self.end_s, self.rollouts.versions, away)

    def _tell(self, node: str, *, up: bool) -> None:
        if not up:
            self.running.discard(node)
        for source in self.running & {*self.fleet.alive}:
            self.fleet.begin(source, "node_is", node, up)

    # Records

    def _collect(self, wait_s: float, nodes: Sequence[str] | None = None) -> None:
        """What actors have to say, as far as they answer until then; the others are heard later."""
        for node in self.fleet.alive if nodes is None else nodes:
            if node not in self.collecting:
                self.collecting[node] = self.fleet.begin(node, "collect", self.cell.id)
        # Answers of actors that have gone meanwhile count as well.
        asked = {node: begun for node, begun in self.collecting.items() if nodes is None or node in nodes}
        for node, collected in self.fleet.answered(asked, wait_s).items():
            del self.collecting[node]
            if isinstance(collected, Collected):  # otherwise it is gone, and `died` says so
                self._hear(node, collected)

    def _hear_out(self, nodes: Sequence[str]) -> None:
        """All that these have closed until now: what was asked before may have been answered before."""
        for _ in range(2):
            self._collect(_LAST_S, nodes)

    def _roll_out(self) -> None:
        """A step, when what is under way at every source is known from after the one before."""
        if self.running <= self.heard:
            self.rollouts.step(self._now_s, {node: self.under_way[node] for node in self.running})
            self.heard.clear()
            self.asked_before = set(self.collecting)

    def _hear(self, node: str, collected: Collected) -> None:
        for record in collected.records:
            self._keep(record)
        if self.decided is not None:
            for decision in collected.decisions:
                self.decided(decision)
        self.refusals.update(collected.refusals)
        self.under_way[node] = collected.versions
        if node not in self.asked_before:
            self.heard.add(node)
        self.asked_before.discard(node)
        self.rollouts.hear(collected.spoilt)
        if collected.failure is not None:
            raise collected.failure
        if collected.done:
            self.running.discard(node)

    def _give_up(self, outcome: Outcome, reason: str, sources: Iterable[str] | None = None) -> None:
        """Every request has an outcome, also those that nobody can speak for any more."""
        for source in self.requests if sources is None else sources:
            for request in self._open(source):
                self._keep(_lost(request, outcome, reason))

    def _keep(self, record: Record) -> None:
        if record.number not in self.closed[record.source]:
            self.closed[record.source].add(record.number)
            self.overruns += bool(record.overruns)
            self.live.see(record)
            self.rollouts.see(record)
            self.sink(record)


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
