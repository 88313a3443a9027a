"""Calibrating for an experiment: what is measured where, and where it is kept. Imports `real` lazily."""

from __future__ import annotations

from pathlib import Path

from isthmus.experiments.execute import Experiment
from isthmus.workloads.errors import InputError
from isthmus.workloads.profile import Profile
from isthmus.workloads.progress import Progress
from isthmus.workloads.testbed import TestbedSpec, profile_path


def _check_ours(path: Path) -> None:
    """InputError when a profile that would be replaced was measured on another machine."""
    from isthmus.real.profiler import this_machine

    if path.exists() and (there := Profile.load(path).machine).cpu != (here := this_machine("host")).cpu:
        raise InputError(
            f"was measured on {there.cpu}, and this is {here.cpu}", where=path, allowed="a label of its own"
        )


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
    from isthmus.real.cluster import connect

    bare = experiment.build_testbed(need_profiles=False)
    labels = {node.label for node in experiment.testbed_spec.nodes.values() if node.service is None}
    if len(labels) > 1:
        raise InputError(
            f"nodes take the profiles of several machines: {', '.join(sorted(labels))}",
            where=experiment.where,
            allowed="calibrating one host at a time",
        )
    sources = {source.model: source for source in experiment.spec.sources.values()}
    written: list[Path] = []
    with connect(experiment.testbed_spec.cluster, experiment.folder) as ray:
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
