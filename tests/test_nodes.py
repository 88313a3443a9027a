"""Nodes that are more than slots and a queue: schedules worked out by hand, models to compare with, and what is kept.

Here every request is of one source at its own node, or of two sources at one server behind links that take no time.
"""

from __future__ import annotations

import math
import re
from collections import Counter, OrderedDict
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from isthmus.experiments.execute import Experiment
from isthmus.experiments.real_run import check_real
from isthmus.policies.dispatch import PolicyFailure
from isthmus.policies.estimators import Estimators
from isthmus.policies.least_delay import LeastDelay
from isthmus.policies.neurosurgeon import Neurosurgeon
from isthmus.policies.plan import Plan, split
from isthmus.policies.records import Kind, Outcome, Record
from isthmus.policies.static import Fixed, Local, Remote
from isthmus.sim.battery import Battery
from isthmus.sim.clock import Clock
from isthmus.sim.meter import Meter
from isthmus.sim.node import NodeTotals
from isthmus.sim.simulator import simulate
from isthmus.workloads.arrivals import Poisson
from isthmus.workloads.errors import InputError
from isthmus.workloads.faults import NodeFault
from isthmus.workloads.memory import Memory
from isthmus.workloads.model import Part
from isthmus.workloads.profile import BatchCost, Profile
from isthmus.workloads.quantiles import quantiles
from isthmus.workloads.requests import Request, Source
from isthmus.workloads.service import Measured
from isthmus.workloads.testbed import Testbed, TestbedSpec

SECOND = {"service": {"mean": "1s"}}
"""A node that takes 1 s for the whole model."""


@pytest.fixture(scope="module")
def device(synthetic):
    """`device(**fields)`: a testbed of one node that takes 1 s, and is as the fields say."""
    return lambda **fields: synthetic({"device": {**SECOND, **fields}}, [])


def run(testbed: Testbed, asked: Any, policy: Any = Local, **more: Any) -> tuple[list[Record], NodeTotals]:
    """Records in order of number, and the totals of the first node. `asked` are arrival times, or requests."""
    [model] = testbed.models
    requests = [a if isinstance(a, Request) else Request(i, "device", model, a) for i, a in enumerate(asked)]
    records: list[Record] = []
    totals = simulate(testbed, {"device": requests}, {"device": policy()}, records.append, seed=1, **more)
    return sorted(records, key=lambda r: r.number), totals.nodes[0]


def ends(records: list[Record]) -> list[float | None]:
    return [None if r.end_s is None else round(r.end_s, 9) for r in records]


def span(record: Record, kind: Kind) -> tuple[float, float] | None:
    found = [(round(s.start_s, 9), round(s.end_s, 9)) for s in record.spans if s.kind is kind]
    return found[0] if found else None


# Disciplines


def asked(*wanted: tuple[float, float | None, int]) -> list[Request]:
    """Requests from (arrival, deadline, priority)."""
    return [Request(i, "device", "chain", at, deadline, None, rank) for i, (at, deadline, rank) in enumerate(wanted)]


@pytest.mark.parametrize(
    ("discipline", "order"),
    [
        ("fifo", [0, 1, 2, 3, 4]),
        ("edf", [0, 3, 1, 2, 4]),  # 4 has no deadline
        ("priority", [0, 2, 4, 1, 3]),  # among equals the first
    ],
)
def test_who_is_next(device, discipline, order):
    jobs = asked((0, 9, 0), (0.1, 7, 1), (0.2, 8, 5), (0.3, 5, 0), (0.4, None, 5))
    records, totals = run(device(discipline=discipline), jobs)
    assert sorted(range(5), key=lambda i: records[i].end_s) == order
    assert sorted(ends(records)) == [1, 2, 3, 4, 5]  # whoever is served is not disturbed
    assert totals.served == 5
    assert totals.busy_s == pytest.approx(5)
    assert totals.waited_s == pytest.approx(1 + 2 + 3 + 4 - 0.1 - 0.2 - 0.3 - 0.4)


@pytest.mark.parametrize("discipline", ["fifo", "edf", "priority"])
@given(data=st.data())
def test_whoever_begins_is_the_first_of_those_that_wait(device, discipline, data):
    times = data.draw(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.5, 3.0]), min_size=1, max_size=12))
    deadline = st.none() | st.sampled_from([2.0, 4.0, 8.0])
    jobs = asked(*((t, data.draw(deadline), data.draw(st.integers(-1, 2))) for t in sorted(times)))
    records, _ = run(device(discipline=discipline, slots=data.draw(st.integers(1, 2)), room=100), jobs)
    begun = {r.number: span(r, Kind.COMPUTE)[0] for r in records}

    def rank(job: Request) -> tuple[float, int]:
        if discipline == "edf":
            return math.inf if job.deadline_s is None else job.deadline_s, job.number
        return (-job.priority if discipline == "priority" else 0), job.number

    for a in jobs:
        for b in jobs:
            if a.arrival_s < begun[b.number] < begun[a.number]:  # a was there when b began
                assert rank(b) < rank(a)


