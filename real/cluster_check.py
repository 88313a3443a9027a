"""Whether the hosts of a testbed are ready for a run: who is there, as what, and what to do about what is wrong.

Asks an actor on each Ray node. Knows Ray, and what breaks or falsifies runs; starts and repairs nothing.
"""

from __future__ import annotations

import socket
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal

from isthmus.real.clocks import Offset, offset
from isthmus.real.cluster import connect, results, start_actor
from isthmus.real.host_facts import Facts, Inspector, facts
from isthmus.real.launcher import join_command
from isthmus.real.pressure import stalled_share
from isthmus.workloads.cluster import DRIVER, HEAD, ClusterSpec, resource
from isthmus.workloads.errors import InputError, IsthmusError
from isthmus.workloads.model import Model
from isthmus.workloads.testbed import TestbedSpec

Level = Literal["error", "warning", "note"]

_LEVELS: tuple[Level, ...] = ("error", "warning", "note")
_PATIENCE_S = 60.0
_MEMORY_BYTES = 600e6
"""What Ray, an actor and its ONNX Runtime take on a host, before any model."""
_DISK_SHARE = 0.05
"""Ray makes no objects on a disk with less than that free."""
_SHM_BYTES = 512e6
_SLOW_NAME_S = 1.0
_VAGUE_CLOCK_S = 0.002
_BUSY_SHARE = 0.2
_THROTTLED = ("too little voltage", "a capped frequency", "throttling", "too high a temperature")
"""Bits of `vcgencmd get_throttled`, now; the same 16 bits higher: since it was started."""


@dataclass(frozen=True)
class Problem:
    """What is wrong with a host, and what to do about it. An error would break a run."""

    host: str
    level: Level
    what: str
    fix: str


@dataclass(frozen=True)
class Host:
    """A machine of the testbed, or of its cluster; without facts it is not there, or does not answer."""

    name: str
    address: str
    facts: Facts | None = None
    clock: Offset | None = None
    """Of its clock against the driver's."""
    models: Mapping[str, str] = field(default_factory=dict)
    """How each model gets there: `there`, `sent` or `by name`."""


@dataclass(frozen=True)
class Checked:
    hosts: tuple[Host, ...]
    problems: tuple[Problem, ...]

    @property
    def ready(self) -> bool:
        return not any(problem.level == "error" for problem in self.problems)

    def to_json(self) -> dict[str, Any]:
        return {"ready": self.ready, **asdict(self)}


def check(spec: TestbedSpec, folder: Path, models: Sequence[Model] = ()) -> Checked:
    """Ask all hosts. Without a cluster: this machine alone, as an emulated run needs it.

    `folder` is what the paths in `spec` start from. What is wrong is in the answer; it does not raise.
    """
    cluster = spec.cluster
    hosts: list[Host] = []
    problems: list[Problem] = []
    before = stalled_share()  # starting Ray, and asking, is work too
    try:
        with connect(cluster, folder) as ray:
            mine = ray.get_runtime_context().get_node_id()
            nodes = sorted(_alive(ray), key=lambda node: node["NodeID"] != mine)
            here = Facts(**facts(_temp(nodes[0])))
            for node in nodes:
                host = Host(_name(node, cluster, mine, here), node["NodeManagerAddress"])
                try:
                    asked = _ask(ray, node, host, models)
                    hosts.append(_like(asked, here) if node["NodeID"] == mine else asked)
                except IsthmusError as error:
                    hosts.append(host)
                    problems.append(Problem(host.name, "error", f"does not answer: {error}", "restart Ray there"))
                problems += _misplaced(node, host, cluster)
        known = True
    except IsthmusError as error:
        known, here = False, Facts(**facts("/tmp/ray"))
        what, fix = (error.problem, error.allowed) if isinstance(error, InputError) else (str(error), None)
        where = f"{error.where}: " if isinstance(error, InputError) and error.where is not None else ""
        problems.append(Problem(DRIVER, "error", where + what, fix or "docs/cluster.md says how a cluster is started"))
        hosts = [Host(here.name if cluster is None else DRIVER, "", here)]
    if cluster is not None:
        wanted = {node.host for node in spec.nodes.values() if node.host is not None}
        for name in sorted(wanted.union(cluster.hosts) - {host.name for host in hosts}):
            hosts.append(Host(name, cluster.hosts[name].address if name in cluster.hosts else ""))
            problems += [_absent(cluster, name)] if known else []
    hosts = [_at_rest(host, before) for host in hosts]
    for name, count in Counter(host.name for host in hosts).items():
        if count > 1:
            fix = "stop Ray on all but one of them, and start it there with a resource of its own"
            problems.append(Problem(name, "error", f"{count} machines say that they are this host", fix))
    needed_bytes = _MEMORY_BYTES + sum(3 * model.weights_bytes(model.whole()) for model in models)
    for host in hosts:
        if host.facts is not None:
            problems += judge(host, here, needed_bytes, cluster)
    ordered = sorted(dict.fromkeys(problems), key=lambda problem: _LEVELS.index(problem.level))
    return Checked(tuple(hosts), tuple(ordered))


