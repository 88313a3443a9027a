"""Fair sharing against walking from event to event in exact arithmetic, and against queueing theory.

The walk fills the rates up together until a constraint is met (Bertsekas and Gallager, Data Networks, 1992, §6.5.2),
for every flow and constraint by itself; it knows nothing of groups that move as one. Times are sums of binary
fractions, so that ends, joins and changes of rate fall together often.

Sources of the theory: L. Kleinrock, Queueing Systems, vol. 1 (1975), chapter 3, and vol. 2 (1976), chapter 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from isthmus.sim.clock import Clock
from isthmus.sim.sharing import Flow, Sharing
from isthmus.workloads.random import stream
from isthmus.workloads.rate import Rate


@dataclass
class Work:
    """What to share: who joins when, with how much, in which group, and when it gives up."""

    rate: Rate
    slots: int
    caps: dict[str, Rate]
    flows: list[tuple[float, float, str | None, float | None]] = field(default_factory=list)


def share(work: Work) -> list[tuple[int, float]]:
    """Which flow ended when, in the order of the calls."""
    env = Clock()
    sharing = Sharing(env, work.rate, slots=work.slots, caps=work.caps)
    ended: list[tuple[int, float]] = []
    flows: dict[int, Flow] = {}

    def at(time_s: float, call: Callable[[], None]) -> None:
        env.timeout(time_s).callbacks.append(lambda _: call())

    def join(number: int, amount: float, group: str | None) -> None:
        flows[number] = sharing.join(amount, lambda: ended.append((number, env.now)), group)

    for number, (start, amount, group, gives_up) in enumerate(work.flows):
        at(start, partial(join, number, amount, group))
        if gives_up is not None:
            at(gives_up, lambda number=number: sharing.leave(flows[number]))
    env.run()
    return ended


def walk(work: Work) -> list[tuple[int, float]]:
    """The same in fractions."""
    rates = {None: work.rate, **work.caps}
    joins = {n: Fraction(flow[0]) for n, flow in enumerate(work.flows)}
    leaves = {n: Fraction(flow[3]) for n, flow in enumerate(work.flows) if flow[3] is not None}
    group = {n: flow[2] for n, flow in enumerate(work.flows)}
    left: dict[int, Fraction] = {}
    now, ended = Fraction(0), []
    while joins or left:
        for n in [n for n in leaves if n in left and leaves[n] <= now]:
            del left[n]
        for n in sorted([n for n in joins if joins[n] <= now], key=lambda n: (joins[n], n)):
            left[n] = Fraction(work.flows[n][1])
            del joins[n]
        done = [n for n in left if left[n] == 0]  # in order of joining, as `left` is
        ended += [(n, float(now)) for n in done]
        for n in done:
            del left[n]
        at_now = {name: piece(rate, now) for name, rate in rates.items()}
        constraints = [(set(left), work.slots * at_now[None][0])]
        constraints += [({n}, at_now[None][0]) for n in left]
        constraints += [({n for n in left if group[n] == name}, at_now[name][0]) for name in work.caps]
        speed = fill(constraints)
        following = [time for _, time in at_now.values() if time is not None]
        following += joins.values()
        following += [time for n, time in leaves.items() if time > now]
        following += [now + left[n] / speed[n] for n in left if speed[n]]
        if not left and not joins:
            break
        step = min(following) - now
        left = {n: left[n] - speed[n] * step for n in left}
        now += step
    return ended


def piece(rate: Rate, now: Fraction) -> tuple[Fraction, Fraction | None]:
    """The rate now, and when the next piece begins."""
    period = None if rate.period_s is None else Fraction(rate.period_s)
    turn = Fraction(0) if period is None else now // period * period
    starts = [turn + Fraction(s) for s in rate.starts_s]
    index = max(i for i, s in enumerate(starts) if s <= now)
    following = starts[index + 1] if index + 1 < len(starts) else None if period is None else turn + period
    return Fraction(rate.bytes_per_s[index]), following


def fill(constraints: list[tuple[set[int], Fraction]]) -> dict[int, Fraction]:
    """Max–min: all grow together; those under a constraint that is met stop."""
    speed = {n: Fraction(0) for members, _ in constraints for n in members}
    growing = set(speed)
    while growing:
        room = [
            ((limit - sum(speed[n] for n in members)) / len(members & growing), members)
            for members, limit in constraints
            if members & growing
        ]
        step = min(r for r, _ in room)
        for n in growing:
            speed[n] += step
        for r, members in room:
            if r == step:
                growing -= members
    return speed


def moved(rate: Rate, start_s: float, end_s: float) -> Fraction:
    """The integral."""
    now, end, total = Fraction(start_s), Fraction(end_s), Fraction(0)
    while now < end:
        value, following = piece(rate, now)
        until = end if following is None else min(end, following)
        total, now = total + value * (until - now), until
    return total


def busy(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The union of intervals."""
    union: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if union and start <= union[-1][1]:
            union[-1] = union[-1][0], max(union[-1][1], end)
        else:
            union.append((start, end))
    return union