def test_a_shared_processor_serves_all_at_once(device):
    """0 alone for 0.5 s, then both at half speed until 0 has its second at 1.5 s; then 1 alone."""
    records, totals = run(device(discipline="ps"), [0, 0.5])
    assert ends(records) == [1.5, 2.0]
    assert all(span(r, Kind.WAIT) is None for r in records)
    assert (totals.busy_s, totals.waited_s) == (pytest.approx(2), 0)
    records, totals = run(device(discipline="ps", slots=2), [0, 0.5, 0.5])
    # two slots for three: 0 has 0.5 s left at 0.5 s, at 2/3 of a slot; then 1 and 2 have 0.5 s left and a slot each
    assert ends(records) == [1.25, 1.75, 1.75]
    assert totals.busy_s == pytest.approx(0.5 + 2 * 1.25)


# Room


@pytest.mark.parametrize("discipline", ["fifo", "edf", "priority", "ps"])
def test_one_more_than_there_is_room_for_is_dropped(device, discipline):
    records, totals = run(device(discipline=discipline, room=2), [0, 0.1, 0.2, 2.5])
    assert [r.outcome for r in records] == [Outcome.COMPLETED, Outcome.COMPLETED, Outcome.DROPPED, Outcome.COMPLETED]
    assert records[2].reason == "no room at device"
    assert (totals.served, totals.refused) == (3, 1)


def test_what_led_to_a_refusal_is_on_the_record(synthetic):
    cloud = {"service": {"mean": "9s"}, "room": 1}
    testbed = synthetic({"device": "1s", "cloud": cloud}, [{"between": ["device", "cloud"], "rate": 1e5}])
    records, _ = run(testbed, [0, 0.1], lambda: Fixed(2, "cloud"))
    dropped = records[1]
    assert dropped.outcome is Outcome.DROPPED
    assert {s.kind for s in dropped.spans} == {Kind.WAIT, Kind.COMPUTE, Kind.SEND}
    assert {s.place for s in dropped.spans} == {"device", "device>cloud"}


# Batches

HALF_MORE = {"size": 4, "wait": "100ms", "cost": [[1, 1.0], [3, 2.0], [4, 2.5]]}


def test_a_batch_starts_when_it_is_full_or_its_first_job_has_waited(device):
    records, totals = run(device(batch=HALF_MORE), [0, 0.02, 0.05, 0.06, 0.5, 0.55, 2.58, 9.0])
    # 0-3 fill a batch at 0.06; 4 and 5 wait for the slot, longer than 0.1 s; 6 is alone and waits 0.1 s; so does 7
    begun = [0.06] * 4 + [2.56] * 2 + [4.06, 9.1]
    lasts = [2.5] * 4 + [1.5] * 2 + [1.0, 1.0]
    assert [span(r, Kind.COMPUTE) for r in records] == [
        (pytest.approx(b), pytest.approx(b + d)) for b, d in zip(begun, lasts, strict=True)
    ]
    assert span(records[0], Kind.WAIT) == (0, 0.06)
    assert totals.busy_s == pytest.approx(2.5 + 1.5 + 1 + 1)
    assert totals.served == 8


def test_only_jobs_of_the_same_part_are_served_together(synthetic):
    nodes = {"device": "1ns", "cloud": {**SECOND, "slots": 2, "batch": {**HALF_MORE, "wait": 0}}}
    testbed = synthetic(nodes, [{"between": ["device", "cloud"], "rate": 1e18}])
    model = testbed.models["chain"]

    class Alternating:
        def decide(self, request: Request, view: Any) -> Plan:
            return split(model, (request.number % 2,), ("device", "cloud"))

    records, _ = run(testbed, [0, 0, *[0.1] * 6], Alternating)
    computed = {r.number: next(s for s in r.spans if s.kind is Kind.COMPUTE and s.place == "cloud") for r in records}
    for parity in (0, 1):
        [start] = {round(computed[n].start_s, 6) for n in range(2 + parity, 8, 2)}  # three of a kind begin together
        lone, three = (computed[n].end_s - computed[n].start_s for n in (parity, 2 + parity))
        assert three == pytest.approx(2 * lone)
        # the shorter lone one, of cut 1, makes place for those of cut 0, which came first
        assert start == pytest.approx(computed[1 - parity].end_s, abs=1e-6)


def batches_by_hand(times: list[float], size: int, wait: float, cost: dict[int, float]) -> list[float]:
    """When each job begins on one slot, straight from the definition."""
    begun, free, queue, left = [], -math.inf, list[float](), list(times)
    while queue or left:
        while not queue or (len(queue) < size and left and left[0] <= max(free, queue[0] + wait)):
            queue.append(left.pop(0))
        batch, queue = queue[:size], queue[size:]
        start = max(free, batch[-1] if len(batch) == size else batch[0] + wait)
        begun += [start] * len(batch)
        free = start + cost[len(batch)]
    return begun


