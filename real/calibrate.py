"""Calibration: measuring what a simulation of a testbed has to know, where it will happen and at its rhythm.

Profiles are taken inside an actor. A pilot run then tells what the same parts cost at the rhythm of real requests: a
part that runs after idling finds cold caches, which costs a constant, and a machine drifts, which is a factor. The
same pilot tells how single runs scatter, and how late answers are released. Knows Ray and the emulation; shows no
progress itself.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from math import ceil
from platform import node as host_name
from typing import Any

import numpy as np

from isthmus.policies.contract import Policy, View
from isthmus.policies.dispatch import Answer, Compiler, Dispatcher, Start
from isthmus.policies.plan import Plan, split
from isthmus.policies.records import Kind, Record
from isthmus.real.batches import measure_batches
from isthmus.real.cluster import results, start_actor
from isthmus.real.drive import run_cell
from isthmus.real.fleet import Fleet, placed
from isthmus.real.link_probe import LinkEnd, Probe
from isthmus.real.profiler import profile_model
from isthmus.workloads.backend import DEFAULT, BackendSpec
from isthmus.workloads.codecs import CODECS
from isthmus.workloads.fit import fit_line, fit_rhythm, typical
from isthmus.workloads.link_costs import LinkCosts
from isthmus.workloads.model import Model, Part
from isthmus.workloads.overheads import CodecCost, Overheads
from isthmus.workloads.profile import BatchCost, Profile, Rhythm, SessionCost
from isthmus.workloads.progress import Progress
from isthmus.workloads.requests import Request, Source
from isthmus.workloads.service import Measured
from isthmus.workloads.testbed import Testbed

_SIZES_BYTES = (40_000, 200_000, 800_000)
_PILOT_CUTS = 6
_PILOT_S = 60.0
_PILOT_LEAST, _PILOT_MOST = 100, 400
_PILOT_ROUNDS = 2
_GAP_S = 0.05


class Bench:
    """What is measured inside an actor. A plain class; calls may overlap, so that progress can be asked for."""

    def __init__(self) -> None:
        self._progress = (0, 1, "")

    def progress(self) -> tuple[int, int, str]:
        return self._progress

    def profile(self, model: Model, quick: bool, label: str, backend: BackendSpec) -> Profile:
        return profile_model(model, quick=quick, label=label, backend=backend, progress=self._note)

    def batches(self, model: Model, sizes: Sequence[int], backend: BackendSpec) -> tuple[BatchCost, ...]:
        return measure_batches(model, sizes, backend=backend, progress=self._note)

    def _note(self, done: int, total: int, text: str) -> None:
        self._progress = (done, total, text)

    def codecs(self) -> dict[str, CodecCost]:
        """CPU seconds of every codec that does something, by the bytes of the tensor."""
        generator, costs = np.random.default_rng(0), {}
        for name, codec in CODECS.items():
            if codec.bytes_per_value is None:
                continue
            times: dict[str, list[float]] = {"size": [], "encode": [], "decode": []}
            for size in _SIZES_BYTES:
                values = generator.standard_normal(size // 4).astype(np.float32)
                for _ in range(20):
                    time.sleep(0.005)
                    began = time.thread_time()
                    wire = codec.encode(values)
                    encoded = time.thread_time()
                    codec.decode(wire, values.dtype)
                    times["size"].append(size)
                    times["encode"].append(encoded - began)
                    times["decode"].append(time.thread_time() - encoded)
            there, back = fit_line(times["size"], times["encode"]), fit_line(times["size"], times["decode"])
            costs[name] = CodecCost(
                encode_s=there[0], encode_s_per_byte=there[1], decode_s=back[0], decode_s_per_byte=back[1]
            )
        return costs

    def decide_s(self, testbed: Testbed, policy: Policy, source: str, model: str) -> float:
        """Mean CPU seconds from a request's arrival to its plan, with idle time before each as between requests."""
        dispatcher = Dispatcher(source, policy, testbed, Compiler(testbed))
        generator, times = np.random.default_rng(0), []
        for number in range(40):
            time.sleep(generator.exponential(_GAP_S))
            now = number * _GAP_S
            began = time.thread_time()
            actions = dispatcher.arrive(Request(number, source, model, now), now)
            times.append(time.thread_time() - began)
            for action in actions:
                if isinstance(action, Start):
                    dispatcher.answer(number, action.attempt, Answer(), now)
        return float(typical(times[10:]).mean())

    def echo_through(self, peer: Any, size: int) -> float:
        """Median seconds of a call to another actor that carries so many bytes, there and back without them."""
        import ray

        values, times = np.zeros(size, dtype=np.uint8), []
        for _ in range(40):
            time.sleep(0.01)
            began = time.perf_counter()
            ray.get(peer.take.remote(values))
            times.append(time.perf_counter() - began)
        return float(np.median(times[5:]))

    def take(self, values: Any) -> None:
        """The other end of `echo_through`."""