untimed = settings(deadline=None)
eighths = st.integers(1, 24).map(lambda i: i / 8)
starts_s = st.integers(0, 48).map(lambda i: i / 8)
amounts = st.one_of(st.integers(0, 12), st.integers(0, 2000)).map(float)


@st.composite
def rates(draw, speeds=(0.0, 1.0, 3.0, 8.0, 50.0)):
    starts = (0.0, *np.cumsum(draw(st.lists(eighths, max_size=4))).tolist())
    values = [draw(st.sampled_from(speeds)) for _ in starts]
    period = starts[-1] + draw(eighths) if draw(st.booleans()) else None
    if period is None or not any(values):
        values[-1] = draw(st.sampled_from([s for s in speeds if s]))
    return Rate(starts, tuple(values), period)


@st.composite
def works(draw, leaving=True):
    caps = draw(st.dictionaries(st.sampled_from("abc"), rates(), max_size=3))
    gives_up = st.none()
    if leaving:  # never at the moment it ends, which would leave open which comes first
        gives_up |= st.floats(0.011, 5).map(lambda delay: delay + 1e-3 / 7)
    flows = draw(st.lists(st.tuples(starts_s, amounts, st.sampled_from([None, *caps]), gives_up), max_size=9))
    flows = [(s, amount, group, None if d is None else s + d) for s, amount, group, d in flows]
    return Work(draw(rates()), draw(st.integers(1, 4)), caps, flows)


@untimed
@given(works())
def test_each_flow_ends_when_it_should_and_in_that_order(work):
    ended, exact = share(work), walk(work)
    assert [number for number, _ in ended] == [number for number, _ in exact]
    assert [time for _, time in ended] == pytest.approx([time for _, time in exact], rel=1e-10)


@untimed
@given(works(leaving=False))
def test_nothing_is_lost_and_no_cap_exceeded(work):
    """All that joins ends; neither a flow, nor a group, nor all together are served more than there was in their time;
    without caps, one slot serves all there is as long as anyone is there."""
    ended = dict(share(work))
    assert len(ended) == len(work.flows)

    def members(group: str | None = None) -> list[tuple[float, float, float]]:
        flows = enumerate(work.flows)
        return [(start, ended[n], amount) for n, (start, amount, g, _) in flows if group is None or g == group]

    def there_was(rate: Rate, flows: list[tuple[float, float, float]]) -> float:
        return float(sum(moved(rate, *span) for span in busy([(start, end) for start, end, _ in flows])))

    slack = 1 + 1e-9
    for flow in members():
        assert flow[2] <= there_was(work.rate, [flow]) * slack
    for name, cap in work.caps.items():
        assert sum(f[2] for f in members(name)) <= there_was(cap, members(name)) * slack
    total, most = sum(f[2] for f in members()), there_was(work.rate, members())
    assert total <= work.slots * most * slack
    if work.slots == 1 and not any(group in work.caps for _, _, group, _ in work.flows):
        assert total == pytest.approx(most)


@untimed
@given(works(leaving=False), st.randoms(use_true_random=False))
def test_the_order_of_joining_at_one_time_changes_no_end(work, random):
    order = list(range(len(work.flows)))
    random.shuffle(order)
    shuffled = dict(share(Work(work.rate, work.slots, work.caps, [work.flows[n] for n in order])))
    ended = dict(share(work))
    assert [shuffled[i] for i in range(len(order))] == pytest.approx([ended[n] for n in order], rel=1e-12)


