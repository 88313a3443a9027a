"""What goes wrong: how people write it, when it is drawn to happen, and what it does to requests under way."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter
from scipy import stats

from isthmus.policies.least_delay import LeastDelay
from isthmus.policies.neurosurgeon import Neurosurgeon
from isthmus.policies.plan import whole_on
from isthmus.policies.records import Kind, Outcome, Record
from isthmus.policies.static import Fixed, Local, Random, Remote
from isthmus.workloads.affliction import as_rate
from isthmus.workloads.errors import InputError
from isthmus.workloads.experiment import ExperimentSpec
from isthmus.workloads.faults import (
    FaultSpec,
    LinkFault,
    LostMessages,
    NodeFault,
    Recurring,
    SlowNode,
    draw_faults,
    factor,
    merged,
)
from isthmus.workloads.requests import Request

FILE = """
testbed:
  models: {m: squeezenet}
  nodes: {cam: {count: 3}, edge: {}, cloud: {}}
  links: [{between: [cam, edge], rate: 1Mbit}, {between: [edge, cloud], rate: 1Gbit}]
workload: [{node: cam, model: m, arrivals: {kind: poisson, rate: 1/s}, requests: 10}]
policies: [remote]
faults: [%s]
"""


def load(tmp_path, *faults: str) -> ExperimentSpec:
    path = tmp_path / "experiment.yaml"
    path.write_text(FILE % ", ".join(faults))
    return ExperimentSpec.load(path)


def test_every_kind_of_fault_is_read_and_written_again(tmp_path):
    spec = load(
        tmp_path,
        "{node: cloud, down: 1s, up: 2min}",
        "{link: [edge, cloud], down: 500ms}",
        "{node: edge, slower: 3, from: 1s, to: 2s}",
        "{node: edge, slower: 2}",
        "{link: [cam, edge], lose: 0.1, from: 1s}",
        "{node: cam, every: 1h, lasting: 5s}",
        "{link: [cam-1, edge], every: 10s, lasting: 1s}",
        "{node: cloud, every: 10s, lasting: 1s, slower: 4}",
    )
    assert spec.faults == (
        NodeFault(node="cloud", down=1, up=120),
        LinkFault(link=("edge", "cloud"), down=0.5),
        SlowNode(node="edge", slower=3, start=1, end=2),
        SlowNode(node="edge", slower=2),
        LostMessages(link=("cam", "edge"), lose=0.1, start=1),
        Recurring(node="cam", every=3600, lasting=5),
        Recurring(link=("cam-1", "edge"), every=10, lasting=1),
        Recurring(node="cloud", every=10, lasting=1, slower=4),
    )
    assert ExperimentSpec.model_validate(spec.model_dump(mode="json")) == spec
    assert ExperimentSpec.model_validate_json(spec.model_dump_json(by_alias=True)) == spec


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("{node: clod, down: 1s}", ["faults[0].node: unknown node 'clod'; did you mean cloud", "allowed: cam, "]),
        ("{node: cam-3, down: 1s}", ["faults[0].node: unknown node 'cam-3'"]),
        ("{link: [cam, egde], down: 1s}", ["faults[0].link: unknown node 'egde'; did you mean edge"]),
        ("{link: [cam, cloud], down: 1s}", ["faults[0].link", "no link between 'cam' and 'cloud'", "edge–cloud"]),
        ("{link: [edge, cloud, cam], down: 1s}", ["faults[0].link"]),
        ("{node: cloud, down: 2s, up: 2s}", ["faults[0]: is up again at 2 s, before it goes down at 2 s"]),
        ("{link: [edge, cloud], down: 2s, up: 1s}", ["faults[0]: is up again at 1 s"]),
        ("{link: [edge, cloud], down: soon}", ["faults[0].down", "'soon'"]),
        ("{link: [edge, cloud]}", ["faults[0].down: is missing"]),
        ("{link: [edge, cloud], lose: 0}", ["faults[0].lose", "greater than 0, got 0"]),
        ("{link: [edge, cloud], lose: 1.5}", ["faults[0].lose", "less than or equal to 1, got 1.5"]),
        ("{link: [edge, cloud], lose: 0.1, form: 1s}", ["faults[0].form", "(allowed: from, link, lose, to)"]),
        ("{node: cloud, slower: 0.5}", ["faults[0].slower", "greater than or equal to 1, got 0.5"]),
        ("{node: cloud, slower: .inf}", ["faults[0].slower", "inf"]),
        ("{node: cloud, slower: 2, from: 2s, to: 1s}", ["faults[0]: ends at 1 s, before it begins at 2 s"]),
        ("{node: cloud, link: [edge, cloud], down: 1s}", ["faults[0].node", "(allowed: down, link, up)"]),
        ("{node: cloud, link: [edge, cloud], every: 1s, lasting: 1s}", ["faults[0]: happens to either a `node`"]),
        ("{every: 1s, lasting: 1s}", ["faults[0]: happens to either a `node`"]),
        ("{link: [edge, cloud], every: 1s, lasting: 1s, slower: 2}", ["faults[0]: `slower` is of a node"]),
        ("{node: cloud, every: 0, lasting: 1s}", ["faults[0].every", "greater than 0"]),
        ("{down: 1s}", ["faults[0].node: is missing"]),
        ("5", ["faults[0]", "got 5"]),
        ("{node: cloud, down: 1s, up: 3s}, {node: cloud, down: 2s}", ["faults[1]: node 'cloud' is down already"]),
    ],
)
def test_what_is_wrong_with_a_fault_is_said_in_one_line(tmp_path, fault, said):
    with pytest.raises(InputError) as caught:
        load(tmp_path, fault)
    text = str(caught.value)
    assert "\n" not in text
    assert "experiment.yaml" in text
    for part in said:
        assert part in text, text


# When it happens

SPECS: list[Any] = [
    Recurring(node="a", every=10, lasting=1),
    Recurring(node="b", every=10, lasting=1),
    Recurring(link=("a", "b"), every=10, lasting=1),
    Recurring(node="group", every=5, lasting=2),
    NodeFault(node="b", down=3, up=4),
    LostMessages(link=("a", "b"), lose=0.5),
]
MEMBERS = {"a": ("a",), "b": ("b",), "group": ("group-0", "group-1")}
BOTH_WAYS = {("a", "b"), ("b", "a")}


def drawn(specs: list[Any], seed: int = 1, until_s: float = 1000.0) -> list[Any]:
    return draw_faults(specs, MEMBERS.__getitem__, BOTH_WAYS, seed, until_s)


def of_node(faults: list[Any], node: str) -> list[tuple[float, float]]:
    return [(f.down, f.end_s) for f in faults if isinstance(f, NodeFault) and f.node == node]


@given(st.permutations(SPECS), st.integers(0, 5), st.integers(0, 5))
def test_what_is_drawn_for_a_place_is_its_own(specs, seed, keep):
    every, some = drawn(SPECS, seed), drawn(specs[keep:], seed)
    places = {getattr(s, "node", None) for s in specs[keep:]}
    for node, groups in {"a": "a", "group-0": "group", "group-1": "group"}.items():
        assert of_node(some, node) == (of_node(every, node) if groups in places else [])
    assert drawn(SPECS, seed) == every != drawn(SPECS, seed + 1)
    assert [f.down if hasattr(f, "down") else f.start for f in every] == sorted(
        f.down if hasattr(f, "down") else f.start for f in every
    )


def test_places_fail_independently_and_so_do_two_things_that_recur_at_one():
    one = Recurring(node="a", every=10, lasting=1e-3)
    faults = drawn([one, one.model_copy(update={"slower": 2.0}), SPECS[3]], until_s=1e5)
    times = [
        [f.down for f in faults if isinstance(f, NodeFault) and f.node == "a"],
        [f.start for f in faults if isinstance(f, SlowNode)],
        [f.down for f in faults if isinstance(f, NodeFault) and f.node == "group-0"],
        [f.down for f in faults if isinstance(f, NodeFault) and f.node == "group-1"],
    ]
    assert not any(set(a) & set(b) for a, b in pairwise([*times, times[0]]))
    counts = np.array([np.histogram(t, bins=1000, range=(0, 1e5))[0] for t in times])
    assert (abs(np.corrcoef(counts)[np.triu_indices(4, 1)]) < stats.norm.ppf(0.9999) / math.sqrt(1000)).all()


def test_a_link_is_the_same_whichever_end_is_named_first():
    there, back = (drawn([Recurring(link=link, every=10, lasting=1)]) for link in (("a", "b"), ("b", "a")))
    assert [(f.down, f.up) for f in there] == [(f.down, f.up) for f in back] != []


def test_times_between_and_lengths_of_outages_are_exponential_with_the_means_asked_for():
    outages = list(Recurring(node="a", every=10, lasting=2).draw(seed=1, until_s=1e5))
    up = np.diff([0.0, *(t for f in outages for t in (f.down, f.up))])
    for sample, mean in ((up[::2], 10), (up[1::2], 2)):
        assert len(sample) > 8000
        assert stats.kstest(sample, "expon", args=(0, mean)).pvalue > 0.01
    assert outages[-1].down < 1e5 <= outages[-1].up + 200


def test_what_is_too_short_for_the_clock_still_has_a_length():
    for fault in Recurring(node="a", every=1e6, lasting=1e-12).draw(seed=1, until_s=1e9):
        assert fault.up > fault.down


outage = st.tuples(st.sampled_from("ab"), st.integers(0, 20), st.one_of(st.none(), st.integers(1, 6)), st.booleans())


@given(st.lists(outage, max_size=12))
def test_outages_of_one_place_that_overlap_are_one(outages):
    def fault(of: str, down: int, length: int | None, link: bool) -> NodeFault | LinkFault:
        up = None if length is None else down + length
        if link:  # whichever end is named first
            return LinkFault(link=(of, "z") if down % 2 else ("z", of), down=down, up=up)
        return NodeFault(node=of, down=down, up=up)

    found = merged(fault(*it) for it in outages)
    for name in "ab":
        for link in (True, False):
            mine = [f for f in found if isinstance(f, LinkFault) == link and name in (f.link if link else f.node)]
            assert all(a.end_s < b.down for a, b in pairwise(mine))
            for moment in np.arange(0.25, 30, 0.5):
                down = any(
                    n == name and is_link == link and at <= moment < (math.inf if length is None else at + length)
                    for n, at, length, is_link in outages
                )
                assert any(f.down <= moment < f.end_s for f in mine) == down
    assert merged(found) == found


whiles = st.tuples(
    st.integers(0, 20), st.one_of(st.just(math.inf), st.integers(1, 6)), st.sampled_from([0.0, 0.5, 3.0])
)


@given(st.lists(whiles, max_size=10))
def test_factors_multiply_where_they_overlap(spans):
    spans = [(float(start), float(start + length), value) for start, length, value in spans]
    pieces = factor(spans)
    assert pieces[0][0] == 0
    assert all(a[0] < b[0] and a[1] != b[1] for a, b in pairwise(pieces))
    for moment in np.arange(0.25, 30, 0.5):
        value = next(v for t, v in reversed(pieces) if t <= moment)
        assert value == math.prod(v for start, end, v in spans if start <= moment < end)


def test_ten_thousand_outages_are_no_trouble(synthetic, play):
    spec = Recurring(link=("device", "edge"), every=0.9, lasting=0.1)
    faults = draw_faults([spec], lambda n: (n,), {("device", "edge"), ("edge", "device")}, 1, 1e4)
    assert 9_500 < len(faults) < 10_500
    up = as_rate((f.down, f.end_s, 0.0) for f in faults)
    assert up.finish_s(0.0, 5000.0) == pytest.approx(5000 / 0.9, rel=0.02)
    records = play(synthetic(), Remote, [float(t) for t in range(0, 10_000, 10)], faults=faults)
    assert {r.outcome for r in records} == {Outcome.COMPLETED}


def test_a_run_draws_its_faults_for_every_member(tmp_path):
    spec = load(tmp_path, "{link: [cam, edge], down: 1s, up: 2s}", "{node: cam, every: 1s, lasting: 1s}")
    faults = spec.draw_faults(1)
    assert [f.link for f in faults if isinstance(f, LinkFault)] == [(f"cam-{i}", "edge") for i in range(3)]
    assert {f.node for f in faults if isinstance(f, NodeFault)} == {"cam-0", "cam-1", "cam-2"}


# What it does

SIZE = 3 * 64 * 64 * 4  # bytes of the model's input
BACK_S = 128 / SIZE  # its answer takes so long where the input takes a second
BED: dict[str, Any] = {
    "nodes": {"device": "3s", "cloud": "1ms"},
    "links": [{"between": ["device", "cloud"], "rate": SIZE, "latency": "0.5s"}],
}


def cut(down: float, up: float | None = None, link: tuple[str, str] = ("device", "cloud")) -> LinkFault:
    return LinkFault(link=link, down=down, up=up)


def sent_s(records: list[Record], place: str = "device>cloud") -> list[tuple[float, float]]:
    return [
        (s.start_s, s.end_s)
        for r in sorted(records, key=lambda r: r.number)
        for s in r.spans
        if s.kind is Kind.SEND and s.place == place
    ]


@pytest.mark.parametrize(
    ("faults", "sent"),
    [
        ([], [(0, 1.5), (1, 2.5)]),
        ([cut(0.25, 1.25)], [(0, 2.5), (2, 3.5)]),
        ([cut(0.25, 0.5), cut(1.5, 3.5)], [(0, 1.75), (1.25, 4.75)]),
        ([cut(0, 2)], [(0, 3.5), (3, 4.5)]),
        ([cut(0.25, 1, ("cloud", "device")), cut(0.5, 1.25)], [(0, 2.5), (2, 3.5)]),  # they overlap
        ([cut(1.25, 1.5)], [(0, 1.5), (1, 2.75)]),  # what is in the air already arrives
    ],
)
def test_what_is_on_a_link_that_goes_stands_still_and_goes_on(synthetic, play, faults, sent):
    records = play(synthetic(**BED), Remote, [0.0, 0.0], faults=faults)
    assert sent_s(records) == [pytest.approx(it) for it in sent]
    for record, (_, there) in zip(records, sent, strict=True):
        back = max([there + 0.001, *(f.up for f in faults if f.down < there + 0.001 < f.up)])
        assert record.latency_s == pytest.approx(back + BACK_S + 0.5)
        assert sum(s.end_s - s.start_s for s in record.spans) == pytest.approx(record.latency_s)


def test_a_link_that_is_cut_for_ever_answers_nothing(synthetic, play):
    records = play(synthetic(**BED), Remote, [0.0, 0.2, 5.0], faults=[cut(0.5)], drain_s=100)
    assert [(r.outcome, r.reason, r.end_s) for r in records] == [(Outcome.UNFINISHED, "run ended", None)] * 3


def test_a_timeout_notices_a_link_that_is_cut_and_the_source_falls_back_to_itself(synthetic, play):
    [record] = play(
        synthetic(**BED), Remote, {"device": [Request(0, "device", "chain", 0.0, timeout_s=4.0)]}, faults=[cut(0.5)]
    )
    assert (record.outcome, record.attempts) == (Outcome.COMPLETED, 3)  # twice remote, then at home
    assert record.latency_s == pytest.approx(8 + 3)


class Witness(Remote):
    """What it is shown of the links when it decides."""

    def __init__(self) -> None:
        super().__init__("cloud")
        self.seen: list[tuple[set[str], tuple[str, ...]]] = []

    def decide(self, request, view):
        down = {">".join(link) for link, belief in view.links.items() if not belief.up}
        self.seen.append((down, view.testbed.route(view.source, "cloud")))
        return whole_on(view.testbed.models[request.model], "cloud")


DIAMOND: dict[str, Any] = {
    "nodes": {"device": "3s", "a": "1s", "b": "1s", "cloud": "1ms"},
    "links": [
        {"between": pair, "rate": "1GB/s", "latency": latency}
        for *pair, latency in [("device", "a", "1ms"), ("a", "cloud", "1ms"), ("device", "b", "2ms"), ("b", "cloud", 0)]
    ],
}


def test_routes_lead_around_a_link_that_is_down_and_back(synthetic, play):
    faults = [
        cut(1, 2, ("device", "a")),
        cut(3, 4, ("cloud", "a")),
        cut(5, 6, ("a", "device")),
        cut(5, 6, ("device", "b")),
    ]
    witness = Witness()
    records = play(synthetic(**DIAMOND), lambda: witness, [t + 0.5 for t in range(7)], faults=faults)
    by_a, by_b = ("device", "a", "cloud"), ("device", "b", "cloud")
    both = {"device>a", "a>device", "device>b", "b>device"}
    assert witness.seen == [
        (set(), by_a),
        ({"device>a", "a>device"}, by_b),
        (set(), by_a),
        ({"a>cloud", "cloud>a"}, by_b),
        (set(), by_a),
        (both, by_a),  # there is no way around: it stands still on the best one
        (set(), by_a),
    ]
    for record, (_, route) in zip(sorted(records, key=lambda r: r.number), witness.seen, strict=True):
        assert {s.place for s in record.spans if s.kind is Kind.SEND} == {
            place for a, b in pairwise(route) for place in (f"{a}>{b}", f"{b}>{a}")
        }
        assert record.latency_s == pytest.approx(0.505 if record.number == 5 else 0.005, rel=0.2)


@pytest.mark.parametrize("policy", [Remote, Fixed, Random, Neurosurgeon, LeastDelay])
def test_plans_of_before_are_not_carried_out_over_a_link_that_is_down(synthetic, play, policy):
    """Whatever a policy keeps: what it decides is laid out anew over the routes that there are."""
    faults = [cut(5, 10, ("device", "a")), cut(12, 15, ("device", "b"))]
    records = play(synthetic(**DIAMOND), policy, np.arange(0, 20, 0.25).tolist(), faults=faults)
    sent = [(r.arrival_s, s.start_s, s.place) for r in records for s in r.spans if s.kind is Kind.SEND]
    for fault in faults:
        places = {">".join(fault.link), ">".join(fault.link[::-1])}
        assert not [at for arrival, at, place in sent if fault.down <= arrival and at < fault.up and place in places]
    assert {place for *_, place in sent} >= {"device>a", "device>b"}


def test_what_goes_wrong_at_a_time_has_gone_wrong_for_what_arrives_then(synthetic, play):
    [record] = play(synthetic(**DIAMOND), lambda: Remote("cloud"), [0.0], faults=[cut(0, 9, ("device", "a"))])
    assert {s.place for s in record.spans if s.kind is Kind.SEND} == {"device>b", "b>cloud", "cloud>b", "b>device"}
    [record] = play(synthetic(**DIAMOND), Remote, [0.0], faults=[NodeFault(node="device", down=0.0, up=1.0)])
    assert (record.outcome, record.reason) == (Outcome.FAILED, "source device down")


def lost(records: list[Record]) -> set[int]:
    return {r.number for r in records if r.end_s is None}


def test_the_share_of_messages_that_are_lost_is_the_one_asked_for(synthetic, play):
    many = 20_000
    fault = LostMessages(link=("cloud", "device"), lose=0.1, start=100.0, end=1100.0)
    times = np.linspace(0, 1200, many).tolist()
    records = play(synthetic(DIAMOND["nodes"], [{"between": ["device", "cloud"], "rate": "1GB/s"}]),
                   lambda: Remote("cloud"), times, faults=[fault])  # fmt: skip
    gone = lost(records)
    assert all(100 <= times[number] <= 1100 for number in gone)
    inside = sum(100 <= t < 1100 for t in times)
    low, high = stats.binom.interval(0.99, inside, 1 - 0.9**2)  # on its way there, or the answer's back
    assert low <= len(gone) <= high


def test_the_same_messages_are_lost_under_two_policies(synthetic, play):
    fault = LostMessages(link=("device", "cloud"), lose=0.3)
    bed = synthetic({"device": "1ms", "cloud": "1ms"}, [{"between": ["device", "cloud"], "rate": "1GB/s"}])
    times = [float(t) for t in range(1000)]
    remote, half, again = (
        lost(play(bed, p, times, faults=[fault])) for p in (Remote, lambda: Fixed(2), lambda: Remote("cloud"))
    )
    assert remote == half == again
    assert lost(play(bed, Remote, times, faults=[fault], seed=2)) != remote
    mixed = lost(play(bed, lambda: Random(seed=1), times, faults=[fault]))  # some are all at home, and lose nothing
    assert mixed < remote
    assert lost(play(bed, Local, times, faults=[fault])) == set()


def test_what_is_lost_is_noticed_by_timeouts_and_every_request_ends_once(synthetic, play):
    faults = [LostMessages(link=("device", "cloud"), lose=0.5)]
    bed = synthetic({"device": "10ms", "cloud": "1ms"}, [{"between": ["device", "cloud"], "rate": "1GB/s"}])
    requests = {"device": [Request(i, "device", "chain", float(i), timeout_s=0.25) for i in range(400)]}
    records = play(bed, Remote, requests, faults=faults)
    assert Counter(r.number for r in records) == dict.fromkeys(range(400), 1)
    assert {r.outcome for r in records} == {Outcome.COMPLETED}
    attempts = Counter(r.attempts for r in records)
    for number, share in {1: 0.25, 2: 0.75 * 0.25, 3: 0.75**2}.items():
        low, high = stats.binom.interval(0.999, 400, share)
        assert low <= attempts[number] <= high
    assert all(r.latency_s == pytest.approx(0.25 * (r.attempts - 1), abs=0.02) for r in records)


@pytest.mark.parametrize("fault", [cut(1, link=("device", "clod")), LostMessages(link=("a", "cloud"), lose=1)])
def test_a_fault_of_a_link_that_is_not_there_is_refused(synthetic, play, fault):
    with pytest.raises(InputError, match="no link between"):
        play(synthetic(**BED), Local, [0.0], faults=[fault])


def test_kinds_are_told_apart_as_objects_too():
    adapter = TypeAdapter(FaultSpec)
    for spec in (*SPECS, SlowNode(node="a", slower=2)):
        assert adapter.validate_python(spec) == spec
