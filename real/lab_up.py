"""Building a lab: its hosts, one after the other, then the network, then what makes links behave. Needs root.

Knows nodes by name, links, and what Linux has for it; no Ray. What a lab is, and how it ends, is in real/lab.py.
"""

from __future__ import annotations

import math
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import psutil

from isthmus.real.lab import HEAD, LABS, NAMESPACES, Host, Lab, MadeBy, Process, unavailable
from isthmus.workloads.errors import InputError, RunFailure, unknown
from isthmus.workloads.links import Link
from isthmus.workloads.routing import LinkId, Routes

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
test -d /tmp/ray || mkdir -m 1777 /tmp/ray
mount --bind "$FOLDER/$NAME/ray" /tmp/ray
mount --bind "$FOLDER/hosts" /etc/hosts
test ! -e /etc/resolv.conf || mount --bind "$FOLDER/empty" /etc/resolv.conf
echo ready
exec sleep infinity >/dev/null
"""


def up(
    name: str,
    nodes: Sequence[str],
    links: Mapping[LinkId, Link],
    *,
    cpu: Mapping[str, float] | None = None,
    shaper: MadeBy | None = None,
) -> Lab:
    """A host for every node, and one for the driver; the links between them, whose rates begin to play at once.

    `cpu` are the processors that hosts may keep busy, `shaper` is `tc` or `relay` where it is not to be chosen.
    InputError for names that are taken or impossible, RunFailure where the machine does not allow it. What was made
    until then is taken down.
    """
    if (why := unavailable()) is not None:
        raise RunFailure(f"no lab on this machine: {why}")
    from isthmus.real.lab_keeper import check

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
        for more in _build(lab, nodes, links, cpu, shaper):
            lab = more.save()  # has one thing more that is to be taken down
    except BaseException:
        lab.down()
        raise
    return lab


def _build(
    lab: Lab, nodes: Sequence[str], links: Mapping[LinkId, Link], cpu: Mapping[str, float], shaper: MadeBy | None
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
    keeper = _start_keeper(lab.folder, links)
    yield (lab := replace(lab, keeper=Process.of(keeper.pid)))
    _await_word(keeper, "its keeper does not start", lab.folder / "keeper.log")

    devices: dict[LinkId, str] = {}
    for wire in wires:
        a, b = wire["between"]
        devices[a, b] = devices[b, a] = str(wire["device"])
    for link, device in devices.items():
        shaping.raise_device(by_name[link[0]].pid, device, piece_bytes=shaping.piece_bytes(links[link]))
    routes = Routes(nodes, {link: it.latency_s for link, it in links.items()}, frozenset())
    for here, there in permutations(others, 2):
        with suppress(InputError):  # there is no way
            following = routes.find(here.name, there.name)[1]
            by_way_of = None if following == there.name else by_name[following].address
            shaping.route(here.pid, there.address, devices[here.name, following], here.address, by_way_of)


def _start_host(folder: Path, name: str) -> subprocess.Popen[str]:
    (folder / name / "ray").mkdir(parents=True)
    settings = {"FOLDER": str(folder), "NAME": name, "FORWARD": str(int(name != HEAD)), "PATH": os.environ["PATH"]}
    with (folder / name / "host.log").open("w") as log:
        return subprocess.Popen(
            ["unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc", "sh", "-eu", "-c", _HOST],
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


def _start_keeper(folder: Path, links: Mapping[LinkId, Link]) -> subprocess.Popen[str]:
    (folder / "links.pickle").write_bytes(pickle.dumps(dict(links)))
    paths = [Path(__file__).parents[2], *map(os.path.abspath, sys.path)]  # this Isthmus, wherever it is
    settings = {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(map(str, paths)))}
    with (folder / "keeper.log").open("w") as log, (folder / "links.pickle").open() as given:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "isthmus.real.lab_keeper", str(folder)],
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
