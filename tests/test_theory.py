"""The simulator against queueing theory: the exact value lies in a narrow 99 % confidence interval.

Intervals are of independent replications (seeds), by Student's t, each without its first fifth, which still remembers
that everything began empty. Nothing here depends on how the simulator is made: arrivals go in, records come out.

Sources: L. Kleinrock, Queueing Systems, vol. 1 (1975), chapters 2, 3 and 5; P. J. Burke, The output of a queuing system
(1956); J. R. Jackson, Networks of waiting lines (1957); H. D. Friedman, Reduction methods for tandem queuing systems
(1965).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats

from isthmus.policies.plan import split
from isthmus.policies.records import Outcome, Record
from isthmus.policies.static import Fixed, Local, Remote
from isthmus.workloads.arrivals import Poisson
from isthmus.workloads.requests import Request, Source
from isthmus.workloads.testbed import Testbed

SEEDS = range(1, 11)
WITHOUT_DELAY: dict[str, Any] = {"rate": 1e18, "latency": 0}
"""A link that takes no time worth mentioning."""

Measure = Callable[[list[Record]], float]


def mean_latency(records: list[Record]) -> float:
    return float(np.mean([r.latency_s for r in records if r.latency_s is not None]))


def p95_latency(records: list[Record]) -> float:
    return float(np.quantile([r.latency_s for r in records if r.latency_s is not None], 0.95))


def agrees(
    play: Callable[..., list[Record]],
    testbed: Testbed,
    policy: Callable[[], Any],
    per_s: float | dict[str, float],
    theory_s: float,
    measure: Measure = mean_latency,
    *,
    requests: int,
    width: float = 1.0,
) -> None:
    """The interval holds the theory, and is narrow, or the test could not fail: a sixth of it, of `width` of it, to
    either side with the fewest requests, and the less the more there are."""
    rates = per_s if isinstance(per_s, dict) else {"device": per_s}
    [model] = testbed.models
    values = []
    for seed in SEEDS:
        drawn: dict[str, list[Request]] = {
            node: Source(node=node, model=model, arrivals=Poisson(rate=rate), requests=requests).draw(seed)
            for node, rate in rates.items()
        }
        records = play(testbed, policy, drawn, seed=seed)
        assert len(records) == requests * len(rates)
        records.sort(key=lambda r: r.arrival_s)
        values.append(measure(records[len(records) // 5 :]))
    error = stats.t.ppf(0.995, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    said = f"theory {theory_s:.4f} s, simulated {np.mean(values):.4f} ± {error:.4f} s"
    assert error < width * theory_s / 6 * math.sqrt(FEW / requests), said
    assert abs(np.mean(values) - theory_s) <= error, said


def alone(synthetic, distribution: str, slots: int = 1, spread: float = 0.5) -> Testbed:
    """One node that takes 1 s on average."""
    service = {"mean": "1s", "distribution": distribution, "spread": spread}
    return synthetic({"device": {"service": service, "slots": slots}}, [])


FEW, MANY = 6000, 24_000


@pytest.fixture(params=[FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def requests(request: pytest.FixtureRequest) -> int:
    """By replication."""
    return int(request.param)


utilisations = pytest.mark.parametrize("rho", [0.5, 0.8])


@utilisations
def test_m_m_1(synthetic, play, requests, rho):
    """Kleinrock, chapter 3: the time in an M/M/1 queue is 1 / (μ − λ) on average."""
    agrees(play, alone(synthetic, "exponential"), Local, rho, 1 / (1 - rho), requests=requests)


@utilisations
def test_m_m_1_in_its_tail(synthetic, play, requests, rho):
    """Kleinrock, chapter 5: the time in an M/M/1 FIFO queue is exponential with rate μ − λ, so its 95th percentile is
    ln 20 / (μ − λ). A mean says nothing about the order of service; this does."""
    agrees(
        play,
        alone(synthetic, "exponential"),
        Local,
        rho,
        math.log(20) / (1 - rho),
        p95_latency,
        requests=requests,
        width=1.5,
    )


@utilisations
@pytest.mark.parametrize(("distribution", "spread"), [("constant", 0.0), ("gamma", 0.5), ("lognormal", 1.0)])
def test_m_g_1(synthetic, play, requests, rho, distribution, spread):
    """Pollaczek–Khinchine (Kleinrock, chapter 5): waiting is λ·E[S²] / (2(1 − ρ)), and E[S²] = E[S]²·(1 + cv²).

    With constant times it is M/D/1."""
    testbed = alone(synthetic, distribution, spread=spread or 0.5)
    wait = rho * (1 + spread**2) / (2 * (1 - rho))
    agrees(play, testbed, Local, rho, 1 + wait, requests=requests, width=1 + spread)


@utilisations
@pytest.mark.parametrize("slots", [2, 5])
def test_m_m_c(synthetic, play, requests, rho, slots):
    """Erlang C (Kleinrock, chapter 3): P(wait) = B / (1 − ρ(1 − B)) with B from Erlang's recursion; the wait is
    P(wait) / (cμ − λ)."""
    offered = rho * slots
    blocked = 1.0
    for servers in range(1, slots + 1):
        blocked = offered * blocked / (servers + offered * blocked)
    waits = blocked / (1 - rho * (1 - blocked))
    agrees(
        play, alone(synthetic, "exponential", slots), Local, offered, 1 + waits / (slots - offered), requests=requests
    )


@utilisations
def test_m_d_1_at_a_link_before_a_faster_server(synthetic, play, requests, rho):
    """Messages of one size over a constant rate are an M/D/1 queue. They leave it at least one transmission apart, so
    a server that always takes less than that has none waiting (Friedman 1965); neither has the way back.

    A latency delays all alike and changes no queue."""
    size = 3 * 64 * 64 * 4  # bytes of the model's input
    link = {"between": ["device", "cloud"], "rate": size, "latency": "0.25s"}
    testbed = synthetic({"device": "1s", "cloud": "900ms"}, [link])
    answer_s = testbed.models["chain"].bytes_of(testbed.models["chain"].outputs) / size
    assert answer_s < 1
    wait = rho / (2 * (1 - rho))
    agrees(play, testbed, Remote, rho, wait + 1 + 0.25 + 0.9 + answer_s + 0.25, requests=requests)


@utilisations
@pytest.mark.parametrize("medium", [None, "cell"])
def test_m_d_1_with_processor_sharing_at_a_fair_link(synthetic, play, requests, rho, medium):
    """Messages that share a rate take 1 / (1 − ρ) times as long on average as one alone, whatever the distribution of
    their sizes (Kleinrock, vol. 2, §4.4); a server with room for all makes none wait."""
    size = 3 * 64 * 64 * 4
    link = {"between": ["device", "cloud"], "rate": size, "discipline": "fair", "back": {"rate": 1e18}}
    if medium is not None:
        link |= {"medium": medium, "rate": 5 * size}
    nodes = {"device": "1s", "cloud": {"service": {"mean": "0.5s"}, "slots": 1000}}
    media = {medium: {"rate": size, "back": {"rate": 1e18}}} if medium is not None else {}
    testbed = synthetic(nodes, [link], media=media)
    agrees(play, testbed, Remote, rho, 1 / (1 - rho) + 0.5, requests=requests, width=1.5)


@utilisations
def test_two_servers_in_a_row(synthetic, play, requests, rho):
    """What leaves an M/M/1 queue is a Poisson process (Burke 1956), so a second exponential server behind the first is
    an M/M/1 queue too, and the times add (Jackson 1957). Noise that the two nodes shared would break it."""
    testbed = synthetic({"device": "1s", "cloud": "1s"}, [{"between": ["device", "cloud"], **WITHOUT_DELAY}])
    model = testbed.models["chain"]
    parts = [stage.part for stage in split(model, (1,), ("device", "cloud")).stages]
    share = [testbed.service("device", "chain").mean_s(part) for part in parts]
    # The cut's two halves are made to take 1 s and 0.8 s on average.
    nodes = {
        name: {"service": {"mean": mean / of, "distribution": "exponential"}}
        for name, mean, of in zip(("device", "cloud"), (1.0, 0.8), share, strict=True)
    }
    testbed = synthetic(nodes, [{"between": ["device", "cloud"], **WITHOUT_DELAY}])
    agrees(play, testbed, lambda: Fixed(1), rho, 1 / (1 - rho) + 1 / (1 / 0.8 - rho), requests=requests)


@utilisations
def test_two_sources_share_a_server(synthetic, play, requests, rho):
    """Two Poisson processes together are one of the sum of their rates (Kleinrock, chapter 2), whoever sends them."""
    nodes = {"device": "1s", "sensor": "1s", "cloud": {"service": {"mean": "1s", "distribution": "exponential"}}}
    links = [{"between": [n, "cloud"], **WITHOUT_DELAY} for n in ("device", "sensor")]
    rates = {"device": rho / 4, "sensor": 3 * rho / 4}
    # The rarer source is still sending when the other has stopped: only the time in which both do counts.
    testbed = synthetic(nodes, links)

    def while_both_send(records: list[Record]) -> float:
        last = min(max(r.arrival_s for r in records if r.source == s) for s in rates)
        return mean_latency([r for r in records if r.arrival_s <= last])

    agrees(play, testbed, lambda: Remote("cloud"), rates, 1 / (1 - rho), while_both_send, requests=requests, width=1.5)


# Nodes that are more than a queue


class ByRoute:
    """The first block, the second and the rest, each on a node that the source's route says."""

    def __init__(self, routes: dict[str, tuple[str, str, str]]) -> None:
        self.routes = routes

    def decide(self, request, view):
        return split(view.testbed.models[request.model], (1, 2), self.routes[request.source])


