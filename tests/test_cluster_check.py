"""What `isthmus cluster check` finds: clocks, facts of this host, rules about them, and real clusters of Ray."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from isthmus.real.certs import make_token
from isthmus.real.clocks import Offset, offset, reading
from isthmus.real.cluster_check import Host, check, judge
from isthmus.real.host_facts import Facts, facts, strays
from isthmus.workloads.cluster import ClusterSpec
from isthmus.workloads.model import load_model
from isthmus.workloads.testbed import TestbedSpec

SOURCE = Path(__file__).parents[1] / ".src"
HERE = "127.0.0.2"

# Clocks


def test_this_hosts_clock_is_exactly_its_own():
    assert offset(reading) == Offset(0.0, 0.0)


def test_an_offset_is_wrong_by_its_error_at_most():
    """However unevenly a message travels there and back."""
    generator = random.Random(1)

    def far() -> tuple[str, float]:
        time.sleep(generator.expovariate(2000))
        there = time.monotonic() + 1234.5
        time.sleep(generator.expovariate(500))
        return "another boot", there

    found = offset(far)
    assert abs(found.offset_s - 1234.5) <= found.error_s
    assert 0 < found.error_s < 0.01


def test_a_copy_of_a_machine_has_a_clock_of_its_own():
    mine, _ = reading()
    found = offset(lambda: (mine, time.monotonic() - 77))
    assert found.offset_s == pytest.approx(-77, abs=1e-3)
    assert found.error_s > 0


def test_another_time_namespace_is_another_clock():
    """A kernel that shows a process a monotonic clock that is 1000 s ahead."""
    asked = (
        "import sys; from isthmus.real.clocks import reading\n"
        "for _ in sys.stdin: whose, at = reading(); print(whose, at, sep='|', flush=True)"
    )
    command = ["unshare", "--time", "--monotonic", "1000", "--fork", "--kill-child", sys.executable, "-c", asked]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def far() -> tuple[str, float]:
            process.stdin.write("\n")
            process.stdin.flush()
            whose, at_s = process.stdout.readline().split("|")
            return whose, float(at_s)

        try:
            far()
        except (ValueError, BrokenPipeError):
            pytest.skip("needs root and a kernel with time namespaces")
        found = offset(far)
        process.stdin.close()
    assert found.error_s > 0
    assert abs(found.offset_s - 1000) <= found.error_s


def test_a_clock_has_drifted_as_far_as_nobody_can_doubt():
    before = Offset(10.0, 0.001)
    assert Offset(10.006, 0.002).drifted_s(before) == pytest.approx(0.003)
    assert Offset(9.994, 0.002).drifted_s(before) == pytest.approx(0.003)
    assert Offset(10.002, 0.002).drifted_s(before) == 0.0


# Facts and rules


@pytest.fixture(scope="module")
def here() -> Facts:
    """This machine, made to be without faults."""
    found = Facts(**facts("/tmp/ray"))
    return replace(
        found, resolve_s=0.0, memory_free_bytes=8_000_000_000, disk_bytes=100, disk_free_bytes=50, shm_bytes=2**30,
        stalled_share=0.0, load_1=0.0, cores=4, governors=("performance",), throttled=0, environment={},
        unreadable_meters=(), auth_mode="token", token_mode=0o600,
    )  # fmt: skip


def test_facts_of_this_host():
    found = Facts(**facts("/tmp/ray"))
    assert found.python == sys.version.split()[0]
    assert found.packages["isthmus"]
    assert found.packages["onnxruntime"]
    assert len(found.code) == 12
    assert 0 < found.memory_free_bytes < found.memory_bytes
    assert json.loads(json.dumps(facts("/nowhere/yet")))["temp"] == "/nowhere/yet"


def test_settings_that_people_have_made_are_told_from_rays_own(monkeypatch):
    for name in [name for name in os.environ if name.startswith("RAY")]:
        monkeypatch.delenv(name)
    for name, value in {"RAY_AUTH_MODE": "token", "RAY_JOB_ID": "1", "RAY_ADDRESS": "a:1", "RAY_foo": "2"}.items():
        monkeypatch.setenv(name, value)
    assert strays() == {"RAY_ADDRESS": "a:1", "RAY_foo": "2"}


CLUSTER = ClusterSpec.model_validate({"address": "10.0.0.1:6379", "hosts": {"cam": {"address": "10.0.0.2"}}})


def test_a_host_without_faults_has_no_problems(here):
    assert list(judge(Host("cam", "10.0.0.2", here, Offset(5.0, 0.0001)), here, 1e9, CLUSTER)) == []


@pytest.mark.parametrize(
    ("change", "level", "what", "fix"),
    [
        ({"python": "2.7.18"}, "error", "Python 2.7.18", "same versions"),
        ({"packages": {"ray": "1.0"}}, "error", "Ray 1.0", "pip install ray=="),
        ({"packages": {"isthmus": None}, "missing": "No module named 'scipy'"}, "error", "'scipy'", "isthmus[real]"),
        ({"code": "0"}, "error", "other code", "the same wheel"),
        ({"packages": {"onnxruntime": None}}, "error", "no onnxruntime", "isthmus[real]"),
        ({"packages": {"onnxruntime": "1.0"}}, "note", "onnxruntime 1.0", "same everywhere"),
        ({"resolve_s": None}, "warning", "does not resolve", "/etc/hosts"),
        ({"resolve_s": 5.2}, "warning", "takes 5 s", "/etc/hosts"),
        ({"memory_free_bytes": 500_000_000, "memory_bytes": 2**30, "swap_bytes": 0}, "warning", "500 MB", "zram"),
        ({"memory_free_bytes": 20_000_000, "memory_bytes": 2**30}, "error", "20 MB", "end other programs"),
        ({"disk_free_bytes": 3}, "error", "3.0% of the disk", "delete"),
        ({"shm_bytes": 64_000_000}, "warning", "64 MB", "--shm-size"),
        ({"stalled_share": 0.4}, "warning", "40%", "end other programs"),
        ({"stalled_share": None, "load_1": 3.0}, "warning", "load is 3.0", "end other programs"),
        ({"cores": 1}, "warning", "one processor", "more than one"),
        ({"governors": ("ondemand",)}, "note", "ondemand", "scaling_governor"),
        ({"throttled": 0x50005}, "warning", "too little voltage, throttling", "power supply"),
        ({"throttled": 0x80000}, "note", "since it was started by too high a temperature", "cooling"),
        ({"environment": {"RAY_ADDRESS": "a:1"}}, "warning", "RAY_ADDRESS=a:1", "unset"),
        ({"unreadable_meters": ("/sys/x/energy_uj",)}, "note", "modelled", "chmod a+r /sys/x/energy_uj"),
        ({"auth_mode": ""}, "warning", "without a token", "RAY_AUTH_MODE=token"),
        ({"token_mode": 0o644}, "warning", "mode 644", "chmod 600"),
    ],
)
def test_every_problem_has_a_fix(here, change: dict[str, Any], level, what, fix):
    if "packages" in change:
        change = change | {"packages": here.packages | change["packages"]}
    host = Host("cam", "10.0.0.2", replace(here, **change), Offset(5.0, 0.0001))
    [problem] = judge(host, here, 1e9, CLUSTER)
    assert (problem.host, problem.level) == ("cam", level)
    assert what in problem.what
    assert fix in problem.fix


def test_a_vague_clock_is_told_of(here):
    [problem] = judge(Host("cam", "", here, Offset(5.0, 0.01)), here, 1e9, CLUSTER)
    assert "10.0 ms" in problem.what


# Real Ray


def test_this_machine_alone(ray, chain):
    spec = TestbedSpec.model_validate({"models": {"net": str(chain)}, "nodes": {"device": {"slowdown": 2}}})
    checked = check(spec, Path(), [load_model(chain, name="net")])
    [host] = checked.hosts
    assert host.facts is not None
    assert host.name == socket.gethostname()
    assert host.clock is not None
    assert (host.clock.offset_s, host.clock.error_s) == (0.0, 0.0)
    assert host.models == {"net": "there"}
    assert host.facts.code == facts("/tmp")["code"]
    json.dumps(checked.to_json())


@contextmanager
def started(folder: Path, resources: dict[str, int], python_path: Path) -> Iterator[str]:
    """The head of a cluster of one machine, which is these hosts; its address."""
    with socket.socket() as probe:
        probe.bind((HERE, 0))
        address = f"{HERE}:{probe.getsockname()[1]}"
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--include-dashboard=false"),
        *(f"--node-ip-address={HERE}", f"--port={address.split(':')[1]}", f"--temp-dir={folder / 'ray'}"),
        *("--num-cpus=1", "--object-store-memory=80000000", f"--resources={json.dumps(resources)}"),
    ]
    settings = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token"), "RAY_made_up": "1"}
    with (folder / "head.log").open("wb") as log:
        process = subprocess.Popen(
            command, env=plain(folder, python_path) | settings, stdout=log, stderr=log, start_new_session=True
        )
    try:
        until = time.monotonic() + 60
        while b"This command will now block" not in (folder / "head.log").read_bytes():
            assert process.poll() is None, (folder / "head.log").read_text()
            assert time.monotonic() < until, (folder / "head.log").read_text()
            time.sleep(0.1)
        yield address
    finally:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        process.send_signal(signal.SIGTERM)
        for one in family:
            try:
                one.wait(10)
            except psutil.TimeoutExpired:
                one.kill()
        process.wait()


def plain(folder: Path, python_path: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY")}
    return kept | {"HOME": str(folder), "PYTHONPATH": str(python_path), "RAY_USAGE_STATS_ENABLED": "0"}


def run_check(folder: Path, testbed: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    (folder / "bed.yaml").write_text(yaml.safe_dump(testbed))
    code = "from isthmus.experiments.cli import main; main()"
    command = [sys.executable, "-c", code, "cluster", "check", str(folder / "bed.yaml"), "--json"]
    done = subprocess.run(command, env=plain(folder, SOURCE), capture_output=True, text=True, timeout=120)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="isthmus-"))  # short: Ray makes sockets in it
    make_token(made / "token")
    yield made
    shutil.rmtree(made, ignore_errors=True)


def bed(address: str, **hosts: str) -> dict[str, Any]:
    return {
        "models": {"net": "squeezenet"},
        "nodes": {name: {"host": name} for name in hosts},
        "cluster": {
            "address": address,
            "driver": HERE,
            "token": "token",
            "hosts": {name: {"address": at} for name, at in hosts.items() if at},
        },
    }


def test_a_cluster_with_a_host_that_is_gone(folder):
    with started(folder, {"isthmus:cam": 1}, SOURCE) as address:
        code, found = run_check(folder, bed(address, cam=HERE, gone="127.0.0.9", nobody=""))
    assert code == 1
    assert not found["ready"]
    hosts = {host["name"]: host for host in found["hosts"]}
    assert hosts.keys() == {"cam", "gone", "nobody"}
    assert hosts["cam"]["clock"]["error_s"] == 0
    assert hosts["cam"]["facts"]["auth_mode"] == "token"
    assert hosts["cam"]["facts"]["temp"] == str(folder / "ray")
    assert hosts["cam"]["models"] == {"net": "by name"}
    assert hosts["gone"]["facts"] is None
    errors = {p["host"]: p for p in found["problems"] if p["level"] == "error"}
    assert errors.keys() == {"gone", "nobody"}
    assert "not in the cluster" in errors["gone"]["what"]
    assert f"ray start --address={address} '--resources={{\"isthmus:nobody\":1}}'" in errors["nobody"]["fix"]
    assert any("RAY_made_up=1" in p["what"] for p in found["problems"])


def test_a_host_without_isthmus_answers_and_says_why(folder):
    """Its Isthmus cannot be imported, and it is not the host that it should be."""
    (folder / "broken" / "isthmus").mkdir(parents=True)
    (folder / "broken" / "isthmus" / "__init__.py").write_text("raise ImportError(\"No module named 'simpy'\")\n")
    with started(folder, {}, folder / "broken") as address:
        code, found = run_check(folder, bed(address, cam=HERE))
    assert code == 1
    errors = {(p["host"], p["what"]): p["fix"] for p in found["problems"] if p["level"] == "error"}
    assert ("driver", "cannot import isthmus: No module named 'simpy'") in errors
    [fix] = [fix for (host, what), fix in errors.items() if "without the resource 'isthmus:cam'" in what]
    assert "--resources" in fix


def test_a_cluster_that_does_not_answer(folder):
    code, found = run_check(folder, bed(f"{HERE}:1", cam=HERE))
    assert code == 1
    assert [(host["name"], host["facts"] is None) for host in found["hosts"]] == [("driver", False), ("cam", True)]
    [error] = [p for p in found["problems"] if p["level"] == "error"]
    assert "cannot be reached" in error["what"]
