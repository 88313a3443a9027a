"""New versions of models that come while requests go on: none is lost, none answered by a mix, bad ones are undone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from isthmus.experiments.execute import Experiment
from isthmus.experiments.real_run import run
from isthmus.policies.contract import View
from isthmus.policies.plan import Plan, split
from isthmus.policies.records import Record
from isthmus.real.drive import Driven, run_cell
from isthmus.real.fleet import Fleet
from isthmus.real.node import NodeServer
from isthmus.real.release import release
from isthmus.workloads.errors import InputError, RunFailure
from isthmus.workloads.faults import NodeFault
from isthmus.workloads.model import Model, load_model
from isthmus.workloads.random import stream
from isthmus.workloads.requests import Request
from isthmus.workloads.testbed import Testbed, TestbedSpec
from isthmus.workloads.updates import Update, UpdateSpec, load_update

NODES = {"a": "4ms", "b": "4ms", "server": "2ms"}
LINKS = [{"between": [source, "server"], "rate": "100Mbit", "latency": "2ms"} for source in ("a", "b")]


def other(path: Path, to: Path, change: Callable[[str, np.ndarray], np.ndarray]) -> Path:
    """A model with other weights."""
    model = onnx.load(path)
    for weight in model.graph.initializer:
        value = change(weight.name, numpy_helper.to_array(weight))
        weight.CopyFrom(numpy_helper.from_array(value.astype(np.float32), weight.name))
    onnx.save(model, to)
    return to


@pytest.fixture(scope="module")
def better(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return other(chain, tmp_path_factory.mktemp("better") / "better.onnx", lambda name, w: -w[..., ::-1])


@pytest.fixture(scope="module")
def built(chain: Path, diamond: Path) -> Callable[..., Testbed]:
    """Two models, and two sources with a server; `physical`: each on a host of its own."""

    def build(*, physical: bool = False) -> Testbed:
        where = {n: {"host": f"{n}-1"} if physical else {} for n in NODES}
        nodes = {n: {"service": {"mean": mean}, **where[n]} for n, mean in NODES.items()}
        spec = {"models": {"chain": str(chain), "diamond": str(diamond)}, "nodes": nodes, "links": LINKS}
        return Testbed.build(TestbedSpec.model_validate(spec))

    return build


class Everywhere:
    """In turn every cut, and the whole model on either side."""

    def decide(self, request: Request, view: View) -> Plan:
        model = view.testbed.models[request.model]
        return split(model, (request.number % len(model.cuts),), (view.source, "server"))


def everywhere(model: Model, source: str) -> set[Plan]:
    return {split(model, (cut,), (source, "server")) for cut in range(len(model.cuts))}


def requests(source: str, model: str, count: int, rate: float) -> list[Request]:
    times = stream(1, source, "arrivals").exponential(1 / rate, count).cumsum()
    return [Request(i, source, model, float(t)) for i, t in enumerate(times)]


@dataclass
class Ran:
    records: list[Record]
    updates: list[dict[str, Any]]
    refused: int

    @property
    def versions(self) -> Counter[tuple[str, str | None]]:
        return Counter((r.model, r.version) for r in self.records)


@pytest.fixture(scope="module")
def roll(ray: Any) -> Callable[..., Ran]:
    """Chains asked for at a, diamonds at b, or what `asked` says; an update in the middle."""

    def run_it(
        testbed: Testbed,
        updates: Sequence[Update],
        *,
        count: int = 60,
        rate: float = 20.0,
        asked: Mapping[str, str] | None = None,
        warm: bool = True,
        **more: Any,
    ) -> Ran:
        ran, driven = Ran([], [], 0), list[Driven]()
        sources = asked or {"a": "chain", "b": "diamond"}
        plans = {p for s, m in sources.items() for p in everywhere(testbed.models[m], s)} if warm else set()
        with Fleet(ray, testbed) as fleet:
            fleet.prepare(plans, sources, 1)
            run_cell(
                fleet,
                {source: requests(source, model, count, rate) for source, model in sources.items()},
                {source: Everywhere() for source in sources},
                ran.records.append,
                seed=1,
                updates=updates,
                updated=lambda row: ran.updates.append(dict(row)),
                ended=driven.append,
                **more,
            )
        ran.refused = driven[0].pressure.refused
        return ran

    return run_it


def in_turn(records: Sequence[Record], source: str) -> list[str | None]:
    """The versions that answered a source's requests, as they changed."""
    mine = sorted((r for r in records if r.source == source and r.version), key=lambda r: r.arrival_s)
    return [version for version, _ in groupby(r.version for r in mine)]


