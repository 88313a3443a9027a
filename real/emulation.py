"""The emulated testbed: one actor per node on this host, and the cells that are run on it. Keeps records flowing.

The driver. It starts cells, collects what sources close, notices actors that die, and plays faults. It decides nothing:
dispatchers live with the sources of requests.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from isthmus.policies.contract import Policy
from isthmus.policies.plan import Plan
from isthmus.policies.records import Outcome, Record
from isthmus.real.cell import Cell
from isthmus.real.cluster import ActorGone, results, start_actor
from isthmus.real.node import NodeServer
from isthmus.real.pressure import cores, stalled_share
from isthmus.workloads.errors import unknown
from isthmus.workloads.faults import NodeFault
from isthmus.workloads.model import Part
from isthmus.workloads.requests import Request
from isthmus.workloads.testbed import Testbed

_LEAD_S = 0.3
"""From opening a cell on the actors to its time 0."""
_COLLECT_S = 0.5
_PATIENCE_S = 120


@dataclass(frozen=True)
class Pressure:
    """How hard-pressed the host was during a cell. Beyond the limits of `warnings` the figures suffer."""

    overrun_share: float
    run_delay_share: float
    """Seconds that an actor's threads waited for a processor, over the time that the cell took; mean of the actors."""
    cpu_cores: float
    """Processors that the actors kept busy, on average."""
    stalled_share: float | None

    def warnings(self) -> list[str]:
        said = []
        if self.overrun_share > 0.05:
            said.append(f"INVALID: the host was too late for {self.overrun_share:.1%} of requests (limit 5 %)")
        elif self.overrun_share > 0.01:
            said.append(f"the host was too late for {self.overrun_share:.1%} of requests (good: up to 1 %)")
        if self.run_delay_share > 0.15:
            said.append(f"actors waited for a processor {self.run_delay_share:.0%} of the time (good: up to 15 %)")
        if self.cpu_cores > 0.6 * cores():
            said.append(f"actors kept {self.cpu_cores:.1f} of {cores()} processors busy (good: up to 60 %)")
        if self.stalled_share is not None and self.stalled_share > 0.2:
            said.append(f"tasks of this host waited for a processor {self.stalled_share:.0%} of the time (good: 20 %)")
        return said


