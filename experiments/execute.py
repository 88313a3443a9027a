"""Carrying out an experiment in either world, and calibrating for it. Knows both shells, and imports `real` lazily.

Progress is told to a callback (done, total, text); who shows it is none of this file's business.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from isthmus.experiments.run_folder import Run, RunWriter
from isthmus.policies.contract import Policy, View, is_oracle
from isthmus.policies.plan import Plan
from isthmus.policies.records import Record
from isthmus.policies.registry import PolicySpec
from isthmus.policies.registry import spec as policy_spec
from isthmus.sim.clock import few_collections
from isthmus.sim.simulator import simulate as simulate_cell
from isthmus.workloads.errors import InputError
from isthmus.workloads.experiment import ExperimentSpec
from isthmus.workloads.faults import NodeFault, Recurring
from isthmus.workloads.profile import Profile
from isthmus.workloads.progress import Progress
from isthmus.workloads.random import Uniforms
from isthmus.workloads.requests import Request
from isthmus.workloads.service import Measured
from isthmus.workloads.testbed import Testbed, TestbedSpec, profile_path


@dataclass(frozen=True)
class Experiment:
    """An experiment with everything that it names found and checked. `folder` is where its relative paths start."""

    spec: ExperimentSpec
    folder: Path = Path()
    where: object = None

    @classmethod
    def load(cls, path: str | Path) -> Experiment:
        """Read an experiment file. InputError names file, field, value and what is allowed."""
        return cls(ExperimentSpec.load(path), Path(path).parent, path)

    @classmethod
    def of(cls, fields: Mapping[str, Any], folder: str | Path = ".") -> Experiment:
        """From the fields of an experiment file, as a notebook has them; paths are relative to `folder`."""
        return cls(ExperimentSpec.of(fields, Path(folder)), Path(folder), "experiment")

    @property
    def testbed_spec(self) -> TestbedSpec:
        assert isinstance(self.spec.testbed, TestbedSpec)
        return self.spec.testbed

    @cached_property
    def testbed(self) -> Testbed:
        """The testbed with its profiles; InputError when one is missing or of another model."""
        return self.build_testbed()

    def build_testbed(self, *, need_profiles: bool = True) -> Testbed:
        used = frozenset(source.model for source in self.spec.workload)
        return Testbed.build(
            self.testbed_spec, folder=self.folder, where=self.where, need_profiles=need_profiles, only_models=used
        )

    @property
    def store(self) -> Path:
        """The folder of its profiles."""
        return self.folder / self.testbed_spec.profiles

    @cached_property
    def policies(self) -> list[PolicySpec]:
        """InputError when two of them have the same label, or one is unknown."""
        found = [policy_spec(entry) for entry in self.spec.policies]
        labels = [p.label for p in found]
        if twice := sorted({label for label in labels if labels.count(label) > 1}):
            raise InputError(
                f"two policies are called {twice[0]!r}", where=self.where, allowed="a `label` of its own for each"
            )
        return found

    def check_policies(self) -> None:
        """InputError when a policy cannot be made as the experiment says."""
        for policy in self.policies:
            policy.make(0)

    def cells(self) -> list[tuple[PolicySpec, int]]:
        """What has to be run: every policy under every seed."""
        return [(policy, seed) for seed in self.spec.seeds for policy in self.policies]

    def make(self, policy: PolicySpec, seed: int) -> dict[str, Policy]:
        """A fresh policy for every source, each with a seed of its own."""
        return {node: policy.make(int(Uniforms(seed, "policy", node)[0] * 2**31)) for node in self.spec.sources}

    @property
    def oracles(self) -> list[str]:
        return [p.label for p in self.policies if is_oracle(p.make(0))]


def _free(out: str | Path | None, replace: bool) -> Path | None:
    out = None if out is None else Path(out)
    if out is not None and not replace and (out / "run.json").exists():
        raise InputError(
            "holds a finished run", where=out, allowed="another folder, or --force (replace=True) to replace it"
        )
    return out


def uncalibrated(experiment: Experiment) -> list[str]:
    """Warnings about policies whose decisions were not timed on a testbed that was calibrated otherwise."""
    overheads = experiment.testbed.overheads
    if not overheads.measured:
        measured = any(isinstance(service, Measured) for service in experiment.testbed.services.values())
        return ["decisions, codecs and releases cost nothing here: they were not calibrated"] if measured else []
    timed = {*overheads.decide_s, *experiment.oracles}
    return [
        f"{p.label}: decisions cost nothing here: they were not calibrated"
        for p in experiment.policies
        if p.label not in timed
    ]


def _check_ours(path: Path) -> None:
    """InputError when a profile that would be replaced was measured on another machine."""
    from isthmus.real.profiler import this_machine

    if path.exists() and (there := Profile.load(path).machine).cpu != (here := this_machine("host")).cpu:
        raise InputError(
            f"was measured on {there.cpu}, and this is {here.cpu}", where=path, allowed="a label of its own"
        )


def new_folder(experiment: Experiment, world: str) -> Path:
    """Where a run goes that was not told: a folder of its own in `runs`, so that none is lost."""
    return Path("runs") / f"{experiment.spec.name}-{world}-{datetime.now():%Y%m%d-%H%M%S}"


@few_collections()
def simulate(
    experiment: Experiment,
    out: str | Path | None = None,
    *,
    views: bool = False,
    spans: bool = True,
    replace: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Simulate every cell into a run folder, a new one in `runs` by default. `views` keeps every decision beside it.

    Without `spans` there is only what happened to each request, not where its time went: a third faster, and a fourth
    of the size.

    InputError when the folder holds a finished run already, unless `replace`.
    """
    out = _free(out, replace) or new_folder(experiment, "simulated")
    testbed, cells = experiment.testbed, experiment.cells()
    total = len(cells) * experiment.spec.expected_requests
    facts = {"oracles": experiment.oracles, "warnings": uncalibrated(experiment)}
    with RunWriter(out, "simulated", experiment.spec, testbed, **facts) as writer:
        done = 0
        for policy, seed in cells:
            tick = None if progress is None else partial(_told, progress, done, total, policy.label)
            sink = writer.sink(policy.label, seed, spans=spans, tick=tick)
            totals = simulate_cell(
                testbed.at_seed(seed),
                experiment.spec.arrive(seed),
                experiment.make(policy, seed),
                sink.keep,
                seed=seed,
                name=policy.label,
                faults=experiment.spec.draw_faults(seed),
                drain_s=experiment.spec.drain,
                watch=writer.watch(policy.label, seed) if views else None,
                spans=spans,
            )
            writer.totals("nodes", totals.nodes, policy.label, seed)
            writer.totals("links", totals.links, policy.label, seed)
            sink.flush()
            done += sink.kept
        if progress is not None:
            progress(done, done, "done")
    return Run.load(out)


