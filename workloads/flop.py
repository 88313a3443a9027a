"""How much arithmetic an ONNX node does. Knows operators and shapes; nothing of weights, machines or time.

One multiply-add counts as two operations. What dominates (convolutions, matrix products, recurrences) is
counted exactly, without biases; all else is an estimate per element, and moving data counts as nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod

import onnx

Shape = tuple[int, ...]
Count = Callable[[Mapping[str, object], Sequence[Shape], Shape], int]


def _convolution(weight: int) -> Count:
    """Weight at input `weight`, as [out channels, in channels / groups, *kernel]."""
    return lambda _, inputs, output: 2 * prod(output) * prod(inputs[weight][1:])


def _transposed_convolution(_: Mapping[str, object], inputs: Sequence[Shape], output: Shape) -> int:
    """Weight as [in channels, out channels / groups, *kernel]: every input element meets all of its row."""
    return 2 * prod(inputs[0]) * prod(inputs[1][1:])


def _gemm(attributes: Mapping[str, object], inputs: Sequence[Shape], output: Shape) -> int:
    return 2 * prod(output) * inputs[0][0 if attributes.get("transA") else 1]


def _matrix_product(_: Mapping[str, object], inputs: Sequence[Shape], output: Shape) -> int:
    return 2 * prod(output) * (inputs[0][-1] if inputs[0] else 1)


def _recurrence(_: Mapping[str, object], inputs: Sequence[Shape], output: Shape) -> int:
    """Input [steps, batch, features]; weights W and R hold every gate of every direction once."""
    return 2 * prod(inputs[0][:2]) * (prod(inputs[1]) + prod(inputs[2]))


def _window(attributes: Mapping[str, object], inputs: Sequence[Shape], output: Shape) -> int:
    kernel = attributes.get("kernel_shape", ())
    return prod(output) * (prod(kernel) if isinstance(kernel, list) else 1)


def _neighbours(attributes: Mapping[str, object], inputs: Sequence[Shape], output: Shape) -> int:
    size = attributes.get("size", 1)
    return prod(output) * (2 * size + 3 if isinstance(size, int) else 1)


def _per_input(_: Mapping[str, object], inputs: Sequence[Shape], output: Shape) -> int:
    return prod(inputs[0])


def _per_output(operations: int) -> Count:
    return lambda _, inputs, output: operations * prod(output)


# fmt: off
_MOVES = (
    "Cast", "Concat", "DepthToSpace", "Dropout", "Expand", "Flatten", "Gather", "GatherElements", "GatherND",
    "Identity", "Pad", "Reshape", "Shape", "Size", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile",
    "Transpose", "Unsqueeze",
)
_REDUCTIONS = (
    "ArgMax", "ArgMin", "GlobalAveragePool", "GlobalMaxPool", "ReduceL1", "ReduceL2", "ReduceMax",
    "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum",
)
_TRANSCENDENTAL = (
    "Elu", "Erf", "Exp", "Gelu", "Log", "Mish", "Pow", "Selu", "Sigmoid", "Softplus", "Sqrt", "Swish", "Tanh",
)
_NORMALISATIONS = (
    "GroupNormalization", "InstanceNormalization", "LayerNormalization", "LogSoftmax", "Softmax",
)
# fmt: on

_COUNTS: dict[str, Count] = {
    "Conv": _convolution(1),
    "ConvInteger": _convolution(1),
    "QLinearConv": _convolution(3),
    "ConvTranspose": _transposed_convolution,
    "Gemm": _gemm,
    "MatMul": _matrix_product,
    "MatMulInteger": _matrix_product,
    "QLinearMatMul": _matrix_product,
    "LSTM": _recurrence,
    "GRU": _recurrence,
    "RNN": _recurrence,
    "MaxPool": _window,
    "AveragePool": _window,
    "LRN": _neighbours,
    "BatchNormalization": _per_output(2),
    **dict.fromkeys(_MOVES, _per_output(0)),
    **dict.fromkeys(_REDUCTIONS, _per_input),
    **dict.fromkeys(_TRANSCENDENTAL, _per_output(4)),
    **dict.fromkeys(_NORMALISATIONS, _per_output(5)),
}
_OTHER = _per_output(1)


def node_flop(node: onnx.NodeProto, inputs: Sequence[Shape], output: Shape) -> int:
    """Operations of one run of `node`, given the shapes of its inputs (in order) and of its first output.

    An operator that is not in the table counts one operation per output element.
    """
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute if not a.HasField("g")}
    return _COUNTS.get(node.op_type, _OTHER)(attributes, inputs, output)