def test_three_flows_by_hand():
    """6/s, nothing in [2, 3), then 3/s. 12 join at 0, 3 at 1, 6 at 1.5.

    [0, 1): the first gets 6, 6 are left. [1, 1.5): two get 1.5 each: 4.5 and 1.5. [1.5, 2): three get 1 each: 3.5, 0.5
    and 5. From 3 on each gets 1 per second: the second ends after 1/2 s; then 1.5 per second: the first, with 3 left,
    ends 2 s later at 5.5; the third, with 1.5 left, at 3 per second at 6.
    """
    trace = Rate((0.0, 2.0, 3.0), (6.0, 0.0, 3.0))
    work = Work(trace, 1, {}, [(0.0, 12, None, None), (1.0, 3, None, None), (1.5, 6, None, None)])
    assert share(work) == [(1, 3.5), (0, 5.5), (2, 6.0)]
    assert walk(work) == share(work)


def test_a_cap_leaves_the_rest_to_others():
    """Of 10/s, two flows under a cap of 2/s get 1 each; the others 4 each."""
    flows = [(0.0, 2.0, "slow", None), (0.0, 2.0, "slow", None), (0.0, 8.0, None, None), (0.0, 4.0, "other", None)]
    work = Work(Rate.constant(10), 1, {"slow": Rate.constant(2)}, flows)
    assert share(work) == [(3, 1.0), (2, 1.5), (0, 2.0), (1, 2.0)]


def test_one_processor_is_shared_and_more_give_no_job_more_than_one():
    """1, 2, …, n seconds of work at once: job k ends when the shorter ones have had theirs and the n − k longer ones
    k each."""
    n = 7
    jobs = [(0.0, float(k), None, None) for k in range(n, 0, -1)]
    ends = [(n - k, k * (k + 1) / 2 + (n - k) * k) for k in range(1, n + 1)]
    ended = share(Work(Rate.constant(1), 1, {}, jobs))
    assert [number for number, _ in ended] == [number for number, _ in ends]
    assert [end for _, end in ended] == pytest.approx([end for _, end in ends])
    assert dict(share(Work(Rate.constant(2), n, {}, jobs))) == {n - k: k / 2 for k in range(1, n + 1)}
    # Three of 2 s on two slots: 2/3 each. When the node is at half speed from 1.5 s on, 1/3 each.
    work = Work(Rate((0.0, 1.5), (1.0, 0.5)), 2, {}, [(0.0, 2.0, None, None)] * 3)
    assert share(work) == [(n, pytest.approx(4.5)) for n in range(3)]


@pytest.mark.parametrize("seed", range(50))
def test_what_ends_with_the_last_byte_before_an_outage_does_not_wait_for_its_end(seed):
    """Also when what is served adds up to it but for roundings."""
    generator = stream(seed, "outage")
    amounts = generator.random(100)
    amounts *= 7 / amounts.sum()
    joins = np.sort(generator.random(100)) * 0.001
    joins[0] = 0
    flows = [(start, amount, None, None) for start, amount in zip(joins.tolist(), amounts.tolist(), strict=True)]
    assert share(Work(Rate((0.0, 1.0, 9.0), (7.0, 0.0, 7.0)), 1, {}, flows))[-1][1] == pytest.approx(1.0)


def test_a_small_amount_is_not_lost_beside_large_ones_before_it():
    work = Work(Rate((0.0, 1.0), (1e16, 1.0)), 1, {}, [(0.0, 1e16, None, None), (2.0, 0.25, None, None)])
    assert share(work) == [(0, 1.0), (1, 2.25)]


def test_only_changes_of_what_is_under_way_take_events():
    """One for each that joins, at most, and one for each that ends: what they supersede does not wake in its turn."""
    env = Clock()
    sharing = Sharing(env, Rate.constant(1.0))
    for amount in range(100, 0, -1):
        sharing.join(amount, lambda: None)
    events = 0
    while env.peek() < math.inf:
        env.step()
        events += 1
    assert env.now == 5050
    assert events <= 200