@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=30, unique=True),
    st.integers(1, 4),
    st.sampled_from([0.0, 1 / 64, 0.25 + 1 / 64, 1.5 + 1 / 64]),
)
def test_batches_are_those_of_a_simulation_by_hand(device, sixteenths, size, wait):
    """Times are binary fractions, and so exact; no two things happen at one time."""
    times, mean_s = sorted(t / 16 for t in sixteenths), 1 + 2.0**-10
    ratios = {1: 1.0, 2: 1.5, 3: 1.75, 4: 2.0}
    batch = {"size": size, "wait": wait, "cost": list(ratios.items())}
    records, _ = run(device(batch=batch, service={"mean": mean_s}), times)
    begun = [next(s.start_s for s in r.spans if s.kind is Kind.COMPUTE) for r in records]
    assert begun == batches_by_hand(times, size, wait, {size: mean_s * ratio for size, ratio in ratios.items()})


@given(st.lists(st.integers(0, 90), min_size=1, max_size=40), st.integers(1, 4), st.integers(1, 3))
def test_no_batch_is_too_large_and_none_waits_beside_a_free_slot(device, sixteenths, size, slots):
    wait = 0.25
    batch = {"size": size, "wait": wait, "cost": [[1, 1.0], [4, 3.0]]}
    records, _ = run(device(batch=batch, slots=slots), sorted(t / 16 for t in sixteenths))
    spans = [span(r, Kind.COMPUTE) for r in records]
    for (start, end), many in Counter(spans).items():
        served = 1 + (end - start - 1) * 3 / 2  # as the cost says; several batches may begin and end together
        assert served == pytest.approx(round(served))
        assert 1 <= round(served) <= size
        assert many % round(served) == 0
    for record, (start, _) in zip(records, spans, strict=True):
        waits = start - record.arrival_s
        if waits > wait + 1e-9:  # then from the end of its patience on all slots worked
            for moment in (record.arrival_s + wait + 1e-6, start - 1e-6):
                jobs = sum(a <= moment < b for a, b in spans)
                assert jobs >= slots


def test_batches_cost_what_the_profile_has_measured(device, chain):
    testbed = device()
    model = testbed.models["chain"]
    blocks = len(model.blocks)
    profile = Profile.model_validate(
        {
            "model": "chain", "sha256": model.sha256, "backend": "x", "backend_version": "1", "provider": "x",
            "machine": {"label": "host", "cpu": "x", "cores": 1, "platform": "x", "python": "x"},
            "threads": 1, "date": "today", "pace_s": 0, "provenance": "made up", "session_s": 0,
            "blocks": [{"seconds": 1, "source": "measured"}] * blocks, "cuts": [{}] * (blocks + 1), "sessions": [],
            "batches": [BatchCost(size=4, ratio=2.5).model_dump()],
        }
    )  # fmt: skip
    service = Measured(model, profile, 2.0)
    assert [service.batch_factor(n) for n in (1, 2, 4)] == [1, 1.5, 2.5]
    with pytest.raises(InputError, match="a batch of 5 costs was not measured on 'host': the largest is 4"):
        service.batch_factor(5)


# Memory


def test_what_is_not_there_is_loaded_once_and_the_least_used_goes(synthetic):
    """Parts of the chain's first and second half at the cloud: there is room for either, not for both."""
    probe = synthetic().models["chain"]
    tail, whole = probe.tail(3), probe.whole()
    budget = max(probe.memory_bytes(tail), probe.memory_bytes(whole))
    cloud = {"service": {"mean": "100ms", "load": "1s"}, "memory": budget}
    testbed = synthetic({"device": "1ns", "cloud": cloud}, [{"between": ["device", "cloud"], "rate": 1e18}])
    model = testbed.models["chain"]
    whole_s, tail_s = (testbed.service("cloud", "chain").load_s(part) for part in (whole, tail))
    assert (whole_s, tail_s) == (1, pytest.approx(model.weights_bytes(tail) / model.parameter_bytes))

    class Cuts:
        def decide(self, request: Request, view: Any) -> Plan:
            return split(model, (3 * (request.number == 2),), ("device", "cloud"))

    records: list[Record] = []
    requests = [Request(i, "device", "chain", 10.0 * i) for i in range(4)]
    totals = simulate(testbed, {"device": requests}, {"device": Cuts()}, records.append, seed=1)
    loads = [sum(s.end_s - s.start_s for s in r.spans if s.kind is Kind.LOAD) for r in records]
    assert loads == pytest.approx([whole_s, 0, tail_s, whole_s], abs=1e-6)
    cloud_totals = totals.nodes[1]
    assert (cloud_totals.loads, cloud_totals.evictions) == (3, 2)
    for record in records:  # what it waits for, loads and computes follow each other
        at_cloud = sorted((s.start_s, s.end_s, s.kind) for s in record.spans if s.place == "cloud")
        assert all(a[1] == b[0] for a, b in pairwise(at_cloud))


def test_a_part_that_is_being_loaded_is_not_loaded_twice(device):
    testbed = device(slots=2, memory="1GB", service={"mean": "1s", "load": "2s"})
    records, totals = run(testbed, [0, 0.5, 9])
    assert [span(r, Kind.LOAD) for r in records] == [(0, 2), (0.5, 2), None]
    assert ends(records) == [3, 3, 10]
    assert (totals.loads, totals.busy_s) == (1, pytest.approx(3 + 2.5 + 1))


