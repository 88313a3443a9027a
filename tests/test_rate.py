"""Transfers over a changing rate, against integration by walking from piece to piece in exact arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.workloads.errors import InputError
from isthmus.workloads.rate import Rate
from isthmus.workloads.testbed import Link
from isthmus.workloads.transmitter import Transmitter


def finish_by_walking(rate: Rate, start_s: float, size: float) -> float:
    """Piece by piece, in fractions."""
    if size <= 0:
        return start_s
    starts = [Fraction(s) for s in rate.starts_s]
    period = None if rate.period_s is None else Fraction(rate.period_s)
    now, left = Fraction(start_s), Fraction(size)
    while True:
        turn = Fraction(0) if period is None else now // period * period
        piece = max(i for i, s in enumerate(starts) if s <= now - turn)
        following = starts[piece + 1] if piece + 1 < len(starts) else period
        speed = Fraction(rate.bytes_per_s[piece])
        room = None if following is None else (turn + following - now) * speed
        if room is None or room >= left > 0 < speed:
            return float(now + left / speed)
        left -= room
        now = turn + following


# Eighths of a second and whole bytes per second are exact in binary, so boundaries are hit exactly, and often.
eighths = st.integers(1, 40).map(lambda i: i / 8)
speeds = st.sampled_from([0.0, 0.0, 1.0, 3.0, 8.0, 64.0, 1000.0])


@st.composite
def rates(draw):
    gaps = draw(st.lists(eighths, max_size=5))
    starts = (0.0, *np.cumsum(gaps).tolist())
    values = [draw(speeds) for _ in starts]
    period = starts[-1] + draw(eighths) if draw(st.booleans()) else None
    if period is None or not any(values):
        values[-1] = draw(speeds.filter(bool))
    return Rate(starts, tuple(values), period)


starts_s = st.integers(0, 800).map(lambda i: i / 8)
sizes = st.one_of(st.integers(0, 64), st.integers(0, 100_000)).map(float)


@given(rates(), starts_s, sizes)
def test_a_transfer_ends_when_its_last_byte_is_moved(rate, start, size):
    assert rate.finish_s(start, size) == pytest.approx(finish_by_walking(rate, start, size), rel=1e-12, abs=1e-9)


@given(rates(), st.lists(st.tuples(starts_s, sizes), min_size=1, max_size=8))
def test_many_at_once_is_one_by_one(rate, transfers):
    start, size = np.array(transfers).T
    one_by_one = [rate.finish_s(*transfer) for transfer in transfers]
    assert rate.finish_all_s(start, size).tolist() == pytest.approx(one_by_one, rel=1e-14)
    assert rate.finish_all_s(start[:, None], size[None, :]).shape == (len(transfers), len(transfers))


@given(rates(), st.floats(0, 1e5), st.floats(0, 1e5), st.floats(0, 100), st.floats(0, 1000))
def test_later_and_larger_ends_later(rate, start, size, delay, more):
    end = rate.finish_s(start, size)
    slack = 1e-9 * (1 + end)
    assert end >= start
    assert rate.finish_s(start, size + more) >= end - slack
    if size:
        assert rate.finish_s(start + delay, size) >= end - slack


@given(rates().filter(lambda r: r.period_s is not None), starts_s, sizes.filter(bool), st.integers(1, 1000))
def test_a_periodic_rate_repeats(rate, start, size, turns):
    shift = turns * rate.period_s
    assert rate.at(start + shift) == rate.at(start)
    assert rate.finish_s(start + shift, size) - shift == pytest.approx(rate.finish_s(start, size), abs=1e-6)


def test_a_period_that_is_no_binary_number_keeps_its_boundaries():
    """0.1 s times a whole number is off by a rounding; the transfer must not fall into another period by it."""
    rate = Rate((0.0, 0.05), (0.0, 100.0), 0.1)
    for number in range(20_000):
        for start in (number * 0.1, float(np.nextafter(number * 0.1, 0))):
            assert start < rate.finish_s(start, 1.0) < start + 0.0601 + 1e-9


def test_the_exact_boundaries():
    rate = Rate((0.0, 1.0, 2.0), (10.0, 0.0, 5.0))
    assert rate.finish_s(0, 10) == 1.0  # done at the beginning of the outage, not at its end
    assert rate.finish_s(0, 11) == pytest.approx(2.2)
    assert rate.finish_s(1.0, 5) == 3.0
    assert rate.finish_s(1.5, 0) == 1.5  # nothing to send: the outage does not matter
    assert (rate.at(0.999), rate.at(1.0), rate.at(2.0), rate.at(99)) == (10, 0, 5, 5)
    turning = Rate((0.0, 1.0), (0.0, 10.0), 2.0)
    assert turning.finish_s(1.0, 10) == 2.0  # one period's bytes end with it, not after the outage of the next
    assert turning.finish_s(1.0, 20) == 4.0
    assert Rate((0.0, 1.0, 2.0), (1e17, 0.0, 5.0)).finish_s(1.5, 1) >= 1.5  # a byte that is lost beside 1e17 others


@given(rates(), st.integers(0, 800), st.integers(1, 200))
def test_a_rate_holds_until_it_changes(rate, start, many):
    """Eighths of a second are exact: every change is on one of them, so it is enough to look there."""
    values = [rate.at(i / 8) for i in range(start, start + many + 1)]
    now, seen = start / 8, [values[0]]
    while (change := rate.change_after_s(now)) <= (start + many) / 8:
        assert change > now
        seen += [rate.at(now)] * round((change - now) * 8 - 1) + [rate.at(change)]
        now = change
    assert seen + [rate.at(now)] * (len(values) - len(seen)) == values
    assert change < math.inf or rate.at(now) == rate.bytes_per_s[-1]


def test_the_changes_of_a_period_that_is_no_binary_number_are_all_met():
    rate = Rate((0.0, 0.03), (1.0, 0.0), 0.1)
    now, met = 0.0, []
    while now < 1000:
        now = rate.change_after_s(now)
        if not met or rate.at(now) != met[-1][1]:
            met.append((now, rate.at(now)))
    assert [value for _, value in met] == [0.0, 1.0] * 10_000
    assert [time for time, _ in met] == pytest.approx([i * 0.1 + d for i in range(10_000) for d in (0.03, 0.1)])
    assert Rate.constant(1.0).change_after_s(5.0) == math.inf
    assert Rate((0.0, 1.0), (1.0, 2.0)).change_after_s(1.0) == math.inf


def test_a_transmitter_sends_one_after_the_other_and_latency_keeps_none_waiting():
    link = Transmitter(Link(("a", "b"), Rate((0.0, 2.0), (10.0, 20.0)), 0.5))
    assert link.send(0.0, 10) == (0.0, 1.0, 1.5)  # first byte leaves, last byte leaves, last byte arrives
    assert link.send(0.5, 30) == (1.0, 3.0, 3.5)
    assert link.send(2.0, 0) == (3.0, 3.0, 3.5)  # an empty message keeps its place
    assert link.send(9.0, 20) == (9.0, 10.0, 10.5)


def test_the_mean_is_what_a_long_transfer_sees():
    rate = Rate((0.0, 1.0, 4.0), (10.0, 0.0, 5.0), 6.0)
    assert rate.mean_bytes_per_s == pytest.approx(20 / 6)
    assert rate.finish_s(0, 20e6) == pytest.approx(20e6 / rate.mean_bytes_per_s, rel=1e-5)
    assert Rate((0.0, 1.0), (10.0, 20.0)).mean_bytes_per_s == 15  # the last counts as long as the one before it
    assert Rate.constant(7.0).is_constant
    assert not rate.is_constant


@pytest.mark.parametrize(
    ("starts", "values", "period"),
    [
        ((), (), None),
        ((0.0,), (1.0, 2.0), None),
        ((1.0,), (1.0,), None),
        ((0.0, 0.0), (1.0, 2.0), None),
        ((0.0, 2.0, 1.0), (1.0, 2.0, 3.0), None),
        ((0.0,), (-1.0,), None),
        ((0.0,), (float("nan"),), None),
        ((0.0, float("inf")), (1.0, 1.0), None),
        ((0.0, 1.0), (1.0, 0.0), None),
        ((0.0, 1.0), (0.0, 0.0), 2.0),
        ((0.0, 1.0), (1.0, 1.0), 1.0),
        ((0.0, 1.0), (1.0, 1.0), float("nan")),
    ],
)
def test_a_rate_that_makes_no_sense_is_refused(starts, values, period):
    with pytest.raises(InputError):
        Rate(starts, values, period)
