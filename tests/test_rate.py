"""Transfers over a changing rate, against integration by walking from piece to piece in exact arithmetic."""

from __future__ import annotations

import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.workloads.errors import InputError
from isthmus.workloads.links import Link
from isthmus.workloads.rate import Rate
from isthmus.workloads.transmitter import Transmitter


def finish_by_walking(rate: Rate, start_s: float, size: float) -> float:
    """Piece by piece, in fractions."""
    if size <= 0:
        return start_s
    starts = [Fraction(s) for s in rate.starts_s]
    period = None if rate.period_s is None else Fraction(rate.period_s)
    first = Fraction(rate.repeat_from_s)
    now, left = Fraction(start_s), Fraction(size)
    while True:
        turn = Fraction(0) if period is None or now < first else (now - first) // period * period
        piece = max(i for i, s in enumerate(starts) if s <= now - turn)
        following = starts[piece + 1] if piece + 1 < len(starts) else None if period is None else first + period
        speed = Fraction(rate.bytes_per_s[piece])
        room = None if following is None else (turn + following - now) * speed
        if room is None and not speed:
            return math.inf
        if room is None or room >= left > 0 < speed:
            return float(now + left / speed)
        left -= room
        now = turn + following


# Eighths of a second and whole bytes per second are exact in binary, so boundaries are hit exactly, and often.
eighths = st.integers(1, 40).map(lambda i: i / 8)
speeds = st.sampled_from([0.0, 0.0, 1.0, 3.0, 8.0, 64.0, 1000.0])


@st.composite
def rates(draw, *, may_end=False):
    gaps = draw(st.lists(eighths, max_size=5))
    starts = (0.0, *np.cumsum(gaps).tolist())
    values = [draw(speeds) for _ in starts]
    period, repeat_from = None, 0.0
    if draw(st.booleans()):
        repeat_from = draw(st.sampled_from([0.0, 0.0, *starts])) + draw(st.sampled_from([0.0, 0.125]))
        period = max(starts[-1] - repeat_from, 0) + draw(eighths)
    if not (may_end and period is None) and not values[-1]:
        values[-1] = draw(speeds.filter(bool))
    return Rate(starts, tuple(values), period, repeat_from_s=repeat_from, may_end=may_end)


starts_s = st.integers(0, 800).map(lambda i: i / 8)
sizes = st.one_of(st.integers(0, 64), st.integers(0, 100_000)).map(float)


@given(rates(may_end=True), starts_s, sizes)
def test_a_transfer_ends_when_its_last_byte_is_moved(rate, start, size):
    assert rate.finish_s(start, size) == pytest.approx(finish_by_walking(rate, start, size), rel=1e-12, abs=1e-9)


@given(rates(may_end=True), st.lists(st.tuples(starts_s, sizes), min_size=1, max_size=8))
def test_many_at_once_is_one_by_one(rate, transfers):
    start, size = np.array(transfers).T
    one_by_one = [rate.finish_s(*transfer) for transfer in transfers]
    assert rate.finish_all_s(start, size).tolist() == one_by_one  # to the last bit: the oracle meets the physics
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
    shift, start = turns * rate.period_s, start + rate.repeat_from_s
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


@given(rates(may_end=True), starts_s, sizes.filter(bool))
def test_going_from_change_to_change_moves_the_same_bytes(rate, start, size):
    now, left = start, size
    for _ in range(2000):
        then = rate.change_after_s(now)
        assert then > now
        if rate.at(now) * (then - now) >= left:
            break
        left -= rate.at(now) * (then - now) if rate.at(now) else 0.0
        now = then
        if now == math.inf:
            break
    else:
        return  # thousands of periods: enough was seen
    end = now + left / rate.at(now) if now < math.inf else math.inf
    assert end == pytest.approx(rate.finish_s(start, size), rel=1e-9)


def test_changes_are_those_of_the_value():
    rate = Rate((0.0, 1.0, 2.0, 3.0), (5.0, 5.0, 7.0, 5.0), 4.0)
    assert [rate.change_after_s(t) for t in (0.0, 1.0, 2.0, 2.5, 3.0, 3.99)] == [2, 2, 3, 3, 6, 6]
    assert Rate((0.0, 1.0), (5.0, 7.0)).change_after_s(1.0) == math.inf
    assert Rate((0.0, 1.0), (5.0, 5.0), 2.0).change_after_s(1.0) == math.inf
    assert Rate((0.0, 1.0), (5.0, 7.0), 2.0).change_after_s(1.5) == 2.0
    later = Rate((0.0, 1.0, 2.0), (1.0, 5.0, 7.0), 2.0, repeat_from_s=1.0)
    assert [later.change_after_s(t) for t in (0.0, 1.0, 2.0, 3.0, 4.0)] == [1, 2, 3, 4, 5]


