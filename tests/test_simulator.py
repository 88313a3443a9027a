"""The simulator's promises: nothing is lost, nothing precedes its cause, and the same seed is the same run."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.policies.least_delay import LeastDelay
from isthmus.policies.neurosurgeon import Neurosurgeon
from isthmus.policies.oracle import BruteForce
from isthmus.policies.records import Kind, Outcome, Record
from isthmus.policies.registry import spec
from isthmus.policies.static import Fixed, Local, Random, Remote
from isthmus.workloads.arrivals import Poisson
from isthmus.workloads.errors import InputError
from isthmus.workloads.faults import NodeFault
from isthmus.workloads.overheads import Overheads
from isthmus.workloads.requests import Request, Source

NOISY = {
    n: {"service": {"mean": mean, "distribution": "gamma"}, "slots": slots, "power": {"busy": "2W", "tx": "1W"}}
    for n, mean, slots in [("device", "100ms", 1), ("sensor", "150ms", 1), ("edge", "30ms", 1), ("cloud", "10ms", 3)]
}
LINKS = [
    {"between": ["device", "edge"], "rate": [["0s", "8Mbit"], ["2s", "1Mbit"], ["3s", 0]], "period": "4s",
     "latency": "2ms"},
    {"between": ["sensor", "edge"], "rate": "4Mbit", "latency": "1ms"},
    {"between": ["edge", "cloud"], "rate": "50Mbit", "latency": "20ms"},
]  # fmt: skip
POLICIES = [Local, Remote, Fixed, Random, Neurosurgeon, LeastDelay, BruteForce]


@pytest.fixture(scope="module")
def testbed(synthetic):
    return synthetic(NOISY, LINKS)


def workload(seed: int = 1, requests: int = 40, rate: float = 4.0, **more) -> dict[str, list[Request]]:
    return {
        node: Source(node=node, model="chain", arrivals=Poisson(rate=rate), requests=requests, **more).draw(seed)
        for node in ("device", "sensor")
    }


def check_causes(record: Record, slack_s: float = 1e-9) -> None:
    """Spans lie within the request's life, end where they began or later, and follow what they need."""
    for span in record.spans:
        assert span.end_s > span.start_s >= record.arrival_s - slack_s
        if record.end_s is not None and span.attempt == record.attempts:
            assert span.end_s <= record.end_s + slack_s
    for attempt in {s.attempt for s in record.spans}:
        spans = [s for s in record.spans if s.attempt == attempt]
        for stage in {s.stage for s in spans if s.kind is Kind.COMPUTE}:
            [compute] = [s for s in spans if s.kind is Kind.COMPUTE and s.stage == stage]
            for sent in (s for s in spans if s.stage == stage and s.kind in (Kind.ENCODE, Kind.SEND)):
                assert sent.start_s >= compute.end_s - slack_s


fault = st.builds(
    lambda node, down, length: NodeFault(node=node, down=down, up=None if length is None else down + length),
    st.sampled_from(["device", "edge", "cloud"]),
    st.floats(0, 12),
    st.one_of(st.none(), st.floats(0.01, 5)),
)


@settings(max_examples=60)
@given(
    st.sampled_from(POLICIES),
    st.lists(fault, max_size=4),
    st.sampled_from([None, 0.3, 2.0]),
    st.sampled_from([None, 0.5]),
    st.sampled_from([0.0, 0.1, 60.0]),
    st.integers(0, 3),
)
def test_whatever_fails_every_request_ends_once(testbed, play, policy, faults, timeout, deadline, drain_s, seed):
    faults = [f for i, f in enumerate(faults) if not any(f.overlaps(other) for other in faults[:i])]
    requests = workload(seed, timeout=timeout, deadline=deadline)
    records = play(testbed, policy, requests, seed=seed, faults=faults, drain_s=drain_s)
    arrived = {(r.source, r.number): r for of in requests.values() for r in of}
    assert Counter((r.source, r.number) for r in records) == dict.fromkeys(arrived, 1)
    for record in records:
        asked = arrived[record.source, record.number]
        assert (record.arrival_s, record.deadline_s) == (asked.arrival_s, asked.deadline_s)
        assert (record.end_s is None) == (record.outcome in (Outcome.FAILED, Outcome.UNFINISHED))
        assert (record.energy_j is None) == (record.end_s is None)
        assert (record.reason is None) == (record.end_s is not None)
        if record.end_s is not None:
            late = asked.deadline_s is not None and record.end_s > asked.deadline_s
            assert record.outcome == (Outcome.LATE if late else Outcome.COMPLETED)
        check_causes(record)


