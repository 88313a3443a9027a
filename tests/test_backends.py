"""Backends: each gives the whole model's answer, from parts and among others; what breaks the contract is found."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from onnx import parser

import isthmus
from isthmus.policies.plan import Plan, Stage
from isthmus.policies.records import Record
from isthmus.real.backend import Backend, backend, difference, find, installed, offers
from isthmus.real.check import check_backend
from isthmus.real.drive import run_cell
from isthmus.real.fleet import Fleet
from isthmus.real.node import PAYLOADS
from isthmus.real.onnxruntime_backend import CPU, OnnxRuntime
from isthmus.real.profiler import profile_model
from isthmus.real.session import PartSession, random_input
from isthmus.workloads.backend import BackendSpec
from isthmus.workloads.errors import InputError
from isthmus.workloads.model import Model, load_model, model_proto
from isthmus.workloads.profile import Profile
from isthmus.workloads.requests import Request
from isthmus.workloads.testbed import Testbed, TestbedSpec, profile_path

HERE = [offer.name for offer in offers() if offer.problem is None]
QUICK = [name for name in HERE if name != "executorch"]  # which takes a minute to convert a model
MODELS = ["squeezenet", "shufflenet", "inception_v1", "densenet121"]
LARGE = ["alexnet", "inception_v2", "resnet50", "vgg19", "zfnet512"]


def named(name: str) -> Backend:
    return backend(BackendSpec(name=name))


def test_what_a_developer_installs_is_here():
    assert {"onnxruntime", "openvino", "torch"} <= set(HERE)


@pytest.mark.parametrize("name", QUICK)
def test_a_backend_keeps_the_contract(name):
    isthmus.check_backend(lambda: named(name), models=["squeezenet"])


@pytest.mark.slow
@pytest.mark.skipif("executorch" not in HERE, reason="pip install 'isthmus[executorch]'")
def test_executorch_keeps_the_contract():
    check_backend(lambda: named("executorch"))


def joined(
    model: Model, cuts: list[int], runtimes: list[Backend], given: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The answer of the parts between these cuts, each in a backend of its own."""
    tensors, proto = dict(given), model_proto(model)
    for (first, last), runtime in zip(itertools.pairwise([0, *cuts, len(model.blocks)]), runtimes, strict=True):
        session = PartSession(model, model.span(first, last), proto=proto, backend=runtime)
        tensors |= session.run({name: tensors[name] for name in session.inputs})
    return {name: tensors[name] for name in model.outputs}


