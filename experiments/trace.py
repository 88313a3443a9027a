"""A run as a trace that opens in Perfetto (ui.perfetto.dev) or chrome://tracing. Knows run folders and the trace-event
format (Google, "Trace Event Format", JSON object form); computes nothing.

One process per policy and seed. One track per node and per link, with what it was busy with: computing, coding,
sending. Waiting is not being busy, so waits have tracks of their own, and so do requests from arrival to answer: both
are asynchronous events, which may overlap. The same run gives the same file, byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from isthmus.experiments.run_folder import Run
from isthmus.policies.records import Kind
from isthmus.workloads.documents import write_text
from isthmus.workloads.testbed import TestbedSpec

Event = dict[str, Any]


def write_trace(run: Run, path: str | Path) -> None:
    """Write the whole run. RunFailure when the file cannot be written."""
    events = [event for pid, key in enumerate(_processes(run), 1) for event in _process(run, pid, *key)]
    document = {
        "displayTimeUnit": "ms",
        "otherData": {"world": run.world, "experiment": run.experiment.name},
        "traceEvents": events,
    }
    write_text(path, json.dumps(document, separators=(",", ":"), allow_nan=False) + "\n")


def _processes(run: Run) -> list[tuple[str, int]]:
    """Policies and seeds in the order in which they ran."""
    pairs = run.requests[["policy", "seed"]].drop_duplicates()
    return list(zip(pairs["policy"].tolist(), pairs["seed"].tolist(), strict=True))


def _process(run: Run, pid: int, policy: str, seed: int) -> Iterator[Event]:
    yield _named("process_name", pid, 0, f"{policy}, seed {seed} ({run.world})")
    yield {"ph": "M", "name": "process_sort_index", "pid": pid, "tid": 0, "args": {"sort_index": pid}}
    requests, spans = (
        table[(table["policy"] == policy) & (table["seed"] == seed)] for table in (run.requests, run.spans)
    )
    spans = _in_ns(spans).sort_values(["start", "end", "source", "number", "attempt", "stage", "kind", "place"])
    tid = 0
    for place in _places(run, spans):
        busy = spans[(spans["place"] == place) & (spans["kind"] != Kind.WAIT)].to_dict("records")
        for lane, inside in enumerate(_lanes(busy), 1):
            tid += 1
            name = place.replace(">", " → ")
            yield _named("thread_name", pid, tid, name if lane == 1 else f"{name} ({lane})")
            yield {"ph": "M", "name": "thread_sort_index", "pid": pid, "tid": tid, "args": {"sort_index": tid}}
            for span in inside:
                start, end = span["start"], span["end"]
                event = {"ph": "X", "name": span["kind"], "cat": span["kind"], "pid": pid, "tid": tid}
                yield event | {"ts": start / 1e3, "dur": (end - start) / 1e3, "args": _about(span)}
    for number, span in enumerate(spans[spans["kind"] == Kind.WAIT].to_dict("records")):
        name = f"wait for {span['place'].replace('>', ' → ')}"
        yield from _spanning("wait", name, f"{pid}.wait.{number}", pid, span["start"], span["end"], _about(span))
    for row in requests.sort_values(["arrival_s", "source", "number"]).to_dict("records"):
        start_s, end_s = row["arrival_s"], row["end_s"]
        named = ("source", "number", "model", "outcome", "reason", "attempts", "plan")
        about = {k: row[k] for k in named if not pd.isna(row[k])}
        # An unanswered request has no end; it is shown as a moment, and its outcome says why.
        end_s = start_s if pd.isna(end_s) else end_s
        identity = f"{pid}.{row['source']}.{row['number']}"
        name = f"requests of {row['source']}"
        yield from _spanning("request", name, identity, pid, round(start_s * 1e9), round(end_s * 1e9), about)


def _places(run: Run, spans: pd.DataFrame) -> list[str]:
    """Nodes, then links in both directions, as the testbed lists them; a place without work has no track."""
    testbed = run.experiment.testbed
    assert isinstance(testbed, TestbedSpec)
    links = [link.between for link in testbed.links]
    listed = [*testbed.nodes, *(f"{x}>{y}" for a, b in links for x, y in ((a, b), (b, a)))]
    return [place for place in listed if place in set(spans["place"])]


def _in_ns(spans: pd.DataFrame) -> pd.DataFrame:
    """Whole nanoseconds, so that what follows on something does not overlap it by a rounding error."""
    return spans.assign(
        start=(spans["start_s"] * 1e9).round().astype("int64"),
        end=(spans["end_s"] * 1e9).round().astype("int64"),
    )


def _lanes(spans: Sequence[dict[Any, Any]]) -> list[list[dict[Any, Any]]]:
    """Spans on as few tracks as hold them without overlap: a node has slots, a link has messages in flight.

    Viewers nest what overlaps on one track, and drop what does not nest. `spans` are in order of their start.
    """
    lanes: list[list[dict[Any, Any]]] = []
    for span in spans:
        lane = next((lane for lane in lanes if lane[-1]["end"] <= span["start"]), None)
        if lane is None:
            lanes.append([span])
        else:
            lane.append(span)
    return lanes


def _about(span: dict[Any, Any]) -> dict[str, Any]:
    about = {k: span[k] for k in ("source", "number", "attempt")}
    about |= {} if span["stage"] < 0 else {"stage": span["stage"]}
    return about if pd.isna(span["bytes"]) else about | {"bytes": int(span["bytes"])}


def _named(what: str, pid: int, tid: int, name: str) -> Event:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": {"name": name}}


def _spanning(
    category: str, name: str, identity: str, pid: int, start: int, end: int, about: dict[str, Any]
) -> Iterator[Event]:
    """An asynchronous event, in nanoseconds: it begins and ends."""
    event = {"cat": category, "name": name, "id": identity, "pid": pid, "tid": 0}
    yield event | {"ph": "b", "ts": start / 1e3, "args": about}
    yield event | {"ph": "e", "ts": end / 1e3}
