"""When requests come: from the seed alone."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats

from isthmus.workloads.random import Uniforms, stream
from isthmus.workloads.requests import Request, Source

POISSON = {"kind": "poisson", "rate": "20/s"}


def source(arrivals, **more) -> Source:
    return Source.model_validate({"node": "device", "model": "m", "arrivals": arrivals, **more})


def times(requests: list[Request]) -> list[float]:
    return [r.arrival_s for r in requests]


def test_the_same_seed_gives_the_same_arrivals_in_another_process(elsewhere):
    code = (
        "import json\n"
        "from isthmus.workloads.requests import Source\n"
        f"spec = { {'node': 'device', 'model': 'm', 'arrivals': POISSON, 'requests': 50}!r}\n"
        "print(json.dumps([r.arrival_s for r in Source.model_validate(spec).draw(7)]))"
    )
    there = json.loads(elsewhere(code))
    assert times(source(POISSON, requests=50).draw(7)) == there
    assert times(source(POISSON, requests=50).draw(8)) != there
    other = source(POISSON, requests=50).model_copy(update={"node": "other"})
    assert times(other.draw(7)) != there


def test_more_requests_leave_the_first_ones_as_they_were():
    assert source(POISSON, requests=300).draw(1)[:20] == source(POISSON, requests=20).draw(1)


def test_poisson_arrivals_are_memoryless_at_the_rate_asked_for():
    gaps = np.diff(times(source(POISSON, requests=20_000).draw(3)), prepend=0.0)
    assert gaps.mean() == pytest.approx(1 / 20, rel=2.6 / np.sqrt(20_000))  # 99 %
    assert stats.kstest(gaps, stats.expon(scale=1 / 20).cdf).pvalue > 0.01
    assert abs(np.corrcoef(gaps[1:], gaps[:-1])[0, 1]) < 2.6 / np.sqrt(20_000)


def test_periodic_arrivals_do_not_drift():
    arrivals = {"kind": "periodic", "rate": "10/s"}
    assert times(source(arrivals, duration="0.3s").draw(1)) == [0.1, 0.2, 0.3]
    assert times(source(arrivals, requests=100_000).draw(1))[-1] == 10_000


def test_replayed_arrivals_come_when_they_are_said_to():
    given = ["0.7s", 0, "100ms", 0.30000000000000004, "0.1s"]
    drawn = source({"kind": "replay", "times": given}).draw(1)
    assert times(drawn) == [0, 0.1, 0.1, 0.30000000000000004, 0.7]
    assert [r.number for r in drawn] == [0, 1, 2, 3, 4]
    assert len(source({"kind": "replay", "times": given}, requests=2).draw(1)) == 2


def test_a_request_carries_what_its_source_says():
    [first] = source({"kind": "replay", "times": [2]}, deadline="50ms", timeout="1s").draw(1)
    assert first == Request(0, "device", "m", 2.0, 2.05, 1.0)
    [first] = source({"kind": "replay", "times": [2]}).draw(1)
    assert (first.deadline_s, first.timeout_s) == (None, None)


@pytest.mark.parametrize("limit", [{"requests": 25}, {"duration": "2s"}, {"requests": 25, "duration": "2s"}])
def test_a_source_stops_where_it_is_told_to(limit):
    drawn = source(POISSON, **limit).draw(5)
    assert len(drawn) <= limit.get("requests", 10**9)
    assert all(t <= 2 for t in times(drawn)) or "duration" not in limit
    assert times(drawn) == sorted(times(drawn))
    assert drawn


def test_streams_of_different_purposes_are_independent():
    names = [("a", "b"), ("a", "c"), ("ab",), ("b", "a")]
    draws = np.array([stream(1, *n).random(2000) for n in names])
    correlations = np.corrcoef(draws) - np.eye(len(names))
    assert np.abs(correlations).max() < 4 / np.sqrt(2000)
    uniforms, again = Uniforms(1, "x"), Uniforms(1, "x")
    assert uniforms[3000] == [again[i] for i in range(3001)][-1]  # in whatever order they are asked for
