"""The trace: valid, ordered, every span once, and nothing on a track overlaps."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from isthmus.experiments.run_folder import Run, RunWriter
from isthmus.experiments.trace import write_trace
from isthmus.policies.registry import spec
from isthmus.sim.simulator import simulate
from isthmus.workloads.experiment import ExperimentSpec
from isthmus.workloads.testbed import Testbed, TestbedSpec

Event = dict[str, Any]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("run")
    nodes = {
        "device": {"service": {"mean": "90ms", "distribution": "gamma"}},
        "cloud": {"service": {"mean": "300ms", "distribution": "exponential"}, "slots": 3},
    }
    testbed_spec = {
        "models": {"squeezenet": "squeezenet"},
        "nodes": nodes,
        "links": [{"between": ["device", "cloud"], "rate": "50Mbit", "latency": "80ms"}],
    }
    source = {"node": "device", "model": "squeezenet", "arrivals": {"kind": "poisson", "rate": "8/s"}, "requests": 50}
    experiment = ExperimentSpec.model_validate(
        {
            "testbed": testbed_spec,
            "workload": [source],
            "policies": ["local", "remote"],
            "seeds": [1, 2],
            "faults": [{"node": "device", "down": "5s"}],
        }
    )
    assert isinstance(experiment.testbed, TestbedSpec)
    testbed = Testbed.build(experiment.testbed)
    with RunWriter(folder, "simulated", experiment, testbed) as writer:
        for seed in experiment.seeds:
            for name in ("local", "remote"):
                made = {"device": spec(name).make(seed)}
                requests, sink = experiment.draw(seed), writer.sink(name, seed).keep
                simulate(testbed, requests, made, sink, seed=seed, name=name, faults=experiment.faults)
    return Run.load(folder)


def written(run: Run, path: Path) -> list[Event]:
    write_trace(run, path)
    events = json.loads(path.read_text(), parse_constant=pytest.fail)["traceEvents"]
    assert isinstance(events, list)
    return events


def test_every_process_and_track_has_a_name(run: Run, tmp_path: Path) -> None:
    events = written(run, tmp_path / "trace.json")
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert list(processes.values()) == [
        f"{policy}, seed {seed} (simulated)" for seed in (1, 2) for policy in ("local", "remote")
    ]
    tracks = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert {(e["pid"], e["tid"]) for e in events if e["ph"] == "X"} == set(tracks)
    assert [name for (pid, _), name in tracks.items() if pid == 1] == ["device"]
    remote = [name for (pid, _), name in tracks.items() if pid == 2]
    assert remote[:3] == ["cloud", "cloud (2)", "cloud (3)"]  # one for each slot
    assert "cloud (4)" not in remote
    assert "device → cloud" in remote


def test_every_span_is_there_once_and_no_track_overlaps(run: Run, tmp_path: Path) -> None:
    events = written(run, tmp_path / "trace.json")
    busy = run.spans[run.spans["kind"] != "wait"]
    complete = [e for e in events if e["ph"] == "X"]
    assert Counter(e["name"] for e in complete) == Counter(busy["kind"])
    assert sum(e["dur"] for e in complete) == pytest.approx((busy["end_s"] - busy["start_s"]).sum() * 1e6)
    tracks: defaultdict[tuple[int, int], list[Event]] = defaultdict(list)
    for event in complete:
        tracks[event["pid"], event["tid"]].append(event)
    for track in tracks.values():
        for before, after in pairwise(track):
            assert round(1e3 * (before["ts"] + before["dur"])) <= round(1e3 * after["ts"])
    sent = next(e for e in complete if e["name"] == "send")
    assert sent["args"].keys() == {"source", "number", "attempt", "bytes"}  # of no stage: the request itself
    assert isinstance(sent["args"]["bytes"], int)


def test_requests_and_waits_begin_and_end(run: Run, tmp_path: Path) -> None:
    events = written(run, tmp_path / "trace.json")
    for category, expected in (("request", len(run.requests)), ("wait", (run.spans["kind"] == "wait").sum())):
        begins = {e["id"]: e for e in events if e["ph"] == "b" and e["cat"] == category}
        ends = {e["id"]: e for e in events if e["ph"] == "e" and e["cat"] == category}
        assert len(begins) == len(ends) == expected
        assert all(begins[i]["ts"] <= ends[i]["ts"] for i in begins)
    outcomes = Counter(e["args"]["outcome"] for e in events if e["ph"] == "b" and e["cat"] == "request")
    assert outcomes == Counter(run.requests["outcome"])
    assert outcomes["failed"] > 0  # the device went down: these have no end


def test_the_same_run_gives_the_same_file(run: Run, tmp_path: Path) -> None:
    written(run, tmp_path / "a.json")
    written(run, tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