def test_an_open_network_of_four_queues(synthetic, play, requests):
    """Jackson 1957: with Poisson arrivals and exponential services each queue of a network is as if it were alone, an
    M/M/1 queue of all that comes by. Each node here runs one part of the model, which takes 1 s on average."""
    rate = 0.25
    routes = {"s1": ("a", "c", "d"), "s2": ("b", "c", "s2"), "s3": ("s3", "c", "d"), "s4": ("b", "s4", "d")}
    model = synthetic({"a": "1s"}, []).models["chain"]
    one = synthetic({"a": "1s"}, []).service("a", "chain")
    share = [one.mean_s(stage.part) for stage in split(model, (1, 2), ("a", "b", "c")).stages]
    nodes: dict[str, Any] = dict.fromkeys((*routes, "hub"), "1ns")
    for name, part in zip("abcd", (0, 0, 1, 2), strict=True):
        nodes[name] = {"service": {"mean": 1 / share[part], "distribution": "exponential"}}
    testbed = synthetic(nodes, [{"between": [n, "hub"], **WITHOUT_DELAY} for n in nodes if n != "hub"])
    visits = {name: sum(name in route for route in routes.values()) for name in "abcd"}
    theory = sum(many / (1 - many * rate) for many in visits.values()) / len(routes)

    def while_all_send(records: list[Record]) -> float:
        last = min(max(r.arrival_s for r in records if r.source == s) for s in routes)
        return mean_latency([r for r in records if r.arrival_s <= last])

    agrees(
        play, testbed, lambda: ByRoute(routes), dict.fromkeys(routes, rate), theory, while_all_send,
        requests=requests // 4, width=2,
    )  # fmt: skip


