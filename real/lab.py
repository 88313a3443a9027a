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
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

import isthmus
from isthmus.workloads.errors import InputError, RunFailure, unknown
from isthmus.workloads.links import Link
from isthmus.workloads.routing import LinkId, Routes

HEAD = "head"
LABS = Path("/run/isthmus-lab")
VARIABLE = "ISTHMUS_LAB"
"""Of the environment, in every process of a lab: its folder."""

_NAMESPACES = ("--net", "--mount", "--uts", "--ipc", "--pid")
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
_PERIOD_US, _LEAST_QUOTA_US = 5_000, 1_000

# The first process of a host. It ignores its children's ends, so that the kernel reaps them.
_HOST = """
trap '' CHLD
for setting in 4/ip_forward=$FORWARD 4/conf/all/send_redirects=0 4/conf/default/send_redirects=0 \
    4/conf/all/rp_filter=0 4/conf/default/rp_filter=0 6/conf/all/disable_ipv6=1 6/conf/default/disable_ipv6=1; do
  echo "${setting#*=}" 2>/dev/null >"/proc/sys/net/ipv${setting%%=*}" || true
done
echo "$NAME" >/proc/sys/kernel/hostname
mount -t tmpfs -o mode=1777 isthmus-lab /dev/shm
test -d /tmp/ray || mkdir -m 0777 /tmp/ray
mount --bind "$FOLDER/$NAME/ray" /tmp/ray
mount --bind "$FOLDER/hosts" /etc/hosts
test ! -e /etc/resolv.conf || mount --bind "$FOLDER/empty" /etc/resolv.conf
echo ready
exec sleep infinity >/dev/null
"""


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
    relay: Process | None = None

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
        return cls(folder, hosts, tuple(said["wires"]), said["relay"] and Process(**said["relay"]))

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
        from isthmus.real.relay import ask

        ask(self.folder, (epoch_s, dict(links)))

    def totals(self) -> dict[LinkId, dict[str, float]]:
        """What every direction of every link has carried and dropped since the lab is up."""
        from isthmus.real.relay import ask

        found: dict[LinkId, dict[str, float]] = ask(self.folder, None)
        return found

    def command(self, host: str, arguments: Sequence[str], folder: str | Path | None = None) -> list[str]:
        """What runs a command in a host, in a folder, by default this one. For use outside of the lab."""
        there = self.host(host)
        enter = ["nsenter", "--target", str(there.pid), *_NAMESPACES, "--"]
        enter += ["sh", "-c", 'cd "$0" && exec "$@"', os.path.abspath(folder or "."), *arguments]
        if there.group is None:
            return enter
        return ["sh", "-c", 'echo $$ >"$0" && exec "$@"', f"{there.group}/cgroup.procs", *enter]

    def down(self) -> None:
        """End all that the lab has started, and nothing else. Once more does no harm."""
        started = [p for host in self.hosts for p in host.processes] + ([self.relay] if self.relay else [])
        for process in started:
            if process.is_alive:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, 9)
        _await(lambda: not any(process.is_alive for process in started), "its processes do not end")
        for host in self.hosts:
            if host.group is not None:
                _await(lambda group=host.group: _removed(group), f"{host.group} is still in use")  # type: ignore[misc]
        shutil.rmtree(self.folder, ignore_errors=True)

    def save(self) -> Lab:
        said = {key: value for key, value in asdict(self).items() if key != "folder"}
        partial = self.folder / "lab.json.partial"
        partial.write_text(json.dumps(said, indent=1))
        partial.replace(self.folder / "lab.json")
        return self


def _removed(group: str) -> bool:
    try:
        os.rmdir(group)
    except FileNotFoundError:
        return True
    except OSError:  # of what has just ended, something is still in it
        return False
    return True


def _await(done: Any, otherwise: str, timeout_s: float = 20) -> None:
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
    tried = subprocess.run(["unshare", *_NAMESPACES, "--fork", "--mount-proc", "true"], capture_output=True, text=True)
    return f"namespaces are not allowed: {tried.stderr.strip()}" if tried.returncode else None


