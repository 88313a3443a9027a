"""A Ray cluster in a lab: its head beside the driver, and a node in every host. Knows labs and Ray's command line.

Every host has the custom resource of its name, so that actors can be pinned to it. Token mode is always on, with a
token of the lab's own. What is sent as an argument of an actor's call goes with the call, whatever its size up to
10 MB: in one way, not by way of a store from which the receiver fetches it.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from isthmus.real.lab import HEAD, VARIABLE, Lab
from isthmus.workloads.cluster import ClusterSpec, HostSpec, resource
from isthmus.workloads.errors import RunFailure

PORT = 6379
_STORE_BYTES = 100 * 2**20
_PATIENCE_S = 120


def environment(lab: Lab) -> dict[str, str]:
    """What every process in the lab has to be told, beside what this one was."""
    found = [os.path.abspath(path) for path in dict.fromkeys(sys.path)]  # actors find what the driver finds
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(found),
        VARIABLE: str(lab.folder),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(lab.folder / "token"),
        "RAY_max_direct_call_object_size": str(10_000_000),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }


def cluster(lab: Lab) -> ClusterSpec:
    """How a testbed names it."""
    head = lab.host(HEAD).address
    return ClusterSpec(
        address=f"{head}:{PORT}",
        driver=head,
        token=str(lab.folder / "token"),
        hosts={host.name: HostSpec(address=host.address) for host in lab.hosts if host.name != HEAD},
    )


def start_ray(lab: Lab) -> None:
    """The head, then all hosts at once. RunFailure with what Ray says when one does not start."""
    token = lab.folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    head = lab.host(HEAD)
    _start(lab, HEAD, "--head", f"--port={PORT}", "--include-dashboard=false", "--num-cpus=1")
    others = [host.name for host in lab.hosts if host.name != HEAD]
    with ThreadPoolExecutor(2) as pool:  # more would only wait for each other
        for started in [pool.submit(_start, lab, name, f"--address={head.address}:{PORT}", "--num-cpus=1",
                                    f"--resources={json.dumps({resource(name): 1})}") for name in others]:  # fmt: skip
            started.result()


def _start(lab: Lab, name: str, *arguments: str) -> None:
    common = [f"--node-ip-address={lab.host(name).address}", f"--object-store-memory={_STORE_BYTES}"]
    common += ["--include-log-monitor=false", "--disable-usage-stats"]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", *common, *arguments]
    log = lab.folder / name / "ray.log"
    with log.open("w") as out:
        # Not through a pipe: what Ray starts would hold it open.
        try:
            code = subprocess.run(
                lab.command(name, command, "/"), env=environment(lab), stdin=subprocess.DEVNULL, stdout=out,
                stderr=subprocess.STDOUT, timeout=_PATIENCE_S,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            code = -1
    if code:
        raise RunFailure(f"Ray does not start in host {name!r} of the lab: {' '.join(log.read_text().split())[-500:]}")
