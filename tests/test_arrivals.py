"""When requests come: from the seed alone, and as theory says."""

from __future__ import annotations

import json
import tracemalloc
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from isthmus.workloads.arrivals import Closed, Diurnal, Markov, Periodic, Replay
from isthmus.workloads.documents import parse
from isthmus.workloads.errors import InputError
from isthmus.workloads.experiment import ExperimentSpec
from isthmus.workloads.random import Uniforms, stream
from isthmus.workloads.requests import Request, Source

POISSON = {"kind": "poisson", "rate": "20/s"}
PERIODIC = {"kind": "periodic", "rate": "10/s"}
MARKOV = {"kind": "markov", "states": [["20/s", "2s"], ["1/s", "6s"]]}
DIURNAL = {"kind": "diurnal", "rate": "5/s", "swing": 0.8, "period": "100s", "peak": "30s"}
ENDLESS = {
    "poisson": POISSON,
    "periodic": PERIODIC,
    "jitter": PERIODIC | {"jitter": "100ms", "phase": "random"},
    "markov": MARKOV,
    "three states": {"kind": "markov", "states": [["9/s", "2s"], [0, "1s"], ["60/min", "500ms"]]},
    "diurnal": DIURNAL,
}
endless = pytest.mark.parametrize("arrivals", ENDLESS.values(), ids=ENDLESS.keys())


def source(arrivals, **more) -> Source:
    return Source.model_validate({"node": "device", "model": "m", "arrivals": arrivals, **more})


def times(requests: list[Request]) -> list[float]:
    return [r.arrival_s for r in requests]


def drawn(process: Any, count: int, seed: int = 1) -> np.ndarray:
    return np.fromiter(process.times_s(stream(seed, "test")), float, count)


@endless
def test_the_same_seed_gives_the_same_arrivals_in_another_process(elsewhere, arrivals):
    code = (
        "import json\n"
        "from isthmus.workloads.requests import Source\n"
        f"spec = { {'node': 'device', 'model': 'm', 'arrivals': arrivals, 'requests': 50}!r}\n"
        "print(json.dumps([r.arrival_s for r in Source.model_validate(spec).draw(7)]))"
    )
    assert times(source(arrivals, requests=50).draw(7)) == json.loads(elsewhere(code))


@pytest.mark.parametrize("arrivals", [a for a in ENDLESS.values() if a != PERIODIC])
def test_other_seeds_and_other_sources_have_arrivals_of_their_own(arrivals):
    here = source(arrivals, requests=50)
    assert times(here.draw(7)) != times(here.draw(8))
    assert times(here.draw(7)) != times(here.model_copy(update={"node": "other"}).draw(7))


@endless
def test_arrivals_increase_and_more_of_them_leave_the_first_as_they_were(arrivals):
    many = source(arrivals, requests=2000).draw(1)
    assert [r.number for r in many] == list(range(2000))
    assert (np.diff(times(many), prepend=0.0) > 0).all()
    assert many[:20] == source(arrivals, requests=20).draw(1)


@endless
def test_an_endless_source_is_drawn_as_it_is_asked(arrivals):
    first = list(islice(source(arrivals, deadline="1s", timeout="2s").arrive(1), 5))
    assert first == source(arrivals, deadline="1s", timeout="2s", requests=5).draw(1)
    assert all(isinstance(request, Request) for request in first)


@endless
def test_an_iterator_is_small_enough_for_a_hundred_thousand_of_them(arrivals):
    one, count = source(arrivals), 100
    tracemalloc.start()
    sources = [one.arrive(seed) for seed in range(count)]
    for requests in sources:
        next(requests)
    held_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held_bytes / count < 8192


def test_poisson_arrivals_are_memoryless_at_the_rate_asked_for():
    gaps = np.diff(times(source(POISSON, requests=20_000).draw(3)), prepend=0.0)
    assert gaps.mean() == pytest.approx(1 / 20, rel=2.6 / np.sqrt(20_000))  # 99 %
    assert stats.kstest(gaps, stats.expon(scale=1 / 20).cdf).pvalue > 0.01
    assert abs(np.corrcoef(gaps[1:], gaps[:-1])[0, 1]) < 2.6 / np.sqrt(20_000)


def test_periodic_arrivals_do_not_drift():
    arrivals = {"kind": "periodic", "rate": "10/s"}
    assert times(source(arrivals, duration="0.3s").draw(1)) == [0.1, 0.2, 0.3]
    assert times(source(arrivals, requests=100_000).draw(1))[-1] == 10_000