def _check_joined(name: str, architecture: str) -> None:
    model, runtime = load_model(architecture), named(name)
    given = random_input(model, 0, seed=1)
    expected = joined(model, [], [named("onnxruntime")], given)
    for cut in (0, len(model.blocks) // 4, len(model.blocks) // 2):
        cuts = [cut] if cut else []
        answer = joined(model, cuts, [runtime] * (len(cuts) + 1), given)
        for tensor, right in expected.items():
            assert difference(answer[tensor], right) <= runtime.tolerance, f"{architecture}, cut {cut}"


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("name", QUICK)
def test_parts_joined_again_are_the_whole(name, architecture):
    _check_joined(name, architecture)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", LARGE)
@pytest.mark.parametrize("name", QUICK)
def test_parts_of_large_models_joined_again_are_the_whole(name, architecture):
    _check_joined(name, architecture)


@pytest.mark.parametrize("order", list(itertools.permutations(["onnxruntime", "openvino", "torch"]))[::2])
def test_parts_in_different_backends_are_the_whole(order):
    model = load_model("squeezenet")
    given = random_input(model, 0, seed=1)
    [(tensor, expected)] = joined(model, [], [named("onnxruntime")], given).items()
    third = len(model.blocks) // 3
    answer = joined(model, [third, 2 * third], [named(name) for name in order], given)
    assert difference(answer[tensor], expected) <= 1e-5


# The kit finds what is wrong


class Broken(OnnxRuntime):
    """What a backend's author might get wrong: ONNX Runtime, and one thing amiss."""

    def load(self, graph, *, threads, optimize):
        loaded = super().load(graph, threads=threads, optimize=optimize)
        return Wrapped(lambda feeds: self.ran(loaded, feeds))

    def ran(self, loaded, feeds):
        return loaded.run(feeds)


class Wrapped:
    def __init__(self, run):
        self.run = run


class Inexact(Broken):
    def ran(self, loaded, feeds):
        return [v * v.dtype.type(1.001) if v.dtype == np.float32 else v for v in loaded.run(feeds)]


class Doubles(Broken):
    def ran(self, loaded, feeds):
        return [v.astype(np.float64) for v in loaded.run(feeds)]


class Backwards(Broken):
    def ran(self, loaded, feeds):
        return loaded.run(feeds)[::-1]


class Fused(Broken):
    """It optimises when it was told not to, and says that it is exact."""

    def load(self, graph, *, threads, optimize):
        return super().load(graph, threads=threads, optimize=True)


class Scribbles(Broken):
    def ran(self, loaded, feeds):
        values = loaded.run(feeds)
        for value in feeds.values():
            if value.flags.writeable:
                value[:] = np.roll(value, 1)
        return values


class Reuses(Broken):
    """It answers in memory that the next answer overwrites."""

    def load(self, graph, *, threads, optimize):
        loaded = OnnxRuntime.load(self, graph, threads=threads, optimize=optimize)
        memory: dict[int, np.ndarray] = {}

        def run(feeds):
            for number, value in enumerate(loaded.run(feeds)):
                np.copyto(memory.setdefault(number, np.empty_like(value)), value)
            return list(memory.values())

        return Wrapped(run)


class Forgets(Broken):
    """Answers differ from run to run."""

    exact = False
    runs = 0

    def ran(self, loaded, feeds):
        self.runs += 1
        return [v * v.dtype.type(1 + self.runs % 3 * 1e-6) if v.dtype == np.float32 else v for v in loaded.run(feeds)]


class Shares(Broken):
    """Threads that call at the same time meet in one place."""

    feeds = None

    def ran(self, loaded, feeds):
        self.feeds = feeds
        loaded.run(feeds)  # meanwhile others come
        return loaded.run(self.feeds)


class Elsewhere(Broken):
    """It works on a thread of its own, and says that its clock is that of the caller's."""

    def ran(self, loaded, feeds):
        answer = []
        worker = threading.Thread(target=lambda: answer.extend(loaded.run(feeds)))
        worker.start()
        worker.join()
        return answer


class Keeps(Broken):
    kept: list[object] = []  # noqa: RUF012

    def load(self, graph, *, threads, optimize):
        self.kept.append(bytearray(graph))
        return super().load(graph, threads=threads, optimize=optimize)


class Crashes(Broken):
    def load(self, graph, *, threads, optimize):
        if graph.startswith(b"not"):
            raise KeyError("graph")
        return super().load(graph, threads=threads, optimize=optimize)


class Late(Broken):
    """It finds out when it runs that it does not take halves."""

    def ran(self, loaded, feeds):
        if any(value.dtype == np.float16 for value in feeds.values()):
            raise TypeError("halves")
        return loaded.run(feeds)


class Nameless(Broken):
    version = ""


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Inexact, "declared tolerance is 1.0e-05"),
        (Doubles, "is float64"),
        (Backwards, "'y' is int64"),
        (Fused, "not `exact`"),
        (Scribbles, "inputs are changed"),
        (Reuses, "an answer changes when other requests follow|another answer the second time"),
        (Forgets, "another answer the second time"),
        (Shares, "threads that call at the same time"),
        (Elsewhere, "it is `wall`"),
        (Keeps, "closed and dropped"),
        (Crashes, "not ONNX is refused with .*, not InputError"),
        (Late, "is loaded, and then does not run: .*halves"),
        (Nameless, "version is empty"),
    ],
)
def test_the_kit_finds_what_breaks_the_contract(kind, said):
    with pytest.raises(AssertionError, match=said):
        check_backend(kind)


# Refusals


def test_an_execution_provider_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(InputError, match="unknown execution provider 'CUDAProvider'") as caught:
        backend(BackendSpec.model_validate({"name": "onnxruntime", "providers": ["CUDAProvider", CPU]}))
    assert CPU in str(caught.value.allowed)