def node(synthetic, **fields: Any) -> Testbed:
    """One node that takes 1 s on average, exponentially, unless its `service` says otherwise."""
    return synthetic({"device": {"service": {"mean": "1s", "distribution": "exponential"}, **fields}}, [])


@utilisations
@pytest.mark.parametrize(
    "service",
    [
        {"mean": "1s", "distribution": "exponential"},
        {"mean": "1s"},
        {"mean": "1s", "distribution": "gamma", "spread": 1.5},
        {"mean": "1s", "distribution": "weibull_min", "parameters": {"c": 0.8}},
    ],
    ids=lambda service: service.get("distribution", "constant"),
)
def test_m_g_1_processor_sharing(synthetic, play, requests, rho, service):
    """The time in an M/G/1 queue that shares its processor is E[S] / (1 − ρ), whatever the distribution (Kleinrock,
    vol. 2, 1976, §4.4): it is insensitive to all but the mean."""
    testbed = node(synthetic, discipline="ps", service=service)
    width = 1.5 if service.get("spread", 0) > 1 else 1.0
    agrees(play, testbed, Local, rho, 1 / (1 - rho), requests=requests, width=width)


@pytest.mark.parametrize("discipline", ["fifo", "ps"])
@pytest.mark.parametrize("offered", [0.8, 1.25])
def test_m_m_1_k(synthetic, play, requests, offered, discipline):
    """With room for K a request is refused with probability (1 − ρ) ρ^K / (1 − ρ^(K+1)) (Kleinrock, §3.6); the mean
    time of the others is L / (λ (1 − P)) (Little). Which of them is served when makes no difference to either."""
    k = 5
    shares = [(1 - offered) * offered**n / (1 - offered ** (k + 1)) for n in range(k + 1)]
    testbed = node(synthetic, room=k, discipline=discipline)

    def refused(records: list[Record]) -> float:
        return sum(r.outcome is Outcome.DROPPED for r in records) / len(records)

    agrees(play, testbed, Local, offered, shares[k], refused, requests=requests, width=1.5)
    mean_s = sum(n * share for n, share in enumerate(shares)) / (offered * (1 - shares[k]))
    agrees(play, testbed, Local, offered, mean_s, requests=requests)


