"""Physical nodes and links: processes of this machine over loopback, which is real TCP."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

from isthmus.experiments.bench_real import Always
from isthmus.experiments.real_run import world_of
from isthmus.policies.plan import split, whole_on
from isthmus.policies.records import Kind, Outcome, Record
from isthmus.real.calibrate import measure_links
from isthmus.real.clocks import reading
from isthmus.real.drive import run_cell
from isthmus.real.fleet import Fleet
from isthmus.real.letters import Letter, letter_from, letter_to
from isthmus.real.link_probe import Probe
from isthmus.real.power import Energy, by_machine
from isthmus.real.pressure import Load, Pressure, Usage
from isthmus.real.wire import Address, Wire
from isthmus.workloads.errors import InputError, RunFailure
from isthmus.workloads.faults import Fault, LinkFault, LostMessages, NodeFault, SlowNode
from isthmus.workloads.link_costs import LinkCost, LinkCosts
from isthmus.workloads.links import SlowStart
from isthmus.workloads.rate import Rate
from isthmus.workloads.requests import Request
from isthmus.workloads.testbed import Testbed, TestbedSpec
from isthmus.workloads.transport import rested, slow_start

AB = {"a": {"host": "one"}, "b": {"host": "two"}}
LINK = [{"between": ["a", "b"], "rate": "1Gbit"}]


@pytest.fixture
def build(chain: Path) -> Callable[..., Testbed]:
    def make(nodes: Mapping[str, Any] = AB, links: Sequence[Mapping[str, Any]] = LINK) -> Testbed:
        spec = {"models": {"chain": str(chain)}, "nodes": nodes, "links": links}
        return Testbed.build(TestbedSpec.model_validate(spec), need_profiles=False)

    return make


def every(gap_s: float, count: int, **more: Any) -> list[Request]:
    return [Request(i, "a", "chain", gap_s * (i + 1), **more) for i in range(count)]


def play(
    ray: Any, testbed: Testbed, plan: Any, requests: list[Request], meanwhile: Any = None, **more: Any
) -> list[Record]:
    records: list[Record] = []
    with Fleet(ray, testbed) as fleet:
        fleet.prepare([plan], {"a": "chain"}, 1)
        if meanwhile is not None:
            threading.Thread(target=meanwhile, args=(fleet,), daemon=True).start()
        run_cell(fleet, {"a": requests}, {"a": Always(plan)}, records.append, seed=1, **more)
    return sorted(records, key=lambda r: r.number)


def test_two_physical_nodes_give_the_whole_models_answer(ray, build):
    testbed = build()
    plan = split(testbed.models["chain"], (3,), ("a", "b"))
    assert world_of(testbed) == "physical"
    records = play(ray, testbed, plan, every(0.03, 20))
    assert Counter(r.outcome for r in records) == {Outcome.COMPLETED: 20}
    assert all(r.correct for r in records)
    for record in records:
        kinds = [(s.kind, s.place) for s in record.spans if s.kind in (Kind.COMPUTE, Kind.SEND)]
        assert kinds == [(Kind.COMPUTE, "a"), (Kind.SEND, "a>b"), (Kind.COMPUTE, "b"), (Kind.SEND, "b>a")]
        ends = [s.end_s for s in record.spans]
        assert record.arrival_s <= record.spans[0].start_s
        assert ends == sorted(ends)
        assert ends[-1] <= record.end_s


def test_an_emulated_node_beside_a_physical_one(ray, build):
    """Its times are the emulated hardware's, and the link between them is what it is."""
    testbed = build({"a": {"host": "one"}, "b": {"host": "two", "service": {"mean": "40ms"}}})
    assert world_of(testbed) == "mixed"
    records = play(ray, testbed, whole_on(testbed.models["chain"], "b"), every(0.1, 10))
    assert all(r.correct for r in records)
    computed = [s.end_s - s.start_s for r in records for s in r.spans if s.kind is Kind.COMPUTE]
    assert computed == pytest.approx([0.04] * 10)
    assert {s.place for r in records for s in r.spans if s.kind is Kind.SEND} == {"a>b", "b>a"}


