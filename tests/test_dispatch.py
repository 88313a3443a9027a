"""The life of a request as a state machine: told what happened and when, it says what to do next."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from isthmus.policies.contract import Oracle
from isthmus.policies.dispatch import RETRIES, Answer, Compiler, Dispatcher, PolicyFailure, Start, Timer
from isthmus.policies.plan import Plan, Stage, split, whole_on
from isthmus.policies.records import Kind, Outcome, Record, Span
from isthmus.policies.static import Fixed, Local, Remote
from isthmus.workloads.errors import InputError
from isthmus.workloads.model import Part
from isthmus.workloads.requests import Request


class Noting:
    """Any policy, with a note of what it was asked and told."""

    def __init__(self, inner=None) -> None:
        self.inner = inner or Remote("cloud")
        self.views, self.records = [], []

    def decide(self, request, view):
        self.views.append(view)
        return self.inner.decide(request, view)

    def learn(self, record) -> None:
        self.records.append(record)


def dispatcher_for(testbed, policy=None, **more) -> Dispatcher:
    return Dispatcher("device", policy or Noting(), testbed, Compiler(testbed), name="it", **more)


def request(number: int = 0, arrival_s: float = 1.0, **more) -> Request:
    return Request(number, "device", "chain", arrival_s, **more)


def started(actions) -> Start:
    assert [type(a) for a in actions] == [Start]
    return actions[0]


def closed(actions):
    assert [type(a) for a in actions] == [Record]
    return actions[0]


@pytest.fixture(scope="module")
def testbed(synthetic):
    return synthetic()


def test_arrive_start_answer_close(testbed):
    policy = Noting()
    it = dispatcher_for(testbed, policy)
    start = started(it.arrive(request(deadline_s=2.0), 1.0))
    assert (start.attempt, start.compiled.plan) == (1, whole_on(testbed.models["chain"], "cloud"))
    assert it.open == 1
    spans = [Span(Kind.COMPUTE, "cloud", 1.1, 1.2)]
    record = closed(it.answer(0, 1, Answer(spans, correct=True, answer_error=1e-7, overruns=2), 2.0))
    assert it.open == 0
    assert (record.outcome, record.reason, record.end_s, record.latency_s) == (Outcome.COMPLETED, None, 2.0, 1.0)
    assert (record.correct, record.answer_error, record.overruns, record.attempts) == (True, 1e-7, 2, 1)
    assert (list(record.spans), record.energy_j) == (spans, None)  # no power is given: unknown, not zero
    assert Plan.from_json(record.plan) == start.compiled.plan
    assert policy.records == [record]


def test_an_answer_after_the_deadline_is_late(testbed):
    it = dispatcher_for(testbed)
    it.arrive(request(deadline_s=2.0), 1.0)
    record = closed(it.answer(0, 1, Answer(), 2.0001))
    assert (record.outcome, record.end_s) == (Outcome.LATE, 2.0001)


def test_lost_again_and_again_is_retried_then_falls_back_then_fails(testbed):
    policy = Noting()
    it = dispatcher_for(testbed, policy)
    it.arrive(request(), 1.0)
    retry = started(it.lost(0, 1, "gone", 2.0, [Span(Kind.SEND, "device>edge", 1.0, 1.5)]))
    assert (retry.attempt, retry.compiled.nodes) == (2, {"device", "edge", "cloud"})
    fallback = started(it.lost(0, 2, "gone", 3.0))
    assert (fallback.attempt, fallback.compiled.nodes) == (3, {"device"})
    assert len(policy.views) == 1 + RETRIES  # the fallback is not the policy's doing
    record = closed(it.lost(0, 3, "melted", 4.0))
    assert (record.outcome, record.reason, record.attempts) == (Outcome.FAILED, "melted", 3)
    assert (record.end_s, record.latency_s, record.energy_j) == (None, None, None)
    assert [s.kind for s in record.spans] == [Kind.SEND]
    assert not it.lost(0, 3, "melted", 5.0)
    assert policy.records == [record]


def test_what_failed_twice_at_home_is_not_tried_there_a_third_time(testbed):
    it = dispatcher_for(testbed, Noting(Local()))
    it.arrive(request(), 1.0)
    started(it.lost(0, 1, "gone", 2.0))
    assert closed(it.lost(0, 2, "gone", 3.0)).outcome == Outcome.FAILED


def test_timers_go_with_attempts(testbed):
    it = dispatcher_for(testbed)
    start, timer = it.arrive(request(timeout_s=0.5), 1.0)
    assert timer == Timer(1.5, 0, 1)
    start, timer = it.timer(0, 1, 1.5)
    assert (type(start), timer) == (Start, Timer(2.0, 0, 2))
    assert not it.timer(0, 1, 1.6)  # of an attempt that is over
    closed(it.answer(0, 2, Answer(), 1.9))
    assert not it.timer(0, 2, 2.0)


def test_the_first_answer_counts_whichever_attempt_it_is_of(testbed):
    policy = Noting()
    it = dispatcher_for(testbed, policy)
    it.arrive(request(timeout_s=0.5), 1.0)
    it.timer(0, 1, 1.5)
    record = closed(it.answer(0, 1, Answer([Span(Kind.COMPUTE, "cloud", 1.0, 1.6)]), 1.7))
    assert (record.outcome, record.latency_s, record.attempts) == (Outcome.COMPLETED, pytest.approx(0.7), 2)
    assert not it.answer(0, 2, Answer(), 1.8)
    assert not it.answer(0, 1, Answer(), 1.9)
    assert len(policy.records) == 1
    assert it.view(2.0).nodes["cloud"].queue == 0  # both attempts are accounted for


def test_a_node_that_goes_takes_what_is_under_way_with_it(testbed):
    policy = Noting(Fixed(2, "cloud"))
    it = dispatcher_for(testbed, policy)
    it.arrive(request(0), 1.0)
    it.arrive(request(1), 1.1)
    again = it.node_is("edge", up=False, now_s=1.2)  # which only forwards
    assert [(a.request.number, a.attempt, a.compiled.nodes) for a in again] == [(0, 2, {"device"}), (1, 2, {"device"})]
    view = it.view(1.2)
    assert not view.nodes["edge"].up
    assert view.nodes["edge"].age_s == 0
    assert view.nodes["cloud"].age_s is None  # nothing was heard of it
    assert (view.nodes["cloud"].queue, view.links["device", "edge"].queued_bytes) == (0, 0)
    assert started(it.arrive(request(2), 1.3)).compiled.nodes == {"device"}
    assert not it.node_is("edge", up=True, now_s=1.4)
    assert started(it.arrive(request(3), 1.5)).compiled.nodes == {"device", "edge", "cloud"}


@pytest.mark.parametrize("told", ["node", "timer", "answer"])
def test_an_attempt_that_goes_on_after_its_request_is_closed_leaves_no_backlog(testbed, told):
    it = dispatcher_for(testbed)
    it.arrive(request(timeout_s=0.5), 1.0)
    it.timer(0, 1, 1.5)
    it.answer(0, 1, Answer(), 1.6)
    assert it.view(1.6).nodes["cloud"].queue == 1  # the second attempt is still under way there
    if told == "node":
        it.node_is("cloud", up=False, now_s=1.7)
    elif told == "timer":
        it.timer(0, 2, 2.0)
    else:
        it.answer(0, 2, Answer(), 2.1)
    assert it.view(2.2).nodes["cloud"].queue == 0


def test_a_source_that_goes_loses_all_and_takes_nothing_new(testbed):
    policy = Noting()
    it = dispatcher_for(testbed, policy)
    it.arrive(request(0), 1.0)
    record = closed(it.node_is("device", up=False, now_s=1.1))
    assert (record.outcome, record.reason, record.attempts) == (Outcome.FAILED, "source device down", 1)
    record = closed(it.arrive(request(1), 1.2))
    assert (record.outcome, record.reason, record.attempts, record.plan) == ("failed", "source device down", 0, None)
    assert len(policy.views) == 1  # nobody is there to decide
    assert not it.answer(0, 1, Answer(), 1.3)
    it.node_is("device", up=True, now_s=1.4)
    started(it.arrive(request(2), 1.5))
    assert it.view(1.5).nodes["cloud"].queue == 1
    assert [r.number for r in policy.records] == [0, 1]


def test_the_end_closes_what_is_open(testbed):
    it = dispatcher_for(testbed)
    it.arrive(request(0), 1.0)
    it.arrive(request(1), 1.5)
    it.answer(0, 1, Answer(), 1.6)
    record = closed(it.end())
    assert (record.number, record.outcome, record.reason, record.end_s) == (1, "unfinished", "run ended", None)
    assert not it.end()


class Raising:
    def decide(self, request, view):
        raise KeyError("no\nsuch\nthing")


class Saying:
    def __init__(self, plan) -> None:
        self.plan = plan

    def decide(self, request, view):
        return self.plan


class BadPupil(Local):
    def learn(self, record) -> None:
        raise ZeroDivisionError("of\nhope")


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        (Raising(), r"policy 'it' raised on request 7: KeyError: 'no\\nsuch\\nthing'"),
        (Saying("cloud"), "policy 'it' gave an impossible plan for request 7: .* not with str"),
        (Saying(["cloud"]), "policy 'it' gave an impossible plan for request 7: .* not with list"),
        (Saying(Plan((Stage("moon", Part("chain", 63)),))), "impossible plan for request 7: stage 0: unknown node"),
        (Saying(Plan(([1],))), "impossible plan for request 7: stage 0 is not a Stage"),
        (BadPupil(), "policy 'it' raised on request 7: ZeroDivisionError: of hope"),
    ],
)
def test_a_policy_that_fails_ends_the_run_in_one_line(testbed, policy, said):
    it = dispatcher_for(testbed, policy)
    with pytest.raises(PolicyFailure, match=said) as caught:  # noqa: PT012
        it.arrive(request(7), 1.0)
        it.answer(7, 1, Answer(), 2.0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("policy", "said"),
    [(Fixed(99), "policy 'it': 'chain' has no cut 99"), (Remote("moon"), "policy 'it': unknown node 'moon'")],
)
def test_wrong_arguments_of_a_policy_are_wrong_input(testbed, policy, said):
    with pytest.raises(InputError, match=said):
        dispatcher_for(testbed, policy).arrive(request(7), 1.0)


class Clairvoyant(Oracle, Noting):
    pass


def test_only_an_oracle_sees_the_truth(synthetic):
    link = {"between": ["device", "cloud"], "rate": [[0, 1234567], [5, 7654321]], "period": 8}
    testbed = synthetic({"device": "1s", "cloud": "1s"}, [link])
    for kind in (Noting, Clairvoyant):
        policy = kind()
        dispatcher_for(testbed, policy).arrive(request(), 1.0)
        [view] = policy.views
        if kind is Clairvoyant:
            assert view.truth.rates == {i: x.rate for i, x in testbed.links.items()}
        else:
            assert view.truth is None
            assert "7654321" not in repr((view, vars(view.testbed)))
        assert all(x.rate.is_constant for x in view.testbed.links.values())


def test_every_decision_can_be_watched(testbed):
    seen = []
    it = dispatcher_for(testbed, watch=lambda *what: seen.append(what))
    start = started(it.arrive(request(), 1.0))
    [(of, attempt, view, plan)] = seen
    assert (of, attempt, view.now_s, plan) == (request(), 1, 1.0, start.compiled.plan)


NAMES = ("device", "edge", "cloud")


class Lives(RuleBasedStateMachine):
    """Whatever happens, in whatever order, stale and twice: each arrival is closed exactly once, and nothing else."""

    attempts = Bundle("attempts")

    @initialize(seed=st.integers(0, 5))
    def begin(self, seed):
        testbed = Lives.testbed
        model = testbed.models["chain"]
        routes = [("device", "edge"), ("device", "cloud"), ("device", "edge", "cloud")]
        plans = [split(model, (seed,) * (len(r) - 1), r) for r in routes] + [whole_on(model, "device")]

        class Turning(Noting):
            def decide(self, request, view):
                self.views.append(view)
                return plans[len(self.views) % len(plans)]

        self.policy = Turning()
        self.it = dispatcher_for(testbed, self.policy)
        self.now, self.arrived, self.records = 0.0, 0, []

    def told(self, actions):
        self.now += 0.125
        starts = [a for a in actions if isinstance(a, Start)]
        for action in actions:
            if isinstance(action, Record):
                self.records.append(action)
        for start in starts:
            assert start.request.number not in [r.number for r in self.records]
            assert not start.compiled.nodes & self.it._down
        return multiple(*((s.request.number, s.attempt, s.compiled) for s in starts))

    @rule(target=attempts, timeout=st.sampled_from([None, 1.0]), deadline=st.sampled_from([None, 0.3, 5.0]))
    def arrive(self, timeout, deadline):
        until = None if deadline is None else self.now + deadline
        made = request(self.arrived, self.now, timeout_s=timeout, deadline_s=until)
        self.arrived += 1
        return self.told(self.it.arrive(made, self.now))

    @rule(target=attempts, which=attempts)
    def lost(self, which):
        return self.told(self.it.lost(which[0], which[1], "gone", self.now))

    @rule(target=attempts, which=attempts)
    def timer(self, which):
        return self.told(self.it.timer(which[0], which[1], self.now))

    @rule(target=attempts, which=consumes(attempts))
    def answer(self, which):
        return self.told(self.it.answer(which[0], which[1], Answer(), self.now))

    @rule(which=attempts, ahead=st.sampled_from([0.0, 1.0]))
    def progress(self, which, ahead):
        number, attempt, compiled = which
        self.it.stage_done(number, attempt, 0, self.now)
        for m in compiled.messages:
            if m.links:
                self.it.sent(number, attempt, m.load, self.now + ahead)

    @rule(target=attempts, node=st.sampled_from(NAMES), up=st.booleans())
    def node_is(self, node, up):
        return self.told(self.it.node_is(node, up=up, now_s=self.now))

    @precondition(lambda self: self.arrived > 5)
    @rule()
    def end(self):
        self.told(self.it.end())
        assert self.it.open == 0

    @invariant()
    def each_is_open_or_closed_once(self):
        numbers = [r.number for r in self.records]
        assert len(numbers) == len(set(numbers))
        assert len(numbers) + self.it.open == self.arrived
        assert self.policy.records == self.records
        view = self.it.view(self.now)
        assert all(b.queue >= 0 and b.backlog_s >= 0 for b in view.nodes.values())
        assert all(b.queued_bytes >= 0 and b.rate_bytes_per_s > 0 for b in view.links.values())

    def teardown(self):
        self.told(self.it.end())
        assert sorted(r.number for r in self.records) == list(range(self.arrived))
        for name in NAMES:  # whatever was under way over a node is given up with it
            self.it.node_is(name, up=False, now_s=self.now)
        view = self.it.view(self.now + 10)
        assert {(b.queue, b.backlog_s) for b in view.nodes.values()} == {(0, 0.0)}
        assert {b.queued_bytes for b in view.links.values()} == {0}


def test_whatever_happens_each_request_is_closed_exactly_once(testbed):
    Lives.testbed = testbed
    run_state_machine_as_test(Lives, settings=settings(max_examples=60, stateful_step_count=40))
