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

    An attempt of which there are spans, but none for deciding, decided in no time: spans of nothing are not kept.
    """

    def __init__(self, testbed: Testbed, policy: str, spans: Iterable[Row]) -> None:
        self._testbed = testbed
        self._mean_decide_s = testbed.overheads.decide_s.get(policy, 0.0)
        self._decide: dict[tuple[str, int, int], float] = {}
        self._compute: dict[tuple[str, int, int, int], float] = {}
        for span in spans:
            attempt = span["source"], span["number"], span["attempt"]
            seconds = float(span["end_s"] - span["start_s"])
            self._decide.setdefault(attempt, 0.0)
            if span["kind"] == Kind.DECIDE:
                self._decide[attempt] = seconds
            elif span["kind"] == Kind.COMPUTE:
                self._compute[*attempt, span["stage"]] = seconds

    def decide_s(self, request: Request, attempt: int) -> float:
        mean_s = self._mean_decide_s * self._testbed.nodes[request.source].slowdown
        return self._decide.get((request.source, request.number, attempt), mean_s)

    def compute_s(self, request: Request, attempt: int, stage: int, compiled: Compiled) -> float:
        seconds = self._compute.get((request.source, request.number, attempt, stage))
        if seconds is not None:
            return seconds
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