def test_a_link_that_is_cut_is_given_nothing(ray, build):
    testbed = build()
    fault = LinkFault(link=("a", "b"), down=0.5, up=1.2)
    records = play(ray, testbed, whole_on(testbed.models["chain"], "b"), every(0.1, 15), faults=[fault])
    assert Counter(r.outcome for r in records) == {Outcome.COMPLETED: 15}
    caught = [r for r in records if 0.5 <= r.arrival_s < 1.2]
    assert len(caught) == 7
    assert all(r.end_s > 1.2 for r in caught)
    assert all(Kind.WAIT in {s.kind for s in r.spans if s.place == "a>b"} for r in caught)


@pytest.mark.parametrize(
    "faults",
    [
        [NodeFault(node="b", down=0.4, up=0.8)],
        [LostMessages(link=("a", "b"), lose=0.5, **{"from": 0.3, "to": 0.9})],
        [SlowNode(node="b", slower=3.0, **{"from": 0.3, "to": 0.9})],
    ],
    ids=["node", "messages", "straggler"],
)
def test_every_request_has_one_outcome_whatever_goes_wrong(faults: list[Fault], ray, build):
    testbed = build()
    plan = split(testbed.models["chain"], (3,), ("a", "b"))
    records = play(ray, testbed, plan, every(0.05, 30, timeout_s=0.5), faults=faults, drain_s=20.0)
    assert [r.number for r in records] == list(range(30))
    assert Counter(r.outcome for r in records) == {Outcome.COMPLETED: 30}  # the source can always do it alone
    assert all(r.correct for r in records)


def test_a_node_that_is_to_go_again_before_it_is_back_stays_away(ray, build):
    testbed = build()
    faults = [NodeFault(node="b", down=0.4, up=0.6), NodeFault(node="b", down=1.0, up=9.0)]
    records = play(ray, testbed, whole_on(testbed.models["chain"], "b"), every(0.1, 110), faults=faults)
    assert Counter(r.outcome for r in records) == {Outcome.COMPLETED: 110}
    there = [span.start_s for r in records for span in r.spans if span.kind is Kind.COMPUTE and span.place == "b"]
    assert not [at_s for at_s in there if 0.6 < at_s < 9.0]
    assert max(there) > 9.0


def test_an_actor_that_dies_is_started_anew(ray, build):
    testbed = build()
    plan = split(testbed.models["chain"], (3,), ("a", "b"))
    killed = threading.Event()

    def crash(fleet: Fleet) -> None:
        time.sleep(1.0)
        ray.kill(fleet._actors["b"])
        killed.set()

    records = play(ray, testbed, plan, every(0.1, 120), crash, drain_s=30.0)
    assert killed.is_set()
    assert Counter(r.outcome for r in records) == {Outcome.COMPLETED: 120}
    again = [r for r in records if r.plan and '"b"' in r.plan]
    assert again[-1].number > 100, "the node was not used again after it was started anew"


def test_an_actor_that_dies_again_before_it_is_let_in_is_started_once_more(ray, build):
    testbed = build()
    plan = split(testbed.models["chain"], (3,), ("a", "b"))
    deaths = []

    def crash(fleet: Fleet) -> None:
        time.sleep(1.0)
        ray.kill(fleet._actors["b"])
        deaths.append("in use")
        until(lambda: "b" in fleet._spares)
        ray.kill(fleet._spares["b"].actor)
        deaths.append("before it was let in")

    records = play(ray, testbed, plan, every(0.1, 150), crash, drain_s=30.0)
    assert len(deaths) == 2
    assert Counter(r.outcome for r in records) == {Outcome.COMPLETED: 150}
    again = [r for r in records if r.plan and '"b"' in r.plan]
    assert again[-1].number > 120, "the node was not used again after it was started anew"


def test_who_does_not_answer_keeps_nobody_waiting(ray, build):
    """A machine that hangs is not gone yet: what the others have done is heard all the same, and the run ends."""
    testbed = build()
    heard_s: list[float] = []
    began = time.monotonic()
    with Fleet(ray, testbed) as fleet:
        fleet.prepare([], {"a": "chain"}, 1)
        hung = ray.get(fleet._actors["b"].__ray_call__.remote(lambda _: os.getpid()))
        timers = [
            threading.Timer(1.0, os.kill, (hung, signal.SIGSTOP)),
            threading.Timer(5.0, os.kill, (hung, signal.SIGCONT)),
        ]
        for timer in timers:
            timer.start()
        try:
            requests, plan = every(0.1, 60), whole_on(testbed.models["chain"], "a")
            run_cell(
                fleet, {"a": requests}, {"a": Always(plan)},
                lambda record: heard_s.append(time.monotonic() - began), seed=1,
            )  # fmt: skip
        finally:
            for timer in timers:
                timer.join()
    assert len(heard_s) == 60
    assert sum(2.0 < at_s < 4.9 for at_s in heard_s) > 15