def test_a_node_that_was_down_has_to_load_again(device):
    testbed = device(memory="1GB", service={"mean": "1s", "load": "2s"})
    records, totals = run(testbed, [0, 5, 10], faults=[NodeFault(node="device", down=6.5, up=7)])
    assert [span(r, Kind.LOAD) for r in records] == [(0, 2), None, (10, 12)]
    assert (totals.loads, totals.evictions) == (2, 0)


SIZES = {Part("m", 1 << i): float(size) for i, size in enumerate([1, 2, 3, 5, 8])}


@given(st.integers(8, 19), st.lists(st.sampled_from(sorted(SIZES, key=str)), max_size=60))
def test_memory_is_a_plain_lru_cache(budget, uses):
    memory = Memory(budget, lambda part: (SIZES[part], 1.0))
    plain: OrderedDict[Part, float] = OrderedDict()
    evictions = loads = 0
    for now, part in enumerate(uses):
        if part in plain:
            plain.move_to_end(part)
        else:
            loads += 1
            while sum(plain.values()) + SIZES[part] > budget:
                plain.popitem(last=False)
                evictions += 1
            plain[part] = SIZES[part]
        assert memory.admits(part)
        memory.use(part, float(now), lambda start, seconds: start + seconds)
        memory.release(part)
        assert memory.resident == tuple(plain)
    assert (memory.loads, memory.evictions) == (loads, evictions)


@given(st.integers(8, 19), st.data())
def test_what_is_in_use_stays_and_the_budget_holds(budget, data):
    memory = Memory(budget, lambda part: (SIZES[part], 0.0))
    using: list[Part] = []
    for _ in range(30):
        if using and data.draw(st.booleans()):
            memory.release(using.pop(data.draw(st.integers(0, len(using) - 1))))
        part = data.draw(st.sampled_from(sorted(SIZES, key=str)))
        fits = part in memory.resident or sum(SIZES[p] for p in set(using)) + SIZES[part] <= budget
        assert memory.admits(part) == fits
        if fits:
            memory.use(part, 0.0, lambda start, seconds: start + seconds)
            using.append(part)
        assert set(using) <= set(memory.resident)
        assert sum(SIZES[p] for p in memory.resident) <= budget


def test_a_part_that_never_fits_is_an_impossible_plan(synthetic):
    testbed = synthetic({"device": {**SECOND, "memory": "20kB"}}, [])
    with pytest.raises(PolicyFailure, match=r"chain\[0-5\] needs 92 kB of memory, and node 'device' has 20 kB"):
        run(testbed, [0])


def test_policies_that_look_for_splits_find_those_that_fit(synthetic):
    links = [{"between": ["device", "cloud"], "rate": "1Mbit"}]
    testbed = synthetic({"device": {"service": {"mean": "1ms"}, "memory": "20kB"}, "cloud": "1s"}, links)
    for policy in (LeastDelay, Neurosurgeon):
        records, _ = run(testbed, [0], policy)
        assert records[0].outcome is Outcome.COMPLETED
    nowhere = synthetic({"device": {**SECOND, "memory": "1kB"}}, [])
    with pytest.raises(InputError, match="no split of 'chain' fits into the memory of the nodes device"):
        run(nowhere, [0], LeastDelay)


def test_a_source_that_cannot_hold_the_model_has_nothing_to_fall_back_to(synthetic):
    nodes = {"device": {**SECOND, "memory": "20kB"}, "cloud": "1s"}
    testbed = synthetic(nodes, [{"between": ["device", "cloud"], "rate": "1GB/s"}])
    records, _ = run(testbed, [0, 2], Remote, faults=[NodeFault(node="cloud", down=0.5)])
    assert [(r.outcome, r.reason) for r in records] == [(Outcome.FAILED, "device cannot hold chain")] * 2


# Speed


def test_work_goes_on_at_the_speed_of_the_moment(device):
    testbed = device(speed=[["0s", 1], ["2s", 0.5], ["4s", 0]], period="5s")
    records, totals = run(testbed, [0, 0, 0, 0])
    # 2 s at 1, 2 s at a half, 1 s of nothing, and again: 3 s of work every 5 s
    assert ends(records) == [1, 2, 4, 6]
    assert totals.busy_s == 6
    assert ends(run(device(discipline="ps", speed=0.5), [0, 0])[0]) == [4, 4]


@given(
    st.lists(st.tuples(st.integers(1, 8), st.integers(0, 4)), min_size=1, max_size=5),
    st.lists(st.integers(0, 30), min_size=1, max_size=10),
    st.sampled_from(["fifo", "ps"]),
)
def test_no_work_is_lost_or_made_by_changes_of_speed(device, pieces, quarters, discipline):
    starts = [0, *accumulate(length for length, _ in pieces)]
    speed = [[s, v / 2] for s, (_, v) in zip(starts, pieces, strict=False)] + [[starts[-1], 1]]
    testbed = device(speed=speed, discipline=discipline)
    records, _ = run(testbed, sorted(q / 4 for q in quarters), drain_s=1000)
    rate = testbed.nodes["device"].speed
    free = 0.0
    for record in records if discipline == "fifo" else []:
        free = rate.finish_s(max(free, record.arrival_s), 1.0) if rate else max(free, record.arrival_s) + 1
        assert record.end_s == pytest.approx(free)
    # whatever the discipline, the node is idle from the same moment on
    work = 0.0
    for record in records:
        start = max(work, record.arrival_s)
        work = rate.finish_s(start, 1.0) if rate else start + 1
    assert max(r.end_s for r in records) == pytest.approx(work)


