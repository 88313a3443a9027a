"""What the places of a run did, by group: a thousand cameras are one row. Knows run folders; draws nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from isthmus.experiments.run_folder import Run
from isthmus.workloads.testbed import TestbedSpec


def group_of(spec: TestbedSpec) -> Mapping[str, str]:
    """The name by which the testbed's file calls each node, and each link `a>b`: a member's is its group's."""
    nodes = {member: name for name in spec.nodes for member in spec.members(name)}
    links = {}
    for link in spec.links:
        for a, b in spec.pairs(link):
            links[f"{a}>{b}"], links[f"{b}>{a}"] = f"{nodes[a]}>{nodes[b]}", f"{nodes[b]}>{nodes[a]}"
    return nodes | links


def by_group(places: pd.Series, run: Run) -> pd.Series:
    """Names of places as names of their groups."""
    spec = run.experiment.testbed
    assert isinstance(spec, TestbedSpec)
    return places.map(group_of(spec)).fillna(places)


def node_rows(run: Run) -> list[dict[str, Any]]:
    """Per policy and group of nodes, seeds pooled: how many they are, and what they did. Nothing of an idle group.

    `utilisation` is the share of the slots' time that was worked; `wait_s` the mean of those served. Missing is None.
    """
    if run.world != "simulated" or (nodes := run.nodes).empty:
        return []
    slots = {name: node.slots for name, node in run.testbed.nodes.items()}
    nodes = nodes.assign(group=by_group(nodes["node"], run), time_s=nodes["up_s"] * nodes["node"].map(slots))
    nodes["time_s"] = nodes["rented_s"].fillna(nodes["time_s"])
    rows = []
    for (policy, group), of in nodes.groupby(["policy", "group"], sort=False):
        total = of.drop(columns=["policy", "group", "node", "seed"]).sum(min_count=1)
        if total["served"] or total["refused"]:
            rows.append(
                {
                    "policy": policy,
                    "place": group,
                    "members": of["node"].nunique(),
                    "served": int(total["served"]),
                    "refused": int(total["refused"]),
                    "utilisation": total["busy_s"] / total["time_s"],
                    "wait_s": total["waited_s"] / total["served"] if total["served"] else None,
                    "loads": int(total["loads"]),
                    "energy_j": _known(total["energy_j"]),
                    "money_usd": _known(total["money_usd"]),
                }
            )
    return rows


def link_rows(run: Run) -> list[dict[str, Any]]:
    """The same of links, by direction: messages, bytes, the share of time in which they sent, and the mean wait."""
    if run.world != "simulated" or (links := run.links).empty:
        return []
    lasted = run.nodes.groupby(["policy", "seed"])["up_s"].max().rename("lasted_s")
    links = links.join(lasted, on=["policy", "seed"]).assign(group=by_group(links["link"], run))
    rows = []
    for (policy, group), of in links.groupby(["policy", "group"], sort=False):
        total = of.drop(columns=["policy", "group", "link", "seed"]).sum()
        if total["messages"]:
            rows.append(
                {
                    "policy": policy,
                    "place": group,
                    "members": of["link"].nunique(),
                    "messages": int(total["messages"]),
                    "bytes": int(total["bytes"]),
                    "utilisation": total["busy_s"] / total["lasted_s"],
                    "wait_s": total["waited_s"] / total["messages"],
                    "lost_packets": int(total["lost_packets"]),
                }
            )
    return rows


def _known(value: float) -> float | None:
    return None if value != value else float(value)
