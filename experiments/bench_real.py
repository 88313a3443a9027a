"""What the real side adds: a plan in two stages beside its parts alone and raw TCP, and how full a pipeline runs.

Physical nodes, each a process of this machine, over loopback. Both sides of every ratio are measured in one run: the
parts' own time is that of their compute spans in it, and raw TCP carries the same bytes at the same rhythm.
"""

from __future__ import annotations

import multiprocessing
import socket
import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from isthmus.policies.contract import View, blind
from isthmus.policies.plan import Plan, compile_plan, split
from isthmus.policies.records import Kind, Record
from isthmus.workloads.errors import RunFailure
from isthmus.workloads.model import Model, load_model, members
from isthmus.workloads.progress import Progress
from isthmus.workloads.requests import Request
from isthmus.workloads.testbed import Testbed, TestbedSpec

MODELS = {"squeezenet": 0.05, "resnet50": 0.25}
"""By name, the seconds between two requests: about half of what one core can do."""
_PIPELINE = "resnet50"
_SHARES = (0.3, 0.5, 0.2)
"""Of the work, by stage: the slowest has half, so that two cores can run it beside the others."""
_WARM = 10


class Always:
    """One plan for every request."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    @blind
    def decide(self, request: Request, view: View) -> Plan:
        return self.plan


def bench_real(*, requests: int = 100, progress: Progress | None = None) -> dict[str, Any]:
    """`two_stage`: per model the median of (latency of a request / its parts' own time and raw TCP).

    `pipeline_efficiency`: answers per second of a pipeline of three that never runs dry, over what its slowest stage,
    as long as it took there, would allow.
    """
    from isthmus.real.cluster import local_ray

    steps = len(MODELS) + 1
    rows = []
    with local_ray() as ray:
        for number, (name, gap_s) in enumerate(MODELS.items()):
            if progress is not None:
                progress(number, steps, f"{name} in two stages")
            rows.append(_two_stage(ray, load_model(name), requests, gap_s))
        if progress is not None:
            progress(len(MODELS), steps, f"{_PIPELINE} in a pipeline of three")
        pipeline = _pipeline(ray, load_model(_PIPELINE), requests)
    return {"two_stage": rows, **pipeline}


def cut_at(model: Model, share: float) -> int:
    """The cut before which about this share of the work is done."""
    flop = [sum(model.layers[i].flop for i in members(block)) for block in model.blocks]
    total, done = sum(flop), 0
    for number, of in enumerate(flop):
        if done + of / 2 >= share * total:
            return number
        done += of
    return len(flop)


def _two_stage(ray: Any, model: Model, requests: int, gap_s: float) -> dict[str, Any]:
    plan = split(model, (cut_at(model, 0.5),), ("a", "b"))
    testbed = _testbed(model, "ab")
    compiled = compile_plan(plan, model, "a", testbed)
    there, back = (sum(m.wire_bytes for m in compiled.messages if m.links and m.path[0] == node) for node in "ab")
    records = _run(ray, testbed, plan, [gap_s * (1 + i) for i in range(requests + _WARM)])
    tcp_s = statistics.median(raw_tcp(there, back, requests // 2, gap_s / 5))
    latency_s = [float(r.latency_s or 0.0) for r in records]
    compute_s = [sum(s.end_s - s.start_s for s in r.spans if s.kind is Kind.COMPUTE) for r in records]
    return {
        "model": model.name,
        "ratio": statistics.median(a / (b + tcp_s) for a, b in zip(latency_s, compute_s, strict=True)),
        "latency_s": statistics.median(latency_s),
        "compute_s": statistics.median(compute_s),
        "raw_tcp_s": tcp_s,
        "bytes": there + back,
        "requests": len(records),
    }


def _pipeline(ray: Any, model: Model, requests: int) -> dict[str, Any]:
    cuts = tuple(cut_at(model, sum(_SHARES[:n])) for n in range(1, len(_SHARES)))
    records = _run(ray, _testbed(model, "abc"), split(model, cuts, tuple("abc")), [0.0] * (requests + _WARM))
    ends_s = sorted(float(r.end_s or 0.0) for r in records)
    spans = [span for record in records for span in record.spans if span.kind is Kind.COMPUTE]
    each_s = [statistics.mean(s.end_s - s.start_s for s in spans if s.stage == i) for i in range(len(_SHARES))]
    per_s = (len(ends_s) - 1) / (ends_s[-1] - ends_s[0])
    return {
        "pipeline_efficiency": per_s * max(each_s),
        "pipeline_per_s": per_s,
        "pipeline_stages_s": each_s,
        "pipeline_model": model.name,
    }


def _testbed(model: Model, nodes: str) -> Testbed:
    """Physical nodes in a row, each with a host of its own, which without a cluster are all this machine."""
    links = [{"between": list(ends), "rate": "10Gbit", "latency": 0.0} for ends in pairwise(nodes)]
    spec = {"models": {model.name: model.source}, "nodes": {n: {"host": n} for n in nodes}, "links": links}
    return Testbed.build(TestbedSpec.model_validate(spec), need_profiles=False)


def _run(ray: Any, testbed: Testbed, plan: Plan, times_s: Sequence[float]) -> list[Record]:
    """The records of a run at these times, without the first ones."""
    from isthmus.real.drive import run_cell
    from isthmus.real.fleet import Fleet

    [model] = testbed.models
    records: list[Record] = []
    with Fleet(ray, testbed) as fleet:
        fleet.prepare([plan], {"a": model}, seed=0)
        requests = [Request(i, "a", model, at_s) for i, at_s in enumerate(times_s)]
        run_cell(fleet, {"a": requests}, {"a": Always(plan)}, records.append, seed=0)
    wrong = [r for r in records if r.end_s is None or not r.correct]
    if wrong:
        raise RunFailure(f"{len(wrong)} of {len(records)} requests had no right answer: {wrong[0].reason}")
    return sorted(records, key=lambda r: r.number)[_WARM:]


def raw_tcp(there: int, back: int, times: int, gap_s: float) -> list[float]:
    """Seconds to send so many bytes to another process and have so many back, over one warm connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        other = multiprocessing.get_context("spawn").Process(
            target=_echo, args=(server.getsockname(), there, back, times), daemon=True
        )
        other.start()
        server.settimeout(60)  # it may have died
        connection, _ = server.accept()
        with connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            buffer, seconds = bytearray(max(there, back, 1)), []
            for _ in range(times):
                time.sleep(gap_s)
                began = time.perf_counter()
                connection.sendall(memoryview(buffer)[:there])
                _receive(connection, memoryview(buffer)[:back])
                seconds.append(time.perf_counter() - began)
        other.join()
    return seconds


def _echo(address: tuple[str, int], there: int, back: int, times: int) -> None:
    with socket.create_connection(address) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        buffer = bytearray(max(there, back, 1))
        for _ in range(times):
            _receive(connection, memoryview(buffer)[:there])
            connection.sendall(memoryview(buffer)[:back])


def _receive(connection: socket.socket, into: memoryview) -> None:
    while into:
        into = into[connection.recv_into(into) :]
