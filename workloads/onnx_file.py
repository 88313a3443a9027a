"""Reading an ONNX file and bringing its graph into the one form that the rest works with.

Knows the ONNX format. Must not know cuts, parts, profiles or machines.

The form (`normalise`): no local functions; static shapes with batch 1, or a batch that was asked for; every
tensor's type known; whatever depends on constants only is an initializer; every node leads to an output, has a
unique name, and finds its inputs before it; no initializer is also an input.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import external_data_helper, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from isthmus.workloads.errors import InputError

# Not folded although their inputs are constants: random ones, and the marks that tell a runtime to use int8.
# fmt: off
_NEVER_FOLDED = frozenset((
    "Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike",
    "DequantizeLinear", "QuantizeLinear",
))
# fmt: on
_NOT_LARGER = frozenset(("Compress", "Constant", "Identity", "NonZero", "Unique"))  # than what they are made from
_MOST_FOLDED_BYTES = 2**28
_MOST_NODES = 1_000_000
_SMALL = 1024  # elements: constants up to this size may be shapes, and shape inference has to see their values


def read(path: Path) -> tuple[onnx.ModelProto, str]:
    """The model with its weights, and the sha256 over the file and its external data files.

    Raises InputError if a file is missing or is not ONNX.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=path) from None
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(content)
    except DecodeError:
        raise InputError("is not an ONNX model", where=path) from None
    if not proto.graph.node or not proto.opset_import:
        raise InputError("is not an ONNX model, or an empty one", where=path)
    digest = hashlib.sha256(content)
    try:
        for location in sorted(_external_files(proto)):
            with beside(path, location).open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
        external_data_helper.load_external_data_for_model(proto, str(path.parent))
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise InputError(f"its external weights cannot be read: {error}", where=path) from None
    return proto, digest.hexdigest()


@contextmanager
def well_formed(where: object) -> Iterator[None]:
    """What the library makes of a graph that is not: InputError."""
    try:
        yield
    except (onnx.shape_inference.InferenceError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"is malformed: {said[:200]}", where=where) from error


def external_files(path: Path) -> list[str]:
    """The names of the files beside an ONNX file that hold its weights, if any."""
    return sorted(_external_files(onnx.load(str(path), load_external_data=False)))


def beside(path: Path, location: str) -> Path:
    """A file that an ONNX file names. InputError unless it is in the same folder, or below: a model reads no others."""
    folder = path.parent.resolve()
    found = (folder / location).resolve()
    if not found.is_relative_to(folder) or not found.is_file():
        problem = f"its external weights cannot be read: {location[:80]!r} is no file beside it"
        raise InputError(problem, where=path, allowed="files in its folder")
    return found


