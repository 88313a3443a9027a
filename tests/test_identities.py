"""What holds of every run, whatever happens: Little's law, slots, the same bytes, the same luck for all policies."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from itertools import pairwise, product, takewhile
from typing import Any

import numpy as np
import pytest

from isthmus.experiments.execute import Experiment, simulate
from isthmus.policies.least_delay import LeastDelay
from isthmus.policies.records import Kind, Record, Span
from isthmus.policies.static import Fixed, Random
from isthmus.sim.simulator import simulate as simulate_cell
from isthmus.workloads.arrivals import Poisson
from isthmus.workloads.faults import LinkFault
from isthmus.workloads.requests import Source

GAMMA = {"distribution": "gamma"}
NODES = {
    "device": {"service": {"mean": "100ms", **GAMMA}},
    "sensor": {"service": {"mean": "150ms", **GAMMA}},
    "edge": {"service": {"mean": "60ms", **GAMMA}, "slots": 2},
    "cloud": {"service": {"mean": "40ms", **GAMMA}, "slots": 3},
}
LINKS = [
    {"between": ["device", "edge"], "rate": [["0s", "8Mbit"], ["2s", "1Mbit"], ["3s", 0]], "period": "4s",
     "latency": "2ms"},
    {"between": ["sensor", "edge"], "rate": "4Mbit", "latency": "1ms"},
    {"between": ["edge", "cloud"], "rate": "50Mbit", "latency": "20ms"},
]  # fmt: skip


def by_visit(records: list[Record]) -> dict[str, list[tuple[float, float, float]]]:
    """For every place, its visits: when it was entered, when its service began, and when it was left."""
    visits: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for record in records:
        before: Span | None = None
        for span in sorted(record.spans, key=lambda s: (s.start_s, s.end_s)):
            if span.kind in (Kind.COMPUTE, Kind.SEND):
                waited = before is not None and before.kind is Kind.WAIT and before.place == span.place
                visits[span.place].append(
                    (before.start_s if waited and before else span.start_s, span.start_s, span.end_s)
                )
            before = span
    return visits


def integral(steps: list[tuple[float, int]]) -> tuple[float, int]:
    """Of a number over time that changes by steps, and its maximum."""
    area, number, most = 0.0, 0, 0
    steps = sorted(steps)
    for (at, change), (then, _) in pairwise([*steps, (steps[-1][0], 0)]):
        number += change
        most = max(most, number)
        area += number * (then - at)
    return area, most


@pytest.mark.parametrize("policy", [lambda: Fixed(2, "cloud"), lambda: Random(seed=1, cuts=(0, 2, 4)), LeastDelay])
def test_littles_law_and_slots_at_every_place(synthetic, policy):
    """The time-average number is the rate of arrivals times the mean time (Little 1961). Three ways to the same area:
    the number present from moment to moment, the visits one by one, and what nodes and links say they did."""
    testbed = synthetic(NODES, LINKS)
    requests = {
        n: Source(node=n, model="chain", arrivals=Poisson(rate=5.0), requests=300).draw(1) for n in ("device", "sensor")
    }
    records: list[Record] = []
    totals = simulate_cell(
        testbed, requests, {n: policy() for n in requests}, records.append, seed=1,
        faults=[LinkFault(link=("edge", "cloud"), down=5.0, up=6.5)],
    )  # fmt: skip
    visits = by_visit(records)
    assert len(visits) >= 7
    told = {n.node: (n.served, n.waited_s + n.busy_s, testbed.nodes[n.node].slots) for n in totals.nodes}
    for link in totals.links:
        latency_s = testbed.links[tuple(link.link.split(">"))].latency_s
        told[link.link] = link.messages, link.waited_s + link.air_s + latency_s * link.messages, 1
    for place, here in visits.items():
        served, area, slots = told[place]
        assert served == len(here)
        present, _ = integral([step for entered, _, left in here for step in ((entered, 1), (left, -1))])
        assert present == pytest.approx(sum(left - entered for entered, _, left in here))
        assert present == pytest.approx(area)
        latency_s = testbed.links[tuple(place.split(">"))].latency_s if ">" in place else 0.0
        # A step down comes before a step up at the same time, but for rounding.
        _, most = integral([s for _, began, left in here for s in ((began + 1e-9, 1), (left - latency_s - 1e-9, -1))])
        assert most <= slots
        for entered, began, _ in here:  # who waits finds all slots taken, until there is one
            if began > entered:
                middle = (entered + began) / 2
                assert sum(b <= middle < left - latency_s for _, b, left in here) == slots


FADES = {"kind": "gauss-markov", "mean": "8Mbit", "deviation": "3Mbit", "correlation_time": 3}
ROAMS = {"kind": "random-waypoint", "area": [[0, -9], [90, 9]], "speed": [20, 60], "handover": "50ms"}
EVERYTHING: dict[str, Any] = {
    "testbed": {
        "nodes": {
            "cam": {"count": 2, "service": {"mean": "100ms", **GAMMA}, "mobility": ROAMS},
            "sensor": {"service": {"mean": "100ms", **GAMMA}},
            "a": {"service": {"mean": "50ms", **GAMMA}, "position": [0, 0]},
            "b": {"service": {"mean": "50ms", **GAMMA}, "position": [90, 0]},
            "cloud": {"service": {"mean": "10ms", "distribution": "lognormal"}, "slots": 2},
        },
        "links": [
            *({"between": ["cam", cell], "rate": FADES, "latency": "2ms"} for cell in "ab"),
            {"between": ["sensor", "a"], "rate": "4Mbit", "latency": "1ms"},
            *({"between": [cell, "cloud"], "rate": "50Mbit", "latency": "10ms"} for cell in "ab"),
        ],
    },
    "workload": [
        {"node": "cam", "model": "m", "arrivals": {"kind": "poisson", "rate": "4/s"}, "requests": 60, "timeout": "1s"},
        {"node": "sensor", "model": "m", "arrivals": {"kind": "closed", "users": 3, "think": "500ms"}, "requests": 60,
         "duration": "60s"},
    ],
    "policies": ["local", "random", "least-delay", {"fixed": {"cut": 2, "server": "cloud"}}],
    "seeds": [1, 2],
    "faults": [
        {"node": "b", "every": "5s", "lasting": "500ms"},
        {"link": ["a", "cloud"], "every": "4s", "lasting": "1s"},
        {"link": ["cam", "a"], "lose": 0.05},
        {"node": "cloud", "slower": 3, "from": "4s", "to": "8s"},
    ],
}  # fmt: skip


def everything(chain) -> dict[str, Any]:
    return {**EVERYTHING, "testbed": {**EVERYTHING["testbed"], "models": {"m": str(chain)}}}


@pytest.fixture(scope="module")
def run(chain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("everything")
    return simulate(Experiment.of(everything(chain), folder), folder / "run")


def test_the_same_seed_writes_the_same_bytes_in_every_process(chain, run, tmp_path, elsewhere):
    here = [hashlib.sha256((run.folder / f"{t}.parquet").read_bytes()).hexdigest() for t in ("requests", "spans")]
    code = f"""
