"""The lab: real namespaces, real TCP over links that are slowed down, and a real Ray cluster in it.

Nothing arrives before the link's own integral says so, and, of a few, the quickest soon after that: how soon depends on
what else the machine does, so limits are wide. Figures are in docs/lab.md.
"""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from isthmus.experiments.cli import main
from isthmus.experiments.execute import Experiment
from isthmus.experiments.lab import hosts_and_links, in_lab
from isthmus.experiments.run_folder import Run
from isthmus.real.lab import HEAD, VARIABLE, Host, Lab, Process, names, unavailable
from isthmus.workloads.cluster import ClusterSpec
from isthmus.workloads.errors import InputError, RunFailure
from isthmus.workloads.jitter import Distributed
from isthmus.workloads.links import Link
from isthmus.workloads.rate import Rate
from isthmus.workloads.routing import LinkId
from isthmus.workloads.testbed import Testbed

why_not = unavailable()
needs_lab = pytest.mark.skipif(why_not is not None, reason=f"no lab on this machine: {why_not}")
PEER = str(Path(__file__).with_name("lab_peer.py"))
NODES = ["device", "edge", "cloud", "island"]


def link(a: str, b: str, mbit: float | Rate, latency_s: float = 0.0, **more: Any) -> Link:
    rate = mbit if isinstance(mbit, Rate) else Rate.constant(mbit * 125e3)
    return Link((a, b), rate, latency_s, **more)


def both(a: str, b: str, there: float | Rate, back: float | Rate, latency_s: float = 0.0) -> dict[LinkId, Link]:
    return {(a, b): link(a, b, there, latency_s), (b, a): link(b, a, back, latency_s)}


def new_name(what: str) -> str:
    return f"test-{what}-{os.getpid()}"


def on_the_wire(size: int) -> int:
    """Bytes of IP that a message takes in full packets: 40 of headers each, and 12 of TCP's timestamps."""
    return size + 52 * math.ceil(size / 1448)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    from isthmus.real.lab_up import up

    links = both("device", "edge", 20, 8, 0.002) | both("edge", "cloud", 50, 50, 0.005)
    made = up(new_name("hosts"), NODES, links, cpu={"cloud": 0.5})
    yield made
    made.down()


def run(lab: Lab, host: str, *arguments: str) -> str:
    return subprocess.run(lab.command(host, arguments), capture_output=True, text=True, check=True).stdout


def transfer(lab: Lab, sender: str, receiver: str, plan: Sequence[tuple[int, float]]) -> list[tuple[int, float, float]]:
    """Messages over one TCP connection: bytes, when each was sent and when it had come."""
    command = lab.command(receiver, [sys.executable, PEER, "receive"])
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as receiving:
        assert receiving.stdout is not None
        assert receiving.stdout.readline() == "ready\n"
        run(lab, sender, sys.executable, PEER, "send", lab.host(receiver).address, json.dumps(plan))
        return [tuple(json.loads(line)) for line in receiving.stdout]


WARM = [(1_000_000, 0.0)] * 2
"""So that TCP's window is open."""


def check(taken_s: Sequence[float], ideal_s: Sequence[float]) -> None:
    for taken, ideal in zip(taken_s, ideal_s, strict=True):
        assert taken > ideal * 0.995 - 2e-4
    beyond = min(taken / ideal for taken, ideal in zip(taken_s, ideal_s, strict=True))
    assert beyond < 1.1, (taken_s, ideal_s)


@needs_lab
@pytest.mark.parametrize("latency_s", [0.002, 0.02])
@pytest.mark.parametrize(("sender", "receiver", "mbit"), [("device", "edge", 20), ("edge", "device", 8)])
def test_a_message_takes_what_its_direction_of_the_link_takes(lab, sender, receiver, mbit, latency_s):
    lab.play(time.monotonic(), both("device", "edge", 20, 8, latency_s))
    sent = transfer(lab, sender, receiver, [*WARM, *[(100_000, 0.0)] * 4, (1_000_000, 0.0)])[len(WARM) :]
    ideal_s = [on_the_wire(size) / (mbit * 125e3) + latency_s for size, _, _ in sent]
    taken_s = [came - sent_at for _, sent_at, came in sent]
    check(taken_s[:4], ideal_s[:4])
    check(taken_s[4:], ideal_s[4:])


