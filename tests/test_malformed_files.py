"""Files that are broken, or made to break: each is refused in one line or taken, soon, and without much memory."""

from __future__ import annotations

import copy
import json
import math
import resource
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from isthmus.experiments.execute import Experiment, simulate
from isthmus.experiments.run_folder import Run
from isthmus.experiments.traces import find_traces
from isthmus.policies.plan import Plan, compile_plan, split
from isthmus.workloads.errors import InputError
from isthmus.workloads.model import load_model, model_proto
from isthmus.workloads.overheads import Overheads
from isthmus.workloads.profile import Profile
from isthmus.workloads.testbed import Testbed

EXAMPLES = 500
PATIENCE_S = 2.0
MEMORY_BYTES = 300 * 2**20


@dataclass(frozen=True)
class Kind:
    """A kind of file: a valid one, and what reads it. `data`: what it holds, where that is a tree."""

    name: str
    content: bytes = field(repr=False)
    read: Callable[[Path], object] = field(repr=False)
    data: Any = field(default=None, repr=False)


def _profile(path: Path) -> object:
    return Profile.load(path).span_s()


def _plan(path: Path) -> object:
    plan = Plan.from_json(path.read_text(errors="replace"))
    model = load_model("squeezenet")
    return compile_plan(plan, model, "device", BED), str(plan)


def _testbed(path: Path) -> object:
    return Testbed.load(path).nominal.rates


def _experiment(path: Path) -> object:
    experiment = Experiment.load(path)
    experiment.check_policies()
    return experiment.build_testbed(need_profiles=False)


def _overheads(path: Path) -> object:
    return Overheads.find(path.parent)


def _run(path: Path) -> object:
    run = Run.load(path.parent)
    return run.world, run.experiment.seeds


def _model(path: Path) -> object:
    model = load_model(path)
    return len(model.cuts), model_proto(model).ByteSize()


BED_SPEC: dict[str, Any] = {
    "models": {"net": "squeezenet"},
    "nodes": {
        "device": {"service": {"mean": "20ms"}, "power": {"busy": "2W"}, "count": None},
        "edge": {"service": {"mean": "5ms", "distribution": "gamma", "spread": 0.5}, "slots": 2, "memory": "512MB"},
        "cloud": {"service": {"mean": "2ms"}, "batch": {"size": 4, "cost": [[1, 1.0], [4, 2.5]]},
                  "speed": [["0s", 1], ["5s", 0.5]], "period": "9s"},
    },
    "links": [
        {"between": ["device", "edge"], "rate": [["0s", "80Mbit"], ["5s", "20Mbit"]], "period": "9s", "latency": "4ms"},
        {"between": ["edge", "cloud"], "rate": {"kind": "markov", "states": [["20Mbit", "10s"], ["4Mbit", "3s"]]},
         "jitter": "2ms"},
    ],
    "cluster": {"address": "10.0.0.1:6379", "hosts": {"cam": {"address": "10.0.0.5"}}},
}  # fmt: skip
EXPERIMENT: dict[str, Any] = {
    "name": "small",
    "testbed": BED_SPEC,
    "workload": [
        {"node": "device", "model": "net", "arrivals": {"kind": "poisson", "rate": "8/s"}, "requests": 20,
         "deadline": "150ms"}
    ],
    "policies": ["local", {"fixed": {"cut": 2, "server": "edge"}}],
    "seeds": [1, 2],
    "faults": [{"node": "edge", "down": "1s", "up": "2s"}],
}  # fmt: skip
BED = Testbed.build(Experiment.of(EXPERIMENT).testbed_spec)


def _small_model() -> onnx.ModelProto:
    generator = np.random.default_rng(0)
    kernels = [generator.normal(0, 0.2, (8, channels, 3, 3)).astype(np.float32) for channels in (3, 8)]
    weights = [numpy_helper.from_array(kernel, f"w{i}") for i, kernel in enumerate(kernels)]
    shape = numpy_helper.from_array(np.array([1, -1]), "shape")
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["a"], strides=[2, 2], pads=[1, 1, 1, 1], name="first"),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "w1"], ["c"], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Reshape", ["c", "shape"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes, "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 16, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [*weights, shape],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    folder = tmp_path_factory.mktemp("valid")
    session = {"first": 0, "last": 1, "kind": "block", "load_s": 0.01, "weights_bytes": 1000, "mean_s": 0.01,
               "samples_s": [0.01, 0.011, 0.0102]}  # fmt: skip
    profile = {
        "model": "net", "sha256": "0" * 64, "backend": "onnxruntime", "backend_version": "1", "provider": "CPU",
        "machine": {"label": "host", "cpu": "x", "cores": 2, "platform": "p", "python": "3"}, "threads": 1,
        "date": "2026-01-01", "pace_s": 0.02, "provenance": "measured", "session_s": 0.001,
        "blocks": [{"seconds": 0.01, "source": "measured"}] * 2, "cuts": [{}, {"enter_s": 0.001}, {}],
        "sessions": [session], "batches": [{"size": 2, "ratio": 1.5, "samples_s": [0.1]}],
    }  # fmt: skip
    overheads = {"measured": "now", "codecs": {"fp16": {"encode_s": 0, "encode_s_per_byte": 1e-9, "decode_s": 0,
                 "decode_s_per_byte": 1e-9}}, "decide_s": {"local": 1e-5}, "wake_s": 1e-4}  # fmt: skip
    simulate(Experiment.of(EXPERIMENT), folder / "run")
    run = json.loads((folder / "run/run.json").read_text())
    plan = json.loads(split(load_model("squeezenet"), (4, 9), ("device", "edge", "cloud")).to_json())

    def trace(content: str, name: str) -> Kind:
        return Kind(name, content.encode(), lambda path: [t.rate.finish_s(0.0, 1e5) for t in find_traces(path)])

    def arrivals(path: Path) -> object:
        from isthmus.workloads.arrivals import read_times

        return read_times(path, "time")

    every = [
        Kind("profile.json", json.dumps(profile).encode(), _profile, profile),
        Kind("plan.json", json.dumps(plan).encode(), _plan, plan),
        Kind("overheads.json", json.dumps(overheads).encode(), _overheads, overheads),
        Kind("run.json", json.dumps(run).encode(), _run, run),
        Kind("testbed.yaml", yaml.safe_dump(BED_SPEC).encode(), _testbed, BED_SPEC),
        Kind("experiment.yaml", yaml.safe_dump(EXPERIMENT).encode(), _experiment, EXPERIMENT),
        Kind("model.onnx", _small_model().SerializeToString(), _model),
        trace("t_s,rate\n0,20\n1,4.5\n2.5,30\n", "trace.csv"),
        trace("0 20\n1 4.5\n2.5 30\n", "pairs.txt"),
        trace("1\n3\n3\n10\n12\n", "mahimahi.txt"),
        Kind("arrivals.csv", b"time,what\n0.1,a\n0.2,b\n", arrivals),
    ]
    return {kind.name: kind for kind in every}


