"""The lab: hosts inside one Linux machine, each with namespaces of its own, and a network between them. Needs root.

Knows nodes by name, links and processes; no Ray (real/lab_ray.py) and no experiment. Nothing of a lab is in the
machine's own network namespace, so labs meet neither each other nor anything else, and all have the same addresses:

    head  198.18.0.1 ── one virtual Ethernet to every host, unshaped ── for the driver, and for what controls
    host  198.18.0.2 … , on its loopback; every link of the testbed is one device more in both of its hosts

Where two hosts have no link, packets take the best route over links, and hosts on it forward them; there is no other
way, and none out. A host is a process that sleeps, the first one of a process namespace: when it is ended the kernel
ends all that runs in the host, and namespaces, devices and mounts go with it.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import psutil

from isthmus.workloads.errors import InputError, RunFailure, unknown
from isthmus.workloads.links import Link
from isthmus.workloads.routing import LinkId

HEAD = "head"
MadeBy = Literal["tc", "relay"]
LABS = Path("/run/isthmus-lab")
LINKS, PLUGS = "links.sock", "plugs.sock"
"""On which its keeper answers, in its folder."""
VARIABLE = "ISTHMUS_LAB"
"""Of the environment, in every process of a lab: its folder."""

NAMESPACES = ("--net", "--mount", "--uts", "--ipc", "--pid")


@dataclass(frozen=True)
class Process:
    """One that was started, and when, in ticks since the machine was: a number alone may be another's by now."""

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> Process:
        return cls(pid, _started(pid) or 0)

    @property
    def is_alive(self) -> bool:
        return self.started != 0 and _started(self.pid) == self.started


def _started(pid: int) -> int | None:
    """When a process was started; None when there is none, or it has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state == "Z" else int(fields[18])


@dataclass(frozen=True)
class Host:
    name: str
    address: str
    cpu: float | None
    """Processors that it may keep busy; None for all."""
    group: str | None
    """Its control group, where it has one."""
    pid: int
    """Of its first process."""
    processes: tuple[Process, ...]


@dataclass(frozen=True)
class Lab:
    """A lab that is up, or was: what its folder says. `find()` is the lab that this process runs in."""

    folder: Path
    hosts: tuple[Host, ...]
    wires: tuple[Mapping[str, Any], ...] = ()
    """Per link its two hosts (`between`), `device`, and what it is `made_by`: tc or relay."""
    keeper: Process | None = None
    """The process that makes links behave, and can end what runs in a host."""

    @classmethod
    def load(cls, folder: str | Path) -> Lab:
        """InputError when there is none."""
        folder = Path(folder)
        if not folder.is_dir():
            raise InputError("there is no such lab", where=folder, allowed=", ".join(names()) or "none is up")
        try:
            said = json.loads((folder / "lab.json").read_text())
        except FileNotFoundError:  # it has just begun, or did not get further
            return cls(folder, ())
        hosts = tuple(Host(**{**h, "processes": tuple(Process(**p) for p in h["processes"])}) for h in said["hosts"])
        return cls(folder, hosts, tuple(said["wires"]), said["keeper"] and Process(**said["keeper"]))

    @classmethod
    def find(cls) -> Lab | None:
        """The lab that this process runs in."""
        folder = os.environ.get(VARIABLE)
        return cls.load(folder) if folder else None

    @property
    def name(self) -> str:
        return self.folder.name

    def host(self, name: str) -> Host:
        """InputError when there is none."""
        for host in self.hosts:
            if host.name == name:
                return host
        raise unknown("host", name, [host.name for host in self.hosts], where=f"lab {self.name}")

    def play(self, epoch_s: float, links: Mapping[LinkId, Link]) -> None:
        """At `epoch_s` of the monotonic clock, which all hosts share, these directions of links become as described.

        Their rates have time 0 then. In the past, it is at once. It replaces what was to become of links later; what
        waits for a link, or has left it in part, is sent anew. InputError for what is no link of the lab.
        """
        ask(self.folder / LINKS, "play", epoch_s, dict(links))

    def totals(self) -> dict[LinkId, dict[str, float]]:
        """What every direction of every link has carried and dropped since the lab is up."""
        found: dict[LinkId, dict[str, float]] = ask(self.folder / LINKS, "totals")
        return found

    def kill(self, host: str) -> None:
        """End all that runs in a host, as if its plug were pulled. Its network stays."""
        ask(self.folder / PLUGS, "kill", self.host(host).name)

    def restart(self, host: str) -> None:
        """Begin to start Ray in a host again; that takes seconds."""
        ask(self.folder / PLUGS, "restart", self.host(host).name)

    def command(self, host: str, arguments: Sequence[str], folder: str | Path | None = None) -> list[str]:
        """What runs a command in a host, in a folder, by default this one. For use outside of the lab."""
        there = self.host(host)
        enter = ["nsenter", "--target", str(there.pid), *NAMESPACES, "--"]
        enter += ["sh", "-c", 'cd "$1" && shift && exec "$@"', host, os.path.abspath(folder or "."), *arguments]
        if there.group is None:
            return enter
        return ["sh", "-c", 'echo $$ >"$0" && exec "$@"', f"{there.group}/cgroup.procs", *enter]

    def empty(self, host: str) -> None:
        """What `kill` does, from outside of the lab: what is in the host's namespace is ended, but for its first."""
        first = self.host(host).processes[0]
        there = _namespace(first.pid)
        if not first.is_alive or there in (None, _namespace(os.getpid())):  # never this machine's own processes
            raise RunFailure(f"host {host!r} of the lab is gone")
        while True:  # they may start more until the last one is gone
            others = [p for p in psutil.pids() if p != first.pid and _namespace(p) == there and _started(p) is not None]
            if not others:
                return
            for pid in others:
                with suppress(ProcessLookupError):
                    os.kill(pid, 9)

    def down(self) -> None:
        """End all that the lab has started, and nothing else. Once more does no harm."""
        started = [p for host in self.hosts for p in host.processes] + ([self.keeper] if self.keeper else [])
        for process in started:
            if process.is_alive:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, 9)
        await_that(lambda: not any(process.is_alive for process in started), "its processes do not end")
        for host in self.hosts:
            if host.group is not None:
                await_that(partial(_removed, host.group), f"{host.group} is still in use")
        shutil.rmtree(self.folder, ignore_errors=True)

    def save(self) -> Lab:
        said = {key: value for key, value in asdict(self).items() if key != "folder"}
        partial = self.folder / "lab.json.partial"
        partial.write_text(json.dumps(said, indent=1))
        partial.replace(self.folder / "lab.json")
        return self


