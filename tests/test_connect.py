"""Who is let into a cluster: a real head of Ray on this machine, with token and TLS, and drivers with and without."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from isthmus.real.certs import make_certs, make_token
from isthmus.real.cluster import tls_settings
from isthmus.workloads.cluster import host_files

HERE = "127.0.0.2"
"""An address of this machine that Ray takes for one of a network: not the one by which it knows the loopback."""
SOURCE = Path(__file__).parents[1] / ".src"


@dataclass
class Head:
    folder: Path
    address: str
    process: subprocess.Popen[bytes]

    @property
    def settings(self) -> dict[str, str]:
        """What a driver needs that is let in."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.folder / "token")} | tls_settings(
            host_files(self.folder / "certs", "head")
        )


def _environment(folder: Path, settings: dict[str, str]) -> dict[str, str]:
    """Of a process that knows no token but what `settings` name."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY")}
    return kept | {"HOME": str(folder), "PYTHONPATH": str(SOURCE), "RAY_USAGE_STATS_ENABLED": "0"} | settings


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HERE, 0))
        return int(probe.getsockname()[1])


@contextmanager
def _head(settings: dict[str, str], folder: Path) -> Iterator[Head]:
    port = _free_port()
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--include-dashboard=false"),
        *(f"--node-ip-address={HERE}", f"--port={port}", f"--temp-dir={folder / 'ray'}", "--num-cpus=1"),
        *("--object-store-memory=80000000", "--disable-usage-stats"),
    ]
    with (folder / "head.log").open("wb") as log:
        process = subprocess.Popen(
            command, env=_environment(folder, settings), stdout=log, stderr=log, start_new_session=True
        )
    try:
        until = time.monotonic() + 60
        while b"This command will now block" not in (folder / "head.log").read_bytes():
            assert process.poll() is None, (folder / "head.log").read_text()
            assert time.monotonic() < until, (folder / "head.log").read_text()
            time.sleep(0.1)
        yield Head(folder, f"{HERE}:{port}", process)
    finally:
        family = psutil.Process(process.pid).children(recursive=True)  # some have a group of their own
        process.send_signal(signal.SIGTERM)
        for one in [*family, psutil.Process(process.pid)]:
            try:
                one.wait(10)
            except psutil.TimeoutExpired:
                one.kill()
        process.wait()


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="isthmus-"))  # short: Ray makes sockets in it
    make_token(made / "token")
    make_token(made / "wrong")
    make_certs(made / "certs", {"head": [HERE], "driver": [HERE, "127.0.0.3"]})
    make_certs(made / "strange", {"head": [HERE]})
    make_certs(made / "elsewhere", {"head": ["10.0.0.1"]})
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture(scope="module")
def head(folder: Path) -> Iterator[Head]:
    settings = Head(folder, "", None).settings  # type: ignore[arg-type]
    with _head(settings, folder) as started:
        yield started


def _python(code: str, head: Head, settings: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=_environment(head.folder, settings), capture_output=True, text=True, timeout=90,
    )  # fmt: skip


DRIVER = """
import sys, ray
ray.init(address=sys.argv[1], _node_ip_address=sys.argv[2], log_to_driver=False)
print(ray.get(ray.remote(num_cpus=0)(lambda: "worked").remote()))
"""


@pytest.mark.parametrize(
    ("without", "instead"),
    [
        ((), {}),
        (("RAY_AUTH_TOKEN_PATH",), {"RAY_AUTH_MODE": "disabled"}),
        ((), {"RAY_AUTH_TOKEN_PATH": "wrong"}),
        (("RAY_USE_TLS",), {}),
        pytest.param(
            (),
            {"RAY_TLS_SERVER_CERT": "strange/head.pem", "RAY_TLS_SERVER_KEY": "strange/head.key"},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["both", "no token", "wrong token", "no certificate", "strange certificate"],
)
def test_ray_lets_in_a_driver_with_token_and_certificate_only(head, without, instead):
    """Ray's own driver, without any check of ours."""
    changed = {n: v if n == "RAY_AUTH_MODE" else str(head.folder / v) for n, v in instead.items()}
    settings = {n: v for n, v in head.settings.items() if n not in without} | changed
    # Ray would try for minutes.
    patience = {"RAY_NUM_REDIS_GET_RETRIES": "1", "RAY_gcs_rpc_server_connect_timeout_s": "1",
                "RAY_gcs_rpc_server_reconnect_timeout_s": "2"}  # fmt: skip
    done = _python(DRIVER, head, settings | patience, head.address, HERE)
    admitted = not without and not instead
    assert (done.returncode == 0) == admitted, done.stderr
    assert ("worked" in done.stdout) == admitted
    if not admitted:
        assert "Failed to connect to" in done.stderr