def judge(host: Host, here: Facts, needed_bytes: float, cluster: ClusterSpec | None) -> Iterator[Problem]:
    """What is wrong with a host that has answered. `here` is the driver's machine."""
    there = host.facts
    assert there is not None
    error, warning, note = (partial(Problem, host.name, level) for level in _LEVELS)
    yield from _versions(host.name, there, here)
    if there.resolve_s is None or there.resolve_s > _SLOW_NAME_S:
        found = "does not resolve" if there.resolve_s is None else f"takes {there.resolve_s:.0f} s to resolve"
        fix = f"add `{host.address or '127.0.1.1'} {there.name}` to /etc/hosts there"
        yield warning(f"its own name {there.name!r} {found}, which makes Ray start 10 s later", fix)
    if there.memory_free_bytes < needed_bytes:
        short = (
            f"{there.memory_free_bytes / 1e6:.0f} MB of memory are free, and a run may take {needed_bytes / 1e6:.0f}"
        )
        fix = "end other programs, or add swap or zram" if not there.swap_bytes else "end other programs"
        enough = there.memory_free_bytes > 0.05 * there.memory_bytes  # with less, Ray ends actors
        yield (warning if enough else error)(short, fix)
    if there.disk_free_bytes < _DISK_SHARE * there.disk_bytes:
        free = there.disk_free_bytes / there.disk_bytes
        yield error(f"{free:.1%} of the disk with {there.temp} is free, and Ray wants 5 %", "delete what is not needed")
    if there.shm_bytes is not None and there.shm_bytes < _SHM_BYTES:
        fix = "mount it larger; in a container: --shm-size=1g"
        yield warning(f"/dev/shm has only {there.shm_bytes / 1e6:.0f} MB, so that Ray uses the disk", fix)
    if there.stalled_share is not None and there.stalled_share > _BUSY_SHARE:
        fix = "end other programs: they make runs slower than the profiles say"
        yield warning(f"tasks waited for a processor {there.stalled_share:.0%} of the last 10 s", fix)
    elif there.stalled_share is None and there.load_1 > 0.5 * there.cores:
        yield warning(f"its load is {there.load_1:.1f} on {there.cores} processors", "end other programs")
    if there.cores < 2:
        yield warning("has one processor, which Ray and the model share", "more than one, for figures to rely on")
    if slow := [name for name in there.governors if name != "performance"]:
        fix = "`echo performance | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor`"
        yield note(f"its frequency governor is {', '.join(slow)}: the first requests after a pause are slower", fix)
    yield from _throttled(host.name, there.throttled)
    if there.environment:
        named = ", ".join(f"{name}={value}" for name, value in sorted(there.environment.items()))
        yield warning(
            f"has settings of Ray that Isthmus has not made: {named}", "unset them, and start Ray again there"
        )
    if there.unreadable_meters:
        fix = f"`sudo chmod a+r {' '.join(there.unreadable_meters)}`, after each start"
        yield note("its energy counters may not be read, so its energy will be modelled", fix)
    if host.clock is not None and host.clock.error_s > _VAGUE_CLOCK_S:
        vague = f"its clock is known to {host.clock.error_s * 1e3:.1f} ms only: so are times across its links"
        yield note(vague, "a link with a shorter round trip while clocks are compared")
    if cluster is not None and host.clock is not None:
        yield from _token(host.name, there)