@needs_lab
@pytest.mark.parametrize("latency_s", [0.002, 0.02])
def test_a_ping_takes_both_latencies(lab, latency_s):
    lab.play(time.monotonic(), both("device", "edge", 20, 8, latency_s))
    rtts_s = [
        float(rtt) for rtt in run(lab, "device", sys.executable, PEER, "ping", lab.host("edge").address, "20").split()
    ]
    assert min(rtts_s) >= 2 * latency_s
    assert min(rtts_s) < 2 * latency_s + 0.005


def played(
    lab: Lab, rate: Rate, plan: Sequence[tuple[int, float]], latency_s: float
) -> tuple[list[float], list[float]]:
    """What messages take whose times are given on the rate's own clock, and what they would take by its integral."""
    epoch_s = time.monotonic() + 2  # for the connection, and for opening its window
    lab.play(time.monotonic(), both("device", "edge", 20, 20, latency_s))
    lab.play(epoch_s, {("device", "edge"): link("device", "edge", rate, latency_s)})
    sent = transfer(lab, "device", "edge", [*WARM, *((size, epoch_s + at_s) for size, at_s in plan)])[len(WARM) :]
    begun_s = [at - epoch_s for _, at, _ in sent]
    ideal_s = [rate.finish_s(t, on_the_wire(n)) - t + latency_s for t, (n, _, _) in zip(begun_s, sent, strict=True)]
    return [came - at for _, at, came in sent], ideal_s


@needs_lab
@pytest.mark.parametrize("latency_s", [0.002, 0.02])
def test_a_message_feels_a_rate_that_changes_in_its_middle(lab, latency_s):
    rate = Rate((0.0, 0.4), (20 * 125e3, 5 * 125e3), 0.8)
    check(*played(lab, rate, [(100_000, 0.1), (1_000_000, 0.3), (100_000, 1.99)], latency_s))


@needs_lab
def test_a_message_on_a_link_that_is_cut_goes_on_when_it_is_repaired(lab):
    rate = Rate.constant(20 * 125e3).times(Rate((0.0, 0.3, 0.9), (1.0, 0.0, 1.0)))
    taken_s, ideal_s = played(lab, rate, [(1_000_000, 0.2)], 0.005)
    assert ideal_s[0] > 1.0
    check(taken_s, ideal_s)


@needs_lab
def test_where_there_is_no_link_packets_go_over_several(lab):
    lab.play(time.monotonic(), both("device", "edge", 20, 20, 0.002) | both("edge", "cloud", 50, 50, 0.005))
    sent = transfer(lab, "device", "cloud", [*WARM, *[(100_000, 0.0)] * 4])[len(WARM) :]
    check([came - at for _, at, came in sent], [on_the_wire(100_000) / (20 * 125e3) + 0.007] * 4)


@needs_lab
def test_where_there_is_no_way_there_is_none(lab):
    with pytest.raises(subprocess.CalledProcessError) as failed:
        run(lab, "device", sys.executable, PEER, "send", lab.host("island").address, "[]")
    assert "unreachable" in failed.value.stderr
    assert run(lab, HEAD, sys.executable, PEER, "ping", lab.host("island").address, "1")


@needs_lab
def test_what_is_lost_is_counted_and_jitter_keeps_the_order(lab):
    """TCP gets all across; with jitter of 20 ms per burst in between, and one packet in twenty lost."""
    jitter = Distributed(mean=0.02)
    one = link("device", "edge", 20, 0.002, loss=0.05, jitter=jitter)
    lab.play(time.monotonic(), both("device", "edge", 20, 20, 0.002) | {("device", "edge"): one})
    before = lab.totals()["device", "edge"]
    [(_, sent_s, came_s)] = transfer(lab, "device", "edge", [(300_000, 0.0)])
    after = lab.totals()["device", "edge"]
    assert came_s - sent_s > on_the_wire(300_000) / (20 * 125e3)
    assert after["lost"] > before["lost"]
    assert after["bytes"] - before["bytes"] >= on_the_wire(300_000)


