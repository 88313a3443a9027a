"""The command line as people use it: real processes, exit codes, one clear line for what is wrong, JSON."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from onnx import TensorProto, helper, numpy_helper

from isthmus.experiments.execute import Experiment
from isthmus.experiments.run_folder import Run
from isthmus.real.profiler import profile_model
from isthmus.workloads.model import load_model
from isthmus.workloads.profile import Profile

EXPERIMENT: dict[str, Any] = {
    "name": "small",
    "testbed": {
        "models": {"net": "net.onnx"},
        "nodes": {"device": {"service": {"mean": "20ms"}}, "cloud": {"service": {"mean": "5ms"}}},
        "links": [{"between": ["device", "cloud"], "rate": "20Mbit", "latency": "5ms"}],
    },
    "workload": [{"node": "device", "model": "net", "arrivals": {"kind": "poisson", "rate": "20/s"}, "requests": 40}],
    "policies": ["local", "remote", "least-delay"],
}


def isthmus(*arguments: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from isthmus.experiments.cli import main; main()", *map(str, arguments)]
    return subprocess.run(
        command,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / ".src"), "COLUMNS": "100", **environment},
    )


@pytest.fixture
def place(tmp_path: Path, chain: Path) -> Path:
    (tmp_path / "net.onnx").write_bytes(chain.read_bytes())
    write(tmp_path, EXPERIMENT)
    return tmp_path


def write(folder: Path, experiment: dict[str, Any]) -> Path:
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(experiment))
    return path


def changed(**changes: Any) -> dict[str, Any]:
    """The experiment with fields replaced; `a__b__0` is a path."""
    made = json.loads(json.dumps(EXPERIMENT))
    for key, value in changes.items():
        *path, last = key.split("__")
        at = made
        for step in path:
            at = at[int(step) if step.isdigit() else step]
        at[int(last) if last.isdigit() else last] = value
    return made


def fails(done: subprocess.CompletedProcess[str], code: int, *said: str) -> None:
    assert done.returncode == code, done.stderr
    [line] = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    for words in said:
        assert words in line, line


def test_simulate_run_compare_report(place):
    """The main job, by hand, with a trace and a report."""
    done = isthmus("simulate", "experiment.yaml", "--out", "sim", "--trace", "trace.json", cwd=place)
    assert done.returncode == 0, done.stderr
    assert "least-delay" in done.stdout
    assert json.loads((place / "trace.json").read_text())["traceEvents"]

    done = isthmus("run", "experiment.yaml", "--out", "real", "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    assert [p["completed"] for p in json.loads(done.stdout)["policies"]] == [40, 40, 40]
    assert not [said for said in json.loads(done.stdout)["warnings"] if "answers" in said]

    done = isthmus("compare", "sim", "real", "--json", "--report", "report.html", cwd=place)
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert [row["policy"] for row in data["rows"]] == ["local", "remote", "least-delay"]
    contract = {
        "policy", "model", "link", "requests", "outcomes_sim", "outcomes_real", "sim_mean_s", "real_mean_s",
        "mean_error", "p50_error", "p95_error", "structural_error_s", "repeat_mean_error", "overruns",
    }  # fmt: skip
    assert all(contract <= row.keys() for row in data["rows"])
    assert "<html" in (place / "report.html").read_text()[:1000]

    done = isthmus("plan", "experiment.yaml", "--json", cwd=place)
    assert {row["policy"]: row["latency_s"] for row in json.loads(done.stdout)}["local"] == pytest.approx(0.02)


def test_a_policy_of_another_package_runs_in_both_worlds(place):
    """An installed distribution that this repository has never heard of, found by its entry point."""
    site = place / "site"
    meta = site / "elsewhere-1.0.dist-info"
    meta.mkdir(parents=True)
    (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 1.0\n")
    (meta / "entry_points.txt").write_text("[isthmus.policies]\nelsewhere = elsewhere:Alternate\n")
    (site / "elsewhere.py").write_text(
        "from isthmus import split\n"
        "class Alternate:\n"
        "    def decide(self, request, view):\n"
        "        model = view.testbed.models[request.model]\n"
        "        return split(model, (request.number % 3,), (view.source, 'cloud'))\n"
    )
    path = os.pathsep.join([str(Path(__file__).parents[1] / ".src"), str(site)])
    for world in ("simulate", "run"):
        done = isthmus(
            world, "experiment.yaml", "--policy", "elsewhere", "--out", world, "--json", cwd=place, PYTHONPATH=path
        )
        assert done.returncode == 0, done.stderr
        [row] = json.loads(done.stdout)["policies"]
        assert (row["policy"], row["completed"]) == ("elsewhere", 40)


def test_a_policy_beside_the_experiment(place):
    (place / "mine.py").write_text(
        "from isthmus import whole_on\n"
        "class Mine:\n"
        "    def decide(self, request, view):\n"
        "        return whole_on(view.testbed.models[request.model], 'cloud')\n"
    )
    for world in ("simulate", "run"):
        done = isthmus(world, "experiment.yaml", "--policy", "mine:Mine", "--out", world, "--json", cwd=place)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"testbed__links__0__between": ["device", "clod"]}, ["experiment.yaml", "links[0]", "'clod'", "cloud"]),
        ({"testbed__links__0__rate": "-5Mbit"}, ["experiment.yaml", "rate", "-5Mbit", "> 0"]),
        ({"testbed__links__0__rate": "20 Mbps"}, ["experiment.yaml", "rate", "20 Mbps", "Mbit"]),
        ({"testbed__models__net": "missing.onnx"}, ["missing.onnx"]),
        ({"policies": ["remot"]}, ["'remot'", "did you mean remote"]),
        ({"policies": [{"fixed": {"cutt": 3}}]}, ["fixed", "cutt", "cut"]),
        ({"workload__0__model": "nett"}, ["experiment.yaml", "workload[0].model", "'nett'", "net"]),
        ({"testbed__nodes__device": {"slowdown": 4}}, ["net@host.json", "isthmus profile"]),
        ({"sedes": [1]}, ["experiment.yaml", "sedes"]),
    ],
)
def test_bad_experiments(place, changes, said):
    write(place, changed(**changes))
    fails(isthmus("simulate", "experiment.yaml", "--out", "out", cwd=place), 2, *said)
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["simulat"], "simulat"),
        (["simulate", "experiment.yaml", "--bogus"], "--bogus"),
        (["simulate"], "file"),
        (["simulate", "experiment.yaml", "--requests", "0"], "--requests"),
    ],
)
def test_wrong_use_of_the_command_line(place, arguments, said):
    done = isthmus(*arguments, cwd=place)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert said in done.stderr.lower()


def test_a_finished_run_is_not_replaced_unasked(place):
    assert isthmus("simulate", "experiment.yaml", "--out", "sim", cwd=place).returncode == 0
    fails(isthmus("simulate", "experiment.yaml", "--out", "sim", cwd=place), 2, "sim", "finished run", "--force")
    assert isthmus("simulate", "experiment.yaml", "--out", "sim", "--force", cwd=place).returncode == 0


def test_bad_files(place):
    fails(isthmus("simulate", "nowhere.yaml", cwd=place), 2, "nowhere.yaml", "no such file")
    (place / "net.onnx").write_text("this is no model")
    fails(isthmus("simulate", "experiment.yaml", cwd=place), 2, "net.onnx", "ONNX")
    fails(isthmus("models", "nowhere.onnx", cwd=place), 2, "nowhere.onnx")
    fails(isthmus("compare", ".", ".", cwd=place), 2, "run.json")


def test_a_profile_of_another_model_is_refused(place):
    profile_model(load_model("squeezenet"), quick=True, rounds=1, runs=1, pace_s=0).save(
        place / "profiles/net@host.json"
    )
    write(place, changed(testbed__nodes__device={"slowdown": 4}))
    fails(isthmus("simulate", "experiment.yaml", cwd=place), 2, "net@host.json", "squeezenet", "net")


@pytest.mark.parametrize("world", ["simulate", "run"])
@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise KeyError('no idea')", ["broken:Broken", "KeyError", "no idea"]),
        ("return Plan((Stage('moon', view.testbed.models['net'].whole()),))", ["impossible plan", "'moon'"]),
        ("return 'local'", ["impossible plan", "str"]),
    ],
)
def test_broken_policies(place, world, body, said):
    (place / "broken.py").write_text(
        f"from isthmus import Plan, Stage\nclass Broken:\n    def decide(self, request, view):\n        {body}\n"
    )
    done = isthmus(world, "experiment.yaml", "--policy", "broken:Broken", "--out", "out", cwd=place)
    fails(done, 1, *said)
    assert [p.name for p in (place / "out").glob("*") if p.is_file()] == []


def test_a_disk_that_is_full(place):
    """/dev/full refuses every byte: no table may be left that looks whole."""
    out = place / "out"
    out.mkdir()
    for table in ("requests.parquet", "spans.parquet"):
        (out / f"{table}.partial").symlink_to("/dev/full")
    fails(isthmus("simulate", "experiment.yaml", "--out", "out", cwd=place), 1, "out", "No space left")
    assert not [p.name for p in out.glob("*") if p.name in ("run.json", "requests.parquet", "spans.parquet")]


def test_output_that_cannot_be_written(place):
    (place / "taken").write_text("a file where a folder is wanted")
    fails(isthmus("simulate", "experiment.yaml", "--out", "taken/run", cwd=place), 1, "taken")


def test_a_model_with_no_cut(place):
    """It runs whole, in one place or the other, and whoever wants to cut it is told that there is no cut."""
    weight = numpy_helper.from_array(np.ones((4, 3, 3, 3), np.float32), "w")
    nodes = [helper.make_node("Conv", ["x", "w"], [out], pads=[1, 1, 1, 1]) for out in ("left", "right")]
    graph = helper.make_graph(
        [*nodes, helper.make_node("Add", ["left", "right"], ["y"])],
        "uncut",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 16, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 16, 16])],
        [weight],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), place / "net.onnx")
    done = isthmus("simulate", "experiment.yaml", "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    [line] = done.stderr.strip().splitlines()
    assert "no cut" in line
    assert "net" in line
    write(place, changed(policies=[{"fixed": {"cut": 3}}]))
    done = isthmus("simulate", "experiment.yaml", cwd=place)
    assert done.returncode == 2
    assert "'net' has no cut 3 (allowed: 0 to 1)" in done.stderr


def test_calibrate_and_simulate_what_was_measured(place):
    """From nothing to a simulation on this machine's own figures, batches among them, with a model of one's own."""
    cloud = {"slowdown": 2, "batch": {"size": 5, "wait": "200ms"}}
    write(place, changed(testbed__nodes={"device": {"slowdown": 10}, "cloud": cloud}))
    done = isthmus("calibrate", "experiment.yaml", "--quick", "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    assert (place / "profiles/net@host.json").exists()
    overheads = json.loads(done.stdout)["overheads"]
    assert overheads["decide_s"].keys() == {"local", "remote", "least-delay"}
    assert all(seconds > 0 for seconds in overheads["decide_s"].values())
    done = isthmus("simulate", "experiment.yaml", "--out", "sim", cwd=place)
    assert done.returncode == 0, done.stderr
    facts = json.loads((place / "sim/run.json").read_text())
    assert facts["services"]["device/net"]["provenance"].startswith("scaled ×10 from host")

    profile = Profile.load(place / "profiles/net@host.json")
    assert [batch.size for batch in profile.batches] == [2, 4, 5]
    service = Experiment.load(place / "experiment.yaml").testbed.service("cloud", "net")
    mean_s = service.mean_s(load_model(place / "net.onnx").whole())
    drawn_s = mean_s * (1 + profile.residuals(mean_s / 2))
    spans = Run.load(place / "sim").spans.query("policy == 'remote' and kind == 'compute' and place == 'cloud'")
    batches = spans.groupby(["start_s", "end_s"]).size()
    assert sum(batches) == 40
    assert max(batches) > 1
    for (start_s, end_s), size in batches.items():
        alone_s = (end_s - start_s) / profile.batch_factor(size)
        assert np.abs(drawn_s / alone_s - 1).min() < 1e-6, (size, alone_s)


def test_profile_with_batches(place):
    done = isthmus("profile", "net.onnx", "--quick", "--pace", "0s", "--batches", "1,2,4", cwd=place)
    assert done.returncode == 0, done.stderr
    costs = Profile.load(place / "profiles/net@host.json").batches
    assert [cost.size for cost in costs] == [2, 4]
    said = f"In batches 2 take ×{costs[0].ratio:.2f}, 4 take ×{costs[1].ratio:.2f}."
    assert said in " ".join(done.stdout.split())
    fails(isthmus("profile", "net.onnx", "--batches", "2,x", cwd=place), 2, "--batches", "'2,x'", "such as 1,2,4,8")


def test_a_model_that_cannot_be_batched_is_profiled_without_and_not_calibrated_for_them(place):
    nodes = [helper.make_node("Relu", ["x"], ["y"])]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, 8]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "net", ends[:1], ends[1:])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(made, place / "net.onnx")
    done = isthmus("profile", "net.onnx", "--quick", "--batches", "2", "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    [note] = done.stderr.splitlines()
    assert note.startswith("note: no batches: net in batches of 2: ")
    assert json.loads(done.stdout)["batches"] == {}

    write(place, changed(testbed__nodes__cloud={"slowdown": 2, "batch": {"size": 2}}))
    done = isthmus("calibrate", "experiment.yaml", "--quick", cwd=place)
    assert done.returncode == 2
    assert "net in batches of 2" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", [("calibrate",), ("run",), ("validate",), ("cluster", "check")])
def test_a_host_of_no_cluster_is_refused(command, place):
    write(place, changed(testbed__nodes__cloud={"host": "nobody", "service": {"mean": "5ms"}}))
    fails(isthmus(*command, "experiment.yaml", cwd=place), 2, "nodes.cloud.host", "'nobody'", "`cluster`")


def test_ctrl_c_keeps_what_there_is(place):
    """Every request has an outcome, and the run says that it was interrupted."""
    write(place, changed(workload__0__requests=2000))
    command = [sys.executable, "-c", "from isthmus.experiments.cli import main; main()", "run", "experiment.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / ".src")}
    running = subprocess.Popen(
        [*command, "--policy", "local", "--out", "real"],
        cwd=place, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    parts = place / "real"
    decided = parts / "decisions.jsonl.partial"
    deadline = time.monotonic() + 120
    while not (decided.exists() and decided.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(running.pid, signal.SIGINT)
    _, said = running.communicate(timeout=120)
    assert running.returncode == 130, said
    made = Run.load(parts)
    assert made.facts["status"] == "interrupted"
    outcomes = made.requests["outcome"].value_counts()
    assert outcomes["completed"] > 0
    assert outcomes["unfinished"] > 0
    assert len(made.requests) == 2000


def test_lists(place):
    found = json.loads(isthmus("models", "--json", cwd=place).stdout)
    assert {"resnet50", "squeezenet"} <= {m["name"] for m in found}
    cuts = json.loads(isthmus("models", "net.onnx", "--json", cwd=place).stdout)["cuts"]
    assert [c["cut"] for c in cuts] == list(range(7))
    found = json.loads(isthmus("policies", "--json", cwd=place).stdout)
    assert {p["name"]: p["oracle"] for p in found}["oracle"] is True


@pytest.mark.slow
def test_the_demo(place):
    """The whole main job on this machine. How far apart the worlds are is judged by `isthmus bench fidelity`."""
    done = isthmus("demo", "--requests", "10", "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert len(data["rows"]) == 12
    assert {row["link"] for row in data["rows"]} == {"constant", "changing"}
    for folder in ("constant", "changing"):
        real = Run.load(place / f"runs/demo/squeezenet-{folder}/real")
        assert real.requests["correct"].all()
    assert "<html" in Path(place / data["report"]).read_text()[:1000]
