"""Running an experiment for real: on actors of this machine, or of a cluster. Knows both shells, imports `real` lazily.

Worlds: `emulated` where every node and link is, `physical` where none is, `mixed` else; `lab` where the machines and
links are a lab's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isthmus.experiments.execute import Experiment, free_folder, new_folder, told
from isthmus.experiments.run_folder import Run, RunWriter
from isthmus.policies.contract import View
from isthmus.policies.plan import Plan
from isthmus.policies.records import Record
from isthmus.policies.registry import PolicySpec
from isthmus.sim.simulator import simulate as simulate_cell
from isthmus.workloads.errors import InputError, within
from isthmus.workloads.faults import Fault
from isthmus.workloads.link_costs import LinkCosts
from isthmus.workloads.nodes import Node
from isthmus.workloads.profile import Machine
from isthmus.workloads.progress import Progress
from isthmus.workloads.requests import Request
from isthmus.workloads.service import Measured
from isthmus.workloads.testbed import Testbed, TestbedSpec

if TYPE_CHECKING:
    from isthmus.real.drive import Driven, Ground
    from isthmus.real.fleet import Fleet

_STALE_DAYS = 30


def run(
    experiment: Experiment,
    out: str | Path | None = None,
    *,
    replace: bool = False,
    cold: bool = False,
    ground: Ground | None = None,
    progress: Progress | None = None,
) -> Run:
    """Run every cell for real into a run folder: nodes with a `host` there, the others on this machine.

    Which parts to load before is found by simulating the cell; a part that is wanted besides is loaded when it is,
    and what that costs is on the record; with `cold` that is so for every part. `ground` is the lab that the hosts are
    in, if they are in one. Needs the `real` extra.
    """
    from isthmus.real.cluster import ActorGone, connect
    from isthmus.real.drive import run_cell
    from isthmus.real.fleet import Fleet

    check_hosts(experiment.testbed_spec, experiment.where)
    testbed, cells = experiment.testbed, experiment.cells()
    world = world_of(testbed) if ground is None else "lab"
    out = free_folder(out, replace) or new_folder(experiment, world)
    total = len(cells) * sum(map(len, experiment.spec.draw(experiment.spec.seeds[0]).values()))
    warnings, updates = check_real(experiment), experiment.updates
    became: list[dict[str, Any]] = []
    with ExitStack() as stack:
        ray = stack.enter_context(connect(experiment.testbed_spec.cluster, experiment.folder))
        fleet = stack.enter_context(Fleet(ray, testbed))
        machines = fleet.machines()
        warnings += check_profiles(testbed, machines) + check_links(experiment)
        # What is known only later is filled in: an interrupted run has what there is until then.
        facts: dict[str, Any] = {
            "oracles": experiment.oracles,
            "machines": {n: it.model_dump() for n, it in machines.items()},
            "pressure": {},
            "energy": {},
            "clocks": {},
            "warnings": warnings,
        }
        facts |= {"updates": became} if updates else {}
        writer = stack.enter_context(RunWriter(out, world, experiment.spec, testbed, keep=ActorGone, **facts))
        for number, (policy, seed) in enumerate(cells):
            tick = _ticking(partial(told, progress, number * total // len(cells), total), policy.label)
            tick(0, "")
            plans = set() if cold else planned(experiment, policy, seed)
            fleet.prepare(plans, {n: s.model for n, s in experiment.spec.sources.items()}, seed)
            with _counted(writer.sink(policy.label, seed).keep, warnings, policy.label) as keep:
                run_cell(
                    fleet,
                    experiment.spec.draw(seed),
                    experiment.make(policy, seed),
                    keep,
                    seed=seed,
                    name=policy.label,
                    faults=experiment.spec.draw_faults(seed),
                    updates=updates,
                    drain_s=experiment.spec.drain,
                    ground=ground,
                    decided=partial(writer.decision, policy=policy.label, seed=seed),
                    updated=_keeping(became, policy=policy.label, seed=seed),
                    ended=_noting(facts, fleet, policy.label, seed),
                    tick=tick,
                )
        if progress is not None:
            progress(total, total, "done")
    return Run.load(out)


def _noting(facts: dict[str, Any], fleet: Fleet, policy: str, seed: int) -> Callable[[Driven], None]:
    """What is known of a cell besides its records, into the facts of a run."""
    cell = f"{policy}/{seed}"

    def note(driven: Driven) -> None:
        energy, drifts_s = driven.energy, driven.drifts_s
        facts["pressure"][cell] = asdict(driven.pressure)
        facts["energy"][cell] = {
            node: asdict(energy[node]) if node in energy else {"joules": None, "source": "modelled"}
            for node in fleet.testbed.nodes
        }
        facts["clocks"][cell] = {n: asdict(of) | {"drift_s": drifts_s.get(n)} for n, of in fleet.offsets.items()}
        facts["warnings"] += [f"{policy}: {said}" for said in driven.warnings()]

    return note


def world_of(testbed: Testbed) -> str:
    """What a real run of a testbed is called."""
    kinds = {node.physical for node in testbed.nodes.values()} | {testbed.is_physical(link) for link in testbed.links}
    return "mixed" if len(kinds) > 1 else "physical" if True in kinds else "emulated"


def _keeping(rows: list[dict[str, Any]], **of: Any) -> Callable[[Mapping[str, Any]], None]:
    return lambda row: rows.append({**of, **row})


def _ticking(tell: Callable[[str, int], None], label: str) -> Callable[[int, str], None]:
    return lambda closed, figures: tell(f"{label}: {figures}" if figures else label, closed)


@contextmanager
def _counted(sink: Callable[[Record], None], warnings: list[str], label: str) -> Iterator[Callable[[Record], None]]:
    """The sink; in the end it is said how many answers were not the whole model's."""
    wrong = 0

    def keep(record: Record) -> None:
        nonlocal wrong
        wrong += record.correct is False
        sink(record)

    try:
        yield keep
    finally:
        if wrong:
            warnings.append(f"{label}: {wrong} answers were not the whole model's")