def check_whole(ran: Ran, total: int) -> None:
    """Nothing failed, and every answer is that of its version's whole model."""
    assert Counter(r.outcome for r in ran.records) == {"completed": total}
    assert all(r.correct for r in ran.records), max(r.answer_error or 0 for r in ran.records)
    assert all(r.attempts == 1 for r in ran.records)
    assert ran.refused == 0


@pytest.mark.parametrize("physical", [False, True])
def test_an_update_under_load_loses_nothing_and_mixes_nothing(physical, built, better, roll):
    testbed = built(physical=physical)
    old, new = testbed.models["chain"], load_model(better, name="chain")
    ran = roll(testbed, [Update(new, 1.0)])
    check_whole(ran, 120)
    assert in_turn(ran.records, "a") == [old.version, new.version]
    assert in_turn(ran.records, "b") == [testbed.models["diamond"].version]
    assert ran.versions.keys() == {
        ("chain", old.version),
        ("chain", new.version),
        ("diamond", testbed.models["diamond"].version),
    }
    [row] = ran.updates
    assert (row["model"], row["from"], row["to"]) == ("chain", old.version, new.version)
    assert (row["outcome"], row["reason"]) == ("done", None)
    assert 1.0 <= row["began_s"] < row["done_s"]


def test_versions_follow_each_other_at_all_sources(built, chain, better, roll, tmp_path):
    testbed = built()
    old, new = testbed.models["chain"], load_model(better, name="chain")
    third = load_model(other(chain, tmp_path / "third.onnx", lambda name, w: 0.9 * w), name="chain")
    ran = roll(testbed, [Update(new, 0.5), Update(third, 0.6)], asked={"a": "chain", "b": "chain"}, count=80)
    check_whole(ran, 160)
    assert [row["outcome"] for row in ran.updates] == ["done", "done"]
    assert ran.updates[0]["done_s"] <= ran.updates[1]["began_s"]
    for source in "ab":
        assert in_turn(ran.records, source) == [old.version, new.version, third.version]


def test_a_version_that_computes_what_is_no_number_is_undone_before_any_request_meets_it(built, chain, roll, tmp_path):
    testbed = built()

    def spoil(name: str, weight: np.ndarray) -> np.ndarray:
        return weight * np.nan if name == "w3" else weight

    new = load_model(other(chain, tmp_path / "nan.onnx", spoil), name="chain")
    for warm in (True, False):  # cold: nothing is resident that could be checked, but the answers are
        ran = roll(testbed, [Update(new, 0.5)], count=30, warm=warm)
        check_whole(ran, 60)
        assert in_turn(ran.records, "a") == [testbed.models["chain"].version]
        [row] = ran.updates
        assert row["outcome"] == "rolled-back"
        assert "not a number" in row["reason"]


def fragile(path: Path, kernel: float, scales: list[float]) -> Path:
    """A convolution and a multiplication, which ONNX Runtime makes one of where both are in a session."""
    kernels = np.full((4, 1, 1, 1), kernel, np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w"], ["c"]),
            helper.make_node("Mul", ["c", "m"], ["d"]),
            helper.make_node("Flatten", ["d"], ["y"]),
        ],
        "fragile",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 256])],
        [
            numpy_helper.from_array(kernels, "w"),
            numpy_helper.from_array(np.array(scales, np.float32).reshape(4, 1, 1), "m"),
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)
    return path


