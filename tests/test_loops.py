"""What arrives when: windows over all sources, and closed loops whose users wait for their answers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from isthmus.policies.dispatch import Compiler, Dispatcher
from isthmus.policies.records import Outcome, Record
from isthmus.policies.static import Fixed, Local, Remote
from isthmus.sim.arrivals import MOST, Arrivals
from isthmus.sim.clock import Clock
from isthmus.workloads.arrivals import Closed
from isthmus.workloads.faults import LinkFault, LostMessages, NodeFault
from isthmus.workloads.requests import Request, Source

# Windows


def asked(source: int, times: Any) -> Iterator[Request]:
    return (Request(number, f"s{source}", "m", time) for number, time in enumerate(times))


def arrive(sources: list[Iterator[Request]]) -> tuple[list[tuple[float, Request]], list[float]]:
    """What arrives and when, and when it was exhausted."""
    clock, seen, ended = Clock(), [], []

    def one(home: int, request: Request, now: float) -> None:
        assert request.source == f"s{home}"
        assert clock.now == now
        seen.append((now, request))

    Arrivals(clock, list(enumerate(sources)), one, ended.append).begin()
    clock.run()
    return seen, ended


gap = st.sampled_from([0.0, 0.0, 1e-9, 1e-3, 0.1, 1.0, 50.0, 1e5])
burst = st.tuples(gap, st.integers(1, 100)).map(lambda it: [it[0], *[0.0] * (it[1] - 1)])
stream_of_one = st.tuples(gap, st.integers(1, 90)).map(lambda it: [it[0]] * it[1])
times = st.lists(st.one_of(burst, stream_of_one, st.lists(gap, max_size=5)), max_size=3).map(
    lambda parts: np.cumsum([g for part in parts for g in part]).tolist()
)


@settings(max_examples=150)
@given(st.lists(times, max_size=6))
def test_whatever_the_sources_all_arrive_once_in_order_at_exactly_their_time(sources):
    seen, ended = arrive([asked(i, of) for i, of in enumerate(sources)])
    expected = sorted(((t, i, n) for i, of in enumerate(sources) for n, t in enumerate(of)))
    assert [(now, int(r.source[1:]), r.number) for now, r in seen] == expected  # ties in the order of the sources
    assert all(now == request.arrival_s for now, request in seen)
    assert ended == [expected[-1][0] if expected else 0.0]


class Counted:
    """An endless source that counts how many were taken."""

    def __init__(self, source: int, gaps: Iterator[float]) -> None:
        self.taken, self._source, self._gaps, self._now = 0, source, gaps, 0.0

    def __iter__(self) -> Iterator[Request]:
        for number in count():
            self._now += next(self._gaps)
            self.taken += 1
            yield Request(number, f"s{self._source}", "m", self._now)


def gaps(kind: str, seed: int) -> Iterator[float]:
    draw = np.random.default_rng(seed)
    for turn in count():
        if kind == "switching":  # a thousand times busier now and then
            yield float(draw.exponential(1e-3 if turn % 2000 < 1900 else 10.0))
        else:
            yield float(draw.exponential({"fast": 1e-3, "slow": 1e3}[kind]))


@pytest.mark.parametrize(
    "kinds",
    [["fast"], ["fast", *["slow"] * 50], ["slow"] * 50 + ["fast"], ["switching", "slow"], ["switching"] * 5 + ["fast"]],
)
def test_no_source_is_taken_from_far_ahead(kinds):
    sources = [Counted(i, gaps(kind, i)) for i, kind in enumerate(kinds)]
    clock, arrived = Clock(), Counter[int]()
    ahead = [0] * len(kinds)

    def one(home: int, request: Request, now: float) -> None:
        arrived[home] += 1
        for i, source in enumerate(sources):
            ahead[i] = max(ahead[i], source.taken - arrived[i])

    windows = Arrivals(clock, [(i, iter(source)) for i, source in enumerate(sources)], one, lambda now: None)
    windows.begin()
    while arrived.total() < 10_000:
        clock.step()
    assert max(ahead) <= 2 * MOST + 2  # of this window, and of one that was cut short
    assert sum(ahead) <= 10 * len(kinds) + 4 * MOST


def test_a_source_is_only_taken_from_as_time_goes_on(synthetic, play):
    """A run that is stopped has not drawn all that could have come."""
    source = Counted(0, gaps("slow", 1))

    def some() -> Iterator[Request]:
        for request in source:
            if request.arrival_s > 1e5:
                return
            yield request._replace(source="device", model="chain")

    records = play(synthetic({"device": "1s"}, []), Local, {"device": some()})
    assert len(records) == source.taken - 1


# Closed loops


def loop(users: int, think: float, *, node: str = "device", **more: Any) -> Source:
    distribution = more.pop("distribution", "exponential")
    closed = Closed(users=users, think=think, distribution=distribution)
    return Source(node=node, model="chain", arrivals=closed, **more)


def arrivals_of(records: list[Record]) -> list[tuple[float, float | None]]:
    return [(r.arrival_s, r.end_s) for r in sorted(records, key=lambda r: r.number)]


def test_two_users_that_think_for_as_long_each_time(synthetic, play):
    """Both ask at 1 s and are answered at 3 s and 5 s; each thinks for a second and waits for the other's answer."""
    source = loop(2, 1, distribution="constant", requests=6)
    records = play(synthetic({"device": "2s"}, []), Local, {"device": source.loop(1)})
    assert arrivals_of(records) == [(1, 3), (1, 5), (4, 7), (6, 9), (8, 11), (10, 13)]
    assert {r.outcome for r in records} == {Outcome.COMPLETED}