@needs_lab
def test_only_links_of_the_lab_are_played(lab):
    with pytest.raises(InputError, match=r"link device>cloud: is not in this lab \(allowed: "):
        lab.play(0.0, {("device", "cloud"): link("device", "cloud", 1)})


@needs_lab
def test_hosts_have_names_and_files_of_their_own(lab, tmp_path):
    assert run(lab, "edge", "hostname") == "edge\n"
    run(lab, "edge", "touch", "/dev/shm/mine", "/tmp/ray/mine")
    assert run(lab, "edge", "ls", "/dev/shm", "/tmp/ray").split().count("mine") == 2
    assert "mine" not in run(lab, "device", "ls", "/dev/shm", "/tmp/ray")
    assert not Path("/dev/shm/mine").exists()
    assert run(lab, "edge", "getent", "hosts", "cloud").split() == [lab.host("cloud").address, "cloud"]
    assert subprocess.run(lab.command("edge", ["pwd"], tmp_path), capture_output=True, text=True).stdout.strip() == str(
        tmp_path
    )


@needs_lab
def test_a_host_may_have_half_a_processor(lab):
    code = "import time; t = time.monotonic()\nwhile time.monotonic() < t + 1: pass\nprint(time.process_time())"
    assert float(run(lab, "cloud", sys.executable, "-c", code)) < 0.65


@needs_lab
def test_a_plug_that_is_pulled_ends_what_runs_in_that_host_only(lab):
    running = {h: subprocess.Popen(lab.command(h, ["sleep", "60"])) for h in ("device", "edge")}
    time.sleep(0.5)
    lab.kill("edge")
    assert running["edge"].wait(5) != 0
    assert running["device"].poll() is None
    lab.kill("device")
    running["device"].wait(5)
    assert run(lab, "edge", "hostname") == "edge\n"  # the host is still there


@needs_lab
def test_what_is_down_leaves_nothing():
    from isthmus.real.lab_up import up

    name = new_name("down")
    lab = up(name, ["a", "b"], both("a", "b", 10, 10), cpu={"a": 0.1})
    with pytest.raises(InputError, match="is up already"):
        up(name, ["a"], {})
    assert name in names()
    [group] = [host.group for host in lab.hosts if host.group is not None]
    inside = [subprocess.Popen(lab.command(host.name, ["setsid", "sleep", "60"])) for host in lab.hosts]
    lab = Lab.load(lab.folder)
    assert lab.keeper is not None
    os.kill(lab.keeper.pid, 9)  # as after a crash
    os.kill(lab.host("a").pid, 9)
    while lab.keeper.is_alive:
        time.sleep(0.01)
    with pytest.raises(RunFailure, match="does not answer"):
        lab.totals()
    lab.down()
    lab.down()
    assert [process.wait(5) for process in inside]
    assert not lab.folder.exists()
    assert not Path(group).exists()
    assert not any(process.is_alive for host in lab.hosts for process in host.processes)


@needs_lab
def test_what_cannot_be_is_refused_and_leaves_nothing():
    from isthmus.real.lab_up import up

    name, shaken = new_name("wrong"), link("a", "b", 1, jitter=Distributed(mean=1))
    for nodes, links, more in [
        ([HEAD], {}, {}),
        (["a", "b c"], {}, {}),
        (["a"], {}, {"cpu": {"b": 1.0}}),
        (
            ["a", "b"],
            both("a", "b", 10, 10) | {("a", "b"): shaken},
            {"shaper": "tc"},
        ),
    ]:
        with pytest.raises(InputError):
            up(name, nodes, links, **more)
        assert name not in names()