@pytest.mark.parametrize(
    ("last", "warm", "said"),
    [(1e-38, False, "not the whole model's"), (0.0, False, "a refused a message"), (1e-38, True, "not a number")],
)
def test_a_version_that_only_works_in_one_piece_is_undone(last, warm, said, roll, tmp_path):
    """Between its layers numbers overflow: to infinity, which gives wrong answers, or to none, which nodes refuse.

    Where parts were resident, and so could be checked, no request meets it.
    """
    first = fragile(tmp_path / "first.onnx", 1.0, [1.0] * 4)
    new = load_model(fragile(tmp_path / "second.onnx", 3e38, [1e-38, 1e-38, 1e-38, last]), name="net")
    spec = {
        "models": {"net": str(first)},
        "nodes": {"a": {"service": {"mean": "4ms"}}, "server": {"service": {"mean": "2ms"}}},
        "links": LINKS[:1],
    }
    testbed = Testbed.build(TestbedSpec.model_validate(spec))
    old = testbed.models["net"]
    ran = roll(testbed, [Update(new, 0.5)], asked={"a": "net"}, count=60, rate=25.0, warm=warm)
    assert Counter(r.outcome for r in ran.records) == {"completed": 60}
    [row] = ran.updates
    assert row["outcome"] == "rolled-back"
    assert said in row["reason"]
    assert all(r.correct for r in ran.records if r.version == old.version)
    turns = in_turn(ran.records, "a")
    assert (turns[0], turns[-1]) == (old.version, old.version)
    assert ("not the whole" not in said) or turns == [old.version, new.version, old.version]
    assert not warm or (turns == [old.version] and ran.refused == 0)


@pytest.mark.parametrize("node", ["server", "a"])
def test_a_node_that_goes_and_comes_back_meanwhile_has_the_new_version(node, built, better, roll):
    testbed = built()
    old, new = testbed.models["chain"], load_model(better, name="chain")
    fault = NodeFault(node=node, down=1.02, up=1.5)
    ran = roll(testbed, [Update(new, 1.0)], count=120, rate=15.0, faults=[fault], drain_s=20.0)
    assert sorted(r.number for r in ran.records if r.source == "b") == list(range(120))
    assert sorted(r.number for r in ran.records if r.source == "a") == list(range(120))
    failed = [r for r in ran.records if r.outcome != "completed"]
    assert all(r.outcome == "failed" and node == "a" == r.source for r in failed)
    assert all(r.correct for r in ran.records if r.outcome == "completed")
    assert ran.updates[0]["outcome"] == "done"
    assert in_turn(ran.records, "a") == [old.version, new.version]
    last = max((r for r in ran.records if r.source == "a"), key=lambda r: r.arrival_s)
    assert (last.outcome, last.version) == ("completed", new.version)


def test_the_next_run_begins_with_the_first_version_again(ray, built, better):
    testbed = built()
    old, new = testbed.models["chain"], load_model(better, name="chain")
    with Fleet(ray, testbed) as fleet:
        for _ in range(2):
            records: list[Record] = []
            fleet.prepare(everywhere(old, "a"), {"a": "chain"}, 1)
            run_cell(
                fleet,
                {"a": requests("a", "chain", 30, 20.0)},
                {"a": Everywhere()},
                records.append,
                seed=1,
                updates=[Update(new, 0.3)],
            )
            assert in_turn(records, "a") == [old.version, new.version]
            assert all(r.correct for r in records)


def test_a_node_says_what_is_wrong_with_a_version(built, better, tmp_path):
    """Where it is staged, by a node alone: a part that makes something else than in the whole model; a wrong hash."""
    testbed = built()
    new = load_model(better, name="chain")
    server = NodeServer("a", testbed, {name: {} for name in testbed.models}, "127.0.0.1")
    part = new.span(1, 3)
    made = release(new, [part])
    server.stage(new, made.files, made.probes, seed=1)
    session, load_s = server.residents.session(part, new.version)
    given, expected = made.probes[part]
    [name] = expected
    assert load_s == 0.0
    assert np.allclose(session.run(given)[name], expected[name], rtol=0, atol=1e-5)
    wrong = {part: (given, {name: expected[name] * 1.001})}
    with pytest.raises(RunFailure, match="another 'c' than in the whole model"):
        server.stage(new, made.files, wrong, seed=None)
    with pytest.raises(RunFailure, match="is another on"):
        server.stage(replace(new, sha256="0" * 64), made.files, {}, seed=None)
    server.forget("chain", new.version)
    with pytest.raises(InputError, match=f"has no version {new.version} of chain"):
        server.residents.session(part, new.version)
    server._wire.close()


# The experiment file


def experiment(folder: Path, chain: Path, **update: Any) -> dict[str, Any]:
    (folder / "net.onnx").write_bytes(chain.read_bytes())
    other(chain, folder / "net-v2.onnx", lambda name, w: -w)
    return {
        "testbed": {
            "models": {"net": "net.onnx"},
            "nodes": {"device": {"service": {"mean": "8ms"}}, "cloud": {"service": {"mean": "2ms"}}},
            "links": [{"between": ["device", "cloud"], "rate": "20Mbit", "latency": "5ms"}],
        },
        "workload": [
            {"node": "device", "model": "net", "arrivals": {"kind": "poisson", "rate": "20/s"}, "requests": 40}
        ],
        "policies": ["local", "remote"],
        "updates": [{"model": "net", "to": "net-v2.onnx", "at": "800ms", **update}],
    }


