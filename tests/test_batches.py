"""Batches: a model shaped for several requests answers each as alone, and what that costs reaches the simulator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from isthmus.experiments.execute import Experiment, simulate
from isthmus.real.batches import measure_batches
from isthmus.real.profiler import profile_model
from isthmus.real.session import PartSession, random_input
from isthmus.workloads.errors import InputError
from isthmus.workloads.model import Model, load_model, model_proto
from isthmus.workloads.profile import BatchCost, Profile
from isthmus.workloads.testbed import profile_path


def save(path: Path, nodes: list[onnx.NodeProto], shape: list[int | str], **constants: Any) -> Model:
    """A model from `x` of this shape to `y`."""
    graph = helper.make_graph(
        nodes,
        path.stem,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.array(value), name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return load_model(path)


def fixed(path: Path) -> Model:
    """Its file says a batch of 1, also in two Reshapes that share a target with a third, of weights."""
    nodes = [
        helper.make_node("Reshape", ["x", "target"], ["a"]),
        helper.make_node("MatMul", ["a", "w"], ["b"]),
        helper.make_node("Reshape", ["b", "target"], ["c"]),
        helper.make_node("Reshape", ["v", "target"], ["bias"]),
        helper.make_node("Add", ["c", "bias"], ["d"]),
        helper.make_node("Reshape", ["d", "flat"], ["y"]),
    ]
    rng = np.random.default_rng(0)
    weights = {"w": rng.normal(size=(8, 8)).astype(np.float32), "v": rng.normal(size=32).astype(np.float32)}
    return save(path, nodes, [1, 32], target=[1, 4, 8], flat=[1, -1], **weights)


def dynamic(path: Path) -> Model:
    """A token before each sequence, copied for as many as there are: the batch is a constant that must not stay 1."""
    nodes = [
        helper.make_node("Shape", ["x"], ["batch"], end=1),
        helper.make_node("Concat", ["batch", "inner"], ["shape"], axis=0),
        helper.make_node("Expand", ["token", "shape"], ["tokens"]),
        helper.make_node("Concat", ["tokens", "x"], ["a"], axis=1),
        helper.make_node("Softmax", ["a"], ["y"], axis=1),
    ]
    return save(path, nodes, ["n", 3, 8], inner=[1, 8], token=np.linspace(-1, 1, 8, dtype=np.float32).reshape(1, 1, 8))


def mixing(path: Path) -> Model:
    """The axis that it normalises over has the batch in it as soon as that is more than 1."""
    nodes = [
        helper.make_node("Reshape", ["x", "rows"], ["a"]),
        helper.make_node("Softmax", ["a"], ["b"], axis=0),
        helper.make_node("Reshape", ["b", "back"], ["y"]),
    ]
    return save(path, nodes, [1, 32], rows=[-1, 8], back=[1, 32])


def rigid(path: Path) -> Model:
    return save(path, [helper.make_node("Reshape", ["x", "rows"], ["y"])], [1, 32], rows=[4, 8])


def gathering(path: Path) -> Model:
    return save(path, [helper.make_node("ReduceSum", ["x"], ["y"], keepdims=0)], [1, 32])


def unbatched(path: Path) -> Model:
    return save(path, [helper.make_node("Relu", ["x"], ["y"])], [4, 8])


@pytest.mark.parametrize("make", [lambda path: load_model("squeezenet"), lambda path: load_model("shufflenet"),
                                  fixed, dynamic])  # fmt: skip
def test_each_row_of_a_batch_is_the_answer_to_that_request(make, tmp_path):
    model = make(tmp_path / "net.onnx")
    feeds = [random_input(model, number, seed=3) for number in range(3)]
    single = PartSession(model, model.whole())
    session = PartSession(model, model.whole(), proto=model_proto(model, 3))
    [name] = model.inputs
    [rows] = session.run({name: np.concatenate([feed[name] for feed in feeds])}).values()
    assert len(rows) == 3
    for row, feed in zip(rows, feeds, strict=True):
        [[alone]] = single.run(feed).values()
        assert np.abs(row - alone).max() <= 1e-4 * np.abs(alone).max()
    with pytest.raises(InputError, match=r"was given .* as float32"):
        session.run(feeds[0])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (mixing, "output 'y' is another than that of the same requests alone"),
        (rigid, "net in batches of 2: "),
        (gathering, r"output 'y' is \[\], not \[2\]: no row per request"),
        (unbatched, r"input 'x' has no place for a batch: its first dimension is 4 \(allowed: a first dimension of 1"),
    ],
)
def test_models_that_cannot_be_batched_are_refused(make, said, tmp_path):
    model = make(tmp_path / "net.onnx")
    assert measure_batches(model, [1]) == ()
    with pytest.raises(InputError, match=said):
        measure_batches(model, [2], rounds=1, pace_s=0.0)


def test_sizes_are_measured_each_once_in_order():
    model, steps = load_model("squeezenet"), []
    costs = measure_batches(
        model, [4, 1, 2, 4], rounds=3, pace_s=0.0, progress=lambda done, total, _: steps.append((done, total))
    )
    assert [cost.size for cost in costs] == [2, 4]
    assert all(cost.ratio > 0 and len(cost.samples_s) == 3 and min(cost.samples_s) > 0 for cost in costs)
    assert steps == [(done, 6) for done in range(1, 7)]
    for sizes, rounds, pace_s in [([0], 1, 0.0), ([2], 0, 0.0), ([2], 1, -1.0)]:
        with pytest.raises(InputError, match="cannot time batches"):
            measure_batches(model, sizes, rounds=rounds, pace_s=pace_s)


def test_a_simulated_batch_takes_the_mean_times_the_measured_factor(chain, tmp_path):
    """Without any spread in the profile it is that exactly, on a node three times slower than what was measured."""
    model = load_model(chain)
    profile = profile_model(model, quick=True, rounds=1, runs=1, pace_s=0.0)
    costs = (*measure_batches(model, [2], rounds=2, pace_s=0.0), BatchCost(size=4, ratio=3.25))
    path = profile_path(tmp_path / "profiles", "chain", "host")
    profile.with_batches(costs).save(path)
    again = Profile.load(path)
    assert again.batches == costs
    assert again.with_batches(()) == profile

    batch = {"size": 4, "wait": "10ms"}
    nodes = {"device": {"slowdown": 3, "batch": batch}}
    arrivals = {"kind": "replay", "times": [0.0, 1.0, 1.0, 2.0, 2.0, 2.0, 3.0, 3.0, 3.0, 3.0]}
    fields = {
        "testbed": {"models": {"chain": str(chain)}, "nodes": nodes},
        "workload": [{"node": "device", "model": "chain", "arrivals": arrivals}],
        "policies": ["local"],
    }
    spans = simulate(Experiment.of(fields, tmp_path), tmp_path / "sim").spans
    took_s = spans[spans["kind"] == "compute"].eval("end_s - start_s").to_numpy()
    mean_s, two = 3 * profile.part_s(model, model.whole()), costs[0].ratio
    factors = [1.0, *[two] * 2, *[(two + 3.25) / 2] * 3, *[3.25] * 4]
    assert took_s == pytest.approx(mean_s * np.array(factors), abs=1e-9)

    profile.save(path)
    with pytest.raises(InputError, match=r"nodes\.device\.batch: what a batch of 4 costs was not measured"):
        simulate(Experiment.of(fields, tmp_path), tmp_path / "other")