def test_changes_of_a_period_that_is_no_binary_number_go_on():
    rate, now, turned = Rate((0.0, 0.05), (0.0, 100.0), 0.1), 0.0, 0
    while turned < 20_000:
        then = rate.change_after_s(now)
        assert now < then < now + 0.05 + 1e-9
        turned, now = turned + (then - now > 1e-9), then
    assert now == pytest.approx(1000)


@given(rates(may_end=True), rates(may_end=True), st.sampled_from([1.0, 2.0, 3.0]))
def test_a_product_is_the_product_at_every_time(a, b, multiple):
    if a.period_s is not None and b.period_s is not None:
        starts = tuple(s * multiple * a.period_s / b.period_s for s in b.starts_s)
        b = Rate(starts, b.bytes_per_s, multiple * a.period_s, repeat_from_s=starts[-1])
    for product in (a.times(b), b.times(a)):
        for time in np.arange(0.0625, 150, 0.375).tolist():  # between the eighths
            if b.starts_s[-1] * 8 % 1 == 0 or all(abs(time % 1 - s % 1) > 1e-6 for s in b.starts_s):
                assert product.at(time) == pytest.approx(a.at(time) * b.at(time))


def test_a_product_repeats_from_where_both_have_settled():
    fading = Rate((0.0, 1.0), (10.0, 20.0), 2.0)
    down = Rate((0.0, 3.0, 5.0), (1.0, 0.0, 1.0))
    product = fading.times(down)
    assert [product.at(t) for t in (0.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5, 99.5)] == [10, 10, 0, 0, 20, 10, 20, 20]
    assert product.period_s == 2.0
    assert product.finish_s(2.5, 10) == pytest.approx(5.25)
    assert Rate.constant(8.0).times(Rate.constant(0.5)) == Rate.constant(4.0)
    cut = fading.times(Rate((0.0, 3.0), (1.0, 0.0), may_end=True))
    assert (cut.finish_s(2.0, 10), cut.finish_s(2.0, 11), cut.change_after_s(3.0)) == (3.0, math.inf, math.inf)
    never = Rate((0.0, 1.0), (1.0, 0.0), 2.0).times(Rate((0.0, 1.0), (0.0, 1.0), 2.0))
    assert never.finish_s(0.0, 1) == math.inf
    with pytest.raises(InputError, match="every 2 s and every 3 s"):
        fading.times(Rate((0.0, 1.0), (10.0, 20.0), 3.0))


def test_a_link_that_is_cut_for_ever_finishes_at_infinity():
    with pytest.raises(InputError, match="ends at 0"):
        Rate((0.0, 1.0), (10.0, 0.0))
    cut = Rate((0.0, 1.0), (10.0, 0.0), may_end=True)
    assert (cut.finish_s(0.0, 10), cut.finish_s(0.0, 11), cut.finish_s(5.0, 1)) == (1.0, math.inf, math.inf)
    assert cut.finish_s(5.0, 0) == 5.0
    none = Rate((0.0,), (0.0,), may_end=True)
    assert none.finish_s(1.0, 1) == math.inf
    assert none.finish_all_s([1.0, 2.0], [1.0, 0.0]).tolist() == [math.inf, 2.0]
    with pytest.raises(InputError):
        Rate((0.0,), (0.0,), 1.0, may_end=True)  # what repeats and moves nothing has no period


@given(rates(may_end=True), st.floats(0, 200))
def test_pieces_are_the_rate_written_out(rate, until):
    starts, values = rate.pieces(until)
    assert values.tolist() == [rate.at(t) for t in starts.tolist()]
    assert (np.diff(starts) > 0).all()
    assert not len(starts) or (starts[0] == 0 and starts[-1] < until)


def test_a_million_pieces():
    """What it knows of itself is not pickled, and is the same again."""
    generator = np.random.default_rng(0)
    rate = Rate(tuple(np.arange(1e6).tolist()), tuple(generator.integers(0, 9, 1_000_000).astype(float).tolist()), 1e6)
    before = len(pickle.dumps(rate))
    times = generator.uniform(0, 3e6, 1000)
    ends = [rate.finish_s(t, 100.0) for t in times.tolist()]
    assert rate.finish_all_s(times, 100.0).tolist() == ends
    assert rate.change_after_s(0.0) >= 1
    assert rate.mean_bytes_per_s == pytest.approx(4, rel=0.01)
    assert len(pickle.dumps(rate)) == before < 20e6
    again = pickle.loads(pickle.dumps(rate))
    assert again == rate
    assert again.finish_s(float(times[0]), 100.0) == ends[0]


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
        ((0.0, 1.0), (1.0, 1.0), float("inf")),
    ],
)
def test_a_rate_that_makes_no_sense_is_refused(starts, values, period):
    with pytest.raises(InputError):
        Rate(starts, values, period)