def measure_profiles(
    ray: Any,
    models: Sequence[Model],
    *,
    quick: bool,
    label: str,
    backend: BackendSpec = DEFAULT,
    batches: Sequence[int] = (),
    where: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> list[Profile]:
    """Profile models in a backend, inside an actor, one after another, with what `batches` of these sizes cost.

    `where` are Ray's options of where the actor runs.

    InputError, before any profile is taken, for a model that cannot be batched.
    """
    bench = start_actor(ray, Bench, **(where or {}))

    def measured(running: Any) -> Any:
        while not ray.wait([running], timeout=0.5)[0]:
            if progress is not None:
                progress(*results(ray, [bench.progress.remote()])[0])
        return results(ray, [running])[0]

    try:
        costs = [measured(bench.batches.remote(model, batches, backend)) for model in models]
        profiles = [measured(bench.profile.remote(model, quick, label, backend)) for model in models]
    finally:
        ray.kill(bench)
    return [profile.with_batches(cost) for profile, cost in zip(profiles, costs, strict=True)]


def measure_overheads(
    ray: Any,
    testbed: Testbed,
    policies: Mapping[str, Policy],
    source: str,
    model: str,
    progress: Progress | None = None,
) -> Overheads:
    """Codecs, decisions and calls between actors, on the machine of the source."""
    where = placed(ray, testbed, source)
    one, other = start_actor(ray, Bench, **where), start_actor(ray, Bench, **where)
    try:
        [codecs] = results(ray, [one.codecs.remote()])
        decide_s = {}
        for done, (name, policy) in enumerate(policies.items()):
            if progress is not None:
                progress(done, len(policies), f"decisions of {name}")
            pickle.dumps(policy)  # the contract: a policy pickles
            [decide_s[name]] = results(ray, [one.decide_s.remote(testbed, policy, source, model)])
        sizes = (0, *_SIZES_BYTES)
        call_s, per_byte = fit_line(
            sizes, [seconds for size in sizes for seconds in results(ray, [one.echo_through.remote(other, size)])]
        )
    finally:
        ray.kill(one)
        ray.kill(other)
    return Overheads(
        measured=f"{datetime.now(UTC).isoformat(timespec='seconds')} on {host_name()}",
        codecs=codecs,
        decide_s=decide_s,
        actor_call_s=call_s,
        hand_over_s_per_byte=per_byte,
    )


def measure_links(ray: Any, testbed: Testbed, progress: Progress | None = None) -> LinkCosts:
    """Every direction of every link between machines, one after another."""
    links = [link for link in testbed.links if testbed.is_physical(link)]
    nodes = sorted({node for link in links for node in link})
    address = "127.0.0.1" if testbed.spec.cluster is None else None
    ends = {
        node: start_actor(ray, LinkEnd, address, testbed.spec.is_encrypted, **placed(ray, testbed, node))
        for node in nodes
    }

    def ask(node: str, method: str, *arguments: Any) -> Any:
        return results(ray, [getattr(ends[node], method).remote(*arguments)])[0]

    costs = []
    try:
        peers = {node: ask(node, "address") for node in nodes}
        for node in nodes:
            ask(node, "connect", peers)
        probe = Probe(ask)
        for done, link in enumerate(links):
            if progress is not None:
                progress(done, len(links), f"link {link[0]} to {link[1]}")
            declared = testbed.links[link].rate.mean_bytes_per_s if testbed.declares(link) else None
            costs.append(probe.measure(link, declared))
    finally:
        for actor in ends.values():
            ray.kill(actor)
    return LinkCosts(measured=datetime.now(UTC).isoformat(timespec="seconds"), links=tuple(costs))


class Stretches:
    """Each plan for `length` requests on end, then the next: as a policy does, it mostly runs what it ran before.

    Parts that take turns find each other's data in the caches, and cost some per cent more than in most runs.
    """

    def __init__(self, plans: Sequence[Plan], length: int) -> None:
        self.plans, self.length = plans, length

    def decide(self, request: Request, view: View) -> Plan:
        return self.plans[request.number // self.length % len(self.plans)]


class Pilot:
    """What a short real run tells: parts at the rhythm of requests, and how late answers are released."""

    def __init__(self, testbed: Testbed, records: Sequence[Record]) -> None:
        self.samples_s: dict[tuple[str, str, Part], list[float]] = {}  # by label of the machine, and backend
        self.answered = 0
        labels = {member: it.label for name, it in testbed.spec.nodes.items() for member in testbed.spec.members(name)}
        lateness = []
        for record in records:
            plan = Plan.from_json(record.plan) if record.plan else None
            if plan is None or record.end_s is None or record.attempts > 1:
                continue
            self.answered += 1
            lateness.append(record.end_s - max(span.end_s for span in record.spans))
            for span in record.spans:
                if span.kind is Kind.COMPUTE:
                    stage = plan.stages[span.stage]
                    if not isinstance(testbed.service(stage.node, record.model), Measured):
                        continue
                    node = testbed.nodes[stage.node]
                    place = labels[stage.node], node.backend.key, stage.part
                    self.samples_s.setdefault(place, []).append((span.end_s - span.start_s) / node.slowdown)
        self.wake_s = max(float(np.median(lateness)), 0.0) if lateness else 0.0

    def rhythm(self, model: Model, profile: Profile) -> Rhythm:
        """How parts cost in the pilot on the profile's machine and backend, against the profiler's loop.

        InputError if the profile is of another model.
        """
        whose = profile.machine.label, profile.measured_with.key
        of = {p: s for (*by, p), s in self.samples_s.items() if tuple(by) == whose}
        of = {part: samples for part, samples in of.items() if part.model == model.name}
        loop = profile.at_rhythm(Rhythm())
        found = [
            (loop.part_s(model, part), float(typical(samples).mean()), len(samples)) for part, samples in of.items()
        ]
        scale, shift_s = fit_rhythm([f[0] for f in found], [f[1] for f in found], [f[2] for f in found])
        said = f"a pilot of {self.answered} requests on {datetime.now(UTC).isoformat(timespec='seconds')}"
        sessions = tuple(
            SessionCost(
                first=span[0],
                last=span[1],
                kind="part",
                load_s=0.0,
                weights_bytes=model.weights_bytes(part),
                mean_s=float(np.mean(samples)),
                samples_s=tuple(round(s, 8) for s in samples),
            )
            for part, samples in of.items()
            if len(samples) > 1 and (span := model.span_of(part)) is not None
        )
        return Rhythm(scale=scale, shift_s=shift_s, provenance=said, sessions=sessions)


def run_pilot(ray: Any, testbed: Testbed, source: Source, *, seed: int, progress: Progress | None = None) -> Pilot:
    """A real run at the source's own rhythm for half a minute or so: every server and some cuts, one after another.

    Nodes hold all parts, and compute one request at a time: a profile is of that.
    """
    alone = {n: replace(node, batch=None, memory_bytes=None) for n, node in testbed.nodes.items()}
    testbed = replace(testbed, nodes=alone)
    model = testbed.models[source.model]
    last = len(model.blocks)
    cuts = tuple(int(c) for c in np.unique(np.linspace(0, last, _PILOT_CUTS).round()))
    servers = testbed.reachable(source.node)
    plans = list(dict.fromkeys(split(model, (cut,), (source.node, server)) for server in servers for cut in cuts))
    most = source.model_copy(update={"requests": _PILOT_MOST, "duration": None, "timeout": None}).draw(seed)
    requests = [r for r in most if r.number < _PILOT_LEAST or r.arrival_s < _PILOT_S]
    count = len(requests)
    policy = Stretches(plans, ceil(count / len(plans) / _PILOT_ROUNDS))
    records: list[Record] = []
    with Fleet(ray, testbed) as fleet:
        fleet.prepare(plans, {source.node: model.name}, seed)
        run_cell(
            fleet,
            {source.node: requests},
            {source.node: policy},
            records.append,
            seed=seed,
            tick=None if progress is None else lambda closed, _: progress(closed, count, f"pilot of {model.name}"),
        )
    first_of_stretch = range(0, count, policy.length)  # it finds the caches as another plan left them
    return Pilot(testbed, [record for record in records if record.number not in first_of_stretch])
