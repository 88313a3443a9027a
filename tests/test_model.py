"""Models, cuts and parts against brute force over all sets of layers of small random graphs."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from isthmus.workloads import zoo
from isthmus.workloads.errors import InputError
from isthmus.workloads.model import Model, Part, layer_set, load_model, members, model_proto

SHAPE = [1, 4]


def save(path: Path, nodes, inputs, outputs, initializers=(), value_info=()) -> Path:
    """Write a float graph; inputs and outputs are names, or (name, shape) pairs."""

    def value(item):
        name, shape = item if isinstance(item, tuple) else (item, SHAPE)
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    graph = helper.make_graph(nodes, "g", [value(i) for i in inputs], [value(o) for o in outputs], list(initializers))
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)
    return path


def random_dag(path: Path, seed: int, layers: int = 7, inputs: int = 1) -> Path:
    """Adds, Relus and Splits; every tensor that nothing uses is an output."""
    rng = np.random.default_rng(seed)
    tensors = [f"x{i}" for i in range(inputs)]
    unused = dict.fromkeys(tensors)
    nodes = []
    for index in range(layers):
        if rng.random() < 0.6:
            op, ins = "Add", [str(t) for t in rng.choice(tensors[-4:], 2)]
        else:
            op, ins = "Relu", [str(rng.choice(tensors[-3:]))]
        nodes.append(helper.make_node(op, ins, [f"t{index}"]))
        for name in ins:
            unused.pop(name, None)
        tensors.append(f"t{index}")
        unused[f"t{index}"] = None
    outputs = [t for t in unused if t.startswith("t")]
    return save(path, nodes, [f"x{i}" for i in range(inputs)], outputs)


def brute_crossing(model: Model, before: int) -> set[str]:
    made = {name: layer.index for layer in model.layers for name in layer.outputs}
    crossing = set()
    for name in model.tensors:
        given = name in model.inputs or before >> made[name] & 1
        needed = name in model.outputs or any(
            name in layer.inputs and not before >> layer.index & 1 for layer in model.layers
        )
        if given and needed:
            crossing.add(name)
    return crossing


def brute_reachable(model: Model) -> np.ndarray:
    n = len(model.layers)
    reach = np.eye(n, dtype=bool)
    for a, b in itertools.product(model.layers, repeat=2):
        reach[a.index, b.index] |= bool(set(a.outputs) & set(b.inputs))
    for k in range(n):
        reach |= np.outer(reach[:, k], reach[k])
    return reach


@pytest.mark.parametrize("seed", range(25))
def test_graph_algebra_against_brute_force(tmp_path, seed):
    model = load_model(random_dag(tmp_path / "m.onnx", seed, inputs=1 + seed % 2))
    reach = brute_reachable(model)
    n = len(model.layers)
    singles = {0, model.everything}
    for layers in range(1 << n):
        inside = [i for i in range(n) if layers >> i & 1]
        outside = [i for i in range(n) if not layers >> i & 1]
        closed = not any(reach[a, b] for a in outside for b in inside)
        assert model.is_downward_closed(layers) == closed
        convex = not any(reach[a, x] and reach[x, b] for a in inside for x in outside for b in inside)
        assert model.is_convex(layers) == convex
        if closed:
            crossing = model.crossing(layers)
            assert set(crossing) == brute_crossing(model, layers)
            if len(crossing) == 1 and layers:
                singles.add(layers)
        part = Part(model.name, layers)
        uses = {t for i in inside for t in model.layers[i].inputs}
        makes = {t for i in inside for t in model.layers[i].outputs}
        rest = {t for i in outside for t in model.layers[i].inputs} | set(model.outputs)
        assert set(model.part_inputs(part)) == uses - makes
        assert set(model.part_outputs(part)) == makes & rest
    assert [cut.before for cut in model.cuts] == sorted(singles, key=int.bit_count)


@pytest.mark.parametrize("name", ["squeezenet", "resnet50", "densenet121"])
def test_blocks_partition_the_model_and_spans_invert(name):
    model = load_model(name)
    assert sum(model.blocks) == model.everything
    assert len(model.blocks) == len(model.cuts) - 1
    assert all(model.blocks)
    for cut in model.cuts[1:-1]:
        assert len(cut.crossing) == 1
        assert cut.bytes == model.tensors[cut.crossing[0]].bytes > 0
        assert model.head(cut.index).layers | model.tail(cut.index).layers == model.everything
        assert model.part_outputs(model.head(cut.index)) == cut.crossing
        assert model.part_inputs(model.tail(cut.index)) == cut.crossing
    for first, last in itertools.combinations(range(0, len(model.cuts), 5), 2):
        part = model.span(first, last)
        assert model.span_of(part) == (first, last)
        assert model.is_convex(part.layers)
    assert model.span_of(Part(name, 0)) is None
    assert model.span_of(Part(name, model.everything ^ model.blocks[3])) is None
    assert model.cuts[0].crossing == model.inputs
    assert model.cuts[-1].crossing == model.outputs
    with pytest.raises(InputError, match="no span from cut 3 to cut 2"):
        model.span(3, 2)


def test_zoo_is_what_the_literature_says():
    inner = {name: len(load_model(name).cuts) - 2 for name in zoo.names() if name not in ("vgg19", "zfnet512")}
    assert inner == {
        "alexnet": 22,
        "densenet121": 87,
        "inception_v1": 24,
        "inception_v2": 29,
        "resnet50": 38,
        "shufflenet": 38,
        "squeezenet": 32,
    }
    resnet = load_model("resnet50")
    assert resnet.flop == pytest.approx(8.2e9, rel=0.01)  # 4.1 G multiply-adds
    assert resnet.parameter_bytes == pytest.approx(4 * 25.6e6, rel=0.01)
    assert resnet.tensors[resnet.outputs[0]].shape == (1, 1000)


def test_models_are_small_values_and_weights_come_from_the_seed():
    model = load_model("squeezenet")
    again = pickle.loads(pickle.dumps(model))
    assert again == model
    assert again.cuts == model.cuts
    assert len(pickle.dumps(model)) < 100_000
    assert hash(model.whole()) == hash(again.whole())
    assert str(Part("m", layer_set([0, 1, 2, 5, 7, 8]))) == "m[0-2,5,7-8]"
    assert list(members(layer_set([3, 1, 8]))) == [1, 3, 8]

    other = load_model("squeezenet", seed=1)
    assert other.sha256 != model.sha256
    weights = [
        {t.name: numpy_helper.to_array(t) for t in model_proto(m).graph.initializer} for m in (model, model, other)
    ]
    for name, values in weights[0].items():
        np.testing.assert_array_equal(values, weights[1][name])
        assert not np.array_equal(values, weights[2][name])


def test_dynamic_batch_constants_and_dead_ends_vanish(tmp_path):
    """Flatten as exporters write it: shape arithmetic that is constant once the batch is."""
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="act"),
        helper.make_node("Shape", ["a"], ["shape"]),
        helper.make_node("Gather", ["shape", "zero"], ["batch"]),
        helper.make_node("Constant", [], ["minus"], value_ints=[-1]),
        helper.make_node("Unsqueeze", ["batch", "axes"], ["batch1"]),
        helper.make_node("Concat", ["batch1", "minus"], ["target"], axis=0),
        helper.make_node("Reshape", ["a", "target"], ["flat"]),
        helper.make_node("Transpose", ["w"], ["wt"]),
        helper.make_node("MatMul", ["flat", "wt"], ["y"], name="act"),
        helper.make_node("Exp", ["a"], ["dead"]),
    ]
    constants = [
        numpy_helper.from_array(np.array(0), "zero"),
        numpy_helper.from_array(np.array([0]), "axes"),
        numpy_helper.from_array(np.ones((5, 6000), np.float32), "w"),
    ]
    path = save(tmp_path / "m.onnx", nodes, [("x", ["N", 3, 2000])], [("y", ["N", 5])], constants)
    model = load_model(path)
    assert [layer.op for layer in model.layers] == ["Relu", "Reshape", "MatMul"]
    assert len({layer.name for layer in model.layers}) == 3
    assert model.tensors["y"].shape == (1, 5)
    assert model.layers[2].flop == 2 * 6000 * 5
    assert model.layers[2].parameter_bytes == 4 * 6000 * 5
    assert [cut.crossing for cut in model.cuts] == [("x",), ("a",), ("flat",), ("y",)]
    proto = model_proto(model)
    onnx.checker.check_model(proto)
    assert {t.name for t in proto.graph.initializer} == {"target", "wt"}


def test_subgraphs_need_what_they_capture(tmp_path):
    branches = {
        f"{kind}_branch": helper.make_graph(
            [helper.make_node(op, ["captured", "b"], ["r"])],
            kind,
            [],
            [helper.make_tensor_value_info("r", TensorProto.FLOAT, SHAPE)],
            [numpy_helper.from_array(np.ones(SHAPE, np.float32), "b")],
        )
        for kind, op in (("then", "Add"), ("else", "Mul"))
    }
    nodes = [
        helper.make_node("Relu", ["x"], ["captured"]),
        helper.make_node("ReduceMax", ["x"], ["m"], keepdims=0),
        helper.make_node("Greater", ["m", "zero"], ["condition"]),
        helper.make_node("If", ["condition"], ["y"], **branches),
    ]
    zero = numpy_helper.from_array(np.float32(0), "zero")
    model = load_model(save(tmp_path / "if.onnx", nodes, ["x"], ["y"], [zero]))
    assert model.layers[3].inputs == ("condition", "captured")
    assert [cut.crossing for cut in model.cuts] == [("x",), ("y",)]
    assert model.part_inputs(Part(model.name, 0b1000)) == ("captured", "condition")


def test_external_weights_are_read_and_are_part_of_the_identity(tmp_path):
    weights = numpy_helper.from_array(np.arange(4000, dtype=np.float32).reshape(4, 1000), "w")
    path = save(tmp_path / "m.onnx", [helper.make_node("MatMul", ["x", "w"], ["y"])], ["x"], ["y"], [weights])
    proto = onnx.load(path)
    proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 1000
    onnx.save(proto, path, save_as_external_data=True, location="m.onnx.data", size_threshold=0)
    model = load_model(path, name="external")
    assert model.name == "external"
    np.testing.assert_array_equal(
        numpy_helper.to_array(model_proto(model).graph.initializer[0]), numpy_helper.to_array(weights)
    )

    data = tmp_path / "m.onnx.data"
    data.write_bytes(bytes(len(data.read_bytes())))
    with pytest.raises(InputError, match="has changed since model external was loaded"):
        model_proto(model)
    data.unlink()
    with pytest.raises(InputError, match=r"m\.onnx: its external weights cannot be read"):
        model_proto(model)


def test_errors_name_the_file_and_what_is_allowed(tmp_path):
    with pytest.raises(InputError, match=r"resnet5: no such file.*did you mean resnet50.*path of an \.onnx"):
        load_model("resnet5")
    with pytest.raises(InputError, match="is not a file"):
        load_model(tmp_path)

    bad = tmp_path / "bad.onnx"
    for content in (b"", b"not a model", b"\xff" * 100):
        bad.write_bytes(content)
        with pytest.raises(InputError, match=r"bad\.onnx: is not an ONNX model"):
            load_model(bad)

    relu = helper.make_node("Relu", ["x"], ["y"])
    with pytest.raises(InputError, match="has no input"):
        load_model(save(bad, [helper.make_node("Constant", [], ["y"], value_floats=[1.0])], [], ["y"]))
    with pytest.raises(InputError, match=r"input 'x' has the dynamic shape \[1, 3, 'H'\].*first dimension"):
        load_model(save(bad, [relu], [("x", ["N", 3, "H"])], [("y", None)]))
    with pytest.raises(InputError, match="uses tensor 'z', which nothing before it makes"):
        load_model(save(bad, [helper.make_node("Add", ["x", "z"], ["y"])], ["x"], ["y"]))
    with pytest.raises(InputError, match="output 'x' does not depend on any layer"):
        load_model(save(bad, [relu], ["x"], ["x", "y"]))
    nodes = [helper.make_node("NonZero", ["x"], ["n"]), helper.make_node("Cast", ["n"], ["y"], to=1)]
    path = save(bad, nodes, ["x"], [("y", None)])
    with pytest.raises(InputError, match=r"bad\.onnx: the shape of tensor 'n' cannot be inferred"):
        load_model(path)
