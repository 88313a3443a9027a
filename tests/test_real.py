"""The real shell: true parts on real Ray actors. Synthetic service times keep the runs short; the parts are real."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from isthmus.experiments.bench_real import Always
from isthmus.policies.contract import Truth, View
from isthmus.policies.dispatch import PolicyFailure
from isthmus.policies.plan import Plan, Stage, split, whole_on
from isthmus.policies.records import Kind, Record
from isthmus.policies.registry import spec
from isthmus.real.drive import run_cell
from isthmus.real.fleet import Fleet
from isthmus.real.interrupts import Interrupts
from isthmus.workloads.faults import LinkFault, NodeFault
from isthmus.workloads.model import Part
from isthmus.workloads.random import stream
from isthmus.workloads.requests import Request
from isthmus.workloads.testbed import Testbed

NODES = {"device": "20ms", "edge": "10ms", "cloud": "5ms"}
LINKS = [
    {"between": ["device", "edge"], "rate": [["0s", "20Mbit"], ["1s", "8Mbit"]], "period": "2s", "latency": "5ms"},
    {"between": ["edge", "cloud"], "rate": "50Mbit", "latency": "10ms"},
]


def poisson(model: str, count: int, rate: float = 25.0) -> list[Request]:
    times = stream(1, "arrivals").exponential(1 / rate, count).cumsum()
    return [Request(i, "device", model, float(t)) for i, t in enumerate(times)]


@dataclass
class Ran:
    records: list[Record]
    decisions: list[dict[str, Any]]


@pytest.fixture(scope="module")
def emulate(ray: Any) -> Callable[..., Ran]:
    def run(testbed: Testbed, policy: Any, requests: list[Request], **more: Any) -> Ran:
        [model] = testbed.models
        ran = Ran([], [])
        with Fleet(ray, testbed) as fleet:
            fleet.prepare([], {"device": model}, 1)
            run_cell(
                fleet,
                {"device": requests},
                {"device": policy},
                ran.records.append,
                seed=1,
                decided=ran.decisions.append,
                **more,
            )
        return ran

    return run


@pytest.mark.parametrize("name", ["local", "remote", "random", "neurosurgeon", "least-delay", "oracle"])
def test_the_same_policy_in_both_worlds(name, synthetic, emulate, play):
    """Answers equal the whole model's; the views that the run recorded give a fresh policy the identical plans."""
    testbed = synthetic(NODES, LINKS)
    requests = poisson("chain", 40)
    ran = emulate(testbed, spec(name).make(1), requests)
    assert Counter(r.outcome for r in ran.records) == {"completed": 40}
    assert all(r.correct for r in ran.records), max(r.answer_error for r in ran.records)

    fresh = spec(name).make(1)
    truth = Truth({i: link.rate for i, link in testbed.links.items()}) if name == "oracle" else None
    assert len(ran.decisions) == 40
    for row in ran.decisions:
        view = View.from_data(row["view"], testbed.nominal, truth)
        assert fresh.decide(requests[row["number"]], view) == Plan.from_json(row["plan"])

    simulated = {r.number: r for r in play(testbed, lambda: spec(name).make(1), {"device": requests})}
    assert simulated.keys() == {r.number for r in ran.records}
    for record in ran.records:
        _check_causes(record)


def _check_causes(record: Record) -> None:
    assert record.end_s is not None
    for span in record.spans:
        assert record.arrival_s <= span.start_s <= span.end_s <= record.end_s + 1e-9, (record, span)


def test_emulated_times_are_the_simulated_ones(synthetic, emulate, play):
    """With made-up service times both worlds draw the same ones: each request must take as long, but for releases."""
    testbed = synthetic(NODES, LINKS)
    requests = poisson("chain", 60)
    ran = emulate(testbed, spec("remote").make(1), requests)
    simulated = {r.number: r for r in play(testbed, lambda: spec("remote").make(1), {"device": requests})}
    kinds = {Kind.COMPUTE, Kind.SEND}
    on_time = [record for record in ran.records if not record.overruns]
    assert len(on_time) > 10
    for record in on_time:
        real = [(s.kind, s.place, s.stage, s.bytes, pytest.approx(s.end_s - s.start_s, abs=1e-9)) for s in record.spans]
        sim = [(s.kind, s.place, s.stage, s.bytes, s.end_s - s.start_s) for s in simulated[record.number].spans]
        # A transfer may meet another piece of the link's schedule when its start moves by a decision's time.
        constant = {"edge>cloud", "cloud>edge", "cloud"}
        assert [r for r in real if r[0] in kinds and r[1] in constant] == [
            s for s in sim if s[0] in kinds and s[1] in constant
        ]


