"""Feeding the simulator what a real run measured: its plans, part times and decision times.

What then still differs from the real run is the structural error: what the simulator leaves out, not what the
profile got wrong. Knows the rows of the two tables (policies/records.py) as plain data; opens no file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from isthmus.policies.contract import View
from isthmus.policies.plan import Compiled, Plan
from isthmus.policies.records import Kind, Record
from isthmus.sim.simulator import simulate
from isthmus.workloads.errors import InputError
from isthmus.workloads.faults import Fault
from isthmus.workloads.requests import Request
from isthmus.workloads.testbed import Testbed

Row = Mapping[str, Any]


class Replayed:
    """A policy that gives every request the plan it got in a recorded run.

    The `requests` table keeps the plan of the last attempt; `decisions`, where a run has them, those of every attempt.
    Rows are of one policy and one seed.
    """

    def __init__(self, requests: Iterable[Row], decisions: Iterable[Row] = ()) -> None:
        self._last = {(r["source"], r["number"]): r["plan"] for r in requests if isinstance(r["plan"], str)}
        self._each = {(d["source"], d["number"], d["attempt"]): d["plan"] for d in decisions}
        self._attempts: Counter[tuple[str, int]] = Counter()
        self._parsed: dict[str, Plan] = {}

    def decide(self, request: Request, view: View) -> Plan:
        """InputError when the recorded run has no plan for this request."""
        key = request.source, request.number
        self._attempts[key] += 1  # one call per attempt: that is the contract of `decide`
        text = self._each.get((*key, self._attempts[key])) or self._last.get(key)
        if text is None:
            raise InputError(f"the recorded run has no plan for request {request.number} of {request.source!r}")
        if text not in self._parsed:
            self._parsed[text] = Plan.from_json(text)
        return self._parsed[text]


class Recorded:
    """Durations as a run's `compute` and `decide` spans have them; the testbed's mean for what the run never did.

    An attempt of which there are spans, but none for deciding, decided in no time: spans of nothing are not kept. What
    was computed from one same time to another on a node that batches was a batch: alone it had taken as many times less
    as such a batch takes longer.
    """

    def __init__(self, testbed: Testbed, policy: str, spans: Iterable[Row]) -> None:
        self._testbed = testbed
        self._mean_decide_s = testbed.overheads.decide_s.get(policy, 0.0)
        self._decide: dict[tuple[str, int, int], float] = {}
        self._compute: dict[tuple[str, int, int, int], tuple[str, float, float]] = {}
        for span in spans:
            attempt = span["source"], span["number"], span["attempt"]
            start_s, end_s = float(span["start_s"]), float(span["end_s"])
            self._decide.setdefault(attempt, 0.0)
            if span["kind"] == Kind.DECIDE:
                self._decide[attempt] = end_s - start_s
            elif span["kind"] == Kind.COMPUTE:
                self._compute[*attempt, span["stage"]] = span["place"], start_s, end_s
        batching = {name for name, node in testbed.nodes.items() if node.batch is not None}
        self._together = Counter(computed for computed in self._compute.values() if computed[0] in batching)

    def decide_s(self, request: Request, attempt: int) -> float:
        mean_s = self._mean_decide_s * self._testbed.nodes[request.source].slowdown
        return self._decide.get((request.source, request.number, attempt), mean_s)

    def compute_s(self, request: Request, attempt: int, stage: int, compiled: Compiled) -> float:
        computed = self._compute.get((request.source, request.number, attempt, stage))
        if computed is not None:
            node, start_s, end_s = computed
            together = self._together.get(computed, 1)
            alone = self._testbed.batch_factor(node, request.model, together) if together > 1 else 1.0
            return (end_s - start_s) / alone
        where = compiled.plan.stages[stage]
        return self._testbed.service(where.node, request.model).mean_s(where.part)


def replay(
    testbed: Testbed,
    requests: Mapping[str, Sequence[Request]],
    sink: Callable[[Record], None],
    *,
    name: str,
    seed: int,
    rows: Iterable[Row],
    spans: Iterable[Row],
    decisions: Iterable[Row] = (),
    faults: Sequence[Fault] = (),
    drain_s: float = 60.0,
) -> None:
    """Simulate one policy and seed of a recorded run again: the same requests, plans, part and decision times.

    `rows`, `spans` and `decisions` are what the run recorded of that policy (`name`) and seed.
    """
    policy, durations = Replayed(rows, decisions), Recorded(testbed, name, spans)
    simulate(
        testbed, requests, dict.fromkeys(requests, policy), sink,
        seed=seed, name=name, faults=faults, drain_s=drain_s, durations=durations,
    )  # fmt: skip
