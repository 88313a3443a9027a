"""Nodes that move: which cell serves when, and what a handover does to messages under way."""

from __future__ import annotations

from collections import Counter
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.policies.least_delay import LeastDelay
from isthmus.policies.neurosurgeon import Neurosurgeon
from isthmus.policies.records import Kind, Outcome, Record, Span
from isthmus.policies.static import Fixed, Local, Random, Remote
from isthmus.sim.simulator import simulate
from isthmus.workloads.errors import InputError
from isthmus.workloads.faults import LinkFault, LostMessages, NodeFault
from isthmus.workloads.mobility import Positions, RandomWaypoint, Waypoints, serving
from isthmus.workloads.requests import Request
from isthmus.workloads.testbed import NodeSpec


def handovers(points: list[tuple[float, float, float]], cells: list[tuple[float, float]]) -> list[tuple[float, int]]:
    """Without the entries that repeat the same cell."""
    found = list(serving(iter(points), cells))
    return [found[0], *(b for a, b in pairwise(found) if a[1] != b[1])]


LINE = [(0.0, 0.0), (10.0, 0.0), (20.0, 0.0)]


@pytest.mark.parametrize(
    ("points", "cells", "served"),
    [
        ([(0, 0, 0), (20, 20, 0)], LINE, [(0, 0), (5, 1), (15, 2)]),
        ([(0, 0, 9), (20, 20, 9)], LINE, [(0, 0), (5, 1), (15, 2)]),  # how far away it passes changes nothing
        ([(0, 20, 0), (40, 0, 0)], LINE, [(0, 2), (10, 1), (30, 0)]),
        ([(0, 0, 0), (8, 4, 0), (9, 6, 0)], LINE, [(0, 0), (8.5, 1)]),
        ([(0, 0, 0), (4, 4, 0), (14, 4, 0), (16, 6, 0)], LINE, [(0, 0), (15, 1)]),  # a pause before the border
        ([(0, 5, 0), (5, 5, 9)], LINE, [(0, 0)]),  # along the border: the one named first, and no other is nearer
        ([(0, 6, 0), (1, 5, 0), (9, 5, 5)], LINE, [(0, 1)]),  # to the border and along it
        ([(0, 6, 0), (1, 5, 0), (2, 6, 0)], LINE, [(0, 1)]),  # to the border and back
        ([(0, 0, 0), (3, 0, 0), (3, 20, 0)], LINE, [(0, 0), (3, 2)]),  # it is somewhere else at once
        ([(0, 0, 0), (3, 0, 0), (3, 20, 0), (3, 10, 0)], LINE, [(0, 0), (3, 2), (3, 1)]),
        ([(0, 0, 0), (10, 10, 0)], [(0, 0), (10, 5), (10, -5)], [(0, 0), (6.25, 1)]),  # two take over at one time
        ([(0, 0, 0), (10, 10, 0)], [(10, 0), (0, 0), (0, 0), (10, 0)], [(0, 1), (5, 0)]),  # cells in one place
        ([(0, 0, 0), (1, 3, 0)], [(-1, 0), (1, 0), (1.5, 0)], [(0, 0), (0, 1), (1.25 / 3, 2)]),
        ([(0, 7, 7)], LINE, [(0, 1)]),
        ([(0, 0, 0), (10, 10, 0)], [(3, 4)], [(0, 0)]),
    ],
)
def test_handovers_are_where_the_nearest_cell_changes(points, cells, served):
    assert handovers(points, cells) == [pytest.approx(it) for it in served]


def test_a_node_that_begins_between_two_cells_and_goes_on_is_handed_over_at_once():
    assert handovers([(0, 0, 0), (1, 1, 0)], [(-1, 0), (1, 0)]) == [(0, 0), (0, 1)]


coordinate = st.one_of(st.integers(-5, 5).map(float), st.floats(-100, 100, allow_nan=False).map(lambda x: round(x, 3)))
place = st.tuples(coordinate, coordinate)
step = st.tuples(st.sampled_from([0.0, 0.5, 1.0, 7.0]), place)


