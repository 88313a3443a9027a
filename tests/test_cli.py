"""The command line as people use it: real processes, exit codes, one clear line for what is wrong, JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from isthmus.real.profiler import profile_model
from isthmus.workloads.model import load_model

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


def test_a_model_with_no_cut_still_runs_whole(place, diamond):
    """Between the ends of the diamond nothing crosses alone but the stem: cuts are few, and never required."""
    (place / "net.onnx").write_bytes(diamond.read_bytes())
    done = isthmus("simulate", "experiment.yaml", "--json", cwd=place)
    assert done.returncode == 0, done.stderr


def test_lists(place):
    found = json.loads(isthmus("models", "--json", cwd=place).stdout)
    assert {"resnet50", "squeezenet"} <= {m["name"] for m in found}
    cuts = json.loads(isthmus("models", "net.onnx", "--json", cwd=place).stdout)["cuts"]
    assert [c["cut"] for c in cuts] == list(range(7))
    found = json.loads(isthmus("policies", "--json", cwd=place).stdout)
    assert {p["name"]: p["oracle"] for p in found}["oracle"] is True