@dataclass
class Emulation:
    """Actors for every node of a testbed. Use within `local_ray`; `close` ends the actors."""

    ray: Any
    testbed: Testbed
    _actors: dict[str, Any] = field(default_factory=dict)
    _watches: dict[Any, str] = field(default_factory=dict)
    _shared: Any = None
    _cells: Any = field(default_factory=count)
    _loaded: dict[str, frozenset[Part]] = field(default_factory=dict)
    _answers: dict[str, tuple[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._shared = self.ray.put(self.testbed)
        for node in self.testbed.nodes:
            self._start(node)
        self._get([actor.ready.remote() for actor in self._actors.values()])
        self._introduce()

    def close(self) -> None:
        for actor in self._actors.values():
            self.ray.kill(actor)
        self._actors.clear()

    def __enter__(self) -> Emulation:
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

    def run_cell(
        self,
        requests: Mapping[str, Sequence[Request]],
        policies: Mapping[str, Policy],
        sink: Callable[[Record], None],
        *,
        seed: int,
        name: str = "policy",
        faults: Sequence[NodeFault] = (),
        drain_s: float = 60.0,
        decided: Callable[[Mapping[str, Any]], None] | None = None,
        tick: Callable[[int], None] | None = None,
    ) -> Pressure:
        """Run one policy's requests in real time; `sink` gets each record soon after it was closed.

        Every request gets exactly one record, also those whose source dies: they have failed. `tick` is told now and
        then how many are closed. Raises PolicyFailure when a policy raises or plans the impossible, RunFailure when
        an actor breaks.
        """
        for fault in faults:
            if fault.node not in self.testbed.nodes:
                raise unknown("node", fault.node, self.testbed.nodes, where="faults")
        cell = Cell(next(self._cells), time.monotonic() + _LEAD_S, seed, name)
        self._get([actor.open.remote(cell) for actor in self._actors.values()])
        late_s = time.monotonic() - cell.epoch
        if late_s > 0:  # opening took long on a busy host: begin anew, with nothing lost
            cell = Cell(next(self._cells), time.monotonic() + _LEAD_S + 2 * late_s, seed, name)
            self._get([actor.open.remote(cell) for actor in self._actors.values()])
        driving = _Driving(self, cell, requests, policies, sink, faults, drain_s, decided, tick)
        for source in requests:
            driving.start(source)
        return driving.drive()

    def _heal(self) -> None:
        """Fresh actors for nodes that are gone, so that a fault of one cell does not reach into the next."""
        self.died()
        if missing := [node for node in self.testbed.nodes if node not in self._actors]:
            for node in missing:
                self._loaded.pop(node, None)
                self._answers.pop(node, None)
                self._start(node)
            self._introduce()

    # For a cell under way

    def kill(self, node: str) -> None:
        """End a node's actor, as a crash would, and wait until it is gone."""
        self.ray.kill(self._actors[node])
        self.ray.wait([ref for ref, of in self._watches.items() if of == node], timeout=_PATIENCE_S)

    def revive(self, node: str, cell: Cell) -> None:
        """A fresh actor for a node, with the same parts resident, in the cell under way."""
        actor = self._start(node)
        self._get([actor.load.remote(sorted(self._loaded.get(node, ()), key=_order))])
        if node in self._answers:
            self._get([actor.prepare_answers.remote(*self._answers[node])])
        self._introduce()
        self._get([actor.open.remote(cell)])

    def died(self) -> list[str]:
        """Nodes whose actors have gone since the last call."""
        done, _ = (
            self.ray.wait(list(self._watches), num_returns=len(self._watches), timeout=0) if self._watches else ([], [])
        )
        gone = [self._watches.pop(ref) for ref in done]
        for node in gone:
            del self._actors[node]
        return gone

    def call(self, node: str, method: str, *arguments: Any) -> Any:
        """Call a node's actor and wait; None when it is gone."""
        if node not in self._actors:
            return None
        try:
            return results(self.ray, [getattr(self._actors[node], method).remote(*arguments)], _PATIENCE_S)[0]
        except ActorGone:
            return None

    @property
    def alive(self) -> list[str]:
        return list(self._actors)

    def _start(self, node: str) -> Any:
        actor = self._actors[node] = start_actor(self.ray, NodeServer, node, self._shared)
        self._watches[actor.watch.remote()] = node
        return actor

    def _introduce(self) -> None:
        self._get([actor.connect.remote(self._actors) for actor in self._actors.values()])

    def _get(self, references: list[Any]) -> list[Any]:
        return results(self.ray, references)


def _order(part: Part) -> tuple[str, int]:
    return part.model, part.layers


class _Driving:
    """One cell under way, seen from the driver."""

    def __init__(
        self,
        emulation: Emulation,
        cell: Cell,
        requests: Mapping[str, Sequence[Request]],
        policies: Mapping[str, Policy],
        sink: Callable[[Record], None],
        faults: Sequence[NodeFault],
        drain_s: float,
        decided: Callable[[Mapping[str, Any]], None] | None,
        tick: Callable[[int], None] | None,
    ) -> None:
        self.emulation, self.cell, self.requests, self.policies = emulation, cell, requests, policies
        self.sink, self.decided, self.tick = sink, decided, tick
        self.end_s = max((r[-1].arrival_s for r in requests.values() if r), default=0.0) + drain_s
        self.closed: dict[str, set[int]] = {source: set() for source in requests}
        self.running: set[str] = set()
        self.overruns = 0
        events = [(f.down, f.node, False) for f in faults] + [(f.up, f.node, True) for f in faults if f.up is not None]
        self.events = sorted(events)

    def start(self, source: str, after_s: float = 0.0) -> None:
        """Let a source's requests arise, those after some time; earlier ones that are open have failed."""
        for request in self._open(source):
            if request.arrival_s < after_s:
                self._keep(_lost(request, Outcome.FAILED, f"source {source} down"))
        self.emulation.call(source, "start", self._open(source), self.policies[source], self.end_s)
        self.running.add(source)
        for node in self.emulation.testbed.nodes:
            if node not in self.emulation.alive:
                self.emulation.call(source, "node_is", node, False)

    def drive(self) -> Pressure:
        try:
            while self.running or any(up and node in self.requests and self._open(node) for _, node, up in self.events):
                self._play_faults()
                self._notice_deaths()
                for node in self.emulation.alive:
                    self._collect(node)
                if self.tick is not None:
                    self.tick(sum(map(len, self.closed.values())))
                due = [self.events[0][0] - self._now_s] if self.events else []
                time.sleep(max(0.0, min([_COLLECT_S, *due])) if self.running or due else 0.0)
            self._give_up(Outcome.FAILED, "source down")
        except KeyboardInterrupt:
            for source in list(self.running):
                self._collect(source)
            self._give_up(Outcome.UNFINISHED, "interrupted")
            raise
        finally:
            lasted_s = max(self._now_s, 1e-9)
            used = [u for node in self.emulation.alive if (u := self.emulation.call(node, "close")) is not None]
        return Pressure(
            self.overruns / max(sum(map(len, self.requests.values())), 1),
            sum(u.run_delay_s for u in used) / lasted_s / max(len(used), 1),
            sum(u.cpu_s for u in used) / lasted_s,
            stalled_share(),
        )

    @property
    def _now_s(self) -> float:
        return time.monotonic() - self.cell.epoch

    def _open(self, source: str) -> list[Request]:
        return [r for r in self.requests[source] if r.number not in self.closed[source]]

    def _play_faults(self) -> None:
        while self.events and self.events[0][0] <= self._now_s:
            _, node, up = self.events.pop(0)
            if not up:
                if node in self.emulation.alive:
                    self._collect(node)  # what it had closed before it goes
                    self.emulation.kill(node)
                    self._notice_deaths()
            elif node not in self.emulation.alive:
                self.emulation.revive(node, self.cell)
                self._tell(node, up=True)
                if node in self.requests:
                    self.start(node, after_s=self._now_s)

    def _notice_deaths(self) -> None:
        for node in self.emulation.died():
            self._tell(node, up=False)

    def _tell(self, node: str, *, up: bool) -> None:
        if not up:
            self.running.discard(node)
        for source in self.running:
            self.emulation.call(source, "node_is", node, up)

    def _collect(self, node: str) -> None:
        collected = self.emulation.call(node, "collect")
        if collected is None:
            return  # it is gone: `died` says so next time
        if collected.failure is not None:
            raise collected.failure
        for record in collected.records:
            self._keep(record)
        if self.decided is not None:
            for decision in collected.decisions:
                self.decided(decision)
        if collected.done:
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