def _namespace(pid: int) -> str | None:
    """The process namespace that a process is in."""
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:  # it has just ended
        return None


def ask(listener: Path, *question: Any) -> Any:
    """What the keeper of a lab answers (real/lab_keeper.py). RunFailure when there is none."""
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(30)
            client.connect(str(listener))
            with client.makefile("rwb") as stream:
                pickle.dump(question, stream)
                stream.flush()
                answer = pickle.load(stream)
    except (OSError, EOFError) as error:
        raise RunFailure(f"{listener}: the lab does not answer: {error}") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _removed(group: str) -> bool:
    try:
        os.rmdir(group)
    except FileNotFoundError:
        return True
    except OSError:  # of what has just ended, something is still in it
        return False
    return True


def await_that(done: Any, otherwise: str, timeout_s: float = 20) -> None:
    until_s = time.monotonic() + timeout_s
    while not done():
        if time.monotonic() > until_s:
            raise RunFailure(f"the lab: {otherwise}")
        time.sleep(0.01)


def names() -> list[str]:
    """The labs that are up, or were not taken down."""
    return sorted(path.name for path in LABS.glob("*"))


def unavailable() -> str | None:
    """Why there can be no lab on this machine; None where there can."""
    if sys.platform != "linux":
        return "it needs Linux"
    if os.geteuid() != 0:
        return "it needs root"
    for tool in ("unshare", "nsenter", "mount"):
        if shutil.which(tool) is None:
            return f"there is no `{tool}`"
    if not os.path.exists("/dev/net/tun"):
        return "there is no /dev/net/tun"
    try:
        import pyroute2  # noqa: F401
    except ImportError:
        return "pyroute2 is missing: pip install 'isthmus[lab]'"
    tried = subprocess.run(["unshare", *NAMESPACES, "--fork", "--mount-proc", "true"], capture_output=True, text=True)
    return f"namespaces are not allowed: {tried.stderr.strip()}" if tried.returncode else None