def test_a_policy_sees_the_mean_speed_and_not_its_schedule(device):
    testbed = device(speed=[["0s", 1], ["5s", 0.5]], period="10s")
    known = testbed.nominal
    assert known.nodes["device"].speed.bytes_per_s == (0.75,)
    assert known.spec.nodes["device"].speed == ((0.0, 0.75),)


# Energy and batteries

WATTS = {"idle": "2W", "busy": "3W"}


def test_energy_is_idling_and_working(device):
    _, totals = run(device(power=WATTS, slots=2), [0, 0.5, 4])
    assert (totals.up_s, totals.busy_s) == (5, 3)
    assert totals.energy_j == 2 * 5 + 3 * 3
    assert totals.battery_left_j is None
    _, totals = run(device(power=WATTS), [0, 4], faults=[NodeFault(node="device", down=0.5, up=2)])
    assert (totals.up_s, totals.busy_s) == (3.5, 1.5)
    assert totals.energy_j == 2 * 3.5 + 3 * 1.5
    assert run(device(), [0])[1].energy_j is None


@pytest.mark.parametrize("discipline", ["fifo", "ps"])
def test_a_battery_ends_its_node_at_the_exact_time(device, discipline):
    """5 W for a second, 2 W for a second, 5 W until 10 J are gone: at 2.6 s."""
    testbed = device(discipline=discipline, power=WATTS, battery="10J")
    fault = NodeFault(node="device", down=20, up=21)  # being switched on does not bring it back
    records, totals = run(testbed, [0, 2, 30], faults=[fault])
    assert [r.outcome for r in records] == [Outcome.COMPLETED, Outcome.FAILED, Outcome.FAILED]
    assert [r.reason for r in records[1:]] == ["source device down"] * 2
    assert totals.up_s == pytest.approx(2.6)
    assert (totals.battery_left_j, totals.energy_j) == (0, 10)
    assert totals.busy_s == pytest.approx(1.6)


def test_a_server_whose_battery_is_empty_is_known_to_be_down(synthetic):
    nodes = {"device": "5s", "edge": {**SECOND, "power": WATTS, "battery": "7J"}}
    testbed = synthetic(nodes, [{"between": ["device", "edge"], "rate": "1GB/s"}])
    records, _ = run(testbed, [0, 1.1], Remote)
    # 5 J in the first second, then 0.2 J idling, and 1.8 J last 0.36 s: the second request starts anew at home
    assert records[1].attempts == 2
    assert records[1].end_s == pytest.approx(1.46 + 5, abs=1e-3)


def test_a_policy_knows_what_is_left_at_its_own_node_only(synthetic):
    nodes = {n: {**SECOND, "power": WATTS, "battery": "100J"} for n in ("device", "edge")}
    testbed = synthetic(nodes, [{"between": ["device", "edge"], "rate": "1GB/s"}])
    seen: list[tuple[float | None, float | None]] = []

    class Curious(Local):
        def decide(self, request: Request, view: Any) -> Plan:
            seen.append((view.nodes["device"].battery_j, view.nodes["edge"].battery_j))
            return super().decide(request, view)

    run(testbed, [0, 0.5, 10], Curious)
    assert seen == [(100, None), (pytest.approx(97.5), None), (pytest.approx(100 - 2 * 10 - 3 * 2), None)]
    estimators = Estimators(testbed)
    before = estimators.nodes(0.0)
    estimators.battery_is("device", 1.0)
    assert before["device"].battery_j is None  # a view stays as it was


def test_what_a_message_takes_is_drained_at_once():
    clock = Clock()
    empty: list[float] = []
    battery = Battery(clock, 10.0, 1.0, 0.0, lambda: empty.append(clock.now))
    clock.call(2.0, lambda: battery.drain(3.0, 2.0))
    clock.call(4.0, lambda: battery.drain(9.0, 4.0))
    clock.run()
    assert empty == [4.0]
    assert battery.left_j(5.0) == 0


@given(
    st.floats(0.5, 100),
    st.floats(0, 3),
    st.floats(0.01, 5),
    st.lists(st.tuples(st.floats(0.001, 5), st.sampled_from([1, -1, "off", "on"])), max_size=30),
)
def test_a_battery_has_given_all_it_had_when_it_is_empty(capacity, idle, busy, changes):
    clock = Clock()
    ends_s: list[float] = []
    battery = Battery(clock, capacity, idle, busy, lambda: ends_s.append(clock.now))
    now, on, running = 0.0, True, 0
    power = [(0.0, idle)]  # from then on
    for gap, change in changes:
        now += gap
        if change == "off" or change == "on":
            on, running = change == "on", 0
            clock.call(now, lambda on=on, at=now: battery.switch(on, at))
        elif on and running + change >= 0:
            running += change
            clock.call(now, lambda more=change, at=now: battery.busy(more, at))
        power.append((now, (idle + busy * running) if on else 0.0))
    clock.run(until=1e6)

    def used(until: float) -> float:
        edges = [*(t for t, _ in power), math.inf]
        return sum(w * (min(b, until) - a) for (a, w), b in zip(power, edges[1:], strict=True) if a < until)

    if used(1e6) < capacity * (1 - 1e-9):
        assert ends_s == []
        assert battery.left_j(1e6) == pytest.approx(capacity - used(1e6), abs=1e-6)
    elif used(1e6) > capacity * (1 + 1e-9):
        [end] = ends_s
        assert used(end) == pytest.approx(capacity, rel=1e-9)
        assert battery.left_j(end) == 0