def _versions(name: str, there: Facts, here: Facts) -> Iterator[Problem]:
    def minor(version: str) -> str:
        return version.rpartition(".")[0]

    same = "install the same versions everywhere: `isthmus cluster file --wheel`, or by hand"
    if minor(there.python) != minor(here.python):
        yield Problem(name, "error", f"has Python {there.python}, and the driver {here.python}", same)
    if there.packages["ray"] != here.packages["ray"]:
        what = f"has Ray {there.packages['ray']}, and the driver {here.packages['ray']}"
        yield Problem(name, "error", what, f"`pip install ray=={here.packages['ray']}` there")
    if there.packages["isthmus"] is None:
        yield Problem(name, "error", f"cannot import isthmus: {there.missing}", "`pip install 'isthmus[real]'` there")
    elif there.code != here.code:
        what = f"has isthmus {there.packages['isthmus']} with other code than the driver's ({here.packages['isthmus']})"
        yield Problem(name, "error", what, "install the same wheel on all machines")
    for package in ("onnxruntime", "onnx", "zmq"):
        if there.packages[package] is None:
            yield Problem(name, "error", f"has no {package}", "`pip install 'isthmus[real]'` there")
        elif package != "zmq" and there.packages[package] != here.packages[package]:
            what = f"has {package} {there.packages[package]}, and the driver {here.packages[package]}"
            yield Problem(name, "note", what, "the same everywhere, for answers that are the same bit for bit")


def _throttled(name: str, bits: int | None) -> Iterator[Problem]:
    if not bits:
        return
    fix = "a stronger power supply, and cooling"
    if now := [said for bit, said in enumerate(_THROTTLED) if bits >> bit & 1]:
        yield Problem(name, "warning", f"is slowed down by {', '.join(now)}", fix)
    elif before := [said for bit, said in enumerate(_THROTTLED) if bits >> (16 + bit) & 1]:
        yield Problem(name, "note", f"has been slowed down since it was started by {', '.join(before)}", fix)


def _token(name: str, there: Facts) -> Iterator[Problem]:
    if there.auth_mode != "token":
        yield Problem(name, "warning", "runs Ray without a token", "start it there with RAY_AUTH_MODE=token")
    if there.token_mode is not None and there.token_mode & 0o077:
        what = f"others there may read the token {there.token_file} (mode {there.token_mode:o})"
        yield Problem(name, "warning", what, f"`chmod 600 {there.token_file}` there")


def _misplaced(node: Mapping[str, Any], host: Host, cluster: ClusterSpec | None) -> Iterator[Problem]:
    """A Ray node that is no host, or one at another address than the testbed says."""
    if cluster is None:
        return
    said = {spec.address: name for name, spec in cluster.hosts.items()}
    if not _hosts(node) and (name := said.get(host.address)) is not None:
        fix = f"`ray stop` there, and: {join_command(cluster, name)}"
        yield Problem(name, "error", f"is in the cluster without the resource {resource(name)!r}", fix)
    elif len(several := _hosts(node)) > 1:
        what = f"says that it is several hosts: {', '.join(several)}"
        yield Problem(host.name, "error", what, "start Ray there with one of these resources")
    elif host.name in cluster.hosts and _is_number(spec := cluster.hosts[host.name].address) and spec != host.address:
        fix = f"start Ray there with --node-ip-address={spec}, or correct the testbed"
        yield Problem(host.name, "warning", f"is in the cluster at {host.address}, not at {spec}", fix)