@given(st.floats(0, 1, exclude_min=True), st.integers(0, 99))
def test_jitter_is_lateness_within_bounds_that_keeps_the_order(share, seed):
    late = drawn(Periodic(rate=8.0, jitter=share / 8, phase=0.5), 300, seed) - (0.5 + np.arange(300) / 8)
    assert (late > -1e-9).all()
    assert (late < share / 8 + 1e-9).all()
    assert (np.diff(drawn(Periodic(rate=8.0, jitter=0.125), 300, seed)) > 0).all()


def test_jitter_is_uniform_and_independent():
    late = drawn(Periodic(rate=10.0, jitter=0.1), 20_000) - np.arange(1, 20_001) / 10
    assert stats.kstest(late, stats.uniform(0, 0.1).cdf).pvalue > 0.01
    assert abs(np.corrcoef(late[1:], late[:-1])[0, 1]) < 2.6 / np.sqrt(20_000)


def test_phases_are_given_or_spread_over_one_period():
    assert list(drawn(Periodic(rate=4.0, phase=0.0), 3)) == [0, 0.25, 0.5]
    assert list(drawn(Periodic(rate=4.0, phase=7.0), 2)) == [7, 7.25]
    cameras = [drawn(Periodic(rate=4.0, phase="random"), 2, seed) for seed in range(2000)]
    first, second = np.transpose(cameras)
    assert second - first == pytest.approx(0.25)
    assert stats.kstest(first, stats.uniform(0, 0.25).cdf).pvalue > 0.01


def _variance_of_counts(process: Markov, window_s: float) -> float:
    """Of the arrivals in a window of a stationary two-state process, from the covariance of its rate."""
    (r1, s1), (r2, s2) = process.states
    relax = 1 / s1 + 1 / s2
    of_rate = s1 * s2 / (s1 + s2) ** 2 * (r1 - r2) ** 2
    return process.rate * window_s + 2 * of_rate * (window_s / relax - (1 - np.exp(-relax * window_s)) / relax**2)


@pytest.mark.parametrize("window_s", [0.5, 5.0, 50.0])
def test_markov_arrivals_come_in_bursts_of_the_size_that_theory_gives(window_s):
    process = Markov.model_validate(MARKOV)
    assert process.rate == pytest.approx((20 * 2 + 1 * 6) / 8)
    at = drawn(process, 1_000_000)
    counts = np.bincount((at / window_s).astype(int))[:-1]
    expected = _variance_of_counts(process, window_s)
    assert expected / (process.rate * window_s) > 3  # the dispersion index; 1 for Poisson
    assert counts.mean() == pytest.approx(process.rate * window_s, rel=0.03)
    assert counts.var() == pytest.approx(expected, rel=0.1)


def test_an_interrupted_poisson_process_renews_with_hyperexponential_gaps():
    """Kuczura, "The interrupted Poisson process as an overflow process", 1973: exact, state by state."""
    rate, on, off = 5.0, 1 / 0.5, 1 / 2.0
    total = rate + on + off
    fast, slow = ((total + sign * np.sqrt(total**2 - 4 * rate * off)) / 2 for sign in (1, -1))
    share = (rate - slow) / (fast - slow)
    gaps = np.diff(drawn(Markov(states=((rate, 1 / on), (0.0, 1 / off))), 20_000))
    assert stats.kstest(gaps, lambda t: 1 - share * np.exp(-fast * t) - (1 - share) * np.exp(-slow * t)).pvalue > 0.01
    assert abs(np.corrcoef(gaps[1:], gaps[:-1])[0, 1]) < 2.6 / np.sqrt(20_000)


def test_markov_arrivals_are_stationary_from_the_start():
    process = Markov.model_validate(MARKOV)
    counts = [sum(1 for _ in source(MARKOV, duration="500ms").arrive(seed)) for seed in range(4000)]
    error = np.sqrt(_variance_of_counts(process, 0.5) / 4000)
    assert np.mean(counts) == pytest.approx(process.rate * 0.5, abs=2.6 * error)