def test_a_battery_costs_few_events(monkeypatch):
    """As many as there are factors between the battery and one job, not one or two per job."""
    clock = Clock()
    battery = Battery(clock, 20_000.0, 1.0, 1.0, lambda: None)
    before = clock.tick()
    for job in range(10_000):
        clock._now = float(job)
        battery.busy(1, job)
        battery.busy(-1, job + 0.5)
    assert clock.tick() - before < 10


# Scaling


def test_a_job_that_finds_no_slot_free_orders_one(device):
    testbed = device(scale={"most": 3, "start_up": "250ms", "idle": "2s"}, price={"per_s": 10})
    records, totals = run(testbed, [0, 0.1, 0.2, 0.3, 0.4])
    # 1 orders a slot that is there at 0.35, 2 one at 0.45; 3 and 4 find all ordered that may be
    assert [span(r, Kind.COMPUTE)[0] for r in records] == [0, 0.35, 0.45, 1.0, 1.35]
    assert totals.rented_s == pytest.approx(2.35 + (2.35 - 0.1) + (2.35 - 0.2))
    assert totals.money_usd == pytest.approx(10 * totals.rented_s)


def test_a_slot_that_idles_is_given_back_and_one_always_stays(device):
    testbed = device(scale={"most": 2, "start_up": 0, "idle": "2s"})
    _, totals = run(testbed, [0, 0.5, 3.0, 20.0])
    # another slot is ordered at 0.5; the first idles from 1 on and goes at 3, when the other is there for what comes
    assert totals.rented_s == pytest.approx(21 + 2.5)
    records, totals = run(testbed, [0, 0.5, 3.0, 20.0, 20.5])
    assert ends(records)[-2:] == [21, 21.5]  # it is ordered anew
    assert totals.rented_s == pytest.approx(21.5 + 2.5 + 1.0)


def test_slots_that_were_ordered_are_lost_with_their_node(device):
    testbed = device(scale={"most": 2, "start_up": "1s", "idle": "1s"})
    fault = NodeFault(node="device", down=0.5, up=2)
    records, totals = run(testbed, [0, 0.25, 4], faults=[fault])
    assert [r.outcome for r in records] == [Outcome.FAILED, Outcome.FAILED, Outcome.COMPLETED]
    assert totals.rented_s == pytest.approx(0.5 + 0.25 + 3)


# What holds for all


@settings(max_examples=100)
@given(
    st.sampled_from(["fifo", "edf", "priority", "ps"]),
    st.sampled_from([{}, {"room": 3}, {"room": 3, "slots": 2}]),
    st.sampled_from(
        [{}, {"batch": {"size": 2, "wait": "50ms", "cost": [[1, 1], [2, 1.5]]}}, {"memory": "200kB"},
         {"scale": {"most": 3, "start_up": "100ms", "idle": "1s"}}, {"battery": "20J"},
         {"speed": [[0, 1], [1, 0.25]], "period": 2}]
    ),
    st.lists(st.tuples(st.floats(0, 10), st.floats(0.01, 3)), max_size=3),
    st.integers(0, 3),
)  # fmt: skip
def test_every_request_ends_once_whatever_the_node(synthetic, discipline, room, feature, faults, seed):
    if discipline == "ps" and set(feature) & {"batch", "memory", "scale"}:
        feature = {}
    service = {"mean": "300ms", "distribution": "exponential", "load": "200ms"}
    cloud = {"service": service, "power": WATTS, "discipline": discipline, **room, **feature}
    nodes = {"device": {"service": {"mean": "1s"}, "memory": "1MB"}, "sensor": "2s", "cloud": cloud}
    testbed = synthetic(nodes, [{"between": [n, "cloud"], "rate": "10Mbit"} for n in ("device", "sensor")])
    played: list[NodeFault] = []
    for down, length in faults:
        fault = NodeFault(node="cloud", down=down, up=down + length)
        played += [] if any(fault.overlaps(other) for other in played) else [fault]
    requests = {
        node: Source(
            node=node, model="chain", arrivals=Poisson(rate=3.0), requests=15, timeout=2.0, deadline=1.0, priority=rank
        ).draw(seed)
        for rank, node in enumerate(("device", "sensor"))
    }
    records: list[Record] = []
    totals = simulate(
        testbed, requests, {n: Fixed(2, "cloud") for n in requests}, records.append, seed=seed, faults=played
    )
    assert Counter((r.source, r.number) for r in records) == Counter((n, i) for n in requests for i in range(15))
    cloud_did = totals.nodes[-1]
    assert cloud_did.refused >= sum(r.outcome is Outcome.DROPPED for r in records)
    assert (cloud_did.refused > 0) <= bool(room)
    slots = 3 if "scale" in feature else room.get("slots", 1)
    assert cloud_did.busy_s <= slots * cloud_did.up_s + 1e-9
    assert cloud_did.energy_j == pytest.approx(2 * cloud_did.up_s + 3 * (cloud_did.busy_s + cloud_did.aside_s))
    for record in records:
        assert all(s.end_s > s.start_s >= record.arrival_s for s in record.spans)