def test_a_node_that_dies_whenever_it_is_started_ends_the_run(ray, build, monkeypatch):
    testbed = build()
    plan = split(testbed.models["chain"], (3,), ("a", "b"))
    started = Fleet._start

    def crash(fleet: Fleet) -> None:
        time.sleep(1.0)
        monkeypatch.setattr(Fleet, "_start", lambda self, node: started(self, "nobody"))  # such a node it cannot be
        ray.kill(fleet._actors["b"])

    with pytest.raises(RunFailure, match="'b' dies whenever it is started"):
        play(ray, testbed, plan, every(0.1, 300), crash, drain_s=30.0)


def test_pressure_is_of_each_host():
    def load(host: str, cpu_s: float, stalled: float | None) -> Load:
        return Load(Usage(cpu_s, 0.5), host, 4, stalled)

    felt = Pressure.of(0.0, [load("one", 8.0, None), load("one", 4.0, 0.1), load("two", 10.0, 0.3)], 10.0, 0)
    assert felt == Pressure(0.0, pytest.approx(0.05), pytest.approx(0.3), 0.3, 0)
    assert [said.split(" of ")[0] for said in felt.warnings()] == ["tasks"]


def test_meters_of_a_machine_that_nodes_share_say_nothing_of_each():
    one = Energy(1.0, "measured: rapl")
    hosts = {"a": "x", "b": "y", "c": "x", "d": "x", "e": "z", "f": "z"}
    assert by_machine(dict.fromkeys("abc", one), hosts) == ({"b": one}, [("a", "c", "d")])


def test_links_are_measured_in_both_directions(ray, build):
    costs = measure_links(ray, build(links=[{"between": ["a", "b"]}]))
    assert [cost.link for cost in costs.links] == [("a", "b"), ("b", "a")]
    for cost in costs.links:
        assert cost.declared_bytes_per_s is None
        assert cost.clock_error_s == 0.0  # one machine, one clock
        assert len(cost.samples) == 32
        assert all(seconds > 0 for _, seconds in cost.samples)


@pytest.mark.parametrize(("window", "idle_s"), [(14_600, 0.24), (29_200, 0.5), (math.inf, 1.0)])
def test_what_a_connection_does_after_pauses_is_found(window, idle_s):
    """On a link that is as the model has it: 48 Mbit/s, 20 ms one way."""
    rate, latency_s = Rate.constant(6e6), 0.02
    state = {"now": 0.0, "free": 0.0, "window": window}
    arrived: dict[int, float] = {}

    def ask(node: str, what: str, *said: Any) -> Any:
        if what == "reading":
            return reading()
        if what == "arrivals":
            state["now"] = max(arrived.values())
            return [arrived[number] for number in said[0]]
        went = []
        for number, size, gap_s in zip(*said[1:], strict=True):
            state["now"] += gap_s
            start_s = max(state["now"], state["free"])
            now = rested(state["window"], window, start_s - state["free"], idle_s)
            state["free"], state["window"] = slow_start(rate.finish_s, start_s, size, now, 2 * latency_s)
            arrived[number] = state["free"] + latency_s
            went.append(state["now"])
        return went

    cost = Probe(ask).measure(("a", "b"))
    assert cost.rate_bytes_per_s == pytest.approx(6e6, rel=0.01)
    assert cost.latency_s == pytest.approx(latency_s, rel=0.02)
    if window == math.inf:
        assert cost.slow_start is None
    else:
        assert cost.slow_start.window == pytest.approx(window, rel=0.15)
        assert cost.slow_start.idle == pytest.approx(idle_s, rel=0.25)