def _absent(cluster: ClusterSpec, name: str) -> Problem:
    if name not in cluster.hosts:
        fix = f"start Ray on it: {join_command(cluster, name)}"
        return Problem(name, "error", "is not in the cluster, and the testbed has no address of it", fix)
    address = cluster.hosts[name].address
    try:
        with socket.create_connection((address, 22), 2):
            said, fix = "answers at its address, and is not in the cluster", join_command(cluster, name)
    except ConnectionRefusedError:
        said, fix = f"is up at {address} without SSH, and is not in the cluster", join_command(cluster, name)
    except socket.gaierror:
        said, fix = f"is not in the cluster, and its name {address!r} does not resolve", "an IP address in the testbed"
    except OSError:
        said, fix = f"is not in the cluster, and does not answer at {address}", "switch it on, check its network"
    return Problem(name, "error", said, fix)


def _ask(ray: Any, node: Mapping[str, Any], host: Host, models: Sequence[Model]) -> Host:
    """The host with what it tells. RunFailure when it does not answer."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    with _as_code(ray):
        actor = start_actor(ray, Inspector, scheduling_strategy=there)
    try:
        [told] = results(ray, [actor.facts.remote(_temp(node))], _PATIENCE_S)
        clock = offset(lambda: results(ray, [actor.clock.remote()], _PATIENCE_S)[0])
        files = {model.source: model.sha256 for model in models if Path(model.source).is_file()}
        has = results(ray, [actor.has.remote(files)], _PATIENCE_S)[0] if told["packages"]["isthmus"] else []
    finally:
        ray.kill(actor)
    ways = {m.name: "by name" if m.source not in files else "there" if m.source in has else "sent" for m in models}
    return replace(host, facts=Facts(**told), clock=clock, models=ways)


def _like(host: Host, driver: Facts) -> Host:
    """The driver's machine has the settings of the driver too."""
    assert host.facts is not None
    return replace(host, facts=replace(host.facts, environment={**driver.environment, **host.facts.environment}))


def _at_rest(host: Host, stalled: float | None) -> Host:
    """A host on the driver's machine, as pressed as it was before it was asked."""
    if host.facts is None or host.clock is None or host.clock.error_s:
        return host
    return replace(host, facts=replace(host.facts, stalled_share=stalled))


@contextmanager
def _as_code(ray: Any) -> Iterator[None]:
    """What is pickled inside takes its code with it: a host may have none of Isthmus, or another."""
    isthmus = sys.modules["isthmus"]
    ray.cloudpickle.register_pickle_by_value(isthmus)
    try:
        yield
    finally:
        ray.cloudpickle.unregister_pickle_by_value(isthmus)


def _alive(ray: Any) -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _hosts(node: Mapping[str, Any]) -> list[str]:
    """The hosts that a Ray node says to be."""
    prefix = resource("")
    return sorted(name.removeprefix(prefix) for name in node["Resources"] if name.startswith(prefix))


def _name(node: Mapping[str, Any], cluster: ClusterSpec | None, mine: str, here: Facts) -> str:
    if cluster is None:
        return here.name
    if hosts := _hosts(node):
        return hosts[0]
    address = str(node["NodeManagerAddress"])
    if node["NodeID"] == mine:
        return DRIVER
    return HEAD if address == cluster.address.rpartition(":")[0] else address


def _temp(node: Mapping[str, Any]) -> str:
    """The folder in which a Ray node keeps the folders of its sessions."""
    return str(Path(node["RayletSocketName"]).parents[2])


def _is_number(address: str) -> bool:
    try:
        ip_address(address)
    except ValueError:
        return False
    return True
