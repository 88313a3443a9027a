"""Plans as values, what makes one impossible, and one with branches carried out to the hand-worked time."""

from __future__ import annotations

import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.policies.cost import latency_s, predict
from isthmus.policies.dispatch import Compiler, Dispatcher
from isthmus.policies.plan import Plan, Stage, compile_plan, split, whole_on
from isthmus.policies.records import Kind
from isthmus.policies.static import Local
from isthmus.workloads.errors import InputError
from isthmus.workloads.model import Part, layer_set
from isthmus.workloads.testbed import Testbed


def stage(node: str, *layers: int, after: tuple[int, ...] | None = None, model: str = "diamond") -> Stage:
    return Stage(node, Part(model, layer_set(layers)), after)


NODES = {"device": "100ms", "edge": "30ms", "cloud": "10ms", "island": "1s"}


@pytest.fixture(scope="module")
def testbed(synthetic) -> Testbed:
    return synthetic(NODES, model="diamond")


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ("local", "a Plan, not with str"),
        (None, "a Plan, not with NoneType"),
        (Plan(()), "without stages"),
        (Plan(("device",)), "stage 0 is not a Stage"),
        (Plan((Stage("device", "all"),)), "stage 0 is not a Stage of a Part"),
        (Plan((stage("devise", 0, 1, 2, 3),)), "stage 0: unknown node 'devise'; did you mean device"),
        (Plan((stage("island", 0, 1, 2, 3),)), "no route from 'device' to 'island'"),
        (Plan((stage("device", 0, 3), stage("cloud", 1, 2))), "stage 0: .*not convex"),
        (Plan((stage("device", 0, 1), stage("cloud", 2))), r"missing from the plan: diamond\[3\]"),
        (Plan((stage("device", 0, 1, 2), stage("cloud", 2, 3))), "stage 1: .*repeats layers"),
        (Plan((stage("device", 0, 1, 2, 3, model="chain"),)), "a part of 'chain' in a plan for 'diamond'"),
        (Plan((stage("device", 0, 1, 2, 3, 4),)), "not all of 'diamond'"),
        (Plan((stage("device"), stage("device", 0, 1, 2, 3))), "stage 0: layers 0x0"),
        (Plan((Stage("device", Part("diamond", -1)),)), "stage 0: layers -0x1"),
        (Plan((stage("device", 0, 1, 2, 3),), (("x", "fp15"),)), "unknown codec 'fp15'; did you mean fp16"),
        (Plan((stage("device", 0, 1, 2, 3),), (("z", "fp16"),)), "'z', which is no tensor of 'diamond'"),
        (Plan((stage("device", 0, 1, 2, 3),), exit="early"), "no exit 'early'"),
        (Plan((stage("device", 0, 1, 2, 3, after=(1,)),)), "after stage 1, which does not exist"),
        (Plan((stage("device", 0, 1, 2, 3, after=(0,)),)), r"stages \[0\] wait for each other"),
        (Plan((stage("device", 0, after=(1,)), stage("cloud", 1, 2, 3))), r"stages \[0, 1\] wait for each other"),
        # each part is convex, and yet each needs the other: 0 → 1 crosses one way, 2 → 3 the other
        (Plan((stage("edge", 1, after=(1,)), stage("cloud", 2, after=(0,)), stage("device", 0), stage("device", 3))),
         r"stages \[0, 1, 3\] wait"),
    ],
)  # fmt: skip
def test_an_impossible_plan_is_refused_with_the_reason(testbed, plan, said):
    with pytest.raises(InputError, match=said) as caught:
        compile_plan(plan, testbed.models["diamond"], "device", testbed)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=said):
        Compiler(testbed)(plan, "diamond", "device")


stages = st.builds(
    Stage,
    st.text(min_size=1),
    st.builds(Part, st.text(), st.integers(0, 2**70)),
    st.one_of(st.none(), st.lists(st.integers(-1, 5), max_size=3).map(tuple)),
)
plans = st.builds(
    Plan,
    st.lists(stages, max_size=4).map(tuple),
    st.lists(st.tuples(st.text(), st.sampled_from(["fp16", "int8"])), max_size=3).map(tuple),
    st.one_of(st.none(), st.text()),
)


@given(plans, plans)
def test_a_plan_is_a_value(plan, other):
    for again in (Plan.from_json(plan.to_json()), pickle.loads(pickle.dumps(plan))):
        assert again == plan
        assert hash(again) == hash(plan)
        assert again.to_json() == plan.to_json()
    assert (plan == other) == (plan.to_json() == other.to_json())
    with pytest.raises(AttributeError):
        plan.stages = ()


