"""The files that people write: what is wrong with them is said in one line that names file, field, value and remedy."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.workloads.errors import InputError
from isthmus.workloads.experiment import ExperimentSpec
from isthmus.workloads.testbed import Testbed, TestbedSpec

GOOD = """
models: {{m: {model}}}
nodes:
  device: {{service: {{mean: 100ms}}}}
  cloud: {{service: {{mean: 10ms}}, slots: 4}}
links:
  - between: [device, cloud]
    rate: 20Mbit
    latency: 5ms
    back: {{rate: 40Mbit}}
"""


@pytest.fixture
def good(chain: Path) -> str:
    return GOOD.format(model=chain)


def refused(kind, path: Path) -> str:
    with pytest.raises(InputError) as caught:
        kind.load(path)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(str(path))
    return text


def test_a_good_one_is_read(good, tmp_path):
    path = tmp_path / "bed.yaml"
    path.write_text(good)
    testbed = Testbed.load(path)
    assert testbed.links["device", "cloud"].rate.bytes_per_s == (2.5e6,)
    assert testbed.links["cloud", "device"].rate.bytes_per_s == (5e6,)
    assert testbed.links["cloud", "device"].latency_s == 0.005
    assert testbed.route("device", "cloud") == ("device", "cloud")
    testbed.nominal.route("device", "cloud")
    again = pickle.loads(pickle.dumps(testbed))
    assert again.route("cloud", "device") == ("cloud", "device")
    assert again.spec == testbed.spec


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("[device, cloud]", "[device, clout]", ["links[0].between", "'clout'", "did you mean cloud", "device"]),
        ("20Mbit", "-20Mbit", ["links[0].rate", "'-20Mbit'", "> 0"]),
        ("20Mbit", "20 Mbps", ["links[0].rate", "'Mbps'", "Mbit"]),
        ("20Mbit", "[[0s, 20Mbit], [5s, 0]]", ["links[0].rate", "ends at 0", "period"]),
        ("20Mbit", "[[1s, 20Mbit]]", ["links[0].rate", "start at 0"]),
        ("20Mbit", "[[0s, 20Mbit, 3]]", ["links[0].rate", "pair"]),
        ("40Mbit", "[[0s, 0]]", ["links[0].back.rate"]),
        ("latency: 5ms", "latency: 5", []),
        ("latency: 5ms", "latency: 5 parsecs", ["links[0].latency", "'parsecs'", "ms"]),
        ("latency: 5ms", "delay: 5ms", ["links[0].delay", "unknown field", "latency"]),
        ("[device, cloud]", "[cloud, cloud]", ["links[0].between", "linked to itself"]),
        ("    back:", "  - {between: [cloud, device], rate: 1Mbit}\n#", ["links[1].between", "linked twice"]),
        ("    rate: 20Mbit\n", "", ["links[0].rate", "missing"]),
        ("slots: 4", "slots: 0", ["nodes.cloud.slots", "0"]),
        ("slots: 4", "slot: 4", ["nodes.cloud.slot", "unknown field", "slots"]),
        ("slots: 4", "slowdown: 2", ["nodes.cloud", "one source"]),
        ("cloud: {", "the>cloud: {", ["nodes.the>cloud"]),
        ("models:", "model:", ["bed.yaml", "model"]),
        ("chain.onnx", "chin.onnx", ["chin.onnx"]),
        ("{mean: 10ms}", "{mean: 0}", ["nodes.cloud.service.mean"]),
        ("{mean: 10ms}", "{mean: 10ms, distribution: normal}", ["nodes.cloud.service.distribution", "exponential"]),
        ("links:", "links: [", ["not YAML"]),
        ("links:", "seen: 2024-13-45\nlinks:", ["not YAML"]),
    ],
)
def test_what_is_wrong_is_named(good, tmp_path, old, new, said):
    assert old in good
    path = tmp_path / "bed.yaml"
    path.write_text(good.replace(old, new))
    if not said:
        Testbed.load(path)
        return
    with pytest.raises(InputError) as caught:
        Testbed.load(path)
    text = str(caught.value)
    assert "\n" not in text
    for part in said:
        assert part in text, text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        (b"\xff\xfe\x00", "not a text file"),
        (b"a\x00b", "not YAML"),
        (b"- 1\n- 2", "found list"),
        (b"", "is empty"),
        (b"nodes: {a: b: c}", "not YAML"),
    ],
)
@pytest.mark.parametrize("kind", [Testbed, ExperimentSpec])
def test_what_is_no_such_file_at_all(kind, content, said, tmp_path):
    path = tmp_path / "bed.yaml"
    if content is not None:
        path.write_bytes(content)
    assert said in refused(kind, path)


def test_a_folder_is_no_file(tmp_path):
    assert "cannot be read" in refused(Testbed, tmp_path)


EXPERIMENT = """
testbed: bed.yaml
workload:
  - {node: device, model: m, arrivals: {kind: poisson, rate: 2/s}, requests: 10}