def check_hosts(spec: TestbedSpec, where: object) -> None:
    """InputError for nodes on machines of a cluster that there is none of."""
    for name, node in spec.nodes.items():
        if node.host is not None and spec.cluster is None:
            raise InputError(
                f"{node.host!r} is a machine of no cluster",
                where=f"{where}: nodes.{name}.host",
                allowed="a `cluster` in the testbed, or no `host`; `isthmus lab run` gives each node one by itself",
            )


def check_real(experiment: Experiment) -> list[str]:
    """Whether the testbed can be run for real: InputError where it cannot, warnings where it may be hard."""
    testbed, spec = experiment.testbed, experiment.testbed_spec
    for number, described in enumerate(spec.links):
        for (ways, _), way in zip(spec.directed(described), ("", "back."), strict=True):
            link = testbed.links[ways[0]]
            if link.features and not testbed.is_physical(ways[0]):
                raise InputError(
                    "is simulated only, so far",
                    where=f"{experiment.where}: links[{number}].{way}{link.features[0]}",
                    allowed="an emulated link has a rate and a latency",
                )
    for source, asked in experiment.spec.sources.items():
        if asked.arrivals.closed:
            raise InputError(
                "is simulated only, so far",
                where=f"{experiment.where}: workload of {source}: arrivals",
                allowed="arrivals that do not depend on the answers",
            )
    for name, described_node in spec.nodes.items():
        if described_node.mobility is not None:
            raise InputError("is simulated only, so far", where=f"{experiment.where}: nodes.{name}.mobility")
    said = []
    for name, node in testbed.nodes.items():
        where = f"{experiment.where}: nodes.{name}"
        only = [field for field in node.special if field in ("battery", "scale")]
        if only or node.discipline == "ps":
            raise InputError(
                f"`{only[0] if only else 'discipline: ps'}` is simulated only so far",
                where=where,
                allowed="slots, room, batch, memory, a speed, and fifo, edf or priority in a real run",
            )
        if node.physical or node.host is not None:
            continue
        services = {m: s for (n, m), s in testbed.services.items() if n == name and isinstance(s, Measured)}
        if services and node.slowdown < 1:
            raise InputError(
                f"slowdown {node.slowdown:g}", where=where, allowed="at least 1: no host runs faster than itself"
            )
        # The host computes each request of a batch by itself.
        size = 1 if node.batch is None else node.batch.size
        slack = min((node.slowdown * testbed.batch_factor(name, m, size) / size for m in services), default=math.inf)
        if slack < 1.5:
            in_batches = f", per request in batches of {size}" if size > 1 else ""
            said.append(f"node {name!r} is only {slack:g} times slower than this host{in_batches}: it has little slack")
        _check_cpu(list(services.values()), where)
        said += _check_backend(node, list(services.values()), where)
    return said


def _check_backend(node: Node, services: Sequence[Measured], where: str) -> list[str]:
    """InputError for a backend that is not here, warnings about profiles of another version of it."""
    from isthmus.real.backend import backend

    with within(f"{where}.backend"):
        here = backend(node.backend)
    return [
        f"node {node.name!r}: its profile is of {here.name} {version}, and this is {here.version}"
        for version in {service.profile.backend_version for service in services}
        if version != here.version
    ]


def _check_cpu(services: Sequence[Measured], where: str) -> None:
    """InputError for profiles of another machine than this one."""
    from isthmus.real.profiler import this_machine

    here = this_machine("host")
    for service in services:
        if (there := service.profile.machine).cpu != here.cpu:
            raise InputError(
                f"its profile was measured on {there.cpu}, and this is {here.cpu}",
                where=where,
                allowed="an emulated node is this machine, slowed down: calibrate here, or give it a `service`",
            )


def check_profiles(testbed: Testbed, machines: dict[str, Machine]) -> list[str]:
    """Warnings about profiles that are of another machine than the node's, or old."""
    said = []
    for (name, model), service in testbed.services.items():
        if not isinstance(service, Measured) or name not in machines:
            continue
        there, here = service.profile.machine, machines[name]
        if there.cpu != here.cpu:
            said.append(f"node {name!r}: the profile of {model} was measured on {there.cpu}, and this is {here.cpu}")
        if (days := _days_since(service.profile.date)) > _STALE_DAYS:
            said.append(f"node {name!r}: the profile of {model} is {days} days old: `isthmus calibrate`")
    return said


def check_links(experiment: Experiment) -> list[str]:
    """A warning about links that were measured long ago."""
    measured = LinkCosts.find(experiment.store).measured
    if not experiment.testbed.measured_links or (days := _days_since(measured)) <= _STALE_DAYS:
        return []
    return [f"the links between machines were measured {days} days ago: `isthmus calibrate`"]


def _days_since(date: str) -> int:
    return (datetime.now(UTC) - datetime.fromisoformat(date)).days


def planned(experiment: Experiment, policy: PolicySpec, seed: int) -> set[Plan]:
    """The plans that a policy makes in simulation."""
    plans: set[Plan] = set()

    def watch(request: Request, attempt: int, view: View, plan: Plan) -> None:
        plans.add(plan)

    faults: list[Fault] = experiment.spec.draw_faults(seed)
    simulate_cell(
        experiment.testbed.at_seed(seed),
        experiment.spec.arrive(seed),
        experiment.make(policy, seed),
        lambda record: None,
        seed=seed,
        name=policy.label,
        faults=faults,
        drain_s=experiment.spec.drain,
        watch=watch,
    )
    return plans