CONNECT = """
import json, sys
from pathlib import Path
from isthmus.real.cluster import connect
from isthmus.workloads.cluster import ClusterSpec

for fields in json.loads(sys.argv[2]):
    try:
        with connect(ClusterSpec(**fields), Path(sys.argv[1])) as ray:
            said = ray.get(ray.remote(num_cpus=0)(lambda: "worked").remote())
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    print(json.dumps(said))
"""


def _connect(head: Head, *specs: dict[str, Any]) -> list[str]:
    """What `connect` says to each, all in one process that has no settings; it must leave none behind."""
    done = _python(CONNECT, head, {}, str(head.folder), json.dumps(specs))
    assert done.returncode == 0, done.stderr
    assert "Unauthenticated" not in done.stderr  # what Ray says while we ask
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_connect_says_what_is_wrong_and_how_to_mend_it(head):
    good = {"address": head.address, "driver": HERE, "token": "token", "certificates": "certs"}
    (head.folder / "readable").write_text((head.folder / "token").read_text())
    (head.folder / "readable").chmod(0o640)
    (head.folder / "empty").touch(0o600)
    expected: list[tuple[dict[str, Any], str]] = [
        ({}, "worked"),
        ({"token": "wrong"}, "RunFailure.*refuses the token"),
        ({"token": "none"}, "InputError.*no such token.*isthmus cluster token"),
        ({"token": "readable"}, "InputError.*mode 640.*chmod 600"),
        ({"token": "empty"}, "InputError.*is empty"),
        ({"certificates": None}, "RunFailure.*no Ray without TLS.*certificates: FOLDER"),
        ({"certificates": "strange"}, "RunFailure.*none of this cluster's.*isthmus cluster certs"),
        ({"certificates": "nowhere"}, "InputError.*no such file.*isthmus cluster certs"),
        ({"address": f"{HERE}:{_free_port()}"}, "RunFailure.*cannot be reached.*ray start --head"),
        ({"driver": "127.0.0.3"}, f"RunFailure.*127.0.0.3.*not joined.*ray start --address={head.address}"),
        ({"driver": None}, "worked"),
        ({}, "worked"),
    ]
    for (fields, pattern), said in zip(expected, _connect(head, *(good | f for f, _ in expected)), strict=True):
        assert re.match(pattern, said), (fields, said)


def test_a_head_of_another_version_is_named(head):
    """The head is made to say that it is one."""
    code = (
        "import sys, json; from ray._raylet import GcsClient; store = GcsClient(address=sys.argv[1])\n"
        "print(store.internal_kv_get(b'CLUSTER_METADATA', b'cluster', timeout=5).decode())\n"
        "store.internal_kv_put(b'CLUSTER_METADATA', sys.argv[2].encode(), True, b'cluster', timeout=5)"
    )
    good = {"address": head.address, "driver": HERE, "token": "token", "certificates": "certs"}
    true = None
    for field, name in (("ray_version", "Ray"), ("python_version", "Python")):
        true = true or _python(code, head, head.settings, head.address, "{}").stdout
        _python(code, head, head.settings, head.address, json.dumps(json.loads(true) | {field: "1.2.3"}))
        [said] = _connect(head, good)
        assert said.startswith(f"RunFailure: {name} is ")
        assert "and 1.2.3 at the head" in said
    _python(code, head, head.settings, head.address, str(true))
    assert _connect(head, good) == ["worked"]