def normalise(proto: onnx.ModelProto, where: object, batch: int = 1) -> onnx.ModelProto:
    """Bring `proto` into the form described above, in place, and return it. `where` is what errors name.

    The first dimension of an input may be dynamic; it becomes `batch`. With a `batch` above 1 one that is 1 in the
    file does too, and so does the 1 that a Reshape to constants begins with; nothing here can tell whether the graph
    then answers each request as it would alone. Raises InputError if an input has another dynamic dimension, or no
    place for the batch, a tensor's shape cannot be inferred, the graph is malformed, or an output depends on no node.
    """
    if proto.functions:
        _check_functions(proto, where)
        proto = onnx.inliner.inline_local_functions(proto)
    graph = proto.graph
    if graph.sparse_initializer:
        raise InputError("has sparse initializers", where=where, allowed="dense initializers")
    constants = {t.name: t for t in graph.initializer}
    inputs = [_copy(i) for i in graph.input if i.name not in constants]
    if not inputs:
        raise InputError("has no input", where=where)
    hints = _fix_batch(inputs, graph.value_info, where, batch)
    opsets = {entry.domain: entry.version for entry in proto.opset_import}
    nodes = [_copy(node) for node in graph.node]
    _check_order(nodes, {*constants, *(i.name for i in inputs)}, where)

    while True:  # folding makes shapes known, and known shapes make more to fold
        nodes = _fold(nodes, constants, {}, opsets)
        if batch > 1:
            _widen(nodes, constants, batch)
        types = _infer(proto, nodes, inputs, hints, constants)
        after = _fold(nodes, constants, types, opsets)
        if len(after) == len(nodes):
            break
        nodes = after

    nodes = _leading_to({o.name for o in graph.output}, nodes)
    _name(nodes)
    used = {name for node in nodes for name in uses(node)}
    made = {name for node in nodes for name in node.output}
    for output in graph.output:
        if output.name not in made:
            raise InputError(f"output {output.name!r} does not depend on any layer", where=where)
    tensors = [i for i in inputs if i.name in used]
    if not tensors:
        raise InputError("its outputs depend on no input", where=where)
    wanted = (used - constants.keys()) | {o.name for o in graph.output}
    typed = {name: _typed(name, types, where) for name in sorted(wanted)}

    given = {t.name for t in graph.initializer}
    for index in range(len(graph.initializer) - 1, -1, -1):  # in place: weights may be most of the memory
        if graph.initializer[index].name not in used:
            del graph.initializer[index]
    graph.initializer.extend(t for name, t in constants.items() if name in used - given)
    del graph.node[:], graph.input[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.input.extend(tensors)
    outputs = [o.name for o in graph.output]
    del graph.output[:]
    graph.output.extend(typed[name] for name in outputs)
    ends = {*outputs, *(i.name for i in tensors)}
    graph.value_info.extend(info for name, info in typed.items() if name not in ends)
    proto.ir_version = max(proto.ir_version, 8)  # from 4 on, initializers need not be inputs as well
    return proto


def _check_functions(proto: onnx.ModelProto, where: object) -> None:
    """InputError for local functions that call themselves, or that are too much when they are written out."""
    functions = {(f.domain, f.name): f for f in proto.functions}
    sizes: dict[tuple[str, str], float] = {}

    def nodes(body: Iterable[onnx.NodeProto], open_: frozenset[tuple[str, str]]) -> float:
        total = 0.0
        for node in body:
            key = (node.domain, node.op_type)
            if key in open_:
                raise InputError(f"function {node.op_type!r} calls itself", where=where)
            if key in functions and key not in sizes:
                sizes[key] = nodes(functions[key].node, open_ | {key})
            total += sizes.get(key, 1.0)
            total += sum(nodes(graph.node, open_) for a in node.attribute for graph in (a.g, *a.graphs))
        return total

    if nodes(proto.graph.node, frozenset()) > _MOST_NODES:
        raise InputError("its functions are too much", where=where, allowed=f"at most {_MOST_NODES} nodes in all")


def uses(node: onnx.NodeProto) -> tuple[str, ...]:
    """The tensors that a node reads: its inputs, then what its subgraphs (If, Loop, Scan) capture."""
    names = dict.fromkeys(name for name in node.input if name)
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            own = {t.name for t in graph.initializer} | {i.name for i in graph.input}
            for inner in graph.node:
                names |= dict.fromkeys(name for name in uses(inner) if name not in own)
                own |= set(inner.output)
            names |= dict.fromkeys(o.name for o in graph.output if o.name not in own)
    return tuple(names)


def _copy(message: Any) -> Any:
    copy = type(message)()
    copy.CopyFrom(message)
    return copy


def _external_files(proto: onnx.ModelProto) -> set[str]:
    return {
        entry.value
        for tensor in external_data_helper._get_all_tensors(proto)
        if external_data_helper.uses_external_data(tensor)
        for entry in tensor.external_data
        if entry.key == "location"
    }


def _fix_batch(
    inputs: Iterable[onnx.ValueInfoProto], hints: Iterable[onnx.ValueInfoProto], where: object, batch: int
) -> list[onnx.ValueInfoProto]:
    """Set the batch of `inputs`, in place; return those of the file's own types that are static then."""
    batches = set()
    for value in inputs:
        if not value.type.HasField("tensor_type") or not value.type.tensor_type.HasField("shape"):
            raise InputError(f"input {value.name!r} has no known shape", where=where)
        first = value.type.tensor_type.shape.dim[:1]
        if batch > 1 and not (first and first[0].dim_value <= 1):
            problem = f"input {value.name!r} has no place for a batch: its first dimension is "
            problem += str(first[0].dim_value) if first else "missing"
            raise InputError(problem, where=where, allowed="a first dimension of 1, or a dynamic one")
        for dim in first:
            if dim.dim_value <= 0:
                batches.add(dim.dim_param)
            if dim.dim_value <= 1:
                dim.dim_value = batch
    batches.discard("")

    def fix(value: onnx.ValueInfoProto) -> bool:
        dims = value.type.tensor_type.shape.dim
        for dim in dims:
            if dim.dim_param in batches:
                dim.dim_value = batch
        return all(dim.dim_value > 0 for dim in dims)

    for value in inputs:
        if not fix(value):
            dims = [dim.dim_value or dim.dim_param or "?" for dim in value.type.tensor_type.shape.dim]
            problem = f"input {value.name!r} has the dynamic shape {dims}"
            raise InputError(problem, where=where, allowed="only the first dimension may be dynamic")
    if batch > 1:
        return []  # the file's own may be of a batch of 1
    copies = [_copy(hint) for hint in hints if hint.type.tensor_type.HasField("shape")]
    return [hint for hint in copies if fix(hint)]


def _widen(nodes: Iterable[onnx.NodeProto], constants: dict[str, onnx.TensorProto], batch: int) -> None:
    """Make the batch of Reshape targets that are constants and begin with 1 `batch`, in place."""
    for node in nodes:
        if node.op_type != "Reshape" or len(node.input) < 2 or node.input[1] not in constants:
            continue
        target = numpy_helper.to_array(constants[node.input[1]])
        if target.size and target[0] == 1:
            name = f"{node.input[1]}, batch {batch}"  # another than the file's: something else may use that one
            constants[name] = numpy_helper.from_array(np.concatenate([[batch], target[1:]]), name)
            node.input[1] = name


def _check_order(nodes: Iterable[onnx.NodeProto], known: set[str], where: object) -> None:
    for node in nodes:
        for name in uses(node):
            if name not in known:
                problem = f"node {node.name or node.op_type!r} uses tensor {name!r}, which nothing before it makes"
                raise InputError(problem, where=where)
        known.update(node.output)


def _fold(
    nodes: Iterable[onnx.NodeProto],
    constants: dict[str, onnx.TensorProto],
    types: Mapping[str, onnx.TypeProto],
    opsets: Mapping[str, int],
) -> list[onnx.NodeProto]:
    """Evaluate what depends on constants only into `constants`; return the other nodes.

    With `types`, Shape and Size of a tensor of known shape are constants too.
    """
    left = []
    for node in nodes:
        feeds = None
        if node.op_type in ("Shape", "Size") and (shape := _static_shape(types.get(node.input[0]))) is not None:
            feeds = {node.input[0]: np.broadcast_to(np.float32(0), shape)}
        elif _is_constant(node, constants) and _folds_to_bytes(node, constants, opsets) <= _MOST_FOLDED_BYTES:
            feeds = {name: numpy_helper.to_array(constants[name]) for name in node.input if name}
        values = None if feeds is None else _evaluate(node, feeds, opsets)
        if values is None:
            left.append(node)
        else:
            constants.update((name, numpy_helper.from_array(v, name)) for name, v in values.items())
    return left


def _is_constant(node: onnx.NodeProto, constants: Mapping[str, object]) -> bool:
    if node.op_type in _NEVER_FOLDED or any(a.HasField("g") or a.graphs for a in node.attribute):
        return False
    return all(name in constants for name in node.input if name)


def _folds_to_bytes(
    node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto], opsets: Mapping[str, int]
) -> float:
    """How large what a node makes of constants will be; infinite where that cannot be told beforehand."""
    if node.op_type in _NOT_LARGER:
        return 0
    graph = onnx.GraphProto(name="one", node=[node])
    graph.initializer.extend(constants[name] for name in dict.fromkeys(node.input) if name)
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in node.output if name)
    ids = [helper.make_opsetid(domain, version) for domain, version in opsets.items()]
    alone = onnx.ModelProto(ir_version=8, graph=graph, opset_import=ids)
    try:
        inferred = onnx.shape_inference.infer_shapes(alone, data_prop=True).graph
    except onnx.shape_inference.InferenceError:
        return math.inf
    types = {v.name: v.type for group in (inferred.value_info, inferred.output) for v in group}
    total = 0.0
    for name in node.output:
        shape = _static_shape(types.get(name))
        if name and shape is None:
            return math.inf
        total += 8.0 * math.prod(shape or (0,))
    return total