def test_a_plan_from_another_process_is_found_again(elsewhere):
    """Hashes of strings differ between processes; a cached one must not come along."""
    code = (
        "import pickle, sys\n"
        "from isthmus.policies.plan import Plan, Stage, Part\n"
        "plan = Plan((Stage('cloud', Part('m', 7)),), (('x', 'fp16'),))\n"
        "hash(plan)\n"
        "sys.stdout.buffer.write(pickle.dumps(plan))"
    )
    plan = Plan((Stage("cloud", Part("m", 7)),), (("x", "fp16"),))
    assert pickle.loads(elsewhere(code)) in {plan}


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "5", '{"stages":[["a"]]}', '{"stages":[["a","m","xyz",null]]}', "nul"]
)
def test_what_is_no_plan_is_refused(text):
    with pytest.raises(InputError, match="not a plan"):
        Plan.from_json(text)


def test_a_split_leaves_out_nodes_with_nothing_to_do(synthetic):
    model = synthetic().models["chain"]
    last = len(model.blocks)
    assert split(model, (0,), ("device", "cloud")) == whole_on(model, "cloud")
    assert split(model, (last, last), ("device", "edge", "cloud")) == whole_on(model, "device")
    assert [s.node for s in split(model, (2, 2), ("device", "edge", "cloud")).stages] == ["device", "cloud"]
    for cuts, nodes in [((3, 2), ("a", "b", "c")), ((-1,), ("a", "b")), ((last + 1,), ("a", "b")), ((1,), ("a",))]:
        with pytest.raises(InputError):
            split(model, cuts, nodes)


def test_a_compiled_plan_sends_only_what_is_needed_where(testbed):
    model = testbed.models["diamond"]
    plan = Plan((stage("device", 0), stage("edge", 1), stage("cloud", 2, 3)), (("left", "fp16"),))
    compiled = compile_plan(plan, model, "device", testbed)
    sent = {(m.source, m.target): (m.tensors, m.codecs, m.wire_bytes, m.path) for m in compiled.messages}
    stem = model.tensors["stem"].bytes
    assert sent == {
        (-1, 0): (("x",), ("fp32",), model.tensors["x"].bytes, ("device",)),
        (0, 1): (("stem",), ("fp32",), stem, ("device", "edge")),
        (0, 2): (("stem",), ("fp32",), stem, ("device", "edge", "cloud")),
        (1, 2): (("left",), ("fp16",), stem // 2, ("edge", "cloud")),
        (2, -1): (("y",), ("fp32",), model.tensors["y"].bytes, ("cloud", "edge", "device")),
    }
    assert compiled.needs == (1, 1, 2, 1)
    assert compiled.nodes == {"device", "edge", "cloud"}


class Always:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def decide(self, request, view):
        return self.plan


def test_branches_on_two_nodes_that_join_take_the_time_worked_out_by_hand(synthetic, play):
    links = [
        {"between": ["device", "edge"], "rate": 8192, "latency": "0.5s", "back": {"rate": 4096}},
        {"between": ["device", "cloud"], "rate": 2048, "latency": 0},
    ]
    testbed = synthetic({"device": "10s", "edge": "6s", "cloud": "2s"}, links, model="diamond")
    model = testbed.models["diamond"]
    cost = {n: [testbed.service(n, "diamond").mean_s(Part("diamond", 1 << i)) for i in range(4)] for n in testbed.nodes}
    assert [sum(c) for c in cost.values()] == pytest.approx([10, 6, 2])
    assert model.tensors["stem"].bytes == 8192

    plan = Plan((stage("device", 0), stage("edge", 1), stage("cloud", 2), stage("device", 3)))
    [record] = play(testbed, lambda: Always(plan), [1.0])
    stem = cost["device"][0]
    left = stem + 8192 / 8192 + 0.5 + cost["edge"][1] + 8192 / 4096 + 0.5
    right = stem + 8192 / 2048 + cost["cloud"][2] + 8192 / 2048
    expected = max(left, right) + cost["device"][3]
    assert record.latency_s == pytest.approx(expected)
    assert record.outcome == "completed"
    assert [s.kind for s in record.spans].count(Kind.COMPUTE) == 4
    assert [s.kind for s in record.spans].count(Kind.SEND) == 4

    # `after` alone makes the right branch wait for the left one: an empty message crosses device and both links
    ordered = Plan((stage("device", 0), stage("edge", 1), stage("cloud", 2, after=(1,)), stage("device", 3)))
    [record] = play(testbed, lambda: Always(ordered), [1.0])
    told = stem + 1 + 0.5 + cost["edge"][1] + 0.5 + 8192 / 4096  # behind `left`, on the same link and first in line
    right = told + cost["cloud"][2] + 8192 / 2048
    assert record.latency_s == pytest.approx(max(left, right) + cost["device"][3])

    view = Dispatcher("device", Local(), testbed, Compiler(testbed)).view(0.0)
    predicted = predict(compile_plan(plan, model, "device", testbed), view)
    assert latency_s(predicted) == pytest.approx(expected)


def test_json_is_what_people_can_read(testbed):
    data = json.loads(Plan((stage("device", 0, 1), stage("cloud", 2, 3, after=(0,))), (("x", "fp16"),)).to_json())
    assert data == {
        "stages": [["device", "diamond", "3", None], ["cloud", "diamond", "c", [0]]],
        "codecs": [["x", "fp16"]],
        "exit": None,
    }