def _listening(processes: list[psutil.Process]) -> dict[str, set[str]]:
    """The addresses that processes listen at, by their name."""
    found: dict[str, set[str]] = {}
    for process in processes:
        at = {c.laddr.ip.removeprefix("::ffff:") for c in process.net_connections("inet") if c.status == "LISTEN"}
        if at:
            found.setdefault(process.name(), set()).update(at)
    return found


def test_what_a_machine_of_a_cluster_listens_at(head):
    """As docs/security.md says. Should Ray learn to bind to one address, this fails, and the page can be shorter."""
    assert _listening(psutil.Process(head.process.pid).children(recursive=True)) == {
        "gcs_server": {"::"},
        "raylet": {"::"},
        "ray::RuntimeEnvAgent": {HERE},
    }


def test_a_head_that_asks_for_no_token_is_refused(folder):
    with tempfile.TemporaryDirectory(prefix="isthmus-") as other:
        shutil.copy(folder / "token", other)
        with _head({"RAY_AUTH_MODE": "disabled"}, Path(other)) as started:
            [said] = _connect(started, {"address": started.address, "driver": HERE, "token": "token"})
            assert said.startswith("RunFailure: ")
            assert "lets in whoever knocks" in said
            [said] = _connect(
                started,
                {"address": started.address, "driver": HERE, "token": "token", "certificates": str(folder / "certs")},
            )
            assert "RAY_USE_TLS=1" in said


LOCAL = """
import json, os, psutil, sys
from isthmus.real.cluster import local_ray
before = dict(os.environ)
class Actor:
    def listening(self): return os.environ.get("RAY_AUTH_TOKEN")
with local_ray() as ray:
    actor = ray.remote(Actor).remote()
    token = ray.get(actor.listening.remote())
    every = [psutil.Process(), *psutil.Process().children(recursive=True)]
    at = [c.laddr.ip for p in every for c in p.net_connections("inet") if c.status == "LISTEN"]
    address = ray.get_runtime_context().gcs_address
    print(json.dumps([at, token, address]), flush=True)
    sys.stdin.readline()
ours = {k for k in before.keys() | os.environ if k.startswith(("RAY", "PYTHONPATH"))} - {"RAY_CLIENT_MODE"}
assert all(before.get(k) == os.environ.get(k) for k in ours)
"""


@pytest.mark.parametrize("first", ["import ray\n", pytest.param("", marks=pytest.mark.slow)], ids=["imported", "not"])
def test_ray_on_one_machine_listens_on_its_loopback_and_asks_for_a_token(first, folder):
    """Also where `ray` was imported before; and nothing stays in the environment."""
    process = subprocess.Popen(
        [sys.executable, "-c", first + LOCAL],
        env=_environment(folder, {}), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    at, token, address = json.loads(process.stdout.readline())
    assert len(at) > 4
    assert {ip.removeprefix("::ffff:") for ip in at} == {"127.0.0.1"}
    assert len(token) == 64
    code = "import sys; from ray._raylet import GcsClient; GcsClient(address=sys.argv[1])"
    refused = subprocess.run(
        [sys.executable, "-c", code, address],
        env=_environment(folder, {"RAY_AUTH_MODE": "disabled"}), capture_output=True, text=True,
    )  # fmt: skip
    assert "AuthenticationError" in refused.stderr
    _, said = process.communicate("done\n", timeout=30)
    assert process.returncode == 0, said
    assert not (folder / ".ray").exists()  # no token that Ray has made, and that others can read