@pytest.mark.parametrize("policy", POLICIES)
def test_an_ordinary_run_is_causal_and_accounts_for_all_its_time(testbed, play, policy):
    """On a chain plan spans follow each other without a gap: together they are the latency."""
    records = play(testbed, policy, workload())
    assert {r.outcome for r in records} == {Outcome.COMPLETED}
    for record in records:
        check_causes(record)
        spans = sorted(record.spans, key=lambda s: (s.start_s, s.end_s))
        edges = [record.arrival_s, *(t for s in spans for t in (s.start_s, s.end_s)), record.end_s]
        assert edges[::2] == pytest.approx(edges[1::2], abs=1e-9)
        assert sum(s.end_s - s.start_s for s in spans) == pytest.approx(record.latency_s)


def test_energy_is_power_times_time(testbed, play):
    for record in play(testbed, lambda: Fixed(2, "cloud"), workload()):
        compute_s = sum(s.end_s - s.start_s for s in record.spans if s.kind is Kind.COMPUTE)
        air_s = sum(
            s.end_s - s.start_s - testbed.links[tuple(s.place.split(">"))].latency_s
            for s in record.spans
            if s.kind is Kind.SEND
        )
        assert record.energy_j == pytest.approx(2 * compute_s + 1 * air_s)


def test_each_place_serves_first_come_first_served_and_no_more_than_it_can(testbed, play):
    """Worked out again from the records alone: by Kiefer and Wolfowitz's recursion, whoever asked."""
    records = play(testbed, lambda: Fixed(2, "cloud"), workload(requests=300))
    slots = {"device": 1, "sensor": 1, "cloud": 3}
    for place in ["device", "sensor", "cloud", "device>edge", "edge>cloud", "cloud>edge"]:
        jobs = []
        for record in records:
            spans = {s.kind: s for s in record.spans if s.place == place}
            if work := spans.get(Kind.COMPUTE, spans.get(Kind.SEND)):
                jobs.append((spans.get(Kind.WAIT, work).start_s, work.start_s, work.end_s))
        assert len(jobs) >= 300
        free = [0.0] * slots.get(place, 1)
        latency_s = testbed.links[tuple(place.split(">"))].latency_s if ">" in place else 0.0
        for asked_s, start_s, end_s in sorted(jobs):
            assert start_s == pytest.approx(max(asked_s, free[0]), abs=1e-9)
            free = sorted([*free[1:], end_s - latency_s])
    assert any(s.kind is Kind.WAIT for r in records for s in r.spans)


def test_transfers_feel_a_fade_in_their_middle(testbed, play):
    for record in play(testbed, lambda: Remote("edge"), workload()):
        for span in record.spans:
            if span.kind is Kind.SEND and span.place == "device>edge":
                rate = testbed.links["device", "edge"].rate
                assert span.end_s == pytest.approx(rate.finish_s(span.start_s, span.bytes) + 0.002)


def digest(records: list[Record]) -> str:
    return hashlib.sha256("\n".join(repr((r, r.spans)) for r in records).encode()).hexdigest()


def run_here(name: str, play, synthetic) -> str:
    faults = [NodeFault(node="cloud", down=2.0, up=4.0)]
    testbed = synthetic(NOISY, LINKS)
    records = play(testbed, lambda: spec(name).make(5), workload(5, timeout=3.0), seed=5, faults=faults)
    return digest(records)