def test_actors_meet_the_rates_that_the_seed_of_their_cell_draws(synthetic, ray):
    drawn = {"kind": "markov", "states": [["50Mbit", "100ms"], ["5Mbit", "100ms"]], "duration": "10s"}
    testbed = synthetic({"device": "5ms", "cloud": "5ms"}, [{"between": ["device", "cloud"], "rate": drawn}])
    with Fleet(ray, testbed) as fleet:
        fleet.prepare([], {"device": "chain"}, 2)
        for seed in (2, 3):
            records: list[Record] = []
            requests = {"device": poisson("chain", 10)}
            run_cell(fleet, requests, {"device": spec("remote").make(1)}, records.append, seed=seed)
            links = testbed.at_seed(seed).links
            sent = [s for record in records for s in record.spans if s.kind is Kind.SEND]
            assert len(sent) == 20
            for span in sent:
                rate = links[tuple(span.place.split(">"))].rate
                assert rate.finish_s(span.start_s, span.bytes) == pytest.approx(span.end_s, abs=1e-9)


class Branches:
    """The two branches of the diamond on different nodes, joined on a third."""

    def decide(self, request: Request, view: View) -> Plan:
        parts = [Part("diamond", 1 << i) for i in range(4)]
        return Plan(tuple(Stage(n, p) for n, p in zip(("device", "edge", "cloud", "edge"), parts, strict=True)))


class Lossy:
    """Half precision over the links."""

    def decide(self, request: Request, view: View) -> Plan:
        model = view.testbed.models[request.model]
        plan = split(model, (2,), (view.source, "cloud"))
        return Plan(plan.stages, tuple((tensor, "fp16") for tensor in model.cuts[2].crossing))


def test_a_branching_plan_gives_the_whole_models_answer(synthetic, emulate):
    ran = emulate(synthetic(NODES, LINKS, "diamond"), Branches(), poisson("diamond", 10))
    assert all(r.correct for r in ran.records)
    for record in ran.records:
        assert sorted(s.place for s in record.spans if s.kind is Kind.COMPUTE) == ["cloud", "device", "edge", "edge"]


def test_a_codec_is_really_applied(synthetic, emulate):
    ran = emulate(synthetic(NODES, LINKS), Lossy(), poisson("chain", 10))
    assert Counter(r.outcome for r in ran.records) == {"completed": 10}
    for record in ran.records:
        assert record.answer_error is not None
        assert 0 < record.answer_error < 0.01
        assert {Kind.ENCODE, Kind.DECODE} <= {span.kind for span in record.spans}


@pytest.mark.parametrize("up", [None, 0.8])
def test_nothing_is_lost_when_an_actor_is_killed(up, synthetic, emulate, play):
    """Half-way through a node dies, for good or for a while: every request has one outcome, in both worlds."""
    testbed = synthetic(NODES, LINKS)
    requests = poisson("chain", 60, rate=5.0)
    down = requests[6].arrival_s + 0.03  # this one is under way then
    fault = NodeFault(node="edge", down=down, up=None if up is None else down + up)
    ran = emulate(testbed, spec("remote").make(1), requests, faults=[fault], drain_s=10.0)
    simulated = play(testbed, lambda: spec("remote").make(1), {"device": requests}, faults=[fault], drain_s=10.0)
    for records in (ran.records, simulated):
        assert sorted(r.number for r in records) == list(range(60))
        assert {r.outcome for r in records} == {"completed"}
        assert max(r.attempts for r in records) > 1
        places = {s.place for r in records if down < r.arrival_s for s in r.spans if s.kind is Kind.COMPUTE}
        assert "device" in places  # the fallback
    # A fresh actor takes seconds to start; then it serves.
    assert ("cloud" in {s.place for r in ran.records if r.arrival_s > 9 for s in r.spans}) == (up is not None)