def run(
    experiment: Experiment, out: str | Path | None = None, *, replace: bool = False, progress: Progress | None = None
) -> Run:
    """Run every cell for real, on actors of this host, into a run folder. Needs the `real` extra.

    Which parts to load before is found by simulating the cell; a part that is wanted besides is loaded when it is,
    and what that costs is on the record.
    """
    from isthmus.real.cluster import local_ray
    from isthmus.real.emulation import Emulation

    out = _free(out, replace) or new_folder(experiment, "emulated")
    testbed, cells = experiment.testbed, experiment.cells()
    total = len(cells) * sum(map(len, experiment.spec.draw(experiment.spec.seeds[0]).values()))
    warnings = check_emulation(experiment)
    wrong: Counter[str] = Counter()
    pressure: dict[str, Any] = {}
    with ExitStack() as stack:
        ray = stack.enter_context(local_ray())
        emulation = stack.enter_context(Emulation(ray, testbed))
        writer = stack.enter_context(RunWriter(out, "emulated", experiment.spec, testbed, oracles=experiment.oracles))
        for number, (policy, seed) in enumerate(cells):
            told = partial(_told, progress, number * total // len(cells), total, policy.label)
            told(0)
            emulation.prepare(
                planned(experiment, policy, seed), {n: s.model for n, s in experiment.spec.sources.items()}, seed
            )
            felt = emulation.run_cell(
                experiment.spec.draw(seed),
                experiment.make(policy, seed),
                _counting(writer.sink(policy.label, seed).keep, wrong, policy.label),
                seed=seed,
                name=policy.label,
                faults=[f for f in experiment.spec.draw_faults(seed) if isinstance(f, NodeFault)],
                drain_s=experiment.spec.drain,
                decided=partial(writer.decision, policy=policy.label, seed=seed),
                tick=told,
            )
            pressure[f"{policy.label}/{seed}"] = vars(felt)
            warnings += [f"{policy.label}: {said}" for said in felt.warnings()]
        if progress is not None:
            progress(total, total, "done")
        warnings += [f"{label}: {count} answers were not the whole model's" for label, count in (+wrong).items()]
        writer.add_facts(pressure=pressure, warnings=warnings)
    return Run.load(out)


def _told(progress: Progress | None, before: int, total: int, label: str, closed: int) -> None:
    if progress is not None:
        progress(before + closed, total, label)


def _counting(sink: Callable[[Record], None], wrong: Counter[str], label: str) -> Callable[[Record], None]:
    """The sink, which also counts answers that were not the whole model's."""

    def keep(record: Record) -> None:
        wrong[label] += record.correct is False
        sink(record)

    return keep


def check_emulation(experiment: Experiment) -> list[str]:
    """Whether this host can emulate the testbed: InputError where it cannot, warnings where it may be hard."""
    from isthmus.real.profiler import this_machine

    here, said = this_machine("host"), []
    for number, described in enumerate(experiment.testbed_spec.links):
        for (ways, _), way in zip(experiment.testbed_spec.directed(described), ("", "back."), strict=True):
            if features := experiment.testbed.links[ways[0]].features:
                raise InputError(
                    "is simulated only, so far",
                    where=f"{experiment.where}: links[{number}].{way}{features[0]}",
                    allowed="in emulation a link has a rate and a latency",
                )
    for number, fault in enumerate(experiment.spec.faults):
        if not isinstance(fault, NodeFault) and not (isinstance(fault, Recurring) and fault.node and not fault.slower):
            raise InputError(
                "is simulated only, so far", where=f"{experiment.where}: faults[{number}]", allowed="nodes that go"
            )
    for name, spec in experiment.testbed_spec.nodes.items():
        if spec.mobility is not None:
            raise InputError("is simulated only, so far", where=f"{experiment.where}: nodes.{name}.mobility")
    for name, node in experiment.testbed.nodes.items():
        where = f"{experiment.where}: nodes.{name}"
        if node.special:
            raise InputError(
                f"`{node.special[0]}` is simulated only so far",
                where=where,
                allowed="slots and a FIFO queue in a real run",
            )
        measured = [s for (n, _), s in experiment.testbed.services.items() if n == name and isinstance(s, Measured)]
        for service in measured:
            if (there := service.profile.machine).cpu != here.cpu:
                raise InputError(
                    f"its profile was measured on {there.cpu}, and this is {here.cpu}",
                    where=where,
                    allowed="an emulated node is this machine, slowed down: calibrate here, or give it a `service`",
                )
        if measured and node.slowdown < 1:
            raise InputError(
                f"slowdown {node.slowdown:g}", where=where, allowed="at least 1: no host runs faster than itself"
            )
        if measured and node.slowdown < 1.5:
            said.append(
                f"node {name!r} is only {node.slowdown:g} times slower than this host, which leaves it little slack"
            )
    return said


def planned(experiment: Experiment, policy: PolicySpec, seed: int) -> set[Plan]:
    """The plans that a policy makes in simulation."""
    plans: set[Plan] = set()

    def watch(request: Request, attempt: int, view: View, plan: Plan) -> None:
        plans.add(plan)

    simulate_cell(
        experiment.testbed.at_seed(seed),
        experiment.spec.arrive(seed),
        experiment.make(policy, seed),
        lambda record: None,
        seed=seed,
        name=policy.label,
        faults=experiment.spec.draw_faults(seed),
        drain_s=experiment.spec.drain,
        watch=watch,
    )
    return plans


def _batch_sizes(testbed: TestbedSpec) -> list[int]:
    """The sizes to measure: 2, 4, 8, … up to the largest batch of each node that has a profile to ask, and that one."""
    nodes = testbed.nodes.values()
    batches = [n.batch for n in nodes if n.service is None and n.batch is not None and n.batch.cost is None]
    sizes = {size for batch in batches for size in (*(2**k for k in range(batch.size.bit_length())), batch.size)}
    return sorted(sizes - {1})


def calibrate(
    experiment: Experiment, *, quick: bool = False, keep_profiles: bool = False, progress: Progress | None = None
) -> list[Path]:
    """Measure what simulating the experiment needs, on this host; the files written.

    Per model of the workload a profile, and what a pilot run finds its parts to cost at the workload's own rhythm;
    then the overheads. Where a node has a `batch` without its `cost`, what batches cost is in the profiles; InputError
    for a model that cannot be batched. `quick` skips the long profile of each block. `keep_profiles` does the pilot
    and the overheads anew, with the profiles that there are, batches and all: half a minute that makes up for a host
    that is not as fast as it was.
    """
    from isthmus.real.calibrate import measure_overheads, measure_profiles, run_pilot
    from isthmus.real.cluster import local_ray

    bare = experiment.build_testbed(need_profiles=False)
    labels = {node.profile for node in experiment.testbed_spec.nodes.values() if node.service is None}
    if len(labels) > 1:
        raise InputError(
            f"nodes take the profiles of several machines: {', '.join(sorted(labels))}",
            where=experiment.where,
            allowed="calibrating one host at a time",
        )
    sources = {source.model: source for source in experiment.spec.sources.values()}
    written: list[Path] = []
    with local_ray() as ray:
        [label] = labels or {""}
        for model in sources if labels else ():
            _check_ours(profile_path(experiment.store, model, label))
        if labels and not keep_profiles:
            models = [bare.models[name] for name in sources]
            sizes = _batch_sizes(experiment.testbed_spec)
            for profile in measure_profiles(ray, models, quick=quick, label=label, batches=sizes, progress=progress):
                path = profile_path(experiment.store, profile.model, label)
                profile.save(path)
        testbed = experiment.build_testbed()
        first = next(iter(experiment.spec.sources.values()))
        policies = {p.label: p.make(0) for p in experiment.policies}
        overheads = measure_overheads(ray, testbed, policies, first.node, first.model, progress)
        late = []
        for source in sources.values():
            pilot = run_pilot(ray, testbed, source, seed=0, progress=progress)
            late.append(pilot.wake_s)
            if labels:
                path = profile_path(experiment.store, source.model, label)
                profile = Profile.load(path)
                profile.at_rhythm(pilot.rhythm(testbed.models[source.model], profile)).save(path)
                written.append(path)
        overheads.model_copy(update={"wake_s": max(late)}).save(experiment.store)
    experiment.__dict__.pop("testbed", None)  # it was built from what was measured before
    return [*dict.fromkeys(written), experiment.store / "overheads.json"]