def test_a_loop_ends_after_its_requests_or_after_its_time(synthetic, play):
    testbed = synthetic({"device": "2s"}, [])
    ten = play(testbed, Local, {"device": loop(3, 5, requests=10).loop(1)})
    assert [r.number for r in sorted(ten, key=lambda r: r.number)] == list(range(10))
    timed = play(testbed, Local, {"device": loop(3, 5, duration=100).loop(1)})
    assert 90 < max(r.arrival_s for r in timed) <= 100
    assert arrivals_of(timed)[:7] == arrivals_of(ten)[:7]  # the same users
    assert play(testbed, Local, {"device": loop(3, 5, duration=1e-6).loop(1)}) == []


def test_a_loop_goes_on_after_failures_and_ends_with_all_others(synthetic, play):
    testbed = synthetic({"device": "2s", "sensor": "1s"}, [])
    requests = {
        "device": loop(2, 1, requests=50).loop(1),
        "sensor": [Request(i, "sensor", "chain", i * 10.0) for i in range(30)],
    }
    faults = [NodeFault(node="device", down=10.5, up=20.0)]
    records = play(testbed, Local, requests, faults=faults)
    assert Counter(r.source for r in records) == {"device": 50, "sensor": 30}
    failed = [r for r in records if r.outcome is Outcome.FAILED]
    assert len(failed) >= 5
    assert all(r.source == "device" and 5 < r.arrival_s <= 20 for r in failed)


LINK = [{"between": ["device", "cloud"], "rate": "1GB/s"}]
ROAMS = {"kind": "random-waypoint", "area": [[0, 0], [90, 90]], "speed": [20, 50]}


@pytest.mark.parametrize("moves", [False, True])
@pytest.mark.parametrize(
    "faults",
    [
        [LinkFault(link=("device", "cloud"), down=3.0)],
        [LinkFault(link=("device", "cloud"), down=0.0)],
        [LostMessages(link=("cloud", "device"), lose=1.0, start=3.0)],
    ],
)
def test_users_that_are_never_answered_do_not_hang_a_run(synthetic, play, moves, faults):
    cell = {"service": {"mean": "1s"}, "position": [0, 0]}
    other = {**cell, "position": [90, 0]}
    device = {"service": {"mean": "1s"}, **({"mobility": {**ROAMS, "handover": "10ms"}} if moves else {})}
    testbed = synthetic(
        {"device": device, "cloud": "1s", "a": cell, "b": other},
        [*LINK, *({"between": ["device", c], "rate": 1} for c in "ab")],
    )
    stuck = play(testbed, lambda: Remote("cloud"), {"device": loop(3, 1, requests=40).loop(1)}, faults=faults)
    lost = [r for r in stuck if r.outcome is Outcome.UNFINISHED]
    assert len(lost) == 3  # one request of each user
    assert all(r.outcome is Outcome.COMPLETED for r in stuck if r not in lost)
    sources = {"device": loop(3, 1, requests=40, timeout=5).loop(1)}
    told = play(testbed, lambda: Remote("cloud"), sources, faults=faults)
    assert len(told) == 40
    assert {r.outcome for r in told} == {Outcome.COMPLETED}  # at home, in the end