@settings(max_examples=200)
@given(st.lists(step, min_size=1, max_size=12), st.lists(place, min_size=1, max_size=6), st.sampled_from([0.0, 5e6]))
def test_the_cell_that_serves_is_the_nearest_at_every_time(steps, cells, origin):
    times = np.cumsum([0.0, *(length for length, _ in steps[1:])])
    points = [(float(t), x + origin, y - origin) for t, (_, (x, y)) in zip(times, steps, strict=True)]
    at = np.add(cells, (origin, -origin))
    served = list(serving(iter(points), [tuple(cell) for cell in at]))
    assert [t for t, _ in served] == sorted(t for t, _ in served)
    assert served[0][0] == 0
    for (from_s, x, y), (to_s, to_x, to_y) in pairwise(points):
        for share in (0.0, 0.1, 0.37, 0.5, 0.9, 0.999) if to_s > from_s else ():
            moment = from_s + share * (to_s - from_s)
            here = np.array([x, y]) + share * np.array([to_x - x, to_y - y])
            away = np.hypot(*(at - here).T)
            candidates = [cell for t, cell in served if abs(t - moment) < 1e-9]  # within rounding of a crossing
            before = [cell for t, cell in served if t <= moment]
            assert any(away[cell] <= away.min() + 1e-6 for cell in (before[-1], *candidates))


def test_a_path_that_repeats_and_one_that_never_leaves_its_cell():
    there_and_back = Waypoints(points=((0, 0, 0), (10, 10, 0), (20, 0, 0)), repeat=True)
    path = there_and_back.path(np.random.default_rng(0))
    assert [t for t, *_ in islice(path, 7)] == [0, 10, 20, 20, 30, 40, 40]
    served = serving(there_and_back.path(np.random.default_rng(0)), LINE[:2])
    assert list(islice(served, 5)) == [(0, 0), (5, 1), (15, 0), (25, 1), (35, 0)]
    endless = serving(there_and_back.path(np.random.default_rng(0)), [(5, 0), (50, 0)])
    assert {cell for _, cell in islice(endless, 5)} == {0}  # it says so, now and then
    jumps = Waypoints(points=((0, 0, 0), (10, 10, 0)), repeat=True).path(np.random.default_rng(0))
    assert list(islice(serving(jumps, LINE[:2]), 4)) == [(0, 0), (5, 1), (10, 0), (15, 1)]


AREA = ((100.0, -50.0), (-20.0, 30.0))  # whichever corners


def test_random_waypoints_keep_to_their_area_and_their_speeds():
    mobility = RandomWaypoint(area=AREA, speed=(2, 5), pause=3)
    points = np.array(list(islice(mobility.path(np.random.default_rng(1)), 4001)))
    assert (points[:, 1:] >= (-20, -50)).all()
    assert (points[:, 1:] <= (100, 30)).all()
    assert points[:, 1:].mean(axis=0) == pytest.approx((40, -10), abs=4)
    steps = np.diff(points, axis=0)
    assert steps[1::2] == pytest.approx(np.tile([3.0, 0, 0], (2000, 1)))
    speeds = np.hypot(*steps[::2, 1:].T) / steps[::2, 0]
    assert 2 <= speeds.min() < 2.05
    assert 4.95 < speeds.max() <= 5
    assert speeds.mean() == pytest.approx(3.5, abs=0.06)
    again = np.array(list(islice(mobility.path(np.random.default_rng(1)), 4001)))
    assert (again == points).all()
    one = RandomWaypoint(area=AREA, speed=(2, 2)).path(np.random.default_rng(1))
    steps = np.diff(np.array(list(islice(one, 100))), axis=0)
    assert np.hypot(*steps[:, 1:].T) == pytest.approx(2 * steps[:, 0])


@pytest.mark.parametrize(
    ("mobility", "said"),
    [
        ({"points": [[1, 0, 0]]}, "start at 0"),
        ({"points": [[0, 0, 0], [2, 1, 0], [2, 2, 0]]}, "increase"),
        ({"points": [[0, 0, 0]], "repeat": True}, "does not repeat"),
        ({"points": []}, "at least 1"),
        ({"points": [[0, 0, float("inf")]]}, "finite"),
        ({"kind": "random-waypoint", "area": [[0, 0], [0, 0]]}, "a point"),
        ({"kind": "random-waypoint", "area": [[0, 0], [1, 1]], "speed": [0, 1]}, "greater than 0"),
        ({"kind": "random-waypoint", "area": [[0, 0], [1, 1]], "speed": [3, 1]}, "slowest speed 3 is above"),
        ({"kind": "brownian"}, "brownian"),
    ],
)
def test_what_is_no_mobility(mobility, said):
    with pytest.raises(ValueError, match=said):
        NodeSpec.model_validate({"mobility": {"kind": "waypoints", **mobility}})


