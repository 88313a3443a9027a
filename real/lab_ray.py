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
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from isthmus.real.lab import HEAD, VARIABLE, Lab, await_that
from isthmus.workloads.affliction import afflicted
from isthmus.workloads.cluster import ClusterSpec, HostSpec, resource
from isthmus.workloads.errors import RunFailure
from isthmus.workloads.faults import Fault, LinkFault
from isthmus.workloads.testbed import Testbed

PORT = 6379
_STORE_BYTES = 100 * 2**20
_PATIENCE_S = 120


def environment(lab: Lab) -> dict[str, str]:
    """What every process in the lab has to be told, beside what this one was."""
    found = [os.path.abspath(path) for path in dict.fromkeys(sys.path)]  # actors find what the driver finds
    other = ("RAY_AUTH_TOKEN", "RAY_USE_TLS", "RAY_ADDRESS")  # of a cluster that this process may be in
    return {
        **{name: value for name, value in os.environ.items() if name not in other},
        "PYTHONPATH": os.pathsep.join(found),
        VARIABLE: str(lab.folder),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(lab.folder / "token"),
        "RAY_max_direct_call_object_size": str(10_000_000),
        "RAY_USAGE_STATS_ENABLED": "0",
        # A host whose plug is pulled refuses connections at once: three times, and it is known to be gone. One that is
        # only busy has ten seconds each time.
        "RAY_health_check_initial_delay_ms": "1000",
        "RAY_health_check_period_ms": "500",
        "RAY_health_check_failure_threshold": "3",
        "RAY_health_check_timeout_ms": "10000",
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
    _start(lab, HEAD, "--head", f"--port={PORT}", "--include-dashboard=false", "--num-cpus=1")
    with ThreadPoolExecutor(2) as pool:  # more would only wait for each other
        list(pool.map(partial(start_host, lab), [host.name for host in lab.hosts if host.name != HEAD]))


def start_host(lab: Lab, name: str) -> None:
    """Ray in one host, which joins the others."""
    _start(
        lab, name, f"--address={lab.host(HEAD).address}:{PORT}", "--num-cpus=1",
        f"--resources={json.dumps({resource(name): 1})}",
    )  # fmt: skip


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


@dataclass(frozen=True)
class LabGround:
    """What carries the nodes of a testbed, for who drives a run in a lab (`Ground` in real/drive.py)."""

    lab: Lab
    testbed: Testbed
    """As it is declared, not as its links were measured."""

    def hold(self) -> None:
        """Every link at its mean rate, until something begins."""
        self.lab.play(time.monotonic(), self.testbed.nominal.links)

    def begin(self, epoch: float, seed: int, faults: Sequence[Fault]) -> None:
        """Rates as this seed draws them, with their outages, from this reading of the monotonic clock on."""
        outages = [fault for fault in faults if isinstance(fault, LinkFault)]
        self.lab.play(epoch, afflicted(self.testbed.at_seed(seed), outages).links)

    def kill(self, node: str) -> None:
        self.lab.kill(node)

    def restart(self, node: str) -> None:
        """Returns when Ray knows that the host was away: before, it would start actors on the one that is gone."""
        import ray

        def alive() -> set[str]:
            address = self.lab.host(node).address
            return {it["NodeID"] for it in ray.nodes() if it["Alive"] and it["NodeManagerAddress"] == address}

        before = alive()
        self.lab.restart(node)
        await_that(lambda: not before & alive(), f"host {node!r} was ended, and Ray does not notice")


if __name__ == "__main__":
    start_host(Lab.load(sys.argv[1]), sys.argv[2])