@pytest.mark.skipif("AzureExecutionProvider" not in OnnxRuntime.devices(), reason="every package has others")
def test_what_a_provider_cannot_run_goes_to_the_cpu_only_where_that_is_named():
    model = load_model("squeezenet")
    with pytest.raises(InputError, match="cannot load it on AzureExecutionProvider"):
        PartSession(model, model.whole(), backend=OnnxRuntime(["AzureExecutionProvider"]))
    session = PartSession(model, model.whole(), backend=OnnxRuntime(["AzureExecutionProvider", CPU]))
    assert session.clock == "wall"
    assert session.run(random_input(model, 0, seed=0)).keys() == set(model.outputs)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("openvin", "unknown backend 'openvin'; did you mean openvino"),
        ({"name": "openvino", "device": "GPU.7"}, "unknown device of OpenVINO 'GPU.7'"),
        ({"name": "openvino", "threads": 2}, "unexpected keyword argument 'threads'.*allowed: device, options"),
        ({"name": "torch", "device": "cuda:9"}, "unknown device of PyTorch 'cuda:9'"),
        ("json:nothing", "cannot be loaded: AttributeError"),
        ("nothing_of_the_sort:Class", "cannot be loaded: ModuleNotFoundError"),
        ("math:pi", "is no class or function"),
    ],
)
def test_a_wrong_backend_is_one_line(spec, said):
    with pytest.raises(InputError, match=said) as caught:
        backend(BackendSpec.model_validate(spec))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", QUICK)
def test_an_operator_that_a_backend_does_not_have_is_named(name, tmp_path):
    text = '<ir_version: 8, opset_import: ["" : 17]> odd (float[1,4] x) => (float[1,4] y) { y = Unheard (x) }'
    with pytest.raises(InputError, match="Unheard"):
        named(name).load(parser.parse_model(text).SerializeToString(), threads=1, optimize=True)


def test_wrong_inputs_are_refused_alike_in_every_backend():
    model = load_model("squeezenet")
    for name in QUICK:
        session = PartSession(model, model.whole(), backend=named(name))
        good = random_input(model, 0, seed=0)
        [tensor] = good
        for bad in ({}, {tensor: good[tensor].astype(np.float64)}, {tensor: good[tensor][:, :1]}):
            with pytest.raises(InputError, match=r"squeezenet\[.*was given"):
                session.run(bad)


# By name


def test_backends_of_other_packages_are_found(tmp_path, monkeypatch):
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[isthmus.backends]\ntheirs = their_module:Theirs\n")
    (tmp_path / "their_module.py").write_text(
        "from isthmus.real.onnxruntime_backend import OnnxRuntime\n"
        "class Theirs(OnnxRuntime):\n"
        "    def __init__(self, colour):\n"
        "        super().__init__()\n"
        "        self.device = colour\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    installed.cache_clear()
    try:
        assert backend(BackendSpec.model_validate({"name": "theirs", "colour": "red"})).device == "red"
        assert find("their_module:Theirs") is find("theirs")
        (info / "entry_points.txt").write_text("[isthmus.backends]\nopenvino = their_module:Theirs\n")
        installed.cache_clear()
        with pytest.raises(InputError, match="'openvino' is claimed twice"):
            installed()
    finally:
        installed.cache_clear()
        sys.modules.pop("their_module", None)


def test_a_node_names_its_backend_in_short_or_at_length(chain):
    fields = {"name": "onnxruntime", "providers": [CPU], "options": {"arena_extend_strategy": "kSameAsRequested"}}
    nodes = {"a": {"backend": "openvino"}, "b": {"backend": fields}, "c": {}}
    spec = TestbedSpec.model_validate(
        {"models": {"net": str(chain)}, "nodes": {n: {"service": {"mean": 1}, **it} for n, it in nodes.items()}}
    )
    assert TestbedSpec.model_validate_json(spec.model_dump_json()) == spec
    testbed = pickle.loads(pickle.dumps(Testbed.build(spec)))
    assert [str(node.backend) for node in testbed.nodes.values()] == ["openvino", json.dumps(fields), "onnxruntime"]
    keys = [node.backend.key for node in testbed.nodes.values()]
    assert (keys[0], keys[2]) == ("openvino", "")
    assert keys[1].startswith("onnxruntime-")


# Profiles


@pytest.fixture(scope="module")
def measured(chain: Path) -> Profile:
    return profile_model(load_model(chain), rounds=2, pace_s=0.0, backend=BackendSpec(name="openvino"))


def test_a_profile_says_with_what_it_was_measured(measured, tmp_path):
    assert (measured.backend, measured.provider, measured.clock) == ("openvino", "CPU", "cpu")
    assert measured.backend_version == named("openvino").version
    measured.save(tmp_path / "profile.json")
    assert Profile.load(tmp_path / "profile.json").measured_with == BackendSpec(name="openvino")


def test_a_node_takes_the_profile_of_its_backend_and_no_other(measured, chain, tmp_path):
    def build(**node: object) -> Testbed:
        spec = {"models": {"chain": str(chain)}, "nodes": {"device": node}}
        return Testbed.build(TestbedSpec.model_validate(spec), folder=tmp_path)

    store = tmp_path / "profiles"
    measured.save(profile_path(store, "chain", "host", BackendSpec(name="openvino")))
    assert build(backend="openvino").service("device", "chain").profile.model_dump() == measured.model_dump()
    with pytest.raises(InputError, match=r"no profile of 'chain' on 'host'.*isthmus profile"):
        build()
    with pytest.raises(InputError, match=r"no profile .* with torch.*--backend 'torch'"):
        build(backend="torch")
    measured.save(profile_path(store, "chain", "host"))
    with pytest.raises(InputError, match="measured with openvino, and a node that takes it computes with onnxruntime"):
        build()


def isthmus_command(*arguments: str, cwd: Path) -> dict | list:
    command = [sys.executable, "-c", "from isthmus.experiments.cli import main; main()", *arguments, "--json"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / ".src")}
    return json.loads(subprocess.run(command, cwd=cwd, capture_output=True, check=True, env=environment).stdout)


