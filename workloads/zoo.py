"""The nine classical architectures that the `onnx` wheel carries, with weights made up from a seed.

Knows where they lie and how to give them weights. Must not know what becomes of the graph.

The wheel ships the structure only: every weight is a constant filled with one value. Here each gets its own
seeded random values, scaled so that activations neither vanish nor explode (He et al., "Delving deep into
rectifiers", ICCV 2015, eq. 10). The terminal Softmax is dropped, so that the output is the
logits: a saturated softmax would hide every numerical error. The costs are those of the real networks; the
answers mean nothing.
"""

from __future__ import annotations

import hashlib
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from isthmus.workloads.errors import InputError, unknown

_FILES = {
    "alexnet": "light_bvlc_alexnet.onnx",
    "densenet121": "light_densenet121.onnx",
    "inception_v1": "light_inception_v1.onnx",
    "inception_v2": "light_inception_v2.onnx",
    "resnet50": "light_resnet50.onnx",
    "shufflenet": "light_shufflenet.onnx",
    "squeezenet": "light_squeezenet.onnx",
    "vgg19": "light_vgg19.onnx",
    "zfnet512": "light_zfnet512.onnx",
}
_RECIPE = "logits, He weights 1"  # part of the identity of a zoo model: change it when `build` changes
_RESHAPES = ("Reshape", "Unsqueeze")  # what may stand between a weight and the operator that uses it
_KERNELS = {("Conv", 1), ("Gemm", 1)}
_SCALES = {("BatchNormalization", 1), ("BatchNormalization", 4), ("Mul", 1)}
# Of the normalisation that ends a residual branch: 16 sums then make the variance ten times larger, not 2^16.
_BRANCH_SCALE = 0.4


def names() -> tuple[str, ...]:
    """The names that `build` takes."""
    return tuple(_FILES)


def sha256(name: str, seed: int) -> str:
    """Identity of a zoo model: the wheel's file, the recipe for its weights, and the seed."""
    return hashlib.sha256(_path(name).read_bytes() + f"{_RECIPE}, seed {seed}".encode()).hexdigest()


def build(name: str, seed: int | None) -> onnx.ModelProto:
    """The model `name` with the weights of `seed`; with None they are zeros, which is faster.

    It takes an image [1, 3, 224, 224] to logits [1, 1000], in some models [1, 1000, 1, 1], all float32.
    Raises InputError for an unknown name, or when the installed `onnx` has no such file.
    """
    proto = onnx.load(_path(name))
    graph = proto.graph
    shapes = {t.name: tuple(t.dims) for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT}
    lengths = {t.name: t for t in graph.initializer if t.data_type == onnx.TensorProto.INT64}
    for node in graph.node:
        if node.op_type == "ConstantOfShape":
            shapes[node.output[0]] = tuple(numpy_helper.to_array(lengths[node.input[0]]).tolist())

    if graph.node[-1].op_type == "Softmax":
        logits = graph.node[-1].input[0]
        del graph.node[-1], graph.output[:]
        graph.output.append(helper.make_tensor_value_info(logits, onnx.TensorProto.FLOAT, None))

    others = [t for t in graph.initializer if t.name not in shapes]
    nodes = [node for node in graph.node if node.op_type != "ConstantOfShape"]
    inputs = [i for i in graph.input if i.name not in shapes and i.name not in lengths]
    del graph.node[:], graph.initializer[:], graph.input[:]
    graph.node.extend(nodes)
    graph.initializer.extend(others)
    graph.input.extend(inputs)
    users = {tensor: (node, at) for node in nodes for at, tensor in enumerate(node.input)}
    for tensor, shape in shapes.items():
        node, at = users.get(tensor, (None, 0))
        while node is not None and node.op_type in _RESHAPES:
            node, at = users.get(node.output[0], (None, 0))
        if node is None:
            continue
        ends_branch = at == 1 and users.get(node.output[0], (node, 0))[0].op_type == "Sum"
        if seed is None:
            values = np.zeros(shape, np.float32)
        else:
            rng = np.random.default_rng([seed, zlib.crc32(tensor.encode())])
            values = _weights(rng, (node.op_type, at), shape, ends_branch)
        weight = graph.initializer.add(name=tensor, data_type=onnx.TensorProto.FLOAT, dims=shape)
        weight.raw_data = values.tobytes()
    proto.ir_version = 8  # from 4 on, initializers need not be inputs as well
    return proto


def _weights(
    rng: np.random.Generator, role: tuple[str, int], shape: tuple[int, ...], ends_branch: bool
) -> npt.NDArray[np.float32]:
    """`role` is the operator that uses the tensor, and as which of its inputs. Kernels are [out, in, ...]."""
    if role in _KERNELS:
        fan_in = int(np.prod(shape[1:]))
        return rng.standard_normal(shape, np.float32) * np.float32(np.sqrt(2 / fan_in))
    if role in _SCALES:
        scale = rng.uniform(0.8, 1.2, shape).astype(np.float32)
        return scale * np.float32(_BRANCH_SCALE if ends_branch and role[0] == "BatchNormalization" else 1)
    return rng.standard_normal(shape, np.float32) * np.float32(0.1)


def _path(name: str) -> Path:
    if name not in _FILES:
        raise unknown("model", name, _FILES)
    path = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light" / _FILES[name]
    if not path.is_file():
        raise InputError("the installed onnx package does not carry this model", where=path, allowed="onnx >= 1.14")
    return path