def test_the_plain_node_and_the_queue_do_the_same(synthetic):
    """Room for a million needs a real queue; without it there is none. Also where a fault takes what waits."""
    service = {"mean": "300ms", "distribution": "gamma"}
    requests = {"device": Source(node="device", model="chain", arrivals=Poisson(rate=5.0), requests=200).draw(1)}
    seen = []
    for room in (None, 1_000_000):
        testbed = synthetic({"device": {"service": service, "slots": 2, "room": room, "power": WATTS}}, [])
        records: list[Record] = []
        faults = [NodeFault(node="device", down=7.0, up=9.0)]
        totals = simulate(testbed, requests, {"device": Local()}, records.append, seed=1, faults=faults)
        seen.append((records, totals.nodes[0]._asdict()))
    (plain, did), (queued, queue_did) = seen
    assert plain == queued
    assert did == pytest.approx(queue_did)


def test_what_a_part_needs_is_asked_once_however_often_it_comes_and_goes():
    parts, asked = [Part("m", frozenset((i,))) for i in range(3)], []
    memory = Memory(2.0, lambda part: asked.append(part) or (1.0, 1.0))
    for turn in range(30):
        part = parts[turn % 3]
        assert memory.admits(part)
        memory.use(part, float(turn), lambda start_s, seconds: start_s + seconds)
        memory.release(part)
    assert memory.loads == 30
    assert asked == parts


def test_a_meter_integrates():
    meter = Meter(2)
    meter.set(5, 3.0)
    assert meter.read(4.0) == 2 * 3 + 5 * 1


# Spread


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("weibull_min", {"c": 1.5}), ("pareto", {"b": 2.5}), ("gamma", {"a": 0.5}), ("expon", {}), ("uniform", {"loc": 1}),
     ("lognorm", {"s": 1.2})],
)  # fmt: skip
def test_quantiles_are_scipys(name, parameters):
    law = getattr(stats, name)(**parameters)
    quantile = quantiles(name, tuple(sorted(parameters.items())))
    generator = np.random.default_rng(0)
    middle, tail = generator.random(2000), 2.0 ** -generator.uniform(1, 39, 500)
    for u, exact in [*zip(middle, law.ppf(middle), strict=True), *zip(tail, law.ppf(tail), strict=True)]:
        assert quantile(float(u)) == pytest.approx(exact / law.mean(), rel=1e-4)
    for p, exact in zip(tail, law.isf(tail), strict=True):
        if 1 - (1 - p) == p:
            assert quantile(1 - float(p)) == pytest.approx(exact / law.mean(), rel=1e-4)
    assert quantile(0.0) >= 0
    assert math.isfinite(quantile(1 - 2.0**-53))


def test_draws_belong_to_requests_and_have_the_mean(device):
    service = {"mean": "10ms", "distribution": "weibull_min", "parameters": {"c": 1.5}}
    testbed = device(service=service)
    took = []
    for order in (range(4000), reversed(range(4000))):
        jobs = {i: Request(i, "device", "chain", 10.0 * i) for i in order}
        records, _ = run(testbed, [jobs[i] for i in range(4000)])
        took.append([r.latency_s for r in records])
    assert took[0] == took[1]
    spread = stats.weibull_min(1.5).std() / stats.weibull_min(1.5).mean()
    assert np.mean(took[0]) == pytest.approx(0.01, abs=4 * 0.01 * spread / math.sqrt(4000))


# What is wrong