def test_every_other_state_is_as_likely_to_be_the_next():
    process = Markov(states=((1e2, 10.0), (1e3, 10.0), (1e4, 10.0)))
    counts = np.bincount((drawn(process, 5_000_000) / 0.1).astype(int))[:-1]
    states = np.digitize(counts, [31, 316])  # of every tenth of a second
    states = states[1:][np.diff(states) == 0]  # one in which the state changes may look like any
    states = states[np.flatnonzero(np.diff(states, prepend=-1))]
    assert len(states) > 100
    for state in range(3):
        following = states[1:][states[:-1] == state]
        assert stats.binomtest(int((following == (state + 1) % 3).sum()), len(following)).pvalue > 0.01


@pytest.mark.parametrize("swing", [0.0, 0.8, 1.0])
@pytest.mark.parametrize("peak", [0.0, 30.0, 250.0])
def test_diurnal_arrivals_are_poisson_on_the_clock_of_their_rate(swing, peak):
    """Time rescaled by the integral of the rate makes the gaps unit exponentials (Brown et al. 2002)."""
    turn = 2 * np.pi / 100
    at = drawn(Diurnal(rate=5.0, swing=swing, period=100.0, peak=peak), 20_000)
    rescaled = 5 * (at + swing / turn * (np.sin(turn * (at - peak)) + np.sin(turn * peak)))
    gaps = np.diff(rescaled, prepend=0.0)
    assert stats.kstest(gaps, stats.expon.cdf).pvalue > 0.01
    assert abs(np.corrcoef(gaps[1:], gaps[:-1])[0, 1]) < 2.6 / np.sqrt(20_000)
    periods = int(at[-1] // 100)
    at = at[at < periods * 100]
    assert len(at) / (periods * 100) == pytest.approx(5, rel=2.6 / np.sqrt(len(at)))
    if swing:
        assert ((at - peak + 25) % 100 < 50).mean() > 0.7  # half of the time, around the peaks


def test_replayed_arrivals_come_when_they_are_said_to():
    given = ["0.7s", 0, "100ms", 0.30000000000000004, "0.1s"]
    drawn = source({"kind": "replay", "times": given}).draw(1)
    assert times(drawn) == [0, 0.1, 0.1, 0.30000000000000004, 0.7]
    assert [r.number for r in drawn] == [0, 1, 2, 3, 4]
    assert len(source({"kind": "replay", "times": given}, requests=2).draw(1)) == 2


def replayed(folder: Any, text: str, **more: Any) -> ExperimentSpec:
    (folder / "times.txt").write_text(text, encoding="utf-8")
    fields = {
        "testbed": {"models": {"m": "m.onnx"}, "nodes": {"device": {}}},
        "workload": [{"node": "device", "model": "m", "arrivals": {"kind": "replay", "file": "times.txt", **more}}],
        "policies": ["local"],
    }
    return ExperimentSpec.of(fields, folder)


@pytest.mark.parametrize(
    ("text", "more"),
    [
        ("# seconds\n2.5  # late\n\n1e-1\n0\n", {}),
        ("at,size\n2.5,1\n\n# noon\n.1,2\n0,3\n", {"column": "at"}),
        ('\ufeff# of a spreadsheet\n"x, y", at\n"a""#", 2.5\n,0.1\nb,0', {"column": "at"}),
    ],
)
def test_a_file_of_times_is_read_once_and_not_needed_again(tmp_path, text, more):
    spec = replayed(tmp_path, text, **more)
    (tmp_path / "times.txt").unlink()
    assert times(spec.draw(1)["device"]) == [0, 0.1, 2.5]
    again = parse(ExperimentSpec, json.loads(spec.model_dump_json()), where="run.json")
    assert again == spec
    assert again.draw(1) == spec.draw(1)
    assert ExperimentSpec.of(spec.model_dump(), tmp_path / "elsewhere") == spec


@pytest.mark.parametrize(
    ("text", "more", "said"),
    [
        ("", {}, "times.txt: holds no times"),
        ("# nothing\n\n", {}, "times.txt: holds no times"),
        ("at\n", {"column": "at"}, "times.txt: holds no times"),
        ("1\n\nsoon\n", {}, "times.txt:3: 'soon' is not a time (allowed: one number >= 0 per line"),
        ("1\nnan\n", {}, "times.txt:2: 'nan' is not a time"),
        ("inf\n", {}, "times.txt:1: 'inf' is not a time"),
        ("1\n-1 # before\n", {}, "times.txt:2: '-1' is not a time"),
        ("at,size\n1,2\n", {}, "of a CSV file, name the `column`"),
        ("at,size\n1,2\n", {"column": "art"}, "times.txt: unknown column 'art'; did you mean at? (allowed: at, size)"),
        ("", {"column": "at"}, "times.txt: unknown column 'at'"),
        ("size,at\n\n1,2\n3\n", {"column": "at"}, "times.txt:4: '' is not a time"),
        ('at\n"' + "1" * 200_000, {"column": "at"}, "times.txt: not CSV: "),
    ],
)
def test_what_is_wrong_with_a_file_of_times_is_named(tmp_path, text, more, said):
    with pytest.raises(InputError) as caught:
        replayed(tmp_path, text, **more)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_of_times_has_to_be_there_and_read(tmp_path):
    with pytest.raises(InputError, match=r"gone\.txt: no such file"):
        Replay(file="gone.txt").resolved(tmp_path)
    with pytest.raises(InputError, match=r"gone\.txt has not been read"):
        source({"kind": "replay", "file": "gone.txt"}).arrive(1)


@pytest.mark.parametrize(
    ("arrivals", "said"),
    [
        (POISSON | {"jitter": "1s"}, "arrivals.jitter: unknown field 'jitter' (allowed: kind, rate)"),
        (PERIODIC | {"jitter": "101ms"}, "the jitter 101 ms is longer than the period (allowed: at most 100 ms"),
        (PERIODIC | {"phase": "rndom"}, "arrivals.phase: 'rndom' is not a time (allowed: a number >= 0"),
        (PERIODIC | {"phase": "rndom"}, "or random"),
        (MARKOV | {"states": [["1/s", "1s"]]}, "arrivals.states: needs at least 2"),
        (MARKOV | {"states": [["0/s", "1s"], [0, "1s"]]}, "every state has rate 0 (allowed: some rate > 0)"),
        (MARKOV | {"states": [["1/s", "1s"], ["2/s", "0s"]]}, "arrivals.states[1][1]: Input should be greater than 0"),
        (MARKOV | {"states": [["1/s", "1s"], ["-2/s", "1s"]]}, "arrivals.states[1][0]: the frequency '-2/s'"),
        (DIURNAL | {"swing": 1.1}, "arrivals.swing: Input should be less than or equal to 1, got 1.1"),
        (DIURNAL | {"period": 0}, "arrivals.period: Input should be greater than 0"),
        ({"kind": "replay"}, "arrivals: has to have either `times` or `file`"),
        ({"kind": "replay", "times": [1], "file": "x"}, "arrivals: has to have either `times` or `file`"),
        ({"kind": "replay", "times": [1], "column": "x"}, "has a `column` without a `file`"),
        ({"kind": "replay", "times": []}, "arrivals.times: needs at least 1"),
        ({"kind": "replay", "times": [1, float("nan")]}, "arrivals.times[1]: the time nan is out of range"),
        ({"kind": "replay", "times": [-1]}, "arrivals.times[0]: the time -1 is out of range"),
        ({"kind": "closed", "users": 0, "think": "1s"}, "arrivals.users: Input should be greater than or equal to 1"),
        ({"kind": "closed", "users": 1}, "arrivals.think: is missing"),
    ],
)
def test_what_is_wrong_with_arrivals_is_named(arrivals, said):
    with pytest.raises(InputError) as caught:
        parse(Source, {"node": "device", "model": "m", "arrivals": arrivals}, where="file")
    assert said in str(caught.value)


def test_users_of_a_closed_loop_think():
    thinking = Closed(users=3, think=2.0)
    thoughts = np.fromiter(thinking.think_s(stream(1, "test")), float, 20_000)
    assert stats.kstest(thoughts, stats.expon(scale=2).cdf).pvalue > 0.01
    assert list(islice(thinking.think_s(stream(1, "test")), 9)) == list(thoughts[:9])
    assert list(islice(Closed(users=1, think=0.5, distribution="constant").think_s(stream(1)), 3)) == [0.5] * 3


def test_a_closed_loop_cannot_be_drawn_before_a_run():
    loop = source({"kind": "closed", "users": 3, "think": "1s"}, requests=5)
    assert loop.arrivals.closed
    assert not source(POISSON).arrivals.closed
    for draw in (loop.draw, loop.arrive):
        with pytest.raises(InputError, match=r"'device' are a closed loop.*allowed: .*simulator"):
            draw(1)


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