def test_what_is_valid_is_taken(kinds, tmp_path):
    for kind in kinds.values():
        path = tmp_path / kind.name
        path.write_bytes(kind.content)
        kind.read(path)


def _deep(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


OTHERS: list[Any] = [None, True, "x", "", -1, 0, 10**400, 2**63, 1e308, 1e-308, -1e308, math.nan, math.inf, 0.5]
OTHERS += [[], {}, [[]], {"a": 1}, [1] * 1000, _deep(100)]
OTHERS += ["9" * 400, "é" * 50, "1e400s", "0Mbit", "../../etc/passwd", "\0", "2024-13-45"]


def _places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inside = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path, *(place for key, value in inside for place in _places(value, (*path, key)))]


def _changed(data: Any, place: tuple[Any, ...], value: Any, how: str) -> Any:
    if not place:
        return value
    data = copy.deepcopy(data)
    at = data
    for key in place[:-1]:
        at = at[key]
    match how:
        case "delete":
            del at[place[-1]]
        case "add" if isinstance(at, dict):
            at["another"] = value
        case _:
            at[place[-1]] = value
    return data


def _as_text(kind: Kind, data: Any) -> bytes:
    if kind.name.endswith("json"):
        return json.dumps(data).encode()
    return yaml.safe_dump(data, allow_unicode=True).encode()


@st.composite
def broken(draw: st.DrawFn, kinds: dict[str, Kind]) -> tuple[str, bytes]:
    name = draw(st.sampled_from(sorted(kinds)))
    kind = kinds[name]
    if kind.data is not None and draw(st.booleans()):
        data = kind.data
        for _ in range(draw(st.integers(1, 2))):
            place = draw(st.sampled_from(_places(data)))
            how = draw(st.sampled_from(["put", "put", "delete", "add"]))
            data = _changed(data, place, draw(st.sampled_from(OTHERS)), how)
        return name, _as_text(kind, data)
    content = bytearray(kind.content)
    for _ in range(draw(st.integers(1, 4))):
        if not content:
            break
        at = draw(st.integers(0, len(content) - 1))
        match draw(st.sampled_from(["flip", "cut", "end", "double", "other"])):
            case "flip":
                content[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del content[at : at + draw(st.integers(1, 60))]
            case "end":
                del content[at:]
            case "double":
                content[at:at] = content[at : at + 60]
            case "other":
                others = [b"9" * 400, b"[" * 2000, b"\xff\xff\xff\xff\x7f", b"nan", b"-", b"\0"]
                content[at : at + 1] = draw(st.sampled_from(others))
    return name, bytes(content)


def _refused_or_taken(kind: Kind, path: Path) -> str:
    """What is said; nothing but an error of ours may come, and soon."""
    began = time.thread_time()
    try:
        kind.read(path)
        said = ""
    except InputError as error:
        said = str(error) or "nothing"
        assert "\n" not in said, said
    assert time.thread_time() - began < PATIENCE_S, kind.name
    return said


def test_broken_files_are_refused_or_taken(kinds, tmp_path_factory):
    outcomes: Counter[tuple[str, bool]] = Counter()
    folder = tmp_path_factory.mktemp("broken")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @given(data=st.data())
    @settings(max_examples=EXAMPLES)
    def one(data: st.DataObject) -> None:
        name, content = data.draw(broken(kinds))
        kind = kinds[name]
        path = folder / kind.name
        path.write_bytes(content)
        outcomes[kind.name, bool(_refused_or_taken(kind, path))] += 1

    one()
    assert all(outcomes[name, True] > 5 for name in kinds)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < MEMORY_BYTES