@pytest.mark.parametrize("name", ["random", "least-delay"])
def test_the_same_seed_is_the_same_run_in_another_process_too(synthetic, play, elsewhere, chain, name):
    code = f"""
import hashlib
from isthmus.policies.registry import spec
from isthmus.sim.simulator import simulate
from isthmus.workloads.faults import NodeFault
from isthmus.workloads.arrivals import Poisson
from isthmus.workloads.requests import Source
from isthmus.workloads.testbed import Testbed, TestbedSpec
spec_ = {{"models": {{"chain": {str(chain)!r}}}, "nodes": {NOISY!r}, "links": {LINKS!r}}}
testbed = Testbed.build(TestbedSpec.model_validate(spec_))
requests = {{
    n: Source(node=n, model="chain", arrivals=Poisson(rate=4.0), requests=40, timeout=3.0).draw(5)
    for n in ("device", "sensor")
}}
records = []
policies = {{n: spec({name!r}).make(5) for n in requests}}
simulate(testbed, requests, policies, records.append, seed=5, faults=[NodeFault(node="cloud", down=2.0, up=4.0)])
print(hashlib.sha256("\\n".join(repr((r, r.spans)) for r in records).encode()).hexdigest())
"""
    here = run_here(name, play, synthetic)
    assert here == run_here(name, play, synthetic)
    for hash_seed in (1, 2):
        assert elsewhere(code, hash_seed=hash_seed).decode().strip() == here


def test_another_seed_is_another_run(testbed, play):
    requests = workload(1)
    assert digest(play(testbed, Local, requests, seed=1)) != digest(play(testbed, Local, requests, seed=2))


def compute_s(records: list[Record], node: str) -> dict[tuple[str, int], float]:
    return {
        (r.source, r.number): s.end_s - s.start_s
        for r in records
        for s in r.spans
        if s.kind is Kind.COMPUTE and s.place == node
    }


def test_two_policies_meet_the_same_noise_request_by_request(testbed, play):
    """Whatever else goes on: a part of one request on one node takes the same time under every policy."""
    requests = workload(requests=60)
    whole = compute_s(play(testbed, lambda: Remote("cloud"), requests), "cloud")
    mixed = compute_s(play(testbed, lambda: Random(seed=3, cuts=(0,)), requests), "cloud")
    assert 10 < len(mixed) < len(whole)
    assert {key: whole[key] for key in mixed} == pytest.approx(mixed)
    assert len({round(x, 12) for x in whole.values()}) == len(whole)  # and it is noise
    halves = compute_s(play(testbed, lambda: Fixed(2, "cloud"), requests), "cloud")
    ratios = np.array([halves[key] / whole[key] for key in whole])
    assert ratios == pytest.approx(ratios.mean())  # a smaller part of it draws the same luck


def test_luck_belongs_to_request_and_node_and_nothing_else(testbed, play):
    requests = workload(requests=300, rate=1.0)
    here, there = (compute_s(play(testbed, p, requests), n) for p, n in ((Local, "device"), (Remote, "cloud")))
    both = np.array([(here[key], there[key]) for key in here if key[0] == "device"])
    assert abs(np.corrcoef(both.T)[0, 1]) < 3 / np.sqrt(300)
    faults = [NodeFault(node="cloud", down=second, up=second + 0.5) for second in range(5, 100)]
    again = play(testbed, Remote, requests, faults=faults)
    assert any(r.attempts == 2 for r in again)  # also when it is tried a second time
    assert compute_s(again, "device") == pytest.approx({k: here[k] for k in compute_s(again, "device")})


def outcomes(records: list[Record]) -> dict[int, tuple[str, str | None, int]]:
    return {r.number: (r.outcome.value, r.reason, r.attempts) for r in records}


def test_a_node_that_goes_down_loses_its_work_and_serves_again_when_it_is_back(synthetic, play):
    testbed = synthetic({"device": "1s", "cloud": "100ms"}, [{"between": ["device", "cloud"], "rate": "1GB/s"}])
    faults = [NodeFault(node="cloud", down=1.05, up=5.0)]
    records = play(testbed, Remote, [0.0, 1.0, 2.0, 6.0], faults=faults)
    assert outcomes(records) == {
        0: ("completed", None, 1),
        1: ("completed", None, 2),  # was in the cloud; starts anew at home, at once
        2: ("completed", None, 1),  # is not sent to a cloud that is known to be down
        3: ("completed", None, 1),
    }
    latency = {r.number: r.latency_s for r in records}
    assert latency[1] == pytest.approx(0.05 + 1)
    assert latency[2] == pytest.approx(0.05 + 1)  # behind request 1 at home
    assert latency[3] == pytest.approx(latency[0], rel=1e-3)
    places = {r.number: {s.place for s in r.spans if s.kind is Kind.COMPUTE} for r in records}
    assert places == {0: {"cloud"}, 1: {"device"}, 2: {"device"}, 3: {"cloud"}}


