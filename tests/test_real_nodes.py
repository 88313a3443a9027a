"""What real nodes hold: room, batches and memory, emulated beside their simulation, and on the host as it is."""

from __future__ import annotations

import threading
import time
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from random import Random
from typing import Any

import numpy as np
import pytest

from isthmus.policies.contract import View
from isthmus.policies.plan import Plan, split
from isthmus.policies.records import Kind, Record
from isthmus.real.cutter import graph_of
from isthmus.real.drive import run_cell
from isthmus.real.fleet import Fleet
from isthmus.real.letters import refusal_from
from isthmus.real.residents import Residents
from isthmus.real.session import PartSession, random_input, random_tensors
from isthmus.real.slots import CannotRun, EmulatedSlots, HostSlots, Job, Slots
from isthmus.real.timeline import Clock
from isthmus.real.together import run_together
from isthmus.sim.replay import replay
from isthmus.workloads.backend import DEFAULT
from isthmus.workloads.errors import InputError
from isthmus.workloads.memory import Memory
from isthmus.workloads.model import Model, model_proto
from isthmus.workloads.nodes import Batch
from isthmus.workloads.requests import Request
from isthmus.workloads.service import Synthetic, SyntheticSpec
from isthmus.workloads.testbed import Testbed, TestbedSpec

LINK = {"between": ["device", "cloud"], "rate": "1Gbit", "latency": "25ms"}  # slack for a busy host
EPISODE_S = 0.6
EPISODES = 6


class Cuts:
    """Everything from a cut on is computed on the cloud; the cuts take turns, request by request."""

    def __init__(self, cuts: Sequence[int]) -> None:
        self.cuts = tuple(cuts)

    def decide(self, request: Request, view: View) -> Plan:
        model = view.testbed.models[request.model]
        return split(model, (self.cuts[request.number % len(self.cuts)],), (view.source, "cloud"))


def episodes(offsets_ms: Sequence[int]) -> list[Request]:
    """The same arrivals again and again, with idle time between: what goes wrong in one is over before the next."""
    times = [k * EPISODE_S + ms / 1e3 for k in range(EPISODES) for ms in offsets_ms]
    return [Request(i, "device", "chain", t) for i, t in enumerate(times)]


Run = Callable[..., list[Record]]


@pytest.fixture(scope="module")
def emulate(ray: Any) -> Run:
    def run(testbed: Testbed, policy: Any, requests: list[Request], plans: Sequence[Plan] = ()) -> list[Record]:
        records: list[Record] = []
        with Fleet(ray, testbed) as fleet:
            fleet.prepare(plans, {"device": "chain"}, 1)
            run_cell(fleet, {"device": requests}, {"device": policy}, records.append, seed=1, drain_s=10.0)
        return sorted(records)

    return run


def at_cloud(record: Record) -> list[tuple[Kind, float, float]]:
    """What took time there, since the request arrived. Deciding takes the host a moment, which shifts everything."""
    spans = [s for s in record.spans if s.place == "cloud" and s.end_s - s.start_s > 2e-3]
    return sorted((s.kind, s.start_s - record.arrival_s, s.end_s - record.arrival_s) for s in spans)