def test_a_cell_does_not_move():
    with pytest.raises(ValueError, match="both `position` and `mobility`"):
        NodeSpec.model_validate({"position": [0, 0], "mobility": {"kind": "waypoints", "points": [[0, 0, 0]]}})


def test_positions_are_read_from_a_file(tmp_path):
    (tmp_path / "cars.csv").write_text("# a comment\nt,east,north,who\n5,0,0,a\n7,2,0,a\n6,1,1,7\n8,3,1,7\n")
    file = Positions(file="cars.csv", time="t", x="east", y="north", node="who", handover=0.5)
    a, seven = file.read(tmp_path, ["a", "7"])
    assert a == Waypoints(points=((0, 0, 0), (2, 2, 0)), handover=0.5)
    assert seven.points == ((0, 1, 1), (1, 1, 1), (3, 3, 1))  # where it is first, until then
    (tmp_path / "one.csv").write_text("time,x,y\n0,1,2\n1,3,4\n")
    assert [w.points for w in Positions(file="one.csv").read(tmp_path, "ab")] == [((0, 1, 2), (1, 3, 4))] * 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no such file"),
        ("", "not a CSV file"),
        ("time,x,y\n", "holds no position"),
        ("time,x\n0,1\n", "unknown column 'y'"),
        ("t,x,y\n0,1,2\n", "unknown column 'time'"),
        ("time,x,y\n0,1,2\n1,here,4\n", "row 2 is not three numbers"),
        ("time,x,y\n0,1,2\n1,,4\n", "row 2 is not three numbers"),
        ("time,x,y\n0,1,2\n2,1,2\n2,3,4\n", "row 3 is not after"),
        ("time,x,y,who\n0,1,2,a\n", "unknown column 'node'"),
        ("time,x,y,node\n0,1,2,b\n", "has no row of node 'a'"),
        ("time,x,y,node\n0,1,2,a\n5,1,2,b\n0,3,4,a\n", "row 3 is not after"),
    ],
)
def test_what_is_wrong_with_positions_is_said_in_one_line(tmp_path, text, said):
    if text is not None:
        (tmp_path / "paths.csv").write_text(text)
    file = Positions(file="paths.csv", node="node" if "node" in said or ",node" in str(text) else None)
    with pytest.raises(InputError) as caught:
        file.read(tmp_path, ["a"])
    assert said in str(caught.value)
    assert "paths.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


# End to end: the device is with cell a until 50 s, without a link until 52 s, and then with cell b

SIZE = 3 * 64 * 64 * 4  # bytes of the model's input
BACK_S = 128 / SIZE
WALK = {"kind": "waypoints", "points": [[0, 0, 0], [100, 100, 0]], "handover": "2s"}
CELLS: dict[str, Any] = {"a": {"service": {"mean": "9s"}, "position": [0, 0]},
                         "b": {"service": {"mean": "9s"}, "position": [100, 0]}}  # fmt: skip
NODES: dict[str, Any] = {"device": {"service": {"mean": "9s"}, "mobility": WALK}, **CELLS, "cloud": "1s"}
RADIO: dict[str, Any] = {"rate": SIZE, "latency": 0}
WIRE: dict[str, Any] = {"rate": 1e18, "latency": "0.25s"}
LINKS = [
    {"between": ["device", "a"], **RADIO},
    {"between": ["device", "b"], **RADIO},
    {"between": ["a", "cloud"], **WIRE},
    {"between": ["b", "cloud"], **WIRE, "latency": "0.2s"},
]


@pytest.fixture(scope="module")
def bed(synthetic):
    return synthetic(NODES, LINKS)


def spans_of(record: Record) -> list[tuple[str, str, float, float]]:
    """What took time on links."""
    spans = sorted(record.spans, key=lambda s: (s.start_s, s.end_s))
    return [(s.kind.value, s.place, s.start_s, s.end_s) for s in spans if ">" in s.place]


def check_account(record: Record) -> None:
    """Of an attempt that was answered: spans follow each other without a gap, and are the latency together."""
    spans = sorted(record.spans, key=lambda s: (s.start_s, s.end_s))
    edges = [record.arrival_s, *(t for s in spans for t in (s.start_s, s.end_s)), record.end_s]
    assert edges[::2] == pytest.approx(edges[1::2], abs=1e-9)