def test_what_is_out_of_date_does_not_pile_up():
    """One long flow, and thousands of short ones one after another, each of which ends it later."""
    clock = Clock()
    sharing = Sharing(clock, Rate.constant(1.0))
    ended: list[tuple[str, float]] = []
    pending: list[int] = []

    def short(number: int) -> None:
        pending.append(clock.pending)
        if number:
            sharing.join(0.5, partial(short, number - 1))

    sharing.join(5000.0, lambda: ended.append(("long", clock.now)))
    short(2500)
    clock.run()
    assert ended == [("long", 6250.0)]
    assert max(pending) <= 2


@pytest.mark.parametrize("period", [0.1, 1 / 3])
def test_long_runs_over_a_period_that_is_no_binary_number(period):
    """Half of each period there is 1/s: 20 flows of 50 end together."""
    rate = Rate((0.0, period / 2), (1.0, 0.0), period)
    ended = share(Work(rate, 1, {}, [(0.0, 50.0, None, None)] * 20))
    assert [number for number, _ in ended] == list(range(20))
    assert [end for _, end in ended] == pytest.approx([2000.0 - period / 2] * 20)


@untimed
@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e12)), max_size=9), st.floats(1e-6, 1e12))
@example([(0.0, math.ulp(0.0))], 1e10)
def test_any_sizes_end(flows, rate):
    """However small beside the clock or beside each other, rounding starves none and repeats no event."""
    work = Work(Rate.constant(rate), 1, {}, [(start, amount, None, None) for start, amount in flows])
    assert sorted(number for number, _ in share(work)) == list(range(len(flows)))


def test_all_at_one_time_are_called_in_order_of_joining_and_may_join_again():
    env = Clock()
    sharing = Sharing(env, Rate.constant(1), caps={"a": Rate.constant(1 / 3)})
    calls: list[tuple[str, float]] = []

    def again(name: str) -> None:
        calls.append((name, env.now))
        if len(name) < 3:
            sharing.join(1 / 3, partial(again, name + name[0]), "a" if name[0] == "y" else None)
            assert calls[-1][0] == name  # nothing is called while it joins
            sharing.join(0.0, partial(calls.append, (name + "0", env.now)))

    for name in "xyz":
        sharing.join(1 / 3, partial(again, name), "a" if name == "y" else None)
    env.run()
    names = ["x", "y", "z", "x0", "y0", "z0", "xx", "yy", "zz", "xx0", "yy0", "zz0", "xxx", "yyy", "zzz"]
    assert [name for name, _ in calls] == names
    assert [time for _, time in calls] == pytest.approx([1] * 6 + [2] * 6 + [3] * 3)


def test_leaving_makes_room_and_clearing_loses_all():
    env = Clock()
    sharing = Sharing(env, Rate.constant(2), caps={"a": Rate.constant(1)})
    calls: list[tuple[str, float]] = []

    def join(name: str, amount: float, group: str | None = None) -> Flow:
        return sharing.join(amount, lambda: calls.append((name, env.now)), group)

    gone, _, empty = join("gone", 4.0), join("stays", 4.0), join("empty", 0.0)
    sharing.leave(empty)  # ended, but not called yet
    env.run(until=2)
    sharing.leave(gone)
    sharing.leave(gone)
    env.run(until=10)
    assert calls == [("stays", 3.0)]
    join("lost", 5.0, "a"), join("lost", 1.0)
    env.run(until=10.5)
    sharing.clear()
    env.run(until=20)
    assert calls == [("stays", 3.0)]
    join("first", 2.0, "a")
    env.run()
    assert calls == [("stays", 3.0), ("first", 22.0)]


@pytest.mark.parametrize("clear", [True, False])
def test_a_callback_may_give_up_what_ends_at_the_same_time(clear):
    env = Clock()
    sharing = Sharing(env, Rate.constant(1))
    calls: list[str] = []
    flows: list[Flow] = []

    def first() -> None:
        calls.append("first")
        if clear:
            sharing.clear()
        else:
            sharing.leave(flows[1])

    flows += sharing.join(1.0, first), sharing.join(1.0, partial(calls.append, "second"))
    env.run()
    assert calls == ["first"]


class Never(Rate):
    """Nothing, for ever."""

    def at(self, time_s: float) -> float:
        return 0.0


