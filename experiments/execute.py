"""An experiment with all that it names, and simulating it. Knows the simulator; real runs are in `real_run.py`.

Progress is told to a callback (done, total, text); who shows it is none of this file's business.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from isthmus.experiments.run_folder import Run, RunWriter
from isthmus.policies.contract import Policy, is_oracle
from isthmus.policies.registry import PolicySpec
from isthmus.policies.registry import spec as policy_spec
from isthmus.sim.clock import few_collections
from isthmus.sim.simulator import simulate as simulate_cell
from isthmus.workloads.errors import InputError
from isthmus.workloads.experiment import ExperimentSpec
from isthmus.workloads.progress import Progress
from isthmus.workloads.random import Uniforms
from isthmus.workloads.service import Measured
from isthmus.workloads.testbed import Testbed, TestbedSpec
from isthmus.workloads.updates import Update, in_order, load_update


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

    def build_testbed(self, *, need_profiles: bool = True, as_declared: bool = False) -> Testbed:
        used = frozenset(source.model for source in self.spec.workload)
        return Testbed.build(
            self.testbed_spec,
            folder=self.folder,
            where=self.where,
            need_profiles=need_profiles,
            only_models=used,
            as_declared=as_declared,
        )

    @property
    def store(self) -> Path:
        """The folder of its profiles."""
        return self.folder / self.testbed_spec.profiles

    @cached_property
    def updates(self) -> list[Update]:
        """New versions of its models, as they come. InputError for a file that is none."""
        return in_order(
            load_update(spec, self.testbed.models[spec.model], f"{self.where}: updates[{number}].to")
            for number, spec in enumerate(self.spec.updates)
        )

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


def free_folder(out: str | Path | None, replace: bool) -> Path | None:
    """InputError where it holds a finished run that is not to be replaced."""
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
    out = free_folder(out, replace) or new_folder(experiment, "simulated")
    testbed, cells = experiment.testbed, experiment.cells()
    _ = experiment.updates  # checked; here they cost nothing and change nothing
    total = len(cells) * experiment.spec.expected_requests
    facts: dict[str, Any] = {"oracles": experiment.oracles, "warnings": uncalibrated(experiment)}
    with RunWriter(out, "simulated", experiment.spec, testbed, **facts) as writer:
        done = 0
        for policy, seed in cells:
            tick = None if progress is None else partial(told, progress, done, total, policy.label)
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


def told(progress: Progress | None, before: int, total: int, label: str, closed: int) -> None:
    """Pass on how far one cell has come, as progress of all."""
    if progress is not None:
        progress(before + closed, total, label)