def test_when_which_links_are_up(bed):
    to_a, to_b = ({("device", cell), (cell, "device")} for cell in "ab")
    assert list(bed.handovers("device", 1)) == [(0, to_b), (50, to_a | to_b), (52, to_a)]


def test_a_node_is_not_connected_to_a_cell_that_it_has_left_again(synthetic):
    back = {**WALK, "points": [[0, 40, 0], [20, 60, 0], [22, 40, 0], [30, 40, 0]], "handover": "12s"}
    bed = synthetic({**NODES, "device": {"service": {"mean": "9s"}, "mobility": back}}, LINKS)
    to_a, to_b = ({("device", cell), (cell, "device")} for cell in "ab")
    assert list(bed.handovers("device", 1)) == [(0, to_b), (10, to_a | to_b), (21, to_a | to_b), (33, to_b)]


def test_a_message_under_way_is_sent_again_over_the_new_cell(bed, play):
    first, second = play(bed, lambda: Remote("cloud"), [49.5, 49.75])
    assert spans_of(first) == [
        ("send", "device>a", 49.5, 50),
        ("wait", "device>b", 50, 52),
        ("send", "device>b", 52, 53),
        ("send", "b>cloud", 53, pytest.approx(53.2)),
        ("send", "cloud>b", pytest.approx(54.2), pytest.approx(54.4)),
        ("send", "b>device", pytest.approx(54.4), pytest.approx(54.4 + BACK_S)),
    ]
    assert spans_of(second)[:4] == [
        ("wait", "device>a", 49.75, 50),
        ("wait", "device>b", 50, 52),
        ("wait", "device>b", 52, 53),
        ("send", "device>b", 53, 54),
    ]
    for record in (first, second):
        check_account(record)
        assert [s.bytes for s in record.spans if s.place == "device>a" and s.kind is Kind.SEND] in ([None], [])
    assert second.end_s == pytest.approx(54 + 0.2 + 1 + 0.2 + BACK_S)


def test_an_answer_follows_the_device(bed, play):
    [record] = play(bed, lambda: Remote("cloud"), [48.4])
    assert spans_of(record) == [
        ("send", "device>a", 48.4, pytest.approx(49.4)),
        ("send", "a>cloud", pytest.approx(49.4), pytest.approx(49.65)),
        ("wait", "cloud>b", pytest.approx(50.65), 52),
        ("send", "cloud>b", 52, pytest.approx(52.2)),
        ("send", "b>device", pytest.approx(52.2), pytest.approx(52.2 + BACK_S)),
    ]
    check_account(record)


def test_what_is_sent_without_a_link_waits_for_one(bed, play):
    [record] = play(bed, lambda: Remote("cloud"), [50.5])
    assert spans_of(record)[:2] == [("wait", "device>b", 50.5, 52), ("send", "device>b", 52, 53)]
    check_account(record)


def test_without_an_outage_a_handover_only_sends_again(synthetic, play):
    walk = {"service": {"mean": "9s"}, "mobility": {**WALK, "handover": 0}}
    [record] = play(synthetic({**NODES, "device": walk}, LINKS), lambda: Remote("cloud"), [49.5])
    assert spans_of(record)[:2] == [("send", "device>a", 49.5, 50), ("send", "device>b", 50, 51)]
    check_account(record)


def test_what_was_lost_is_not_sent_again(bed, play):
    faults = [LostMessages(link=("device", "a"), lose=1.0)]
    records = play(bed, lambda: Remote("cloud"), [49.5, 60.0], faults=faults)
    assert {r.number: r.outcome for r in records} == {0: Outcome.UNFINISHED, 1: Outcome.COMPLETED}


def test_what_a_node_held_when_it_went_is_not_sent_on(bed, play):
    """The answer waits in the cloud, which goes and comes back: only the second attempt, at home, is answered."""
    faults = [NodeFault(node="cloud", down=51.2, up=51.5)]
    [record] = play(bed, lambda: Remote("cloud"), [48.4], faults=faults)
    assert (record.attempts, record.end_s) == (2, pytest.approx(51.2 + 9))