def test_what_never_ends_takes_no_events():
    env = Clock()
    calls: list[str] = []
    Sharing(env, Never((0.0,), (1.0,))).join(1.0, partial(calls.append, "nothing"))
    sharing = Sharing(env, Rate.constant(1.0), caps={"shut": Never((0.0,), (1.0,))})
    sharing.join(math.inf, partial(calls.append, "infinite"))
    sharing.join(1.0, partial(calls.append, "shut"), "shut")
    assert env.peek() == math.inf
    sharing.join(1.0, partial(calls.append, "finite"))
    env.run()
    assert (calls, env.now) == (["finite"], 2.0)
    for amount in (-1.0, math.nan):
        with pytest.raises(ValueError, match="amount"):
            sharing.join(amount, lambda: None)


JOBS, SEEDS = 6000, range(1, 11)
Sizes = Callable[[np.random.Generator], np.ndarray]


def sojourns(rho: float, slots: int, sizes: Sizes, seed: int) -> np.ndarray:
    """Of Poisson arrivals with sizes of mean 1, without the first fifth, in order of arrival."""
    env = Clock()
    sharing = Sharing(env, Rate.constant(1), slots=slots)
    gaps = stream(seed, "gaps").exponential(1 / (rho * slots), JOBS).tolist()
    work = sizes(stream(seed, "sizes")).tolist()
    took = np.full(JOBS, np.nan)

    def end(number: int, start: float) -> None:
        took[number] = env.now - start

    def arrive(number: int) -> None:
        sharing.join(work[number], partial(end, number, env.now))
        following(number + 1)

    def following(number: int) -> None:
        if number < JOBS:
            env.timeout(gaps[number]).callbacks.append(lambda _: arrive(number))

    following(0)
    env.run()
    return took[JOBS // 5 :]


def constant(_: np.random.Generator) -> np.ndarray:
    return np.ones(JOBS)


def exponential(generator: np.random.Generator) -> np.ndarray:
    return generator.exponential(1.0, JOBS)


def hyperexponential(generator: np.random.Generator) -> np.ndarray:
    """Of mean 1 and E[S²] = 5. Two kinds of jobs, each half of the work; one job in nine is of the long kind.

    With chances p and 1 − p and means 1 / 2p and 1 / 2(1 − p), E[S²] = 1 / 2p(1 − p), which is 5 at p(1 − p) = 1/10.
    """
    odd = (1 - math.sqrt(3 / 5)) / 2
    return generator.exponential(1.0, JOBS) / (2 * np.where(generator.random(JOBS) < odd, odd, 1 - odd))


def holds(theory_s: float, values: list[float], width: float) -> None:
    """Student's 99 % interval of replications holds the theory and is narrow."""
    error = stats.t.ppf(0.995, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    said = f"theory {theory_s:.4f} s, simulated {np.mean(values):.4f} ± {error:.4f} s"
    assert error < width * theory_s, said
    assert abs(np.mean(values) - theory_s) <= error, said


@pytest.mark.parametrize("rho", [0.5, 0.8])
@pytest.mark.parametrize(("sizes", "width"), [(constant, 1 / 5), (exponential, 1 / 5), (hyperexponential, 1 / 3)])
def test_processor_sharing_feels_only_the_mean_size(rho, sizes, width):
    """M/G/1-PS: E[S] / (1 − ρ), whatever the distribution (Kleinrock, vol. 2, chapter 4); M/M/1-PS is 1 / (μ − λ).

    At ρ = 0.8 these are 5 s; in FIFO order they would be 3 s, 5 s and 11 s.
    """
    values = [float(np.mean(sojourns(rho, 1, sizes, seed))) for seed in SEEDS]
    holds(1 / (1 - rho), values, width)


@pytest.mark.parametrize("rho", [0.5, 0.8])
@pytest.mark.parametrize("slots", [2, 5])
def test_several_processors_shared(rho, slots):
    """M/M/c-PS has as many jobs as M/M/c in FIFO order, for both lose them at rate min(n, c)·μ, so by Little's law the
    same mean: Erlang C (Kleinrock, vol. 1, chapter 3), with B from Erlang's recursion."""
    offered = rho * slots
    blocked = 1.0
    for servers in range(1, slots + 1):
        blocked = offered * blocked / (servers + offered * blocked)
    waits = blocked / (1 - rho * (1 - blocked))
    values = [float(np.mean(sojourns(rho, slots, exponential, seed))) for seed in SEEDS]
    holds(1 + waits / (slots - offered), values, 1 / 5)