node_fault = st.builds(
    lambda node, down, long: NodeFault(node=node, down=down, up=None if long is None else down + long),
    st.sampled_from(["device", "cloud"]), st.integers(0, 20), st.one_of(st.none(), st.integers(1, 9)),
)  # fmt: skip
link_fault = st.builds(
    lambda down, long: LinkFault(link=("device", "cloud"), down=down, up=None if long is None else down + long),
    st.integers(0, 20), st.one_of(st.none(), st.integers(1, 9)),
)  # fmt: skip


@settings(max_examples=60)
@given(st.lists(st.one_of(node_fault, link_fault), max_size=4), st.sampled_from([None, 2.5]), st.integers(1, 5))
def test_whatever_fails_every_request_of_a_loop_ends_once(synthetic, play, faults, timeout, users):
    testbed = synthetic({"device": "2s", "cloud": {"service": {"mean": "1s", "distribution": "exponential"}}}, LINK)
    source = loop(users, 1, requests=30, timeout=timeout)
    records = play(testbed, Remote, {"device": source.loop(1)}, faults=faults, drain_s=20.0)
    numbers = sorted(r.number for r in records)
    assert numbers == list(range(len(numbers)))
    stuck = [r for r in records if r.outcome is Outcome.UNFINISHED]
    assert len(numbers) == 30 or len(stuck) == users
    known = [r for r in records if r.outcome is not Outcome.FAILED]  # of those no end is on the record
    under_way = sorted([(r.arrival_s, 1) for r in known] + [(r.end_s, -1) for r in known if r.end_s is not None])
    assert max(np.cumsum([change for _, change in under_way]), default=0) <= users


def mean_value_analysis(users: int, think_s: float, service_s: list[float]) -> float:
    """Throughput of a closed network of exponential FIFO queues and one delay (Reiser and Lavenberg 1980)."""
    queue = [0.0] * len(service_s)
    rate = 0.0
    for present in range(1, users + 1):
        time_s = [s * (1 + q) for s, q in zip(service_s, queue, strict=True)]
        rate = present / (think_s + sum(time_s))
        queue = [rate * t for t in time_s]
    return rate


def test_mean_value_analysis_is_right_where_the_answer_is_known():
    """One user never waits; with one queue it is the machine repairman, whose states are a birth–death chain."""
    assert mean_value_analysis(1, 4, [1, 0.5]) == pytest.approx(1 / 5.5)
    weights = [math.perm(6, busy) / 4**busy for busy in range(7)]
    assert mean_value_analysis(6, 4, [1]) == pytest.approx(1 - weights[0] / sum(weights))


def throughput(play: Any, testbed: Any, policy: Any, source: Source, seed: int) -> float:
    records = play(testbed, policy, {"device": source.loop(seed)}, seed=seed)
    ends = sorted(r.end_s for r in records if r.end_s is not None)
    settled = len(ends) // 10
    return (len(ends) - 2 * settled - 1) / (ends[-settled - 1] - ends[settled])


@pytest.mark.parametrize(("users", "think_s"), [(1, 4.0), (6, 4.0), (20, 12.0)])
@pytest.mark.parametrize("tandem", [False, True])
def test_throughput_is_that_of_mean_value_analysis(synthetic, play, users, think_s, tandem):
    """In tandem: a slow device, then a server, with all users of the one device."""
    exponential = {"distribution": "exponential"}
    nodes = {"device": {"service": {"mean": "1s", **exponential}}}
    links: list[dict[str, Any]] = []
    policy: Any = Local
    if tandem:  # two blocks on the device, the others on the server
        nodes["cloud"] = {"service": {"mean": "6s", **exponential}}
        links = [{"between": ["device", "cloud"], "rate": 1e18}]
        policy = partial(Fixed, 2)
    testbed = synthetic(nodes, links)
    plan = policy().plan(
        Request(0, "device", "chain", 0.0), Dispatcher("device", policy(), testbed, Compiler(testbed)).view(0)
    )
    services = [testbed.service(stage.node, "chain").mean_s(stage.part) for stage in plan.stages]
    assert len(services) == len(nodes)
    assert min(services) > 0.3
    theory = mean_value_analysis(users, think_s, services)
    found = [throughput(play, testbed, policy, loop(users, think_s, requests=8000), seed) for seed in range(1, 11)]
    error = stats.t.ppf(0.995, len(found) - 1) * np.std(found, ddof=1) / math.sqrt(len(found))
    assert error < theory / 40
    assert abs(np.mean(found) - theory) <= error, (np.mean(found), error, theory)