@pytest.mark.parametrize(("at", "end"), [(9.0, 12 + 0.25 + 1 + 0.25 + BACK_S), (10.5, 12 + 0.25 + 1 + 0.25 + BACK_S)])
def test_where_only_a_cut_link_leads_on_a_message_stands_still_there(bed, play, at, end):
    """And does not wait for a cell that the device may never come to."""
    [record] = play(bed, lambda: Remote("cloud"), [at], faults=[LinkFault(link=("a", "cloud"), down=9.5, up=12.0)])
    assert record.end_s == pytest.approx(end)
    check_account(record)


def test_a_link_to_a_cell_that_is_cut_for_ever_is_left_at_the_next_handover(bed, play):
    [record] = play(bed, lambda: Remote("cloud"), [40.0], faults=[LinkFault(link=("a", "device"), down=40.5)])
    assert spans_of(record)[:3] == [
        ("send", "device>a", 40, 50), ("wait", "device>b", 50, 52), ("send", "device>b", 52, 53)
    ]  # fmt: skip
    check_account(record)


def test_what_a_cut_off_message_cost_is_the_time_that_it_was_on_the_air(synthetic, play):
    nodes = {**NODES, "device": {**NODES["device"], "power": {"tx": "2W"}}}
    links = [{**link, "latency": "0.5s"} if "device" in link["between"] else link for link in LINKS]
    [record] = play(synthetic(nodes, links), lambda: Remote("cloud"), [49.75])
    assert record.energy_j == pytest.approx(2 * (0.25 + 1))


def test_routes_of_the_controller_lead_to_the_cell_that_serves(bed, play):
    records = play(bed, lambda: Remote("cloud"), [10.0, 70.0])
    assert [{s.place for s in r.spans if s.place.startswith("device>")} for r in records] == [
        {"device>a"},
        {"device>b"},
    ]
    assert bed.route("a", "b") == ("a", "cloud", "b")  # not through the device
    assert bed.without(frozenset([("a", "cloud"), ("cloud", "a")])).route("device", "cloud") == ("device", "b", "cloud")


def test_an_endless_path_within_one_cell_does_not_keep_a_run_going(synthetic, play):
    roams = {"kind": "random-waypoint", "area": [[0, 0], [9, 9]], "speed": [1, 2]}
    bed = synthetic({**NODES, "device": {"service": {"mean": "9s"}, "mobility": roams}}, LINKS)
    assert len(play(bed, lambda: Remote("cloud"), [0.0, 500.0])) == 2


ROAM = {"kind": "random-waypoint", "area": [[0, -10], [100, 10]], "speed": [20, 60], "pause": "0.2s"}
GAMMA = {"distribution": "gamma"}
ROAMING: dict[str, Any] = {
    "device": {"service": {"mean": "300ms", **GAMMA}, "serves": False, "mobility": {**ROAM, "handover": "150ms"}},
    "sensor": {"service": {"mean": "300ms", **GAMMA}, "serves": False, "mobility": {**ROAM, "speed": [90, 90]}},
    "a": {"service": {"mean": "60ms", **GAMMA}, "position": [0, 0]},
    "b": {"service": {"mean": "60ms", **GAMMA}, "position": [100, 0]},
    "c": {"service": {"mean": "60ms", **GAMMA}, "position": [50, 20]},
    "cloud": {"service": {"mean": "10ms", **GAMMA}, "slots": 2},
}
FADES = [["0s", "8Mbit"], ["1s", "1Mbit"], ["1500ms", 0]]
ROAMING_LINKS = [
    *({"between": [m, cell], "rate": FADES, "period": "2s", "latency": "2ms"}
      for m in ("device", "sensor") for cell in "abc"),
    {"between": ["a", "cloud"], "rate": "50Mbit", "latency": "20ms"},
    {"between": ["b", "cloud"], "rate": "50Mbit", "latency": "10ms"},
    {"between": ["b", "c"], "rate": "50Mbit", "latency": "5ms"},
]  # fmt: skip
POLICIES = [Local, lambda: Remote("cloud"), lambda: Fixed(2, "cloud"), Random, Neurosurgeon, LeastDelay]

moment = st.floats(0, 8).map(lambda t: round(t, 2))
length = st.one_of(st.none(), st.floats(0.01, 4).map(lambda t: round(t, 2) + 0.01))
node_fault = st.builds(
    lambda node, down, long: NodeFault(node=node, down=down, up=None if long is None else down + long),
    st.sampled_from(["device", "a", "b", "cloud"]), moment, length,
)  # fmt: skip
link_fault = st.builds(
    lambda link, down, long: LinkFault(link=link, down=down, up=None if long is None else down + long),
    st.sampled_from([("device", "a"), ("b", "cloud"), ("a", "cloud"), ("c", "b")]), moment, length,
)  # fmt: skip
losses = st.builds(
    LostMessages, link=st.sampled_from([("device", "b"), ("b", "cloud")]), lose=st.sampled_from([0.2, 1.0])
)


