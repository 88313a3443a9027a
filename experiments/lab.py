"""Experiments in a lab: which hosts and links it takes to run one, and what changes in it there. Starts nothing."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel

from isthmus.experiments.execute import Experiment
from isthmus.real.lab import HEAD, VARIABLE, Lab
from isthmus.workloads.cluster import ClusterSpec
from isthmus.workloads.errors import InputError
from isthmus.workloads.experiment import ExperimentSpec, read_testbed
from isthmus.workloads.faults import places
from isthmus.workloads.links import Link
from isthmus.workloads.nodes import NodeSpec
from isthmus.workloads.routing import LinkId
from isthmus.workloads.testbed import TestbedSpec, realise_links

if TYPE_CHECKING:
    from isthmus.real.lab_ray import LabGround


def hosts_and_links(path: Path, seed: int | None = None) -> tuple[list[str], dict[LinkId, Link]]:
    """The hosts that a lab needs for an experiment or a testbed, one per node, and both directions of every link.

    `seed` is that of rates that are drawn: by default the experiment's first one, or 1. InputError for what a lab
    cannot have.
    """
    spec, experiment = read_testbed(path)
    seeds = (1,) if experiment is None else experiment.seeds
    for name, node in spec.nodes.items():
        if node.mobility is not None:
            raise InputError("is simulated only: hosts of a lab do not move", where=f"{path}: nodes.{name}.mobility")
    nodes = [member for name in spec.nodes for member in spec.members(name)]
    return nodes, realise_links(spec, folder=path.parent, where=path, seed=seeds[0] if seed is None else seed)


def in_lab(experiment: Experiment, lab: Lab, cluster: ClusterSpec) -> Experiment:
    """The experiment as it is run in a lab: every node is on the host of its name, and a group is its members.

    Hosts are this machine, so a node takes this machine's profiles, unless it names one. A host with a limit of CPU is
    a machine of its own: its profiles have its name.
    """
    spec, testbed = experiment.spec, experiment.testbed_spec

    def on_host(name: str, node: NodeSpec) -> NodeSpec:
        limited = lab.host(name).cpu is not None
        profile = None if node.service is not None else node.profile or (name if limited else "host")
        serves = node.count is None if node.serves is None else node.serves
        return node.model_copy(update={"count": None, "serves": serves, "host": name, "profile": profile})

    missing = {member for name in testbed.nodes for member in testbed.members(name)} - {h.name for h in lab.hosts}
    if missing:
        raise InputError(
            f"has no host {min(missing)!r}", where=f"lab {lab.name}",
            allowed=", ".join(host.name for host in lab.hosts if host.name != HEAD),
        )  # fmt: skip
    nodes = {member: on_host(member, node) for name, node in testbed.nodes.items() for member in testbed.members(name)}
    pairs = {pair: link for link in testbed.links for pair in testbed.pairs(link)}
    links = tuple(link.model_copy(update={"between": pair}) for pair, link in pairs.items())
    workload = tuple(spec.sources.values())
    linked = frozenset(pairs) | {(b, a) for a, b in pairs}
    faults = tuple(
        fault.model_copy(update=place) for fault in spec.faults for place in places(fault, testbed.members, linked)
    )
    fields = {**_said(testbed), "nodes": nodes, "links": links, "cluster": cluster}
    changed = ExperimentSpec.model_validate(
        {**_said(spec), "testbed": TestbedSpec.model_validate(fields), "workload": workload, "faults": faults}
    )
    return replace(experiment, spec=changed)


def _said(spec: BaseModel) -> dict[str, object]:
    """Its fields, without what was found out from them."""
    return {name: getattr(spec, name) for name in type(spec).model_fields}


def as_here(experiment: Experiment) -> Experiment:
    """The experiment as it is run where this process is: in a lab as there, elsewhere as it is."""
    if VARIABLE not in os.environ:
        return experiment
    from isthmus.real.lab_ray import cluster

    lab = Lab.find()
    return experiment if lab is None else in_lab(experiment, lab, cluster(lab))


def ground_here(experiment: Experiment) -> LabGround | None:
    """The hand that a run has on its links and machines, where this process is in a lab."""
    if VARIABLE not in os.environ:
        return None
    from isthmus.real.lab_ray import LabGround

    lab = Lab.find()
    return None if lab is None else LabGround(lab, experiment.build_testbed(need_profiles=False, as_declared=True))