@needs_lab
def test_the_kernel_makes_links_as_well():
    """Without netem only those that have no latency; two labs have the same addresses and do not meet."""
    from isthmus.real.lab_up import up

    lab = up(new_name("tc"), ["device", "edge"], both("device", "edge", 20, 8), shaper="tc")
    try:
        assert [wire["made_by"] for wire in lab.wires] == ["tc"]
        sent = transfer(lab, "device", "edge", [*WARM, *[(1_000_000, 0.0)] * 2])[len(WARM) :]
        check([came - at for _, at, came in sent], [on_the_wire(1_000_000) / (20 * 125e3)] * 2)
        rate = Rate((0.0, 0.3, 0.9), (20 * 125e3, 0.0, 20 * 125e3))
        epoch_s = time.monotonic() + 2
        lab.play(epoch_s, {("device", "edge"): link("device", "edge", rate)})
        [(_, sent_s, came_s)] = transfer(lab, "device", "edge", [*WARM, (1_000_000, epoch_s + 0.2)])[len(WARM) :]
        start_s = sent_s - epoch_s
        # What is in tbf's bucket when the rate becomes 0 still leaves: two packets.
        check([came_s - sent_s], [rate.finish_s(start_s, on_the_wire(1_000_000) - 8000) - start_s])
        assert lab.totals()["device", "edge"]["bytes"] > 4_000_000
    finally:
        lab.down()