@pytest.fixture(scope="module")
def roaming(synthetic):
    return synthetic(ROAMING, ROAMING_LINKS)


KINDS_OF_LINKS: list[dict[str, Any]] = [{}, {"discipline": "fair"}, {"loss": 0.02}, {"slow_start": True}]


@pytest.mark.parametrize("kind", KINDS_OF_LINKS)
@pytest.mark.parametrize("down", [None, 40.5, 0.0])
def test_links_of_every_kind_are_cut_off_and_left(synthetic, kind, down):
    bed = synthetic(NODES, [{**link, **kind} if "device" in link["between"] else link for link in LINKS])
    faults = [] if down is None else [LinkFault(link=("a", "device"), down=down)]
    requests = [Request(i, "device", "chain", t) for i, t in enumerate([40.0, 40.2, 49.5, 49.75, 50.5, 60.0])]
    records: list[Record] = []
    totals = simulate(bed, {"device": requests}, {"device": Remote("cloud")}, records.append, seed=1, faults=faults)
    assert [r.outcome for r in records] == [Outcome.COMPLETED] * 6
    assert (down is None) == any(r.end_s < 50 for r in records)
    for record in records:
        check_account(record)
    assert all(0 <= t < 100 for link in totals.links for t in (link.busy_s, link.air_s, link.waited_s))


@settings(max_examples=100)
@given(
    st.sampled_from(POLICIES),
    st.lists(st.one_of(node_fault, link_fault, losses), max_size=5),
    st.sampled_from([None, 0.4, 3.0]),
    st.integers(0, 5),
)
def test_whatever_moves_and_fails_every_request_ends_once(roaming, play, policy, faults, timeout, seed):
    requests = {
        m: [Request(i, m, "chain", i * 0.25 + phase, timeout_s=timeout) for i in range(32)]
        for m, phase in (("device", 0.0), ("sensor", 0.1))
    }
    records = play(roaming, policy, requests, seed=seed, faults=faults, drain_s=20.0)
    assert Counter((r.source, r.number) for r in records) == {(m, i): 1 for m in requests for i in range(32)}
    for record in records:
        if not faults and timeout is None:
            assert record.outcome is Outcome.COMPLETED
        if record.end_s is not None and record.attempts == 1:
            check_account(record)
        check_spans(record, roaming)


def check_spans(record: Record, testbed: Any) -> None:
    """They are in the life of the request, on links that were up, and nothing went through what moves."""
    for span in record.spans:
        assert record.arrival_s <= span.start_s < span.end_s < np.inf
        assert record.end_s is None or span.attempt < record.attempts or span.end_s <= record.end_s + 1e-9
        a, _, b = span.place.partition(">")
        if b and span.kind is Kind.SEND:
            other = {a, b} & {"device", "sensor"} - {record.source}
            assert not other
            assert (span.bytes is None) <= (record.source in (a, b))
            check_sent(span, testbed)


def check_sent(span: Span, testbed: Any) -> None:
    """What arrived took as long as it takes; only what was cut off has no bytes."""
    if span.bytes is not None:
        link = testbed.links[tuple(span.place.split(">"))]
        assert span.end_s >= link.rate.finish_s(span.start_s, span.bytes) + link.latency_s - 1e-9


def test_while_a_device_is_with_one_cell_it_sends_over_no_other(roaming, play):
    requests = {"device": [Request(i, "device", "chain", i * 0.1) for i in range(300)]}
    changes = list(islice(roaming.handovers("device", 3), 500))
    records = play(roaming, lambda: Remote("cloud"), requests, seed=3)
    used = set()
    for record in records:
        for span in record.spans:
            link = tuple(span.place.split(">"))
            if "device" in link and span.kind is Kind.SEND:
                down = [d for t, d in changes if t < span.end_s][-1]
                assert link not in down
                assert not any(link in d for t, d in changes if span.start_s < t < span.end_s)
                used.add(link)
    assert len(used) == 6
    assert any(span.bytes is None for r in records for span in r.spans if span.kind is Kind.SEND)  # and some again