def up(
    name: str,
    nodes: Sequence[str],
    links: Mapping[LinkId, Link],
    *,
    cpu: Mapping[str, float] | None = None,
    shaper: Any = None,
) -> Lab:
    """A host for every node, and one for the driver; the links between them, whose rates begin to play at once.

    `cpu` are the processors that hosts may keep busy, `shaper` is `tc` or `relay` where it is not to be chosen.
    InputError for names that are taken or impossible, RunFailure where the machine does not allow it. What was made
    until then is taken down.
    """
    if (why := unavailable()) is not None:
        raise RunFailure(f"no lab on this machine: {why}")
    from isthmus.real.relay import check

    cpu = cpu or {}
    for node in (*nodes, name):
        if not _NAME.match(node) or node == HEAD:
            raise InputError(
                f"{node!r} cannot be the name of a host", where="lab", allowed="letters, digits, . _ -, and not `head`"
            )
    for node, share in cpu.items():
        if node not in nodes:
            raise unknown("node", node, nodes, where="--cpu")
        if not 0.01 <= share < math.inf:
            raise InputError(f"{share:g} of a processor for {node!r}", where="--cpu", allowed="0.01 or more")
    for link in links.values():
        check(link, links)
    folder = LABS / name
    try:
        folder.mkdir(parents=True, mode=0o700)
    except FileExistsError:
        raise InputError("is up already", where=f"lab {name}", allowed=f"`isthmus lab down {name}` before") from None
    lab = Lab(folder, ())
    try:
        for lab in _build(lab, nodes, links, cpu, shaper):  # each has one thing more that is to be taken down
            lab.save()
    except BaseException:
        lab.down()
        raise
    return lab


def _build(
    lab: Lab, nodes: Sequence[str], links: Mapping[LinkId, Link], cpu: Mapping[str, float], shaper: Any
) -> Iterator[Lab]:
    """The lab as it grows. Each is to be saved before the next."""
    from isthmus.real import shaping

    addresses = {name: f"198.18.{number >> 8}.{number & 255}" for number, name in enumerate((HEAD, *nodes), 1)}
    (lab.folder / "hosts").write_text(
        "".join(f"{address} {name}\n" for name, address in {"localhost": "127.0.0.1", **addresses}.items())
    )
    (lab.folder / "empty").touch()
    started = []
    for name, address in addresses.items():
        group = None if name not in cpu else f"isthmus-lab-{lab.name}-{name}"
        host = Host(name, address, cpu.get(name), group and str(control_groups() / group), 0, ())
        yield (lab := replace(lab, hosts=(*lab.hosts, host)))
        if host.group is not None:
            limit(Path(host.group), cpu[name])
        started.append(_start_host(lab.folder, name))
        host = replace(host, processes=(Process.of(started[-1].pid),))
        yield (lab := replace(lab, hosts=(*lab.hosts[:-1], host)))
    hosts = tuple(_ready(host, process, lab.folder) for host, process in zip(lab.hosts, started, strict=True))
    yield (lab := replace(lab, hosts=hosts))
    head, *others = hosts
    for host in hosts:
        shaping.begin(host.pid, host.address)
    for number, host in enumerate(others):
        shaping.join(host.pid, "eth0", head.pid, f"host{number}")
        for here, there, device in ((host, head, "eth0"), (head, host, f"host{number}")):
            shaping.raise_device(here.pid, device)
            shaping.route(here.pid, there.address, device, here.address)

    by_name = {host.name: host for host in hosts}
    netem = shaping.has_netem(head.pid)
    wires = []
    for number, (a, b) in enumerate(link for link in links if link[0] < link[1]):
        made_by = shaping.made_by(links[a, b], links[b, a], netem=netem, asked=shaper)
        wires.append({"between": (a, b), "device": f"link{number}", "made_by": made_by})
        if made_by == "tc":
            shaping.join(by_name[a].pid, f"link{number}", by_name[b].pid, f"link{number}")
            for end in (a, b):
                shaping.raise_device(by_name[end].pid, f"link{number}")
    yield (lab := replace(lab, wires=tuple(wires)))
    relay = _start_relay(lab.folder, links)
    yield (lab := replace(lab, relay=Process.of(relay.pid)))
    _await_word(relay, "the relay does not start", lab.folder / "relay.log")

    devices: dict[LinkId, str] = {}
    for wire in wires:
        a, b = wire["between"]
        devices[a, b] = devices[b, a] = str(wire["device"])
    for link, device in devices.items():
        shaping.raise_device(by_name[link[0]].pid, device, piece_bytes=shaping.piece_bytes(links[link]))
    routes = Routes(nodes, {link: it.latency_s for link, it in links.items()}, frozenset())
    for a in others:
        for b in others:
            with suppress(InputError):  # there is no way
                if a != b:
                    following = routes.find(a.name, b.name)[1]
                    by_way_of = None if following == b.name else by_name[following].address
                    shaping.route(a.pid, b.address, devices[a.name, following], a.address, by_way_of)


