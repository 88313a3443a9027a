"""What plans are believed to cost: one plan and all splits at once, against each other, the simulator and formulas."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.policies.contract import LinkBelief, NodeBelief, Truth, View
from isthmus.policies.cost import KnownSplits, Recent, all_splits, latency_s, predict
from isthmus.policies.least_delay import LeastDelay
from isthmus.policies.neurosurgeon import Neurosurgeon
from isthmus.policies.oracle import BruteForce
from isthmus.policies.plan import Plan, Stage, compile_plan, split
from isthmus.workloads.errors import InputError
from isthmus.workloads.model import Part
from isthmus.workloads.overheads import CodecCost, Overheads
from isthmus.workloads.requests import Request
from isthmus.workloads.testbed import Testbed

PLACES = ("device", "edge", "fog", "cloud")
seconds = st.sampled_from([1e-3, 5e-3, 0.02, 0.1, 0.5])
rates = st.sampled_from([1e4, 1e5, 1e6, 1e8])
latencies = st.sampled_from([0.0, 0.0, 1e-3, 0.02, 0.2])


@st.composite
def drawn_testbed(draw, synthetic, model: str = "chain", **node) -> Testbed:
    """Up to four nodes, each linked to some of those before it: rows, stars, rings and what lies between."""
    places = PLACES[: draw(st.integers(1, 4))]
    nodes = {n: {"service": {"mean": draw(seconds)}, "slots": draw(st.integers(1, 3)), **node} for n in places}
    pairs = [pair for pair in combinations(places, 2) if draw(st.booleans())]
    links = [
        {
            "between": pair,
            "rate": draw(rates),
            "latency": draw(latencies),
            "back": {"rate": draw(rates), "latency": draw(latencies)},
        }
        for pair in pairs
    ]
    return synthetic(nodes, links, model)


def view_of(testbed: Testbed, *, links=None, nodes=None, truth=None, now_s: float = 0.0) -> View:
    """What is not given is believed as it is, and idle."""
    idle = {i: LinkBelief(x.rate.mean_bytes_per_s, 2 * x.latency_s, 0, None) for i, x in testbed.links.items()}
    free = {name: NodeBelief(0.0, 0, None) for name in testbed.nodes}
    return View(now_s, "device", testbed.nominal, idle | (links or {}), free | (nodes or {}), truth)


@st.composite
def views(draw, testbed: Testbed) -> View:
    links = {i: LinkBelief(draw(rates), 0.0, draw(st.sampled_from([0, 0, 1000, 10**5])), None) for i in testbed.links}
    backlog = st.sampled_from([0.0, 0.0, 0.01, 0.3])
    nodes = {n: NodeBelief(draw(backlog), draw(st.integers(0, 5)), None) for n in testbed.nodes}
    return view_of(testbed, links=links, nodes=nodes)


def cost(plan: Plan, view: View) -> float:
    [model] = view.testbed.models.values()
    return latency_s(predict(compile_plan(plan, model, "device", view.testbed), view))


def every_plan(testbed: Testbed) -> list[Plan]:
    """Every chain of up to three nodes, in the order of some route, the source among them; by sheer enumeration."""
    [model] = testbed.models.values()
    routes = {
        testbed.route("device", node) for node in testbed.nodes if node in (*testbed.reachable("device"), "device")
    }
    plans = set()
    for route in routes:
        for others in (o for n in range(3) for o in combinations(route[1:], n)):
            cuts = product(range(len(model.blocks) + 1), repeat=len(others))
            plans |= {split(model, c, ("device", *others)) for c in cuts if list(c) == sorted(c)}
    return sorted(plans, key=Plan.to_json)


@given(st.data())
def test_every_split_costs_what_its_plan_is_predicted_to(synthetic, data):
    testbed = data.draw(drawn_testbed(synthetic))
    view = data.draw(views(testbed))
    [model] = testbed.models.values()
    found = set()
    for splits in all_splits(testbed, model, "device"):
        costs = splits.latency_s(view)
        assert len(costs) == len(splits)
        for row in range(len(splits)):
            found.add(splits.plan(row))
            assert costs[row] == pytest.approx(cost(splits.plan(row), view), rel=1e-9), splits.plan(row)
    assert found == set(every_plan(testbed))


@given(st.data())
def test_least_delay_is_brute_force(synthetic, data):
    testbed = data.draw(drawn_testbed(synthetic))
    view = data.draw(views(testbed))
    chosen = LeastDelay().decide(Request(0, "device", "chain", 0.0), view)
    assert cost(chosen, view) == pytest.approx(min(cost(plan, view) for plan in every_plan(testbed)), rel=1e-9)


@settings(max_examples=50)
@given(st.data())
def test_more_bandwidth_never_hurts_the_best_plan(synthetic, data):
    testbed = data.draw(drawn_testbed(synthetic))
    view = data.draw(views(testbed))
    faster = {i: replace(b, rate_bytes_per_s=b.rate_bytes_per_s * 3) for i, b in view.links.items()}
    request = Request(0, "device", "chain", 0.0)
    before = cost(LeastDelay().decide(request, view), view)
    view = view._replace(links=faster)
    assert cost(LeastDelay().decide(request, view), view) <= before * (1 + 1e-12)


class Always:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def decide(self, request, view):
        return self.plan


OVERHEADS = Overheads(
    codecs={
        "fp16": CodecCost(encode_s=1e-3, encode_s_per_byte=1e-8, decode_s=2e-3, decode_s_per_byte=2e-8),
        "int8": CodecCost(encode_s=3e-3, encode_s_per_byte=0, decode_s=0, decode_s_per_byte=5e-8),
    }
)


@given(st.data())
def test_the_simulator_does_to_one_request_what_was_predicted_span_by_span(synthetic, play, data):
    model_name = data.draw(st.sampled_from(["chain", "diamond"]))
    testbed = replace(data.draw(drawn_testbed(synthetic, model_name)), overheads=OVERHEADS)
    model = testbed.models[model_name]
    if model_name == "chain":
        plan = data.draw(st.sampled_from(every_plan(testbed)))
    else:
        places = st.sampled_from(["device", *testbed.reachable("device")])
        plan = Plan(tuple(Stage(data.draw(places), Part("diamond", 1 << layer)) for layer in range(4)))
    codecs = st.dictionaries(st.sampled_from(sorted(model.tensors)), st.sampled_from(["fp16", "int8", "fp32"]))
    plan = replace(plan, codecs=tuple(data.draw(codecs).items()))

    def key(span):
        return span.start_s, span.end_s, span.kind, span.place, span.stage

    expected = sorted(predict(compile_plan(plan, model, "device", testbed), view_of(testbed)), key=key)
    [record] = play(testbed, lambda: Always(plan), [0.0])
    spans = sorted(record.spans, key=key)
    assert [(s.kind, s.place, s.stage, s.bytes) for s in spans] == [
        (s.kind, s.place, s.stage, s.bytes) for s in expected
    ]
    assert [t for s in spans for t in (s.start_s, s.end_s)] == pytest.approx(
        [t for s in expected for t in (s.start_s, s.end_s)], rel=1e-9, abs=1e-12
    )
    assert record.latency_s == pytest.approx(latency_s(expected), rel=1e-9, abs=1e-12)


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 8), st.sampled_from([0.0, 2e4, 2e5, 4e6])), max_size=6),
    st.floats(0, 30),
    st.booleans(),
)
def test_on_a_changing_link_no_split_beats_the_oracle(synthetic, play, pieces, start, periodic):
    schedule = [(0.0, 1e5)]
    for gap, rate in pieces:
        schedule.append((schedule[-1][0] + gap / 4, rate))
    if schedule[-1][1] == 0:
        schedule.append((schedule[-1][0] + 1, 5e5))
    link = {"between": ["device", "cloud"], "rate": schedule, "latency": 0.004}
    if periodic:
        link["period"] = schedule[-1][0] + 0.5
    testbed = synthetic({"device": "500ms", "cloud": "20ms"}, [link])
    [best] = play(testbed, BruteForce, [start])
    for plan in every_plan(testbed):
        [other] = play(testbed, lambda plan=plan: Always(plan), [start])
        assert best.latency_s <= other.latency_s + 1e-9


def test_the_oracle_decides_by_the_truth_and_not_by_the_view(synthetic):
    link = {"between": ["device", "cloud"], "rate": [[0, "1Mbit"], [10, "900Mbit"]], "period": "20s"}
    testbed = synthetic({"device": "100ms", "cloud": "1ms"}, [link])
    truth = Truth({i: x.rate for i, x in testbed.links.items()})
    request = Request(0, "device", "chain", 0.0)
    slow, fast = (
        BruteForce().decide(request, view_of(testbed, truth=truth, now_s=now)).stages[-1].node for now in (1.0, 11.0)
    )
    assert (slow, fast) == ("device", "cloud")


POWER = {"power": {"busy": 3.0, "tx": 1.5, "rx": 0.5}}


def neurosurgeon(testbed: Testbed, view: View, objective: str) -> list[float]:
    """Kang et al. 2017, Algorithm 1, written out: the cost of each of the N + 1 cuts between device and cloud."""
    [model] = testbed.models.values()
    last = len(model.blocks)
    device, cloud = (testbed.service(n, model.name) for n in ("device", "cloud"))
    power = testbed.nodes["device"].power
    up, down = view.links["device", "cloud"], view.links["cloud", "device"]
    there, back = testbed.links["device", "cloud"], testbed.links["cloud", "device"]
    result = sum(model.tensors[t].bytes for t in model.outputs)
    load = 1 + view.nodes["cloud"].queue / testbed.nodes["cloud"].slots
    costs = []
    for i in range(last + 1):
        mobile = sum(device.mean_s(model.span(j, j + 1)) for j in range(i))
        server = sum(cloud.mean_s(model.span(j, j + 1)) for j in range(i, last))
        upload = model.cuts[i].bytes / up.rate_bytes_per_s if i < last else 0.0
        download = result / down.rate_bytes_per_s if i < last else 0.0
        if objective == "latency":
            travel = there.latency_s + back.latency_s if i < last else 0.0
            costs.append(mobile + upload + load * server + download + travel)
        else:
            costs.append(mobile * power.busy + upload * power.tx + download * power.rx)
    return costs


@given(st.data(), st.sampled_from(["latency", "energy"]))
def test_neurosurgeon_is_its_formula(synthetic, data, objective):
    link = {"between": ["device", "cloud"], "rate": data.draw(rates), "latency": data.draw(latencies)}
    link["back"] = {"rate": data.draw(rates), "latency": data.draw(latencies)}
    device = {"service": {"mean": data.draw(seconds)}, **POWER}
    cloud = {"service": {"mean": data.draw(seconds)}, "slots": data.draw(st.integers(1, 4))}
    testbed = synthetic({"device": device, "cloud": cloud}, [link])
    view = data.draw(views(testbed))
    plan = Neurosurgeon(objective).decide(Request(0, "device", "chain", 0.0), view)
    costs = neurosurgeon(testbed, view, objective)
    model = testbed.models["chain"]
    cuts = [i for i in range(len(costs)) if split(model, (i,), ("device", "cloud")) == plan]
    assert len(cuts) == 1
    assert costs[cuts[0]] == pytest.approx(min(costs), rel=1e-9)


def test_neurosurgeon_says_what_it_lacks(synthetic):
    testbed = synthetic({"device": "1s", "cloud": "1s"}, [{"between": ["device", "cloud"], "rate": 1}])
    request = Request(0, "device", "chain", 0.0)
    with pytest.raises(InputError, match=r"node 'device' has no power.*allowed: power\.busy > 0"):
        Neurosurgeon("energy").decide(request, view_of(testbed))
    with pytest.raises(InputError, match="no objective 'speed'"):
        Neurosurgeon("speed")
    with pytest.raises(InputError, match="did you mean cloud"):
        Neurosurgeon(server="clowd").decide(request, view_of(testbed))


def test_a_node_believed_down_is_left_out_of_computing_and_of_forwarding(synthetic):
    testbed = synthetic({"device": "10s", "edge": "5s", "cloud": "1ms"})
    request = Request(0, "device", "chain", 0.0)

    def nodes(**up: bool) -> set[str]:
        beliefs = {n: NodeBelief(0.0, 0, None, up=u) for n, u in up.items()}
        return {s.node for s in LeastDelay().decide(request, view_of(testbed, nodes=beliefs)).stages}

    assert nodes() == {"cloud"}
    assert nodes(cloud=False) == {"edge"}
    assert nodes(edge=False) == {"device"}
    assert nodes(edge=False, cloud=False) == {"device"}


@pytest.mark.parametrize("memory", [None, "20kB"])
def test_sources_whose_routes_are_alike_share_their_numbers(synthetic, memory):
    camera = {"count": 2, "service": {"mean": "1s"}} | ({} if memory is None else {"memory": memory})
    links = [{"between": ["camera", "cloud"], "rate": "1Mbit", "latency": "1ms"}]
    testbed = synthetic({"camera": camera, "cloud": "1ms"}, links)
    first, second = (all_splits(testbed, testbed.models["chain"], f"camera-{i}")[0] for i in range(2))
    assert (first.costs is second.costs) == (memory is None)
    used = {stage.node for row in range(len(second)) for stage in second.plan(row).stages}
    assert used == ({"camera-1", "cloud"} if memory is None else {"cloud"})  # no part of the model fits into 20 kB
    assert np.array_equal(first.cuts, second.cuts)
    with pytest.raises(ValueError, match="read-only"):
        first.compute_s[0, 0] = 0


def test_a_route_that_comes_back_is_not_costed_again(synthetic):
    ring = [("device", "edge"), ("edge", "cloud"), ("device", "cloud"), ("edge", "fog")]
    links = [{"between": pair, "rate": "1Mbit", "latency": "1ms"} for pair in ring]
    testbed = synthetic(dict.fromkeys(PLACES, "1s"), links)
    model, known = testbed.models["chain"], KnownSplits()

    def found(*down):
        both = frozenset(way for a, b in down for way in ((a, b), (b, a)))
        return all_splits(testbed.without(both), model, "device", known.along)

    before, detour = found(), found(("device", "cloud"))
    assert {s.route for s in before} != {s.route for s in detour}
    assert found() == before
    assert found(("edge", "cloud")) == before  # on none of its routes


def test_what_was_not_asked_for_longest_is_forgotten():
    recent = Recent[int, str](2)
    recent.put(1, "one")
    recent.put(2, "two")
    assert recent.get(1) == "one"
    recent.put(3, "three")
    assert [recent.get(i) for i in (1, 2, 3)] == ["one", None, "three"]


def test_predicted_branches_queue_in_the_order_in_which_they_come(synthetic, play):
    """The left branch's tensor is under way earlier, over a slow link, and reaches the shared link later."""
    links = [
        {"between": ["device", "edge"], "rate": 1000, "latency": 0},
        {"between": ["edge", "cloud"], "rate": 4000, "latency": 0},
    ]
    testbed = synthetic({"device": "1ms", "edge": "2s", "cloud": "1ms"}, links, model="diamond")
    plan = Plan(tuple(Stage(n, Part("diamond", 1 << i)) for i, n in enumerate(["device", "device", "edge", "cloud"])))
    [record] = play(testbed, lambda: Always(plan), [0.0])
    assert record.latency_s == pytest.approx(cost(plan, view_of(testbed)))
    shared = [s for s in record.spans if s.place == "edge>cloud"]
    assert len(shared) == 2
    assert np.diff([s.start_s for s in sorted(shared, key=lambda s: s.start_s)]) >= 8192 / 4000
