"""Calibrating for an experiment: what is measured where, and where it is kept. Imports `real` lazily."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from isthmus.experiments.execute import Experiment
from isthmus.experiments.real_run import check_hosts
from isthmus.workloads.documents import write_text
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
    return sorted({size for batch in batches for size in batch.sizes} - {1})


def calibrate(
    experiment: Experiment,
    *,
    quick: bool = False,
    keep_profiles: bool = False,
    resume: bool = False,
    steady: Callable[[], None] | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Measure what simulating the experiment needs, where its nodes are; the files written.

    Per machine, backend and model of the workload a profile, and what a pilot run finds its parts to cost at the
    workload's own rhythm; every link between machines; then the overheads. Where a node has a `batch` without its
    `cost`, what batches cost is in the profiles; InputError for a model that cannot be batched. `quick` skips the long
    profile of each block. `keep_profiles` does all but the profiles anew, with those that there are, batches and all: a
    minute that makes up for a machine that is not as fast as it was. With `resume` what a calibration that was broken
    off had finished is kept. `steady` is called before links are measured: a lab then holds their rates.
    """
    from isthmus.real.calibrate import measure_links, measure_overheads, measure_profiles, run_pilot
    from isthmus.real.cluster import connect
    from isthmus.real.fleet import placed

    store, spec = experiment.store, experiment.testbed_spec
    check_hosts(spec, experiment.where)
    bare = experiment.build_testbed(need_profiles=False, as_declared=True)
    # One node stands for all that share a machine and a backend.
    alike = {(n.label, n.backend.key): (name, n.backend) for name, n in spec.nodes.items() if n.service is None}
    sources = {source.model: source for source in experiment.spec.sources.values()}
    written: list[Path] = []
    with connect(spec.cluster, experiment.folder) as ray, _Done(store / _UNFINISHED, resume) as done:
        for (label, _), (node, backend) in alike.items():
            paths = {model: profile_path(store, model, label, backend) for model in sources}
            if bare.nodes[spec.members(node)[0]].host is None:
                for there in paths.values():
                    _check_ours(there)
            for model, path in paths.items():
                if keep_profiles or (path.name in done and path.exists()):
                    continue
                [profile] = measure_profiles(
                    ray,
                    [bare.models[model]],
                    quick=quick,
                    label=label,
                    backend=backend,
                    batches=_batch_sizes(spec),
                    where=placed(ray, bare, spec.members(node)[0]),
                    progress=None if progress is None or len(alike) == 1 else _on(progress, label),
                )
                profile.save(path)
                done.add(path.name)
        if any(map(bare.is_physical, bare.links)) and "links.json" not in done:
            if steady is not None:
                steady()
            measure_links(ray, bare, progress).save(store)
            done.add("links.json")
            written.append(store / "links.json")
        testbed = experiment.build_testbed()
        first = next(iter(experiment.spec.sources.values()))
        policies = {p.label: p.make(0) for p in experiment.policies}
        overheads = measure_overheads(ray, testbed, policies, first.node, first.model, progress)
        late = []
        for source in sources.values():
            pilot = run_pilot(ray, testbed, source, seed=0, progress=progress)
            late.append(pilot.wake_s)
            for (label, _), (_, backend) in alike.items():
                path = profile_path(store, source.model, label, backend)
                profile = Profile.load(path)
                profile.at_rhythm(pilot.rhythm(testbed.models[source.model], profile)).save(path)
                written.append(path)
        overheads.model_copy(update={"wake_s": max(late)}).save(store)
        done.clear()
    experiment.__dict__.pop("testbed", None)  # it was built from what was measured before
    return [*dict.fromkeys(written), store / "overheads.json"]


_UNFINISHED = "calibration.partial"


class _Done:
    """The files that a calibration has finished, kept in a file until all is done."""

    def __init__(self, path: Path, resume: bool) -> None:
        self._path = path
        self._names = path.read_text(encoding="utf-8").split() if resume and path.is_file() else []

    def __enter__(self) -> _Done:
        return self

    def __exit__(self, *_: object) -> None:
        if self._names:
            write_text(self._path, "\n".join(self._names) + "\n")
        else:
            self._path.unlink(missing_ok=True)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def add(self, name: str) -> None:
        self._names.append(name)
        write_text(self._path, "\n".join(self._names) + "\n")

    def clear(self) -> None:
        self._names.clear()


def _on(progress: Progress, label: str) -> Progress:
    return lambda done, total, text: progress(done, total, f"{label}: {text}")