def test_an_experiment_with_an_update(ray, chain, tmp_path):
    asked = Experiment.of(experiment(tmp_path, chain), tmp_path)
    made = run(asked, tmp_path / "real")
    old, new = (load_model(tmp_path / file).version for file in ("net.onnx", "net-v2.onnx"))
    assert set(made.requests["outcome"]) == {"completed"}
    assert made.requests["correct"].all()
    counts = {(r["policy"], r["version"]): r["answers"] for r in made.versions().to_dict("records")}
    assert counts.keys() == {(policy, version) for policy in ("local", "remote") for version in (old, new)}
    assert sum(counts.values()) == 80
    assert [(row["policy"], row["seed"], row["from"], row["to"], row["outcome"]) for row in made.facts["updates"]] == [
        (policy, 1, old, new, "done") for policy in ("local", "remote")
    ]
    assert made.experiment.updates == asked.spec.updates  # the run folder can be understood where it lies


@pytest.mark.parametrize(
    ("update", "said"),
    [
        ({"to": "net.onnx"}, "net.onnx is what net is already"),
        ({"to": "none.onnx"}, "no such file"),
        ({"model": "nett"}, r"updates\[0\].model: unknown model 'nett'; did you mean net"),
        ({"to": "squeezenet"}, r"updates\[0\].to: squeezenet has 6\d layers, not 6|has \d+ layers, not 6"),
        ({"at": "-1s"}, "at"),
    ],
)
def test_what_is_no_new_version_is_refused(update, said, chain, tmp_path):
    with pytest.raises(InputError, match=said):
        _ = Experiment.of(experiment(tmp_path, chain, **update), tmp_path).updates


def test_another_structure_is_no_new_version(chain, diamond, tmp_path):
    now = load_model(chain, name="net")

    def said(change: Callable[[onnx.ModelProto], None]) -> str:
        model = onnx.load(chain)
        change(model)
        onnx.save(model, tmp_path / "other.onnx")
        with pytest.raises(InputError) as caught:
            load_update(UpdateSpec(model="net", to=str(tmp_path / "other.onnx"), at=1.0), now, "updates[0].to")
        return str(caught.value)

    def larger(model: onnx.ModelProto) -> None:
        for value in (*model.graph.input, *model.graph.output):
            dims = value.type.tensor_type.shape.dim
            dims[-1].dim_value *= 2 if len(dims) == 4 else 4
        for dim in model.graph.input[0].type.tensor_type.shape.dim[2:3]:
            dim.dim_value *= 2

    def stride(model: onnx.ModelProto) -> None:
        for node, by in ((1, 1), (2, 4)):
            [strides] = [it for it in model.graph.node[node].attribute if it.name == "strides"]
            strides.ints[:] = [by, by]

    def renamed(model: onnx.ModelProto) -> None:
        model.graph.node[0].output[0] = model.graph.node[1].input[0] = "aa"

    assert "updates[0].to" in said(larger)
    assert "the tensor 'x' as float32 [1, 3, 128, 128], not float32 [1, 3, 64, 64]" in said(larger)
    assert "the tensor 'b' as float32" in said(stride)
    assert "a tensor 'aa', which is new" in said(renamed)


@pytest.mark.slow
@pytest.mark.parametrize("physical", [False, True])
def test_an_update_in_the_middle_of_a_thousand_requests(physical, built, better, roll):
    """The acceptance: two models, 1 000 requests, none failed, versions counted per answer."""
    testbed = built(physical=physical)
    new = load_model(better, name="chain")
    ran = roll(testbed, [Update(new, 12.0)], count=500, rate=20.0)
    check_whole(ran, 1000)
    assert in_turn(ran.records, "a") == [testbed.models["chain"].version, new.version]
    assert ran.updates[0]["outcome"] == "done"
    assert set(ran.versions) == {("chain", testbed.models["chain"].version), ("chain", new.version),
                                 ("diamond", testbed.models["diamond"].version)}  # fmt: skip
