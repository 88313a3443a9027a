"""What a controller believes, step by step."""

from __future__ import annotations

import math

import pytest

from isthmus.policies.estimators import FORGET_S, GAIN, Estimators
from isthmus.policies.plan import Compiled, compile_plan, split, whole_on
from isthmus.policies.records import Kind, Span
from isthmus.workloads.testbed import Testbed

UP = ("device", "edge")
NOMINAL = 2.5e6  # 20 Mbit/s


@pytest.fixture
def testbed(synthetic) -> Testbed:
    return synthetic()


@pytest.fixture
def it(testbed) -> Estimators:
    return Estimators(testbed)


def compiled(testbed: Testbed, *nodes: str, cut: int = 2) -> Compiled:
    model = testbed.models["chain"]
    plan = whole_on(model, nodes[0]) if len(nodes) == 1 else split(model, (cut,), nodes)
    return compile_plan(plan, model, "device", testbed)


def sent(size: int, flowing_s: float, end_s: float = 1.0) -> Span:
    return Span(Kind.SEND, "device>edge", end_s - flowing_s - 0.002, end_s, bytes=size)


def test_before_anything_was_seen_the_nominal_is_believed(it):
    belief = it.links(5.0)[UP]
    assert (belief.rate_bytes_per_s, belief.rtt_s, belief.queued_bytes, belief.age_s) == (NOMINAL, 0.004, 0, None)
    node = it.nodes(5.0)["cloud"]
    assert (node.backlog_s, node.queue, node.age_s, node.up, node.battery_j) == (0.0, 0, None, True, None)


def test_rates_are_learned_from_spans_without_their_latency_and_forgotten(it, testbed):
    it.start(0, 1, compiled(testbed, "edge"))
    it.end(0, 1, [sent(1_000_000, 1.0)], 1.0)
    first = (1 - GAIN) * NOMINAL + GAIN * 1e6
    assert it.links(1.0)[UP].rate_bytes_per_s == pytest.approx(first)
    assert it.links(1.0)[UP].age_s == 0.0
    trust = math.exp(-5 / FORGET_S)
    assert it.links(6.0)[UP].rate_bytes_per_s == pytest.approx(trust * first + (1 - trust) * NOMINAL)
    assert it.links(6.0)[UP].age_s == 5.0
    assert it.links(1e6)[UP].rate_bytes_per_s == pytest.approx(NOMINAL)
    assert it.links(6.0)["edge", "device"].age_s is None


def test_the_estimate_settles_at_a_constant_rate(it, testbed):
    for number in range(40):
        it.start(number, 1, compiled(testbed, "edge"))
        it.end(number, 1, [sent(500_000, 0.5, number * 0.1)], number * 0.1)
    assert it.links(3.9)[UP].rate_bytes_per_s == pytest.approx(1e6, rel=0.05)


def test_spans_without_evidence_teach_nothing(it, testbed):
    it.start(0, 1, compiled(testbed, "edge"))
    nothing = [sent(0, 0.0), Span(Kind.SEND, "device>edge", 0.0, 0.001, bytes=10), Span(Kind.WAIT, "device>edge", 0, 9)]
    it.end(0, 1, nothing, 1.0)
    assert it.links(1.0)[UP].age_s is None


def test_work_is_outstanding_from_start_to_done(it, testbed):
    plan = compiled(testbed, "device", "cloud")
    mean = {s.node: testbed.service(s.node, "chain").mean_s(s.part) for s in plan.plan.stages}
    it.start(0, 1, plan)
    it.start(1, 1, plan)
    nodes = it.nodes(0.0)
    assert (nodes["device"].queue, nodes["cloud"].queue, nodes["edge"].queue) == (2, 2, 0)
    assert nodes["device"].backlog_s == pytest.approx(2 * mean["device"])
    it.stage_done(0, 1, 0, 0.5)
    it.stage_done(0, 1, 0, 0.6)  # twice is once
    it.stage_done(9, 1, 0, 0.7)  # and of what was never started, nothing
    nodes = it.nodes(1.0)
    assert (nodes["device"].queue, nodes["cloud"].queue) == (1, 2)
    assert nodes["device"].backlog_s == pytest.approx(mean["device"])
    assert nodes["device"].age_s == 0.5
    it.end(0, 1, [Span(Kind.COMPUTE, "cloud", 0.6, 0.8)], 0.9)
    it.end(1, 1, [], 1.0)
    nodes = it.nodes(1.0)
    assert {(b.queue, b.backlog_s) for b in nodes.values()} == {(0, 0.0)}
    assert nodes["cloud"].age_s == pytest.approx(0.1)


def test_backlog_is_per_slot(synthetic):
    testbed = synthetic({"device": "1s", "cloud": {"service": {"mean": "2s"}, "slots": 4}},
                        [{"between": ["device", "cloud"], "rate": 1}])  # fmt: skip
    it = Estimators(testbed)
    for number in range(3):
        it.start(number, 1, compiled(testbed, "cloud"))
    assert it.nodes(0.0)["cloud"].backlog_s == pytest.approx(1.5)


def test_bytes_queue_until_they_are_told_to_have_left(it, testbed):
    plan = compiled(testbed, "edge")
    [there] = [m for m in plan.messages if m.target == 0]
    it.start(0, 1, plan)
    it.start(1, 1, plan)
    assert it.links(0.0)[UP].queued_bytes == 2 * there.wire_bytes
    it.sent(0, 1, there.load, 0.5)  # told ahead
    it.sent(0, 1, there.load, 0.5)
    assert it.links(0.49)[UP].queued_bytes == 2 * there.wire_bytes
    assert it.links(0.5)[UP].queued_bytes == there.wire_bytes
    it.sent(1, 1, there.load, 9.0)
    it.end(1, 1, (), 1.0)
    assert it.links(1.0)[UP].queued_bytes == 0
    assert it.links(10.0)[UP].queued_bytes == 0  # what left was taken off once


def test_giving_up_is_not_hearing_of_a_node(it, testbed):
    it.start(0, 1, compiled(testbed, "cloud"))
    it.end(0, 1, (), 3.0)
    assert it.nodes(3.0)["cloud"].age_s is None


def test_a_node_that_goes_takes_what_was_under_way_over_it(it, testbed):
    it.start(0, 1, compiled(testbed, "cloud"))
    it.start(1, 1, compiled(testbed, "device"))
    it.node_is("edge", up=False, now_s=2.0)  # on the way to the cloud
    nodes = it.nodes(3.0)
    assert (nodes["edge"].up, nodes["edge"].age_s) == (False, 1.0)
    assert (nodes["cloud"].queue, nodes["device"].queue) == (0, 1)
    assert it.links(3.0)[UP].queued_bytes == 0
    it.node_is("edge", up=True, now_s=4.0)
    assert it.nodes(4.0)["edge"].up


def test_roundings_do_not_pile_up(it, testbed):
    """Tenths that are added and taken off in another order leave a rest; no work is no work."""
    plans = [compiled(testbed, "device", "cloud", cut=c) for c in (1, 2, 3, 4)]
    for number in range(200):
        it.start(number, 1, plans[number % 4])
        if number % 3 == 0:
            it.end(number // 3, 1, (), float(number))
    for number in range(200):
        it.end(number, 1, (), 1000.0)
    assert {b.backlog_s for b in it.nodes(1000.0).values()} == {0.0}