policies: [local, {fixed: {cut: 2}}]
seeds: [1, 2]
faults: [{node: cloud, down: 1s, up: 2s}, {node: cloud, down: 3s}]
"""


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("", "", []),
        ("bed.yaml", "bad.yaml", ["bad.yaml", "no such file"]),
        ("node: device", "node: devise", ["workload[0].node", "did you mean device"]),
        ("model: m", "model: n", ["workload[0].model", "'n'", "allowed: m"]),
        (", requests: 10", "", ["workload[0]", "never ends", "duration"]),
        ("2/s", "2", []),
        ("2/s", "0/s", ["workload[0].arrivals.rate", "> 0"]),
        ("poisson", "posson", ["workload[0].arrivals", "posson", "periodic"]),
        ("poisson", "replay", ["workload[0].arrivals.rate", "(allowed: column, file, kind, times)"]),
        ("rate: 2/s", "rat: 2/s", ["workload[0].arrivals.rat: unknown field 'rat'; did you mean rate?"]),
        ("[1, 2]", "[1, 1]", ["seeds", "twice"]),
        ("[1, 2]", "[-1]", ["seeds[0]", "-1"]),
        ("{fixed: {cut: 2}}", "fixed:", ["policies[1].fixed"]),
        ("down: 3s", "down: 1.5s", ["faults[1]", "down already"]),
        ("down: 3s", "down: 2s", ["faults[1]", "down already"]),
        ("up: 2s", "up: 0.5s", ["faults[0]", "0.5", "1 s"]),
        ("{node: cloud, down: 3s}", "{node: clod, down: 3s}", ["faults[1].node", "did you mean cloud"]),
        ("policies: [local", "drain: never\npolicies: [local", ["drain", "'never'"]),
        ("testbed: bed.yaml", "testbed: {models: {m: x}, nodes: {a: {slot: 1}}}", ["testbed.nodes.a.slot", "slots"]),
        ("testbed: bed.yaml", "testbed: 5", ["testbed", "5"]),
    ],
)
def test_what_is_wrong_with_an_experiment_is_named(good, tmp_path, old, new, said):
    (tmp_path / "bed.yaml").write_text(good)
    path = tmp_path / "experiment.yaml"
    path.write_text(EXPERIMENT.replace(old, new))
    if not said:
        spec = ExperimentSpec.load(path)
        assert ExperimentSpec.model_validate(json.loads(spec.model_dump_json())) == spec
        return
    with pytest.raises(InputError) as caught:
        ExperimentSpec.load(path)
    text = str(caught.value)
    assert "\n" not in text
    assert "experiment.yaml" in text or "bad.yaml" in text
    for part in said:
        assert part in text, text


def test_a_disconnected_node_has_no_route(synthetic):
    testbed = synthetic({"device": "1s", "cloud": "1s", "island": "1s"}, [{"between": ["device", "cloud"], "rate": 1}])
    with pytest.raises(InputError, match="no route from 'device' to 'island'"):
        testbed.route("device", "island")
    with pytest.raises(InputError, match="unknown node 'islnd'; did you mean island"):
        testbed.route("device", "islnd")
    assert testbed.reachable("device") == ["cloud"]
    assert testbed.reachable("island") == []


names = st.sampled_from("abcde")


@given(st.dictionaries(st.frozensets(names, min_size=2, max_size=2), st.integers(0, 2), min_size=1, max_size=10))
def test_routes_are_of_a_piece(synthetic, links):
    """Even where many ways are equally good: back is there reversed, and a piece of a route is its ends' route."""
    described = [
        {"between": sorted(pair), "rate": 1, "latency": latency, "back": {"latency": (latency * 7) % 3}}
        for pair, latency in links.items()
    ]
    testbed = synthetic(dict.fromkeys("abcde", "1s"), described)
    for start in "abcde":
        for end in testbed.reachable(start):
            route = testbed.route(start, end)
            assert testbed.route(end, start) == route[::-1]
            for i in range(len(route)):
                for j in range(i + 1, len(route)):
                    assert testbed.route(route[i], route[j]) == route[i : j + 1]


def test_of_two_ways_of_the_same_latency_the_shorter_is_taken(synthetic):
    pairs = [("a", "b"), ("b", "c"), ("a", "c")]
    testbed = synthetic(dict.fromkeys("abc", "1s"), [{"between": p, "rate": 1} for p in pairs])
    assert testbed.route("a", "c") == ("a", "c")


def test_what_a_controller_is_given_does_not_hold_the_trace(synthetic):
    rate = [[0, 1234567], [5, 7654321]]
    link = {"between": ["device", "cloud"], "rate": rate, "period": 8, "back": {"rate": [[0, 1111111], [1, 3333333]]}}
    nominal = synthetic({"device": "1s", "cloud": "1s"}, [link]).nominal
    told = repr(vars(nominal))
    for secret in ("1234567", "7654321", "1111111", "3333333"):
        assert secret not in told
    mean = (1234567 * 5 + 7654321 * 3) / 8
    assert nominal.links["device", "cloud"].rate.bytes_per_s == (pytest.approx(mean),)
    assert nominal.spec.links[0].rate.rate == pytest.approx(mean)
    assert Testbed.build(nominal.spec).links == nominal.links


@pytest.mark.parametrize("kind", [TestbedSpec, ExperimentSpec])
def test_editors_get_a_schema(kind):
    schema = json.loads(json.dumps(kind.model_json_schema()))
    link = schema["$defs"]["LinkSpec"]["properties"]
    assert link["latency"]["type"] == ["string", "number"]
    rate = link["rate"]["anyOf"][0]["anyOf"]  # or none, on a medium
    assert {"type": ["string", "number"]} in rate  # 20Mbit
    assert "array" in [kind["type"] for kind in rate]  # [[0s, 20Mbit], [5s, 4Mbit]]