def test_what_was_measured_is_what_a_simulation_uses(chain: Path, tmp_path: Path):
    """Without a rate in the file the measured one; with one, its course, scaled."""
    nodes = {n: {"host": h, "service": {"mean": "5ms"}} for n, h in (("a", "one"), ("b", "two"))}
    half = LinkCost(
        link=("a", "b"), rate_bytes_per_s=5e5, latency_s=0.02, declared_bytes_per_s=1e6, slow_start=SlowStart()
    )
    LinkCosts(links=(half, LinkCost(link=("b", "a"), rate_bytes_per_s=3e6, latency_s=0.01))).save(tmp_path / "profiles")
    link = {"between": ["a", "b"], "rate": [["0s", 12e5], ["1s", 8e5]], "period": "2s", "latency": "1ms"}
    spec = TestbedSpec.model_validate({"models": {"chain": str(chain)}, "nodes": nodes, "links": [link]})
    links = Testbed.build(spec, folder=tmp_path).links
    assert links["a", "b"].rate.finish_s(0.0, 5e5) == pytest.approx(5e5 / 6e5)
    assert (links["a", "b"].latency_s, links["a", "b"].slow_start) == (0.02, SlowStart())
    assert links["b", "a"].rate.mean_bytes_per_s == 3e6
    declared = Testbed.build(spec, folder=tmp_path, as_declared=True).links
    assert declared["a", "b"].latency_s == 1e-3
    bare = TestbedSpec.model_validate(
        {"models": {"chain": str(chain)}, "nodes": nodes, "links": [{"between": ["a", "b"]}]}
    )
    with pytest.raises(InputError, match="isthmus calibrate"):
        Testbed.build(bare, folder=tmp_path / "elsewhere")


@pytest.fixture(params=[True, False], ids=["encrypted", "password"])
def wires(request: Any):
    made: list[Wire] = []

    def make() -> tuple[Wire, list[Any]]:
        got: list[Any] = []
        take = lambda letter, arrays: got.append((letter, arrays))  # noqa: E731
        wire = Wire("127.0.0.1", take, got.append, got.append, encrypted=request.param)
        made.append(wire)
        return wire, got

    yield make
    for wire in made:
        wire.close()


def letter(number: int = 0) -> Letter:
    from isthmus.policies.plan import Plan

    return Letter(1, Plan(()), Request(number, "a", "chain", 0.5), 1, "", 0, 1, 0.25, (), 0)


def until(done: Callable[[], bool]) -> None:
    for _ in range(500):
        if done():
            return
        time.sleep(0.01)
    raise AssertionError("it never happened")


def test_letters_arrive_in_order_and_whole(wires):
    (one, _), (two, got) = wires(), wires()
    peers = {"one": one.address, "two": two.address}
    two.connect(peers)
    one.connect(peers)
    values = np.arange(5000, dtype=np.float32).reshape(50, 100)
    for number in range(50):
        one.send("two", letter(number), [values, values[:, ::7]])
    one.tell("two", b"a note")
    until(lambda: len(got) == 51)
    assert [it[0].number for it in got[:50]] == list(range(50))
    assert got[50] == b"a note"
    for _, (first, second) in got[:50]:
        np.testing.assert_array_equal(first, values)
        np.testing.assert_array_equal(second, values[:, ::7])


def test_who_is_not_known_is_not_let_in(wires):
    (stranger, _), (two, got) = wires(), wires()
    # It knows where, and the public key; where there is none, it has another's password.
    encrypted = stranger._encrypted
    stranger.connect({"two": two.address if encrypted else Address(two.address.endpoint, stranger.address.key)})
    two.connect({"two": two.address})
    stranger.send("two", letter(), [])
    naked = zmq.Context.instance().socket(zmq.PUSH)
    naked.linger = 0
    naked.connect(two.address.endpoint)
    naked.send_multipart([b"letter", b"{}"])
    time.sleep(1.0)
    assert got == []
    naked.close()


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[]", b"null", b"[1,2", json.dumps([1] * 10).encode(), b"[" * 5000, b"\xff\xfe"],
)  # fmt: skip
def test_what_is_no_letter_is_refused(content):
    with pytest.raises(InputError, match="not a"):
        letter_from(content)


def test_a_letter_reads_as_it_was_written():
    text = letter_to(letter(7), [("<f4", (1, 3))])
    again, shapes = letter_from(text)
    assert again == letter(7)
    assert shapes == [(np.dtype("<f4"), (1, 3))]
    for field, wrong in product(range(10), (None, "x", -5, [1], {"a": 1}, 1e400, 2**70)):
        said = json.loads(text)
        said[field] = wrong
        try:
            other, _ = letter_from(json.dumps(said).encode())
        except InputError:
            continue
        assert (field, wrong) == (6, -5.0) or other.spans == (), (field, wrong)  # a time may be before the start
