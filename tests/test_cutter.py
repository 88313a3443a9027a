"""Cut models, joined again, are the whole model."""

from __future__ import annotations

import functools

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from isthmus.real.cutter import cut_out
from isthmus.real.session import PartSession, random_input
from isthmus.workloads.errors import InputError
from isthmus.workloads.model import Model, Part, load_model, model_proto


@functools.cache
def zoo(name: str) -> tuple[Model, onnx.ModelProto]:
    model = load_model(name)
    return model, model_proto(model)


def joined(model: Model, proto: onnx.ModelProto, before: int, optimize: bool) -> np.ndarray:
    """The first output when `before` and the rest run as two parts and only the crossing tensors pass."""
    tensors = random_input(model, 0, seed=1)
    for layers in (before, model.everything & ~before):
        session = PartSession(model, Part(model.name, layers), optimize=optimize, proto=proto)
        tensors |= session.run({name: tensors[name] for name in session.inputs})
    return tensors[model.outputs[0]]


def whole(model: Model, proto: onnx.ModelProto, optimize: bool) -> np.ndarray:
    session = PartSession(model, model.whole(), optimize=optimize, proto=proto)
    return session.run(random_input(model, 0, seed=1))[model.outputs[0]]


@pytest.mark.parametrize("name", ["squeezenet", "shufflenet"])
def test_head_and_tail_are_the_whole(name):
    model, proto = zoo(name)
    optimized, plain = whole(model, proto, True), whole(model, proto, False)
    for cut in model.cuts[1:-1:6]:
        close = joined(model, proto, cut.before, optimize=True)
        assert np.abs(close - optimized).max() <= 1e-5 * np.abs(optimized).max()
        np.testing.assert_array_equal(joined(model, proto, cut.before, optimize=False), plain)


@pytest.mark.parametrize("seed", range(6))
def test_cuts_inside_blocks_with_several_crossing_tensors(seed):
    model, proto = zoo("densenet121")
    rng = np.random.default_rng(seed)
    before = model.cuts[int(rng.integers(len(model.cuts) // 2))].before
    ready = [
        layer.index for layer in model.layers if not before >> layer.index & 1
    ]  # in topological order: adding a layer whose inputs are there keeps the set downward closed
    for index in ready:
        if model.is_downward_closed(before | 1 << index) and rng.random() < 0.7:
            before |= 1 << index
    assert model.is_downward_closed(before)
    np.testing.assert_array_equal(joined(model, proto, before, optimize=False), whole(model, proto, False))


def test_random_dags_cut_anywhere(tmp_path):
    """Every downward-closed set of a graph with branches, a skip and shared weights."""
    weight = numpy_helper.from_array(np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8), "w")
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("MatMul", ["a", "w"], ["c"]),
        helper.make_node("Split", ["c"], ["c1", "c2"], axis=1),
        helper.make_node("Concat", ["c2", "c1"], ["d"], axis=1),
        helper.make_node("Add", ["b", "d"], ["e"]),
        helper.make_node("Mul", ["e", "x"], ["y"]),
    ]
    value = functools.partial(helper.make_tensor_value_info, elem_type=TensorProto.FLOAT, shape=[1, 8])
    graph = helper.make_graph(nodes, "g", [value("x")], [value("y")], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)]), tmp_path / "m.onnx")
    model = load_model(tmp_path / "m.onnx")
    proto = model_proto(model)
    crossings = set()
    for before in range(1, model.everything):
        if model.is_downward_closed(before):
            crossings.add(len(model.crossing(before)))
            np.testing.assert_array_equal(joined(model, proto, before, False), whole(model, proto, False))
    assert max(crossings) >= 4


def test_parts_carry_their_own_weights_only():
    model, proto = zoo("squeezenet")
    part = model.span(3, 9)
    cut = cut_out(model, part, proto)
    onnx.checker.check_model(cut, full_check=True)
    assert [i.name for i in cut.graph.input] == list(model.part_inputs(part))
    assert [o.name for o in cut.graph.output] == list(model.part_outputs(part))
    size = sum(numpy_helper.to_array(t).nbytes for t in cut.graph.initializer)
    assert size == model.weights_bytes(part) < model.parameter_bytes


def test_impossible_parts_and_wrong_feeds_say_so():
    model, proto = zoo("squeezenet")
    with pytest.raises(InputError, match="not a part of model squeezenet"):
        cut_out(model, Part("resnet50", 1), proto)
    with pytest.raises(InputError, match="empty"):
        cut_out(model, Part("squeezenet", 0), proto)
    with pytest.raises(InputError, match=r"squeezenet\[0,2\] cannot run as one unit"):
        cut_out(model, Part("squeezenet", 0b101), proto)

    session = PartSession(model, model.whole(), proto=proto)
    feeds = random_input(model, 0, seed=0)
    (name,) = feeds
    with pytest.raises(InputError, match=rf"was given nothing \(allowed: {name}\)"):
        session.run({})
    with pytest.raises(InputError, match=r"as float64 \[1, 3, 224, 224\] \(allowed: float32"):
        session.run({name: feeds[name].astype(float)})
    with pytest.raises(InputError, match=r"as float32 \[3, 224, 224\]"):
        session.run({name: feeds[name][0]})


def test_the_calling_thread_does_all_the_work():
    model, proto = zoo("squeezenet")
    outputs, cpu_s = PartSession(model, model.whole(), proto=proto).timed(random_input(model, 0, seed=0))
    assert outputs.keys() == set(model.outputs)
    assert cpu_s > 1e-4  # 0.7 GFLOP cannot be free: the work was not done on some other thread