@needs_lab
def test_the_command_line(tmp_path, monkeypatch, capsys):
    def isthmus(*arguments: str) -> tuple[int, str]:
        """Its exit code and what it prints."""
        monkeypatch.setattr(sys, "argv", ["isthmus", "lab", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), capsys.readouterr().out

    def execute(*arguments: str) -> tuple[int, list[str]]:
        code = "from isthmus.experiments.cli import main; main()"
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / ".src")}
        command = [sys.executable, "-c", code, "lab", "exec", "--name", name, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout.split()

    monkeypatch.chdir(tmp_path)
    Path("two.yaml").write_text(
        "models: {net: squeezenet}\n"
        "nodes: {a: {service: {mean: 5ms}}, b: {service: {mean: 5ms}}}\n"
        "links: [{between: [a, b], rate: 20Mbit, latency: 3ms}]\n"
    )
    name = new_name("cli")
    try:
        code, printed = isthmus("up", "two.yaml", "--name", name, "--cpu", "b=0.5", "--no-ray", "--json")
        assert code == 0
        [told] = json.loads(printed)
        assert [(h["name"], h["cpu"]) for h in told["hosts"]] == [(HEAD, None), ("a", None), ("b", 0.5)]
        assert all(h["up"] for h in told["hosts"])
        said = execute("b", "--", "sh", "-c", f"hostname; pwd; echo ${VARIABLE}; exit 3")
        assert said == (3, ["b", str(tmp_path), told["folder"]])
        assert execute("hostname") == (0, ["head"])
        assert {k["from"] for k in json.loads(isthmus("status", name, "--json")[1])[0]["links"]} == {"a", "b"}
        assert isthmus("up", "two.yaml", "--name", name)[0] == 2
    finally:
        assert isthmus("down", name)[0] == 0
    assert isthmus("down", name)[0] == 0
    assert name not in names()
    assert isthmus("up", "two.yaml", "--cpu", "b=fast")[0] == 2


@needs_lab
@pytest.mark.slow
def test_actors_of_ray_are_pinned_to_hosts_and_send_over_links(tmp_path):
    """400 kB of one actor to another, directly; then the plug of a host is pulled, and put in again."""
    pytest.importorskip("ray")
    from isthmus.real.lab_ray import environment, start_ray
    from isthmus.real.lab_up import up

    lab = up(new_name("ray"), ["device", "edge"], both("device", "edge", 20, 20, 0.005))
    try:
        start_ray(lab)
        script = tmp_path / "driver.py"
        script.write_text(_DRIVER)
        done = subprocess.run(
            lab.command(HEAD, [sys.executable, str(script)]), env=environment(lab), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
        told = json.loads(done.stdout.splitlines()[-1])
        assert told["where"] == {"device": "device", "edge": "edge"}
        check([came - sent for _, sent, came in told["sent"][1:]], [on_the_wire(400_000) / (20 * 125e3) + 0.005] * 4)
        assert told["again"] == "edge"
        refused = subprocess.run(
            lab.command(HEAD, [sys.executable, "-c", "import ray; ray.init(address='198.18.0.1:6379')"]),
            env={k: v for k, v in environment(lab).items() if k != "RAY_AUTH_TOKEN_PATH"}, capture_output=True,
        )  # fmt: skip
        assert refused.returncode != 0
    finally:
        lab.down()


@needs_lab
@pytest.mark.slow
def test_a_host_that_went_for_good_is_there_for_the_next_policy(tmp_path, chain):
    pytest.importorskip("ray")
    (tmp_path / "gone.yaml").write_text(
        f"testbed: {{models: {{net: '{chain}'}},"
        " nodes: {a: {service: {mean: 20ms}}, b: {service: {mean: 5ms}}},"
        " links: [{between: [a, b], rate: 20Mbit, latency: 3ms}]}\n"
        "workload: [{node: a, model: net, arrivals: {kind: periodic, rate: 5/s}, requests: 30, timeout: 2s}]\n"
        "policies: [remote, {remote: {label: again}}]\n"
        "faults: [{node: b, down: 3s}]\n"
    )
    main = "from isthmus.experiments.cli import main; main()"
    command = [sys.executable, "-c", main, "lab", "run", "gone.yaml", "--out", "out", "--no-repeat", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    requests = Run.load(tmp_path / "out" / "gone" / "real").requests
    for label in ("remote", "again"):
        of = requests[requests["policy"] == label]
        assert set(of["outcome"]) == {"completed"}
        assert of[of["arrival_s"] < 2.5]["plan"].str.contains('"b"').all()
        assert not of[of["arrival_s"] > 3.5]["plan"].str.contains('"b"').any()


_DRIVER = """
import json, logging, socket, time
import ray
from isthmus.real.lab import Lab
from isthmus.real.lab_ray import LabGround, cluster
from isthmus.workloads.cluster import resource

lab = Lab.find()
spec = cluster(lab)
ray.init(address=spec.address, _node_ip_address=spec.driver, log_to_driver=False, logging_level=logging.ERROR)

class Peer:
    def __init__(self): self.got = []
    def where(self): return socket.gethostname()
    def send(self, other, size): other.take.remote(time.monotonic(), bytes(size))
    def take(self, sent_s, data): self.got.append((len(data), sent_s, time.monotonic()))
    def taken(self): return self.got

def start(host):
    return ray.remote(Peer).options(num_cpus=0, resources={resource(host): 0.001}).remote()

peers = {host: start(host) for host in ("device", "edge")}
where = {host: ray.get(peer.where.remote()) for host, peer in peers.items()}
for _ in range(5):
    ray.get(peers["device"].send.remote(peers["edge"], 400_000))
    time.sleep(0.25)
sent = ray.get(peers["edge"].taken.remote())
ground = LabGround(lab, None)
ground.kill("edge")
ground.restart("edge")
again = ray.get(start("edge").where.remote(), timeout=60)
print(json.dumps({"where": where, "sent": sent, "again": again}))
"""


# What needs no lab


def test_bytes_on_the_wire_are_those_of_the_packets_that_tso_makes():
    from isthmus.real.relay import wire_bytes

    ip_and_tcp = bytes(20) + bytes(12) + bytes([8 << 4]) + bytes(19)  # 20 of IP, 32 of TCP
    for payload in (1, 1448, 1449, 5000, 14480):
        whole = struct.pack("=BBHHHH", 1, 1, 52, 1448, 20, 16) + ip_and_tcp + bytes(payload)
        assert wire_bytes(whole) == on_the_wire(payload)
    assert wire_bytes(struct.pack("=BBHHHH", 0, 0, 0, 0, 0, 0) + bytes(84)) == 84


def test_the_kernel_makes_what_it_can():
    from isthmus.real.shaping import made_by

    plain, late, lossy = link("a", "b", 1), link("a", "b", 1, 0.01), link("a", "b", 1, loss=0.1)
    shaken = link("a", "b", 1, jitter=Distributed(mean=1))
    assert [made_by(plain, it, netem=True) for it in (plain, late, lossy, shaken)] == ["tc", "tc", "tc", "relay"]
    assert {made_by(plain, it, netem=False) for it in (plain, late, lossy, shaken)} == {"relay"}
    assert made_by(plain, plain, netem=False, asked="tc") == "tc"
    for it in (late, lossy, shaken):
        with pytest.raises(InputError, match="the kernel cannot make its"):
            made_by(plain, it, netem=False, asked="tc")


@pytest.fixture
def described(tmp_path: Path, chain: Path) -> Callable[[], Path]:
    def write() -> Path:
        path = tmp_path / "experiment.yaml"
        path.write_text(
            "testbed:\n"
            f"  models: {{net: '{chain}'}}\n"
            "  nodes:\n"
            "    cam: {count: 2, service: {mean: 10ms}}\n"
            "    edge: {slowdown: 3}\n"
            "    cloud: {host: big, profile: other}\n"
            "  links:\n"
            "  - {between: [cam, edge], rate: {kind: gauss-markov, mean: 20Mbit, deviation: 8Mbit,"
            " correlation_time: 5s, step: 1s}}\n"
            "  - {between: [edge, cloud], rate: 100Mbit, latency: 5ms}\n"
            "workload: [{node: cam, model: net, arrivals: {kind: poisson, rate: 8/s}, requests: 5}]\n"
            "faults: [{link: [cam, edge], every: 10s, lasting: 1s}, {node: cloud, down: 1s}]\n"
            "policies: [local]\n"
            "seeds: [7, 8]\n"
        )
        return path

    return write


def _lab_of(*nodes: str, limited: str) -> Lab:
    process = Process(1, 1)
    return Lab(
        Path("lab"), tuple(Host(n, n, 0.5 if n == limited else None, None, 1, (process,)) for n in (HEAD, *nodes))
    )


def test_an_experiment_is_the_same_in_a_lab_but_for_its_hosts(described):
    experiment = Experiment.load(described())
    cluster = ClusterSpec(address="198.18.0.1:6379")
    lab = _lab_of("cam-0", "cam-1", "edge", "cloud", limited="edge")
    there = in_lab(experiment, lab, cluster)
    assert in_lab(there, lab, cluster).spec == there.spec
    spec = there.testbed_spec
    assert {n: (it.host, it.label, it.slowdown) for n, it in spec.nodes.items()} == {
        "cam-0": ("cam-0", "cam-0", 1), "cam-1": ("cam-1", "cam-1", 1), "edge": ("edge", "edge", 3),
        "cloud": ("cloud", "other", 1),
    }  # fmt: skip
    assert spec.cluster == cluster
    assert [node.serves for node in there.build_testbed(need_profiles=False).nodes.values()] == [
        False,
        False,
        True,
        True,
    ]
    for seed in experiment.spec.seeds:
        assert there.spec.draw(seed) == experiment.spec.draw(seed)
        assert there.spec.draw_faults(seed) == experiment.spec.draw_faults(seed)
        here = [e.build_testbed(need_profiles=False).at_seed(seed).links for e in (experiment, there)]
        assert here[0] == here[1]

    hosts, links = hosts_and_links(Path(str(experiment.where)))
    assert hosts == ["cam-0", "cam-1", "edge", "cloud"]
    assert links == Testbed.build(spec, need_profiles=False, seed=7).links


def test_a_lab_has_to_have_the_hosts(described):
    with pytest.raises(InputError, match=r"lab lab: has no host 'cloud' \(allowed: cam-0, cam-1, edge\)"):
        in_lab(Experiment.load(described()), _lab_of("cam-0", "cam-1", "edge", limited=""), ClusterSpec(address="a:1"))


def test_what_moves_is_in_no_lab(described):
    path = described()
    moves = "{service: {mean: 10ms}, mobility: {kind: waypoints, points: [[0s, 0, 0]]}}"
    path.write_text(path.read_text().replace("{count: 2, service: {mean: 10ms}}", moves))
    with pytest.raises(InputError, match=r"nodes.cam.mobility: .* hosts of a lab do not move"):
        hosts_and_links(path)


def test_no_lab_is_found_where_there_is_none(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert Lab.find() is None
    monkeypatch.setenv(VARIABLE, "/nowhere")
    with pytest.raises(InputError, match="there is no such lab"):
        Lab.find()
    assert replace(_lab_of(limited=""), folder=Path("x")).name == "x"
