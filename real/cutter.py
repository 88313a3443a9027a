"""Cutting a part out of a model's ONNX graph, in memory.

Knows the ONNX format and parts. Must not know runtimes, machines, Ray or time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import onnx

from isthmus.workloads import onnx_file
from isthmus.workloads.errors import InputError
from isthmus.workloads.model import Model, Part, Tensor, members, model_proto, tensor_of
from isthmus.workloads.units import show_bytes

_LIMIT_BYTES = 2**31 - 2**20  # protobuf's limit, less room for the structure


class Graph(NamedTuple):
    """A part as runtimes load it, and the tensors that go in and come out."""

    content: bytes
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]


def graph_of(model: Model, part: Part, proto: onnx.ModelProto | None = None) -> Graph:
    """The part, cut out and serialised. Raises InputError as `cut_out` does."""
    cut = cut_out(model, part, proto)
    inputs, outputs = ({v.name: tensor_of(v) for v in ends} for ends in (cut.graph.input, cut.graph.output))
    return Graph(cut.SerializeToString(), inputs, outputs)


def cut_out(model: Model, part: Part, proto: onnx.ModelProto | None = None) -> onnx.ModelProto:
    """The part as a model of its own: inputs `model.part_inputs(part)`, outputs `model.part_outputs(part)`.

    It carries the weights that it needs and no others. `proto` is `model_proto(model)`, for who cuts several
    parts; it is left as it is. Raises InputError if `part` is of another model, is empty, is not convex, or
    has more weights than fit in one ONNX message (2 GB).
    """
    _check(model, part)
    whole = model_proto(model) if proto is None else proto
    graph = whole.graph
    nodes = [graph.node[index] for index in members(part.layers)]
    used = {name for node in nodes for name in onnx_file.uses(node)}
    made = {name for node in nodes for name in node.output}
    infos = {v.name: v for group in (graph.input, graph.value_info, graph.output) for v in group}
    outputs = model.part_outputs(part)

    cut = onnx.ModelProto(ir_version=whole.ir_version, opset_import=whole.opset_import)
    cut.graph.name = str(part)
    cut.graph.node.extend(nodes)
    cut.graph.input.extend(infos[name] for name in model.part_inputs(part))
    cut.graph.output.extend(infos[name] for name in outputs)
    cut.graph.value_info.extend(infos[name] for name in sorted(made & infos.keys() - set(outputs)))
    cut.graph.initializer.extend(tensor for tensor in graph.initializer if tensor.name in used)
    return cut


def _check(model: Model, part: Part) -> None:
    if part.model != model.name:
        raise InputError(f"{part} is not a part of model {model.name}")
    if not part.layers or part.layers & ~model.everything:
        raise InputError(f"{part} is empty or has layers that the model has not", allowed=str(model.whole()))
    if not model.is_convex(part.layers):
        raise InputError(f"{part} cannot run as one unit: a path leaves it and comes back")
    weights = model.weights_bytes(part)
    if weights > _LIMIT_BYTES:
        problem = f"{part} has {show_bytes(weights)} of weights, which do not fit in one ONNX message"
        raise InputError(problem, where=model.source, allowed="parts of less than 2 GB")
