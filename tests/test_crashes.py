"""What a node takes with it when it goes, and when a run with users who wait is over. By hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from isthmus.policies.records import Kind, Outcome, Record
from isthmus.policies.static import Local, Remote
from isthmus.sim.simulator import Totals, simulate
from isthmus.workloads.errors import InputError
from isthmus.workloads.faults import Fault, NodeFault
from isthmus.workloads.overheads import CodecCost, Overheads
from isthmus.workloads.requests import Request, Source
from isthmus.workloads.testbed import Testbed

X = 3 * 64 * 64 * 4
"""Bytes of the model's input: at the links' rate, one second."""
LINK: Mapping[str, Any] = {"between": ["device", "cloud"], "rate": X / 5, "latency": 0.5}


def run(
    testbed: Testbed, policy: Any, faults: list[Fault], times: tuple[float, ...] = (0.0,), **more: Any
) -> tuple[list[Record], Totals]:
    records: list[Record] = []
    asked = {"device": [Request(i, "device", "chain", t) for i, t in enumerate(times)]}
    totals = simulate(testbed, asked, {"device": policy}, records.append, seed=1, faults=faults, **more)
    return records, totals


@pytest.fixture(scope="module")
def testbed(synthetic) -> Testbed:
    return synthetic({"device": "10s", "cloud": "1s"}, [LINK])


@pytest.mark.parametrize(
    ("node", "down", "up", "served"),
    [
        ("cloud", 1.0, 2.0, 1),  # while a message is on its way to it, and back before it would be there
        ("device", 1.0, 2.0, 1),  # while its message leaves
        ("device", 5.2, 5.3, 2),  # its last byte has left, at 5 s
    ],
)
def test_a_message_is_lost_with_its_receiver_and_with_its_sender_until_it_has_left(testbed, node, down, up, served):
    # The second request keeps the run going, and is served.
    _, totals = run(testbed, Remote("cloud"), [NodeFault(node=node, down=down, up=up)], (0.0, 20.0))
    assert totals.nodes[1].served == served


def test_what_a_node_decodes_is_lost_with_it(synthetic):
    cost = CodecCost(encode_s=0, encode_s_per_byte=0, decode_s=2.0, decode_s_per_byte=0)
    testbed = synthetic({"device": "10s", "cloud": "1s"}, [{**LINK, "rate": 1e15, "latency": 0}])
    testbed = replace(testbed, overheads=Overheads(codecs={"fp32": cost}))
    [record], totals = run(testbed, Remote("cloud"), [NodeFault(node="cloud", down=1.0, up=1.5)])
    # Decided anew at 1 s while the cloud is down, so on the device; the first attempt never computes.
    assert [s.place for s in record.spans if s.kind is Kind.COMPUTE] == ["device"]
    assert (record.end_s, record.attempts, totals.nodes[1].served) == (11.0, 2, 0)


@pytest.mark.parametrize(("drain_s", "outcome"), [(60.0, Outcome.UNFINISHED), (2000.0, Outcome.COMPLETED)])
def test_a_closed_loop_is_waited_for_as_long_as_any_source(synthetic, drain_s, outcome):
    testbed = synthetic({"device": "1000s"}, [])
    closed = {"kind": "closed", "users": 1, "think": "1s", "distribution": "constant"}
    source = Source.model_validate({"node": "device", "model": "chain", "arrivals": closed, "requests": 1})
    records: list[Record] = []
    simulate(testbed, {"device": source.loop(1)}, {"device": Local()}, records.append, seed=1, drain_s=drain_s)
    assert [r.outcome for r in records] == [outcome]


def test_what_a_watcher_raises_is_not_swallowed(testbed):
    def watch(*_: Any) -> None:
        raise RuntimeError("seen enough")

    with pytest.raises(RuntimeError, match="seen enough"):
        run(testbed, Local(), [], watch=watch)


def test_requests_without_a_policy_are_refused(testbed):
    with pytest.raises(InputError, match="no policy is given for the requests of 'device'"):
        simulate(testbed, {"device": [Request(0, "device", "chain", 0.0)]}, {}, lambda record: None, seed=1)


def test_a_battery_pays_for_what_was_sent_before_a_handover_and_no_more(synthetic):
    """Five seconds over a, cut off, and five over b for the whole message."""
    node = {"service": {"mean": "1s"}}
    mobile = {"kind": "waypoints", "points": [[0, 0, 0], [10, 100, 0]]}
    nodes = {
        "device": {**node, "mobility": mobile, "power": {"tx": "1W"}, "battery": "1kJ"},
        "a": {**node, "position": [0, 0]},
        "b": {**node, "position": [100, 0]},
        "cloud": {"service": {"mean": "1s"}},
    }
    links = [
        {"between": ["device", "a"], "rate": X / 60},
        {"between": ["device", "b"], "rate": X / 5},
        *({"between": [cell, "cloud"], "rate": 1e15} for cell in "ab"),
    ]
    _, totals = run(synthetic(nodes, links), Remote("cloud"), [])
    device = totals.nodes[0]
    assert device.battery_left_j == pytest.approx(1000 - (5 + 5))