def _evaluate(node: onnx.NodeProto, feeds: dict[str, Any], opsets: Mapping[str, int]) -> dict[str, Any] | None:
    """The outputs of one node, or None if the reference evaluator cannot do it: then it stays a layer."""
    try:
        outputs = ReferenceEvaluator(node, opsets=dict(opsets)).run(None, feeds)
        return {name: np.asarray(v) for name, v in zip(node.output, outputs, strict=True) if name}
    except Exception:  # it is an evaluator of anybody's operators: whatever it raises means "not here"
        return None


def _infer(
    proto: onnx.ModelProto,
    nodes: Iterable[onnx.NodeProto],
    inputs: Iterable[onnx.ValueInfoProto],
    hints: Iterable[onnx.ValueInfoProto],
    constants: Mapping[str, onnx.TensorProto],
) -> dict[str, onnx.TypeProto]:
    """Types by tensor. Weights take part by shape only: inference copies the model, and they are heavy."""
    light = onnx.ModelProto(ir_version=max(proto.ir_version, 8), opset_import=proto.opset_import)
    graph = light.graph
    graph.name = "types"
    graph.node.extend(nodes)
    graph.input.extend(inputs)
    for tensor in constants.values():
        if np.prod(tensor.dims, dtype=np.int64) <= _SMALL:
            graph.initializer.append(tensor)
        else:
            graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    graph.value_info.extend(hints)
    graph.output.extend(onnx.ValueInfoProto(name=o.name) for o in proto.graph.output)
    inferred = onnx.shape_inference.infer_shapes(light, data_prop=True).graph
    return {v.name: v.type for group in (inferred.input, inferred.value_info, inferred.output) for v in group}


def _static_shape(kind: onnx.TypeProto | None) -> tuple[int, ...] | None:
    if kind is None or not kind.tensor_type.HasField("shape"):
        return None
    dims = kind.tensor_type.shape.dim
    return tuple(d.dim_value for d in dims) if all(d.HasField("dim_value") for d in dims) else None


def _typed(name: str, types: Mapping[str, onnx.TypeProto], where: object) -> onnx.ValueInfoProto:
    kind = types.get(name)
    if kind is None or not kind.tensor_type.elem_type or _static_shape(kind) is None:
        raise InputError(f"the shape of tensor {name!r} cannot be inferred", where=where)
    return onnx.ValueInfoProto(name=name, type=kind)


def _leading_to(outputs: set[str], nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if not wanted.isdisjoint(node.output):
            kept.append(node)
            wanted.update(uses(node))
    return kept[::-1]


def _name(nodes: Iterable[onnx.NodeProto]) -> None:
    """Give every node a name of its own, in place: the file's where it has one that is still free."""
    taken: set[str] = set()
    for index, node in enumerate(nodes):
        name = node.name or f"{node.op_type}_{index}"
        if name in taken:
            name = f"{name}_{index}"
        taken.add(name)
        node.name = name