def test_a_fault_of_one_cell_does_not_reach_into_the_next(ray, synthetic):
    requests = poisson("chain", 20)
    testbed = synthetic(NODES, LINKS)
    with Fleet(ray, testbed) as fleet:
        for faults in ([NodeFault(node="edge", down=0.2)], [NodeFault(node="device", down=0.2)], []):
            records: list[Record] = []
            fleet.prepare([], {"device": "chain"}, 1)
            run_cell(
                fleet,
                {"device": requests},
                {"device": spec("remote").make(1)},
                records.append,
                seed=1,
                faults=faults,
                drain_s=10.0,
            )
            assert sorted(r.number for r in records) == list(range(20))
        assert {(r.outcome, r.attempts) for r in records} == {("completed", 1)}


def test_requests_of_a_source_that_dies_have_failed(synthetic, emulate):
    requests = poisson("chain", 40)
    ran = emulate(synthetic(NODES, LINKS), spec("local").make(1), requests, faults=[NodeFault(node="device", down=0.8)])
    assert sorted(r.number for r in ran.records) == list(range(40))
    outcomes = Counter(r.outcome for r in ran.records)
    assert outcomes["failed"] > 0
    assert outcomes["completed"] + outcomes["failed"] == 40


def test_a_source_that_comes_back_goes_on(synthetic, emulate):
    requests = poisson("chain", 60, rate=8.0)
    fault = NodeFault(node="device", down=1.0, up=1.5)
    ran = emulate(synthetic(NODES, LINKS), spec("remote").make(1), requests, faults=[fault])
    assert sorted(r.number for r in ran.records) == list(range(60))
    outcome = {r.number: r.outcome for r in ran.records}
    assert outcome[0] == outcome[59] == "completed"
    assert "failed" in outcome.values()


class Raises:
    def decide(self, request: Request, view: View) -> Plan:
        if request.number == 3:
            raise ZeroDivisionError("by design")
        return whole_on(view.testbed.models[request.model], view.source)


class Impossible:
    def decide(self, request: Request, view: View) -> Plan:
        return Plan((Stage("moon", view.testbed.models[request.model].whole()),))


@pytest.mark.parametrize(
    ("policy", "said"), [(Raises(), "ZeroDivisionError: by design"), (Impossible(), "unknown node 'moon'")]
)
def test_a_broken_policy_ends_the_run_with_one_line(policy, said, synthetic, emulate):
    with pytest.raises(PolicyFailure, match=said) as caught:
        emulate(synthetic(NODES, LINKS), policy, poisson("chain", 10))
    assert "\n" not in str(caught.value)


def test_what_is_down_is_gone_around(synthetic, emulate):
    """By way of another node, there and back; all nodes know the way that the source has chosen."""
    ends = [("device", "cloud"), ("device", "edge"), ("edge", "cloud")]
    testbed = synthetic(NODES, [{"between": [*pair], "rate": "40Mbit", "latency": "1ms"} for pair in ends])
    policy = Always(whole_on(testbed.models["chain"], "cloud"))
    fault = LinkFault(link=("device", "cloud"), down=0.5, up=1.5)
    ran = emulate(testbed, policy, poisson("chain", 50), faults=[fault])
    assert Counter((r.outcome, r.attempts) for r in ran.records) == {("completed", 1): 50}
    during = [r for r in ran.records if 0.55 < r.arrival_s < 1.3]
    assert len(during) > 10
    for record in during:
        ways = [span.place for span in record.spans if span.kind is Kind.SEND]
        assert ways == ["device>edge", "edge>cloud", "cloud>edge", "edge>device"]


def test_ctrl_c_comes_when_it_can_be_answered():
    with pytest.raises(KeyboardInterrupt), Interrupts():  # nobody asked
        signal.raise_signal(signal.SIGINT)
    with Interrupts() as interrupts:
        signal.raise_signal(signal.SIGINT)
        assert interrupts.came
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        interrupts.came = False
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