def test_what_waited_at_a_node_that_went_down_never_runs_there(synthetic, play):
    testbed = synthetic({"device": "1s", "cloud": "100ms"}, [{"between": ["device", "cloud"], "rate": "1GB/s"}])
    faults = [NodeFault(node="cloud", down=1.05, up=2.0)]
    records = play(testbed, lambda: Remote("cloud"), [1.0, 1.01, 1.02, 6.0, 6.01], faults=faults)
    latency = {r.number: r.latency_s for r in records}
    assert latency[3] == pytest.approx(0.1, rel=1e-2)
    assert latency[4] == pytest.approx(0.19, rel=1e-2)  # behind request 3 and nothing else


def test_a_node_that_is_down_forwards_nothing(synthetic, play):
    links = [{"between": pair, "rate": "1Mbit"} for pair in (["device", "edge"], ["edge", "cloud"])]
    testbed = synthetic({"device": "10s", "edge": "10s", "cloud": "1ms"}, links)
    sent = testbed.models["chain"].tensors["x"].bytes / 125_000
    faults = [NodeFault(node="edge", down=sent / 2, up=3 * sent)]  # away when the message is there
    [record] = play(testbed, lambda: Remote("cloud"), [0.0], faults=faults)
    assert record.latency_s == pytest.approx(sent / 2 + 10)


def test_a_source_that_goes_down_fails_its_requests_and_those_that_come(synthetic, play):
    testbed = synthetic({"device": "1s", "cloud": "100ms"}, [{"between": ["device", "cloud"], "rate": "1GB/s"}])
    faults = [NodeFault(node="device", down=0.05, up=2.0)]
    records = play(testbed, Remote, [0.0, 1.0, 3.0], faults=faults)
    assert outcomes(records) == {
        0: ("failed", "source device down", 1),
        1: ("failed", "source device down", 0),
        2: ("completed", None, 1),
    }


def test_what_is_not_answered_when_the_run_ends_is_unfinished(synthetic, play):
    testbed = synthetic({"device": "1s"}, [])
    records = play(testbed, Local, [0.0, 0.5, 0.6], drain_s=1.5)
    assert outcomes(records) == {
        0: ("completed", None, 1),
        1: ("completed", None, 1),
        2: ("unfinished", "run ended", 1),
    }
    assert [r.end_s for r in records] == [1.0, 2.0, None]


def test_timeouts_retry_and_the_first_answer_counts(synthetic, play):
    testbed = synthetic({"device": "300ms", "cloud": "1s"}, [{"between": ["device", "cloud"], "rate": "1GB/s"}])
    [record] = play(testbed, Remote, {"device": [Request(0, "device", "chain", 0.0, timeout_s=0.4)]})
    # 0.4 s: again, behind itself in the cloud; 0.8 s: at home; 1.0 s: the first attempt answers
    assert (record.outcome, record.attempts) == (Outcome.COMPLETED, 3)
    assert record.latency_s == pytest.approx(1.0, rel=1e-3)


def test_an_idle_run_is_no_run(testbed, play):
    assert play(testbed, Local, {"device": []}) == []


def test_a_fault_of_a_node_that_is_not_there_is_refused(testbed, play):
    with pytest.raises(InputError, match="unknown node 'clout'; did you mean cloud"):
        play(testbed, Local, [0.0], faults=[NodeFault(node="clout", down=1)])


def test_decisions_cost_what_was_calibrated_and_those_of_an_oracle_nothing(synthetic, play):
    testbed = replace(synthetic({"device": "1s"}, []), overheads=Overheads(decide_s={"it": 0.25}, wake_s=0.5))
    [record] = play(testbed, LeastDelay, [1.0], name="it")
    assert [(s.kind, s.start_s, s.end_s) for s in record.spans] == [
        (Kind.DECIDE, 1.0, 1.25),
        (Kind.COMPUTE, 1.25, 2.25),
    ]
    assert record.end_s == 2.75  # awake half a second after the answer was there
    [record] = play(testbed, BruteForce, [1.0], name="it")
    assert record.end_s == 2.5


def test_records_are_handed_over_in_the_order_in_which_requests_end(testbed, play):
    records = [r for r in play(testbed, LeastDelay, workload()) if r.end_s is not None]
    assert all(a.end_s <= b.end_s for a, b in pairwise(records))