def test_the_command_line_lists_backends_and_profiles_with_them(chain, tmp_path):
    rows = {row["name"]: row for row in isthmus_command("backends", cwd=tmp_path)}
    assert CPU in rows["onnxruntime"]["devices"]
    assert rows["torch"]["version"] == named("torch").version
    asked = ("profile", str(chain), "--quick", "--pace", "0s", "--backend", "{name: openvino, device: CPU}")
    said = isthmus_command(*asked, cwd=tmp_path)
    assert (said["backend"], said["provider"], said["clock"]) == ("openvino", "CPU", "cpu")
    assert Profile.load(tmp_path / said["file"]).backend_arguments == {"device": "CPU"}
    [row] = isthmus_command("bench", "backends", "--model", str(chain), "--backend", "openvino", cwd=tmp_path)
    assert row["error"] <= row["tolerance"]


# In an emulated run


class ThreeNodes:
    """The chain in three parts, on three nodes."""

    def decide(self, request: Request, view: object) -> Plan:
        model = view.testbed.models[request.model]
        parts = [model.span(0, 2), model.span(2, 4), model.span(4, len(model.blocks))]
        return Plan(tuple(Stage(n, p) for n, p in zip(("device", "edge", "cloud"), parts, strict=True)))


def test_the_nodes_of_one_plan_run_different_backends(ray, synthetic, chain):
    names = {"device": "onnxruntime", "edge": "openvino", "cloud": "torch"}
    testbed = synthetic({n: {"service": {"mean": "5ms"}, "backend": name} for n, name in names.items()})
    requests = [Request(number, "device", "chain", 0.1 * number) for number in range(2 * PAYLOADS)]
    records: list[Record] = []
    with Fleet(ray, testbed) as fleet:
        fleet.prepare([ThreeNodes().decide(requests[0], _View(testbed))], {"device": "chain"}, 1)
        run_cell(fleet, {"device": requests}, {"device": ThreeNodes()}, records.append, seed=1)
    assert Counter(r.outcome for r in records) == {"completed": len(requests)}
    assert all(r.correct for r in records)

    # Each backend rounds in its own way: that these ran, and on these nodes, the errors tell to the last bit.
    model = testbed.models["chain"]
    for record in records:
        given = random_input(model, record.number % PAYLOADS, 1)
        [(tensor, expected)] = joined(model, [], [named("onnxruntime")], given).items()
        answer = joined(model, [2, 4], [named(name) for name in names.values()], given)[tensor]
        assert record.answer_error == pytest.approx(difference(answer, expected), rel=1e-6)
    assert max(r.answer_error for r in records) > 0


class _View:
    def __init__(self, testbed: Testbed) -> None:
        self.testbed = testbed


def test_a_backend_that_a_node_cannot_have_ends_the_run_with_one_line(ray, synthetic):
    testbed = synthetic({"device": {"service": {"mean": "5ms"}, "backend": {"name": "openvino", "device": "TPU"}}}, [])
    whole = testbed.models["chain"].whole()
    with Fleet(ray, testbed) as fleet, pytest.raises(InputError, match="unknown device of OpenVINO 'TPU'"):
        fleet.prepare([Plan((Stage("device", whole),))], {"device": "chain"}, 1)
