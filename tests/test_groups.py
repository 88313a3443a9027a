"""Groups of nodes: what a name stands for, how groups are linked, and sources and faults of groups."""

from __future__ import annotations

from collections import Counter
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.experiments.execute import Experiment, simulate
from isthmus.workloads.errors import InputError
from isthmus.workloads.experiment import ExperimentSpec
from isthmus.workloads.faults import NodeFault
from isthmus.workloads.mobility import Waypoints
from isthmus.workloads.testbed import Testbed, TestbedSpec


def bed(nodes: dict[str, Any], *links: tuple[str, str]) -> TestbedSpec:
    return TestbedSpec.model_validate(
        {"models": {"m": "m.onnx"}, "nodes": nodes, "links": [{"between": link, "rate": "1Mbit"} for link in links]}
    )


def test_a_name_stands_for_a_node_or_for_the_members_of_a_group():
    spec = bed({"cam": {"count": 3}, "edge": {}})
    assert spec.members("cam") == ("cam-0", "cam-1", "cam-2")
    assert spec.members("edge") == ("edge",)
    assert spec.members("cam-1") == ("cam-1",)
    with pytest.raises(KeyError):
        spec.members("cam-3")


@given(st.integers(1, 12), st.integers(1, 12))
def test_members_are_dealt_out_evenly(first, second):
    spec = bed({"a": {"count": first}, "b": {"count": second}}, ("a", "b"))
    pairs = spec.pairs(spec.links[0])
    assert len(pairs) == len(set(pairs)) == max(first, second)
    for side, members in enumerate((first, second)):
        each = Counter(pair[side] for pair in pairs)
        assert set(each) == set(spec.members("ab"[side]))
        assert max(each.values()) - min(each.values()) <= 1
        assert max(each.values()) == -(-len(pairs) // members)


def test_links_of_a_group_to_a_node_of_one_member_and_of_what_moves():
    car = {"count": 2, "mobility": Waypoints(points=((0, 0, 0),))}
    spec = bed(
        {"cam": {"count": 2}, "car": car, "cell": {"count": 3, "position": [0, 0]}, "edge": {}},
        ("cam", "edge"), ("edge", "cam-1"), ("car", "cell"), ("car-1", "edge"),
    )  # fmt: skip
    one, other, moving, member = (spec.pairs(link) for link in spec.links)
    assert one == [("cam-0", "edge"), ("cam-1", "edge")]
    assert other == [("edge", "cam-1")]
    assert set(moving) == set(product(("car-0", "car-1"), ("cell-0", "cell-1", "cell-2")))
    assert member == [("car-1", "edge")]


@pytest.mark.parametrize(
    ("nodes", "name"),
    [
        ({"cam": {"count": 2}, "cam-1": {}}, "cam-1"),
        ({"cam-1": {}, "cam": {"count": 2}}, "cam-1"),
        ({"cam": {"count": 2}, "cam-1": {"count": 2}}, "cam-1"),  # a group called like a member of another
        ({"cam": {"count": 2}, "cam-2": {}}, None),
        ({"cam": {}, "cam-1": {}}, None),
        ({"cam": {"count": 2}, "cam-01": {}}, None),
    ],
)
def test_two_nodes_of_one_name_are_refused(nodes, name):
    if name is None:
        bed(nodes)
        return
    with pytest.raises(ValueError, match=f"there are two nodes '{name}'"):
        bed(nodes)


def test_links_that_are_not_possible(synthetic):
    nodes = {"cam": {"count": 2, "service": {"mean": "1s"}}, "edge": "1s"}
    for links, said in (
        ([("cam", "edge"), ("cam-1", "edge")], r"links\[1\].between: 'cam-1' and 'edge' are linked twice"),
        ([("cam", "cam")], r"links\[0\].between: 'cam-0' is linked to itself"),
        ([("cam-2", "edge")], r"links\[0\].between: unknown node 'cam-2'"),
    ):
        with pytest.raises(InputError, match=said):
            synthetic(nodes, [{"between": link, "rate": 1} for link in links])


def test_only_what_is_asked_to_serves(synthetic):
    service = {"service": {"mean": "1s"}}
    nodes = {
        "cam": {**service, "count": 2},
        "rack": {**service, "count": 2, "serves": True},
        "hub": {**service, "serves": False},
        "edge": "1s",
    }
    links = [{"between": [name, "hub"], "rate": 1} for name in ("cam", "rack", "edge")]
    testbed = synthetic(nodes, links)
    assert testbed.reachable("cam-0") == ["rack-0", "rack-1", "edge"]
    assert testbed.reachable("edge") == ["rack-0", "rack-1"]
    assert testbed.route("cam-0", "cam-1") == ("cam-0", "hub", "cam-1")
    assert all(testbed.service(node, "chain").mean_s(testbed.models["chain"].whole()) == 1 for node in testbed.nodes)


FIELDS: dict[str, Any] = {
    "testbed": {
        "nodes": {
            "cam": {"count": 3, "service": {"mean": "20ms"}},
            "edge": {"service": {"mean": "5ms"}},
        },
        "links": [
            {
                "between": ["cam", "edge"],
                "rate": {"kind": "gauss-markov", "mean": "8Mbit", "deviation": "2Mbit", "correlation_time": 5},
                "latency": "1ms",
            }
        ],
    },
    "workload": [{"node": "cam", "model": "m", "arrivals": {"kind": "poisson", "rate": "5/s"}, "requests": 20}],
    "policies": ["local", "remote"],
    "faults": [{"node": "cam", "down": "1s", "up": "2s"}, {"node": "cam-1", "down": "1500ms", "up": "2500ms"}],
}


def fields(chain, **changes: Any) -> dict[str, Any]:
    return {**FIELDS, "testbed": {**FIELDS["testbed"], "models": {"m": str(chain)}}, **changes}


def test_every_member_of_a_group_is_a_source_of_its_own(chain, tmp_path):
    experiment = Experiment.of(fields(chain, faults=[]), tmp_path)
    assert list(experiment.spec.sources) == ["cam-0", "cam-1", "cam-2"]
    assert experiment.spec.expected_requests == 60
    drawn = experiment.spec.draw(1)
    assert len({tuple(r.arrival_s for r in of) for of in drawn.values()}) == 3
    assert all(r.source == source for source, of in drawn.items() for r in of)
    run = simulate(experiment, tmp_path / "run")
    counts = run.requests.groupby(["policy", "source"]).size()
    assert counts.to_dict() == {(p, f"cam-{i}"): 20 for p in ("local", "remote") for i in range(3)}
    assert set(run.requests["outcome"]) == {"completed"}
    assert set(run.spans[run.spans["policy"] == "remote"]["place"]) == {"edge"} | {
        place for i in range(3) for place in (f"cam-{i}>edge", f"edge>cam-{i}")
    }


def test_a_member_by_its_own_name_is_a_source_and_not_one_twice(chain, tmp_path):
    one = {**FIELDS["workload"][0], "node": "cam-1"}
    assert list(Experiment.of(fields(chain, workload=[one]), tmp_path).spec.sources) == ["cam-1"]
    with pytest.raises(InputError, match=r"workload\[1\].node: node 'cam-1' has two sources"):
        Experiment.of(fields(chain, workload=[FIELDS["workload"][0], one]), tmp_path)


def test_faults_of_a_group_are_of_every_member_and_merge_with_a_members_own(chain, tmp_path):
    spec = Experiment.of(fields(chain), tmp_path).spec
    assert spec.draw_faults(1) == [
        NodeFault(node="cam-0", down=1, up=2),
        NodeFault(node="cam-1", down=1, up=2.5),
        NodeFault(node="cam-2", down=1, up=2),
    ]
    run = simulate(Experiment.of(fields(chain), tmp_path), tmp_path / "run")
    failed = run.requests[run.requests["outcome"] == "failed"]
    assert set(failed["source"]) == {"cam-0", "cam-1", "cam-2"}
    for source, until_s in {"cam-0": 2.0, "cam-1": 2.5}.items():
        arrived = run.requests[(run.requests["source"] == source) & run.requests["arrival_s"].between(1, until_s)]
        assert set(arrived["outcome"]) == {"failed"}
        assert failed[failed["source"] == source]["arrival_s"].max() < until_s


def test_a_group_that_moves_reads_its_paths_from_one_file(chain, tmp_path):
    (tmp_path / "paths.csv").write_text("time,x,y,node\n0,0,0,car-0\n0,9,9,car-1\n5,1,1,car-0\n")
    car = {"count": 2, "service": {"mean": 1}, "mobility": {"kind": "file", "file": "paths.csv", "node": "node"}}
    spec = TestbedSpec.model_validate({"models": {"m": str(chain)}, "nodes": {"car": car}})
    nodes = Testbed.build(spec, folder=tmp_path).nodes
    assert nodes["car-0"].mobility.points == ((0, 0, 0), (5, 1, 1))
    assert nodes["car-1"].mobility.points == ((0, 9, 9),)
    assert spec.traces == ["paths.csv"]


def test_an_experiment_of_groups_is_written_and_read_again(chain, tmp_path):
    spec = Experiment.of(fields(chain), tmp_path).spec
    assert ExperimentSpec.model_validate_json(spec.model_dump_json()) == spec