import hashlib, json
from pathlib import Path
from isthmus.experiments.execute import Experiment, simulate
folder = Path({str(tmp_path)!r})
simulate(Experiment.of(json.loads({json.dumps(everything(chain))!r}), folder), folder / "run")
print(*(hashlib.sha256((folder / "run" / f"{{t}}.parquet").read_bytes()).hexdigest() for t in ("requests", "spans")))
"""
    assert elsewhere(code, hash_seed=2).decode().split() == here


def test_much_happened(run):
    """Or the tests beside this one would show little."""
    sent = run.spans[run.spans["kind"] == "send"]
    assert sent["bytes"].isna().sum() > 5  # cut off by handovers
    assert {f"cam-{i}>{cell}" for i in (0, 1) for cell in "ab"} <= set(sent["place"])
    assert (run.requests["attempts"] > 1).sum() > 5


def test_every_policy_meets_the_same_requests_faults_and_fades(chain, tmp_path, run):
    requests = run.requests[run.requests["source"] != "sensor"]  # whose users wait for their answers
    times = requests.pivot_table("arrival_s", ["seed", "source", "number"], "policy")
    assert times.shape == (2 * 2 * 60, 4)
    assert (times.nunique(axis=1) == 1).all()
    assert times.index.get_level_values("seed").nunique() == 2
    # All transfers over a link, whoever made them, fit one trace of its rate, and none is while its cell is away.
    experiment = Experiment.of(everything(chain), tmp_path)
    arrived = run.spans[run.spans["kind"] == "send"].dropna(subset=["bytes"])
    for seed, cam, cell in product((1, 2), ("cam-0", "cam-1"), "ab"):
        testbed = experiment.testbed.at_seed(seed)
        sent = arrived[(arrived["seed"] == seed) & (arrived["place"] == f"{cam}>{cell}")]
        assert sent["policy"].nunique() == 3
        link = testbed.links[cam, cell]
        ends_s = link.rate.finish_all_s(sent["start_s"], sent["bytes"]) + link.latency_s
        assert sent["end_s"].to_numpy() == pytest.approx(ends_s)
        changes = [*takewhile(lambda change: change[0] < 1000, testbed.handovers(cam, seed)), (np.inf, None)]
        for (from_s, down), (to_s, _) in pairwise(changes):
            if (cam, cell) in down:
                assert not ((sent["end_s"] > from_s) & (sent["start_s"] < to_s)).any()


def test_a_part_of_a_request_takes_as_long_under_every_policy(run):
    at_home = (run.spans["place"] == "cam-0") & (run.spans["stage"] == 0) & (run.spans["attempt"] == 1)
    computed = run.spans[(run.spans["kind"] == "compute") & at_home]
    whole = computed[computed["policy"] == "local"].set_index(["seed", "number"])
    half = computed[computed["policy"].str.startswith("fixed")].set_index(["seed", "number"])
    both = ((half["end_s"] - half["start_s"]) / (whole["end_s"] - whole["start_s"])).dropna()
    part = both[both < 0.99]  # the others fell back to the whole, at home
    assert len(part) > 40
    assert part.to_numpy() == pytest.approx(np.full(len(part), part.iloc[0]))
    assert both[both >= 0.99].to_numpy() == pytest.approx(np.ones(len(both) - len(part)))
