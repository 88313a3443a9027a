"""A conformance kit: `check_policy(make)` finds out whether a policy keeps the contract. For users' own tests.

It brings a small model and testbed of its own, with made-up service times, so it needs no profile and no shell.
"""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from isthmus.policies.contract import Learner, Oracle, Policy, View, is_oracle
from isthmus.policies.dispatch import Action, Answer, Compiler, Dispatcher, PolicyFailure, Start
from isthmus.policies.plan import Plan
from isthmus.policies.records import Kind, Record, Span
from isthmus.workloads.requests import Request
from isthmus.workloads.testbed import Testbed, TestbedSpec


def check_policy(make: Callable[[], Policy], *, requests: int = 40) -> None:
    """Check a policy against the contract. AssertionError says which clause it breaks.

    `make` builds a fresh policy. Checked, in a conversation in which rates change, queues build up, a server goes and
    comes back: `decide` gives a plan, and a possible one, to every request; two fresh policies that see the same
    answer alike, and so does one that is pickled on the way; views, their testbed and records are left as they were.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "check.onnx"
        onnx.save(_small_model(), path)
        spec = TestbedSpec.model_validate({**_TESTBED, "models": {"check": str(path)}})

        def drive(*, travels: bool) -> list[Plan]:
            # A testbed for each: what one policy does to it must not reach the next.
            return _drive(_made(make), Testbed.build(spec), requests, travels=travels)

        first = drive(travels=False)
        assert first == drive(travels=False), (
            "two fresh policies answer the same views differently: draw from a generator seeded at construction"
        )
        assert first == drive(travels=True), "a policy that is pickled on the way answers differently from then on"


def _made(make: Callable[[], Policy]) -> Policy:
    policy = make()
    assert callable(getattr(policy, "decide", None)), f"{policy!r} has no method decide(request, view)"
    return policy


class _Witness:
    """Stands between the dispatcher and a policy, and looks whether the policy changes what it is shown."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.plans: list[Plan] = []

    def decide(self, request: Request, view: View) -> Plan:
        before = _state(view)
        plan = self.policy.decide(request, view)
        assert _state(view) == before, "decide changes the view that it is given, or its testbed"
        self.plans.append(plan)
        return plan

    def learn(self, record: Record) -> None:
        if isinstance(self.policy, Learner):
            before = repr((record, record.spans))
            self.policy.learn(record)
            assert repr((record, record.spans)) == before, "learn changes the record that it is given"

    def travel(self) -> None:
        try:
            self.policy = pickle.loads(pickle.dumps(self.policy))
        except Exception as error:
            raise AssertionError(f"the policy does not pickle: {type(error).__name__}: {error}") from error


class _OracleWitness(Oracle, _Witness):
    pass


def _state(view: View) -> str:
    testbed = view.testbed
    return repr((view.to_data(), testbed.nodes, testbed.links, *(m.keys() for m in (testbed.models, testbed.services))))


def _drive(policy: Policy, testbed: Testbed, requests: int, *, travels: bool) -> list[Plan]:
    """A dispatcher's conversation with the policy: rates that change, queues that build up, a server that goes."""
    witness = (_OracleWitness if is_oracle(policy) else _Witness)(policy)
    dispatcher = Dispatcher("device", witness, testbed, Compiler(testbed), name=type(policy).__name__)
    generator = np.random.default_rng(0)
    started: list[Start] = []
    closed: list[Record] = []
    now = 0.0

    def carry_out(actions: Sequence[Action]) -> None:
        started.extend(a for a in actions if isinstance(a, Start))
        closed.extend(a for a in actions if isinstance(a, Record))

    def answer(start: Start) -> None:
        rate = float(generator.uniform(1e5, 1e7))
        spans = [
            Span(
                Kind.SEND,
                f"{a}>{b}",
                now - m.wire_bytes / rate - testbed.links[a, b].latency_s,
                now,
                bytes=m.wire_bytes,
            )
            for m in start.compiled.messages
            for a, b in m.links
        ]
        carry_out(dispatcher.answer(start.request.number, start.attempt, Answer(spans), now))

    try:
        for number in range(requests):
            now += float(generator.exponential(0.05))
            carry_out(dispatcher.arrive(Request(number, "device", "check", now, now + 0.5), now))
            if number in (requests // 3, requests * 2 // 3):
                carry_out(dispatcher.node_is("cloud", up=number > requests // 2, now_s=now))
            if number == requests // 2 and travels:
                witness.travel()
            while len(started) > 2:
                answer(started.pop(0))
        carry_out(dispatcher.end())
    except PolicyFailure as error:
        raise AssertionError(str(error)) from error
    assert len(closed) == requests
    return witness.plans


_TESTBED = {
    "nodes": {
        "device": {"service": {"mean": "100ms"}, "power": {"busy": "3W", "tx": "1W", "rx": "0.5W"}},
        "edge": {"service": {"mean": "30ms"}},
        "cloud": {"service": {"mean": "10ms"}, "slots": 4},
    },
    "links": [
        {
            "between": ["device", "edge"],
            "rate": [["0s", "20Mbit"], ["5s", "2Mbit"]],
            "period": "10s",
            "latency": "2ms",
        },
        {"between": ["edge", "cloud"], "rate": "100Mbit", "latency": "20ms"},
    ],
}


def _small_model() -> onnx.ModelProto:
    """A chain of six convolutions that shrinks its tensors, with one skip: five inner cuts."""
    weights = [numpy_helper.from_array(np.zeros((8, 3 if i == 0 else 8, 3, 3), np.float32), f"w{i}") for i in range(6)]
    nodes = [
        helper.make_node(
            "Conv", ["x" if i == 0 else f"t{i - 1}", f"w{i}"], [f"t{i}"], strides=[2, 2], pads=[1, 1, 1, 1]
        )
        for i in range(6)
    ]
    nodes[3] = helper.make_node("Conv", ["t2", "w3"], ["skip"], pads=[1, 1, 1, 1])
    nodes.insert(4, helper.make_node("Add", ["t2", "skip"], ["t3"]))
    graph = helper.make_graph(
        nodes,
        "check",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 64, 64])],
        [helper.make_tensor_value_info("t5", TensorProto.FLOAT, [1, 8, 2, 2])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