BAD: list[tuple[dict[str, Any], list[str]]] = [
    ({"battery": "0J", "power": WATTS}, ["nodes.device.battery", "'0J'", "> 0"]),
    ({"battery": "10J"}, ["nodes.device", "nothing drains", "power"]),
    ({"room": 1, "slots": 2}, ["nodes.device", "slots = 2"]),
    ({"room": 2, "batch": HALF_MORE}, ["nodes.device", "batch.size = 4"]),
    ({"room": 0}, ["nodes.device.room"]),
    ({"discipline": "lifo"}, ["nodes.device.discipline", "'edf'", "'lifo'"]),
    ({"discipline": "ps", "batch": HALF_MORE}, ["nodes.device", "`batch` with fifo, edf, priority"]),
    ({"discipline": "ps", "memory": "1MB"}, ["nodes.device", "`memory` with fifo, edf, priority"]),
    ({"discipline": "ps", "scale": {"most": 2}}, ["nodes.device", "`scale` with fifo, edf, priority"]),
    ({"batch": {"size": 0}}, ["nodes.device.batch.size"]),
    ({"batch": {"size": 4}}, ["nodes.device.batch", "not known of made-up times", "`cost`"]),
    ({"batch": {"size": 4, "cost": [[2, 1.5]]}}, ["nodes.device.batch", "begins with a batch of 1"]),
    ({"batch": {"size": 4, "cost": [[1, 1.5], [4, 2]]}}, ["nodes.device.batch", "begins with a batch of 1"]),
    ({"batch": {"size": 4, "cost": [[1, 1], [4, 0.5]]}}, ["nodes.device.batch", "a batch of 4 takes 0.5", "less"]),
    ({"batch": {"size": 4, "cost": [[1, 1], [1, 2]]}}, ["nodes.device.batch", "increase"]),
    ({"batch": {"size": 8, "cost": [[1, 1], [4, 2]]}}, ["nodes.device.batch", "8", "largest of known cost, 4"]),
    ({"batch": {"size": 2, "delay": 1}}, ["nodes.device.batch.delay", "unknown field", "wait"]),
    ({"speed": [["0s", 1], ["5s", 0]]}, ["nodes.device", "speed", "never finishes its work", "period"]),
    ({"speed": 0}, ["nodes.device", "speed"]),
    ({"speed": [["1s", 1]]}, ["nodes.device", "start at 0"]),
    ({"speed": [["0s", "fast"]]}, ["nodes.device.speed", "'fast'"]),
    ({"speed": [3, 4]}, ["nodes.device.speed", "pair"]),
    ({"speed": 0.5, "period": "5s"}, ["nodes.device", "`period` without a schedule"]),
    ({"scale": {"most": 1}, "slots": 2}, ["nodes.device", "most >= slots"]),
    ({"memory": "-1MB"}, ["nodes.device.memory"]),
    ({"service": {"mean": "1s", "distribution": "weibul_min"}},
     ["nodes.device.service.distribution", "did you mean", "weibull_min"]),
    ({"service": {"mean": "1s", "distribution": "weibull_min"}}, ["nodes.device.service", "{c: …}"]),
    ({"service": {"mean": "1s", "distribution": "weibull_min", "parameters": {"c": -1}}}, ["service", "not defined"]),
    ({"service": {"mean": "1s", "distribution": "pareto", "parameters": {"b": 0.5}}}, ["service", "no finite mean"]),
    ({"service": {"mean": "1s", "distribution": "norm"}}, ["service", "below 0"]),
    ({"service": {"mean": "1s", "distribution": "exponential", "parameters": {"a": 1}}}, ["l has no parameters"]),
    ({"service": {"mean": "1s", "distribution": "weibull_min", "parameters": {"c": 1}, "spread": 1}}, ["`spread`"]),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "said"), BAD, ids=str)
def test_what_makes_no_sense_is_refused_in_one_line(chain, tmp_path, fields, said):
    path = tmp_path / "bed.yaml"
    path.write_text(yaml.safe_dump({"models": {"m": str(chain)}, "nodes": {"device": {**SECOND, **fields}}}))
    with pytest.raises(InputError) as caught:
        Testbed.load(path)
    text = str(caught.value)
    assert "\n" not in text
    for part in [str(path), *said]:
        assert part in text, text


def test_a_real_run_refuses_what_it_does_not_model(chain):
    source = {"node": "device", "model": "m", "arrivals": {"kind": "periodic", "rate": 1}, "requests": 1}

    def experiment(**fields: Any) -> Experiment:
        return Experiment.of(
            {
                "testbed": {"models": {"m": str(chain)}, "nodes": {"device": {**SECOND, **fields}}},
                "workload": [source],
                "policies": ["local"],
            }
        )

    for fields in [{"discipline": "edf", "room": 3}, {"speed": 0.5, "memory": "1GB"}, {"batch": HALF_MORE, "slots": 3}]:
        assert check_real(experiment(power={"idle": 1}, **fields)) == []
    battery = {"battery": "1kJ", "power": {"busy": 1}}
    for field, fields in [
        ("discipline: ps", {"discipline": "ps"}),
        ("battery", battery),
        ("scale", {"scale": {"most": 2}}),
    ]:
        with pytest.raises(InputError, match=rf"nodes\.device: `{field}` is simulated only so far"):
            check_real(experiment(**fields))


def test_the_readmes_nodes_are_read(chain):
    blocks = re.findall(r"```yaml\n(nodes:\n.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.DOTALL)
    described: dict[str, Any] = {}
    for block in blocks:
        described |= yaml.safe_load(block)["nodes"]
    spec = TestbedSpec.model_validate({"models": {"m": str(chain)}, "nodes": described})
    assert spec.nodes["phone"].battery == 10_000
    assert spec.nodes["bus"].mobility is not None


def test_a_specification_survives_its_schema_and_itself(chain):
    node = {
        **SECOND, "discipline": "edf", "room": 50, "batch": HALF_MORE, "memory": "1GB", "power": WATTS,
        "battery": "3Wh", "speed": [["0s", 1], ["60s", 0.6]], "scale": {"most": 9},
    }  # fmt: skip
    spec = TestbedSpec.model_validate({"models": {"m": str(chain)}, "nodes": {"device": node}})
    assert TestbedSpec.model_validate(spec.model_dump()) == spec
    assert TestbedSpec.model_validate_json(spec.model_dump_json()) == spec
    assert spec.nodes["device"].battery == 10_800