BATCH = {"size": 3, "wait": "30ms", "cost": [[1, 1.0], [3, 2.0]]}
CASES: dict[str, tuple[dict[str, Any], list[int], list[int]]] = {
    # Two that have waited long enough; three that fill a batch while the slot works, and one that is left over.
    "batch": ({"service": {"mean": "50ms"}, "batch": BATCH}, [0, 10, 40, 50, 60, 90], [0]),
    "edf": ({"service": {"mean": "50ms"}, "batch": BATCH, "discipline": "edf"}, [0, 10, 40, 50, 60, 70, 90], [0]),
    # Room for one of two parts; the second slot waits for the first one's load, and the other part for both to end.
    "memory": ({"service": {"mean": "40ms", "load": "60ms"}, "memory": 0, "slots": 2}, [0, 10, 30, 300], [0, 0, 3, 0]),
    "room": ({"service": {"mean": "50ms"}, "room": 2}, [0, 10, 20, 70, 80, 90], [0]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_an_emulated_node_is_the_simulated_one(case, synthetic, emulate, play):
    """Same arrivals, same made-up times: each request meets the same fate, within milliseconds."""
    node, offsets, cuts = CASES[case]
    if "memory" in node:
        model = synthetic().models["chain"]
        node = {**node, "memory": max(model.memory_bytes(model.tail(c)) for c in cuts)}
    testbed = synthetic({"device": "20ms", "cloud": node}, [LINK])
    requests = episodes(offsets)
    if node.get("discipline") == "edf":
        rng = Random(1)
        requests = [r._replace(deadline_s=r.arrival_s + rng.choice([0.1, 0.2, 0.3])) for r in requests]
    simulated = sorted(play(testbed, lambda: Cuts(cuts), {"device": requests}))
    plans = [Cuts(cuts).decide(r, View(0.0, "device", testbed, {}, {}, None)) for r in requests[: len(cuts)]]
    real = emulate(testbed, Cuts(cuts), requests, plans)
    assert [r.number for r in real] == [r.number for r in simulated] == list(range(len(requests)))
    assert all(r.correct for r in real if r.end_s is not None)

    late = {r.number // len(offsets) for r in real if r.overruns}  # the host was too slow in these episodes
    kept = [(r, s) for r, s in zip(real, simulated, strict=True) if r.number // len(offsets) not in late]
    assert len(kept) >= len(offsets) * EPISODES // 2
    for record, expected in kept:
        assert (record.outcome, record.reason) == (expected.outcome, expected.reason)
        last, due = (max(s.end_s for s in r.spans) - r.arrival_s for r in (record, expected))
        assert last == pytest.approx(due, abs=5e-3)  # when its answer came; a busy host looks at it later
        there, wanted = at_cloud(record), at_cloud(expected)
        assert [kind for kind, *_ in there] == [kind for kind, *_ in wanted], (record, expected)
        for (_, *times), (_, *expected_times) in zip(there, wanted, strict=True):
            assert times == pytest.approx(expected_times, abs=5e-3)
    seen = Counter(kind for record, _ in kept for kind, *_ in at_cloud(record))
    assert seen[Kind.LOAD] > 0 if case == "memory" else not seen[Kind.LOAD]
    assert ("dropped" in {record.outcome for record, _ in kept}) == (case == "room")
    if case == "room":  # what was done for them is on the record
        assert all(any(s.place == "device>cloud" for s in r.spans) for r, _ in kept if r.outcome == "dropped")


# On the host as it is


def physical(chain: Any, **cloud: Any) -> Testbed:
    spec = {
        "models": {"chain": str(chain)},
        "nodes": {"device": {"service": {"mean": "5ms"}}, "cloud": {"host": "here", **cloud}},
        "links": [LINK],
    }
    testbed = Testbed.build(TestbedSpec.model_validate(spec), need_profiles=False)
    # Controllers believe something; the host takes what it takes.
    believed = Synthetic(testbed.models["chain"], SyntheticSpec(mean=0.005))
    return replace(testbed, services={(node, "chain"): believed for node in testbed.nodes})


def test_a_physical_batch_is_one_run_and_its_rows_are_the_single_answers(chain, emulate):
    """Requests take four payloads in turn, so that rows which are mixed up are wrong."""
    batch = Batch(size=6, wait=0.15, cost=((1, 1.0), (6, 3.0)))
    assert batch.sizes == (1, 2, 4, 6)
    testbed = physical(chain, batch=batch.model_dump())
    arrivals = [0.5 + i / 1e3 for i in range(6)] + [1.5, 1.51, 1.52, 2.5]
    records = emulate(testbed, Cuts([2]), [Request(i, "device", "chain", t) for i, t in enumerate(arrivals)])
    assert Counter(r.outcome for r in records) == {"completed": 10}
    assert all(r.correct for r in records)
    together = defaultdict(list)
    for record in records:
        [span] = [s for s in record.spans if s.place == "cloud" and s.kind is Kind.COMPUTE]
        together[span.start_s, span.end_s].append(record.number)
    assert max(map(len, together.values())) > 1
    assert all(b - a == 1 for numbers in together.values() for a, b in pairwise(numbers))


def test_a_physical_node_loads_what_was_dropped_and_refuses_when_it_is_full(chain, emulate):
    testbed = physical(chain)
    model = testbed.models["chain"]
    budget = max(model.memory_bytes(model.tail(cut)) for cut in (0, 3))
    requests = [Request(i, "device", "chain", 0.3 * i) for i in range(6)]
    records = emulate(physical(chain, memory=budget), Cuts([0, 0, 3]), requests)
    assert all(r.correct for r in records)
    loaded = [any(s.kind is Kind.LOAD and s.place == "cloud" for s in r.spans) for r in records]
    assert loaded == [True, False, True, True, False, True]

    burst = [Request(i, "device", "chain", 0.5) for i in range(30)]
    outcomes = Counter(r.outcome for r in emulate(physical(chain, room=1), Cuts([0]), burst))
    assert set(outcomes) == {"completed", "dropped"}
    assert outcomes.total() == 30


def test_sessions_that_have_to_go_are_gone_and_the_budget_holds(chain, synthetic):
    """Two slots, four parts, room for about two of them: whatever comes, and whoever uses what."""
    model = synthetic().models["chain"]
    parts = [model.tail(cut) for cut in (0, 1, 2, 3)]
    budget = model.memory_bytes(parts[0]) + model.memory_bytes(parts[1])
    residents = Residents({"chain": model}, DEFAULT, filed=True)
    residents.prepare(parts[:3])
    assert residents.resident == ()
    alive: weakref.WeakSet[PartSession] = weakref.WeakSet()
    held: list[int] = []
    lock = threading.Lock()

    def load(part: Any, version: str, size: int) -> Any:
        session, load_s = residents.session(part, version, size)
        with lock:
            held.append(sum(model.memory_bytes(part) for part, *_ in residents.resident))
            alive.add(session)
        return lambda feeds: run_together(session, model, feeds, size), load_s > 0

    ended: list[tuple[int, bool]] = []
    errors: list[BaseException] = []
    node = physical(chain, slots=2, memory=budget).nodes["cloud"]
    memory = Memory(budget, lambda shaped: (model.memory_bytes(shaped[0]), 0.0))
    slots = HostSlots(node, Clock(time.monotonic()), load, residents.keep, memory, errors.append)
    rng = Random(1)
    feeds = {part: random_tensors(model, model.part_inputs(part), np.random.default_rng(0)) for part in parts}
    answers = {part: PartSession(model, part).run(feeds[part]) for part in parts}
    for number in range(80):
        part = rng.choice(parts)

        def end(outputs: Any, _: float, spans: Any, __: int, number: int = number, part: Any = part) -> None:
            right = all(np.array_equal(outputs[n], value) for n, value in answers[part].items())
            ended.append((number, right))

        request = Request(number, "device", "chain", 0.0)
        slots.submit(Job(part, model.version, feeds[part], request, 1, 0, 0.0, float, end, pytest.fail, errors.append))
    deadline = time.monotonic() + 30
    while len(ended) < 80 and time.monotonic() < deadline and not errors:
        time.sleep(0.01)
    slots.close()
    assert not errors
    assert sorted(number for number, _ in ended) == list(range(80))
    assert all(right for _, right in ended)
    assert max(held) <= budget
    assert memory.evictions > 5
    assert len(alive) == len(residents.resident)


@pytest.mark.parametrize("emulated", [False, True])
def test_what_cannot_run_takes_nothing_with_it(emulated, chain, synthetic):
    """Of a batch of four, one has tensors that its part cannot run on: the three others are answered."""
    part = synthetic().models["chain"].whole()
    node = physical(chain, batch={"size": 4, "wait": "1s", "cost": [[1, 1.0], [4, 2.0]]}).nodes["cloud"]
    sizes, ended, broken, errors = [], [], [], []

    def run(feeds: Sequence[dict[str, Any]]) -> list[Any]:
        sizes.append(len(feeds))
        if any(feed["x"] == 2 for feed in feeds):
            raise CannotRun("2 is out of range")
        return [{"y": -feed["x"]} for feed in feeds]

    slots: Slots
    clock = Clock(time.monotonic())
    if emulated:
        compute = lambda part, version, feed: (run([feed])[0], 1.0, 0.0)  # noqa: E731
        slots = EmulatedSlots(node, clock, compute, lambda model, size: 1 + size, None, errors.append)
    else:
        slots = HostSlots(node, clock, lambda part, version, size: (run, False), lambda kept: None, None, errors.append)
    spans: list[Any] = []

    def end(outputs: Any, _: float, took: Any, __: int) -> None:
        ended.append(outputs["y"])
        spans.extend(took)

    for number in range(4):
        request, ready_s = Request(number, "device", "chain", 0.0), 0.01 * number
        slots.submit(
            Job(part, "", {"x": number}, request, 1, 0, ready_s, lambda s: 0.1 * s, end, pytest.fail, broken.append)
        )
    deadline = time.monotonic() + 10
    while len(ended) + len(broken) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    slots.close()
    assert not errors
    assert sorted(ended) == [-3, -1, 0]
    assert sorted(map(str, broken)) == ["2 is out of range"]
    if emulated:
        assert max(s.end_s - s.start_s for s in spans if s.kind is Kind.COMPUTE) == pytest.approx(0.4)
    else:
        assert sizes == [4, 1, 1, 1, 1]


def test_rows_are_those_of_the_requests_also_where_the_batch_is_not_filled(chain, synthetic):
    model: Model = synthetic().models["chain"]
    part, proto = model.tail(2), model_proto(model, 4)
    session, alone = PartSession(model, part, graph=graph_of(model, part, proto)), PartSession(model, part)
    head = PartSession(model, model.head(2))
    feeds = [head.run(random_input(model, i, 1)) for i in range(3)]
    for count in (1, 2, 3):
        for outputs, feed in zip(run_together(session, model, feeds[:count], 4), feeds, strict=False):
            for name, value in alone.run(feed).items():
                assert outputs[name].shape == value.shape
                np.testing.assert_allclose(outputs[name], value, rtol=1e-5, atol=1e-6)


def test_a_replay_of_batches_takes_as_long_as_they_took(synthetic, play):
    """What a request of a batch computed for is the whole batch's time: the replay must not lengthen it again."""
    testbed = synthetic({"device": "20ms", "cloud": {"service": {"mean": "50ms"}, "batch": BATCH}}, [LINK])
    requests = {"device": episodes(CASES["batch"][1])}
    records = play(testbed, lambda: Cuts([0]), requests)
    rows = [{"source": r.source, "number": r.number, "plan": r.plan} for r in records]
    spans = [{"source": r.source, "number": r.number, **s._asdict()} for r in records for s in r.spans]
    again: list[Record] = []
    replay(testbed, requests, again.append, name="cuts", seed=1, rows=rows, spans=spans)
    latency = {r.number: r.latency_s for r in records}
    assert len(again) == len(records)
    for record in again:
        assert record.latency_s == pytest.approx(latency[record.number], abs=1e-9)


@pytest.mark.parametrize(
    "value", [[], ["full"], [1, []], ["full", [["wait"]]], ["full", [["no", "a", 0, 1, 1, 0, None]]]]
)
def test_what_is_no_refusal_is_refused(value):
    with pytest.raises(InputError, match="not a refusal"):
        refusal_from(value)