@pytest.mark.parametrize("rho", [0.6, 0.8])
def test_non_preemptive_priorities(synthetic, play, requests, rho):
    """Class k waits W₀ / ((1 − σ₍k−1₎)(1 − σₖ)), σₖ the load of the classes up to k, W₀ = λ E[S²] / 2 (Cobham, Priority
    assignment in waiting line problems, 1954). Here W₀ = ρ, and two thirds of the load are of the lower class."""
    nodes = {"device": "1s", "sensor": "1s", "cloud": {"service": {"mean": "1s", "distribution": "exponential"}}}
    nodes["cloud"]["discipline"] = "priority"  # type: ignore[index]
    testbed = synthetic(nodes, [{"between": [n, "cloud"], **WITHOUT_DELAY} for n in ("device", "sensor")])
    high = rho / 3
    theory = {"device": rho / (1 - high), "sensor": rho / ((1 - high) * (1 - rho))}
    waits: dict[str, list[float]] = {source: [] for source in theory}
    for seed in SEEDS:
        drawn = {
            source: Source(
                node=source, model="chain", arrivals=Poisson(rate=rate), priority=priority, duration=requests / rho / 2
            ).draw(seed)
            for source, rate, priority in (("device", high, 1), ("sensor", rho - high, 0))
        }
        records = play(testbed, lambda: Remote("cloud"), drawn, seed=seed)
        records.sort(key=lambda r: r.arrival_s)
        for source, values in waits.items():
            values.append(mean_latency([r for r in records[len(records) // 5 :] if r.source == source]) - 1)
    for source, values in waits.items():
        error = stats.t.ppf(0.995, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
        said = f"{source}: theory {theory[source]:.4f} s, simulated {np.mean(values):.4f} ± {error:.4f} s"
        assert error < theory[source] / 4, said
        assert abs(np.mean(values) - theory[source]) <= error, said


def test_batches_of_any_size_in_the_time_of_one_lose_nothing(synthetic, play, requests):
    """M/D/1 with batches of at most 2 that take as long as one job: an embedded chain of what is left at the end of
    each batch. Solved numerically; waiting by Little's law (Bailey, On queueing processes with bulk service, 1954)."""
    rho = 1.4  # of the 2 that are served per second
    testbed = synthetic({"device": {"service": {"mean": "1s"}, "batch": {"size": 2, "cost": [[1, 1], [2, 1]]}}}, [])
    agrees(play, testbed, Local, rho, bulk_service_s(rho, 2), requests=requests)


def bulk_service_s(rate: float, size: int, states: int = 200) -> float:
    """Mean time in a queue with service of 1 s for up to `size` at once, which starts with whoever is there."""
    comes = stats.poisson.pmf(np.arange(states), rate)
    moves = np.zeros((states, states))  # jobs that are left when a batch ends
    for left in range(states):
        rest = max(left - size, 0)
        moves[left, rest:] = comes[: states - rest]
        moves[left, -1] += 1 - moves[left].sum()
    system = np.vstack([moves.T - np.eye(states), np.ones(states)])
    share = np.linalg.lstsq(system, np.append(np.zeros(states), 1.0), rcond=None)[0]
    # A cycle: idle for 1 / rate if nothing is left, then one batch.
    there = np.maximum(np.arange(states), 1)  # at the start of the batch
    jobs_s = share @ there + rate / 2  # job-seconds in a batch: those there, and who comes, for half of it on average
    cycle_s = 1 + share[0] / rate
    return float(jobs_s / cycle_s / rate)


def test_a_drawn_distribution_queues_as_its_variance_says(synthetic, play, requests):
    """Pollaczek–Khinchine for a distribution of scipy, through its table of quantiles."""
    law = stats.weibull_min(1.5)
    cv2 = law.var() / law.mean() ** 2
    testbed = node(synthetic, service={"mean": "1s", "distribution": "weibull_min", "parameters": {"c": 1.5}})
    agrees(play, testbed, Local, 0.8, 1 + 0.8 * (1 + cv2) / (2 * 0.2), requests=requests)