def _start_host(folder: Path, name: str) -> subprocess.Popen[str]:
    (folder / name / "ray").mkdir(parents=True)
    settings = {"FOLDER": str(folder), "NAME": name, "FORWARD": str(int(name != HEAD)), "PATH": os.environ["PATH"]}
    with (folder / name / "host.log").open("w") as log:
        return subprocess.Popen(
            ["unshare", *_NAMESPACES, "--fork", "--kill-child", "--mount-proc", "sh", "-eu", "-c", _HOST],
            env=settings, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True,
            start_new_session=True,
        )  # fmt: skip


def _ready(host: Host, process: subprocess.Popen[str], folder: Path) -> Host:
    """The host when its first process is there, in its control group."""
    _await_word(process, f"host {host.name!r} does not start", folder / host.name / "host.log")
    [first] = psutil.Process(process.pid).children()
    if host.group is not None:
        (Path(host.group) / "cgroup.procs").write_text(str(first.pid))
    return replace(host, pid=first.pid, processes=(Process.of(first.pid), *host.processes))


def _start_relay(folder: Path, links: Mapping[LinkId, Link]) -> subprocess.Popen[str]:
    (folder / "links.pickle").write_bytes(pickle.dumps(dict(links)))
    # This Isthmus, wherever it is.
    settings = {**os.environ, "PYTHONPATH": str(Path(isthmus.__file__).parents[1])}
    with (folder / "relay.log").open("w") as log, (folder / "links.pickle").open() as given:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "isthmus.real.relay", str(folder)],
            env=settings, stdin=given, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True,
        )  # fmt: skip


def _await_word(process: subprocess.Popen[str], otherwise: str, log: Path) -> None:
    """Until it says that it is ready; RunFailure with what it says instead."""
    assert process.stdout is not None
    with process.stdout:
        if process.stdout.readline() != "ready\n":
            process.wait()
            raise RunFailure(f"the lab: {otherwise}: {' '.join(log.read_text().split())[-500:]}")


def control_groups() -> Path:
    """Where control groups are that limit CPU: of version 2, or of version 1."""
    root = Path("/sys/fs/cgroup")
    return root if (root / "cgroup.controllers").exists() else root / "cpu"


def limit(group: Path, share: float) -> None:
    """A new control group, whose processes together keep so many processors busy at most.

    A period of 5 ms, since the usual 100 ms would stop a part of milliseconds for most of a period or not at all; for
    shares below 0.2 longer, since the kernel wants a quota of 1 ms. RunFailure where the kernel has no such limit.
    """
    period = max(_PERIOD_US, math.ceil(_LEAST_QUOTA_US / share))
    quota = round(share * period)
    root = group.parent
    try:
        if (root / "cgroup.controllers").exists():
            if "cpu" not in (root / "cgroup.subtree_control").read_text().split():
                (root / "cgroup.subtree_control").write_text("+cpu")
            files = {"cpu.max": f"{quota} {period}"}
        else:
            files = {"cpu.cfs_period_us": str(period), "cpu.cfs_quota_us": str(quota)}
        group.mkdir()
        for file, text in files.items():
            (group / file).write_text(text)
    except OSError as error:
        raise RunFailure(f"no limit of CPU on this machine: {error}") from None
