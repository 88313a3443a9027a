"""A model as a graph of layers: its cuts, its parts, and what crosses between them.

Knows layers, tensors and their sizes. Must not know weights, runtimes, machines or costs in seconds.

A set of layers is an `int` used as a bit mask (bit i: layer i), so that the set algebra behind cuts and parts
is a few machine operations, and a part is a small hashable value.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from math import prod
from pathlib import Path

import numpy as np
import onnx

from isthmus.workloads import onnx_file, zoo
from isthmus.workloads.errors import InputError, unknown
from isthmus.workloads.flop import node_flop

LayerSet = int


def layer_set(indices: Iterable[int]) -> LayerSet:
    """The set of these layer indices."""
    layers = 0
    for index in indices:
        layers |= 1 << index
    return layers


def members(layers: LayerSet) -> Iterator[int]:
    """The layer indices in a set, ascending."""
    while layers:
        lowest = layers & -layers
        yield lowest.bit_length() - 1
        layers ^= lowest


@dataclass(frozen=True, slots=True)
class Tensor:
    """What flows between layers: one request's worth, batch 1. `dtype` is a numpy name."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Layer:
    """One node of the graph. `inputs` and `outputs` are activations only: no weights, no unused outputs."""

    index: int
    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    flop: int
    parameter_bytes: int
    activation_bytes: int


@dataclass(frozen=True, slots=True)
class Part:
    """A set of layers of the model named `model` that runs as one unit: a value, equal to any other such."""

    model: str
    layers: LayerSet

    def __str__(self) -> str:
        runs: list[list[int]] = []
        for index in members(self.layers):
            if runs and runs[-1][1] == index - 1:
                runs[-1][1] = index
            else:
                runs.append([index, index])
        return f"{self.model}[{','.join(f'{a}-{b}' if a < b else f'{a}' for a, b in runs)}]"

    __repr__ = __str__


@dataclass(frozen=True, slots=True)
class Cut:
    """A place where the model falls into `before` and the rest. `bytes` is what crosses, uncompressed."""

    index: int
    before: LayerSet
    crossing: tuple[str, ...]
    bytes: int


@dataclass(frozen=True)
class Model:
    """The structure of one DNN. Light (no weights), immutable, picklable; equal by name, file and seed."""

    name: str
    source: str
    sha256: str
    seed: int
    layers: tuple[Layer, ...] = field(compare=False, repr=False)
    tensors: Mapping[str, Tensor] = field(compare=False, repr=False)
    inputs: tuple[str, ...] = field(compare=False, repr=False)
    outputs: tuple[str, ...] = field(compare=False, repr=False)

    @property
    def version(self) -> str:
        """What tells it from others of its name and structure: the beginning of its hash."""
        return self.sha256[:12]

    @cached_property
    def everything(self) -> LayerSet:
        """All layers."""
        return (1 << len(self.layers)) - 1

    @cached_property
    def flop(self) -> int:
        """Operations of one inference."""
        return sum(layer.flop for layer in self.layers)

    @cached_property
    def parameter_bytes(self) -> int:
        """Size of the weights; one that several layers share counts once for each."""
        return sum(layer.parameter_bytes for layer in self.layers)

    @cached_property
    def cuts(self) -> tuple[Cut, ...]:
        """Every place where a single tensor crosses, in order; each holds all layers of the one before it.

        The first has nothing before it (the raw inputs cross), the last everything (the outputs cross); these
        two are there whatever their number of tensors. Which cuts there are does not depend on the order in
        which the file lists its nodes: a tensor is one if nothing else leaves the ancestors of its maker.
        """
        befores = {0, self.everything}
        for layer in self.layers:
            before = self._ancestors[layer.index]
            if before not in befores and len(self.crossing(before)) == 1:
                befores.add(before)
        return tuple(self._cut(index, before) for index, before in enumerate(sorted(befores, key=int.bit_count)))

    @cached_property
    def blocks(self) -> tuple[LayerSet, ...]:
        """The layers between neighbouring cuts: `blocks[i]` lies between `cuts[i]` and `cuts[i + 1]`."""
        return tuple(b.before & ~a.before for a, b in zip(self.cuts, self.cuts[1:], strict=False))

    def whole(self) -> Part:
        """The part with every layer."""
        return Part(self.name, self.everything)

    def head(self, cut: int) -> Part:
        """All before `cuts[cut]`."""
        return self.span(0, cut)

    def tail(self, cut: int) -> Part:
        """All after `cuts[cut]`."""
        return self.span(cut, len(self.blocks))

    def span(self, first: int, last: int) -> Part:
        """Blocks `first` to `last - 1`: all between `cuts[first]` and `cuts[last]`. Raises InputError."""
        if not 0 <= first <= last < len(self.cuts):
            allowed = f"0 <= first <= last <= {len(self.blocks)}"
            raise InputError(f"model {self.name} has no span from cut {first} to cut {last}", allowed=allowed)
        return Part(self.name, self.cuts[last].before & ~self.cuts[first].before)

    def span_of(self, part: Part) -> tuple[int, int] | None:
        """The (first, last) for which `part == span(first, last)`, or None: for an empty part as well."""
        touched = [index for index, block in enumerate(self.blocks) if block & part.layers]
        if not touched:
            return None
        first, last = touched[0], touched[-1] + 1
        return (first, last) if self.span(first, last) == part else None

    def is_downward_closed(self, layers: LayerSet) -> bool:
        """Whether everything that `layers` need is among them: then they can be the `before` of a cut."""
        return not self._union(self._ancestors, layers) & ~layers

    def is_convex(self, layers: LayerSet) -> bool:
        """Whether no path leaves `layers` and comes back: then they can run as one unit."""
        between = self._union(self._ancestors, layers) & self._union(self._descendants, layers)
        return not between & ~layers

    def before(self, part: Part) -> LayerSet:
        """The layers that `part` depends on and does not have."""
        return self._union(self._ancestors, part.layers) & ~part.layers

    def part_inputs(self, part: Part) -> tuple[str, ...]:
        """The tensors that `part` needs and does not make, graph inputs included, in the model's order."""
        return tuple(
            name for name in self.tensors if self._users[name] & part.layers and not self._maker[name] & part.layers
        )

    def part_outputs(self, part: Part) -> tuple[str, ...]:
        """The tensors made by `part` that something outside it, or the user, needs, in the model's order."""
        return tuple(
            name for name in self.tensors if self._maker[name] & part.layers and self._users[name] & ~part.layers
        )

    def crossing(self, before: LayerSet) -> tuple[str, ...]:
        """The tensors made in `before`, or given as inputs, that are needed after it, in the model's order.

        The outputs are needed after everything.
        """
        return tuple(name for name in self.tensors if not self._maker[name] & ~before and self._users[name] & ~before)

    def weights_bytes(self, part: Part) -> int:
        """Size of the weights of `part`; one that several of its layers share counts once for each."""
        return sum(self.layers[index].parameter_bytes for index in members(part.layers))

    def memory_bytes(self, part: Part, batch: int = 1) -> int:
        """What running `part` needs: its weights, and what the layer with most to read and to write has at once.

        The least that a runtime gets by with which frees a tensor after its last use and keeps nothing else.
        """
        layers = [self.layers[index] for index in members(part.layers)]
        active = max((self.bytes_of({*layer.inputs, *layer.outputs}) for layer in layers), default=0)
        return self.weights_bytes(part) + batch * active

    def bytes_of(self, tensors: Iterable[str]) -> int:
        """Size of these tensors together."""
        return sum(self.tensors[name].bytes for name in tensors)

    def _cut(self, index: int, before: LayerSet) -> Cut:
        crossing = self.crossing(before)
        return Cut(index, before, crossing, self.bytes_of(crossing))

    @cached_property
    def _maker(self) -> dict[str, LayerSet]:
        """The layer that makes each tensor, as a set; empty for a graph input."""
        made = {name: 1 << layer.index for layer in self.layers for name in layer.outputs}
        return {name: made.get(name, 0) for name in self.tensors}

    @cached_property
    def _users(self) -> dict[str, LayerSet]:
        """The layers that need each tensor; the bit after the last layer is the user of the outputs."""
        users = dict.fromkeys(self.tensors, 0)
        for layer in self.layers:
            for name in layer.inputs:
                users[name] |= 1 << layer.index
        for name in self.outputs:
            users[name] |= 1 << len(self.layers)
        return users

    @cached_property
    def _ancestors(self) -> list[LayerSet]:
        """For each layer, itself and all it depends on."""
        ancestors: list[LayerSet] = []
        for layer in self.layers:
            makers = 0
            for name in layer.inputs:
                makers |= self._maker[name]
            ancestors.append(1 << layer.index | self._union(ancestors, makers))
        return ancestors

    @cached_property
    def _descendants(self) -> list[LayerSet]:
        """For each layer, itself and all that depends on it."""
        descendants = [0] * len(self.layers)
        for layer in reversed(self.layers):
            users = 0
            for name in layer.outputs:
                users |= self._users[name]
            descendants[layer.index] = 1 << layer.index | self._union(descendants, users & self.everything)
        return descendants

    @staticmethod
    def _union(sets: list[LayerSet], layers: LayerSet) -> LayerSet:
        union = 0
        for index in members(layers):
            union |= sets[index]
        return union


def load_model(source: str | Path, *, name: str | None = None, seed: int = 0) -> Model:
    """The model in the .onnx file `source`, or the architecture of that name in the zoo (see `zoo.names`).

    `name` is what it shall be called (default: the zoo name or the file's stem). `seed` makes the weights
    of a zoo model and is without effect on a file. Layers that lead to no output, and inputs that no layer
    needs, are left out. Raises InputError, naming the source, if it is neither, is malformed, or has a tensor
    of unknown shape.
    """
    where = _locate(source)
    stamp = where.stat().st_mtime_ns if isinstance(where, Path) else 0
    model = _load(where, stamp, seed)
    return model if name in (None, model.name) else replace(model, name=name)


def model_proto(model: Model, batch: int = 1) -> onnx.ModelProto:
    """The model with its weights, as a new message: its nodes are `model.layers`, one for one and by name.

    Constants are folded, shapes are static, with room for `batch` requests at once. Raises InputError if the source
    is no longer what `model` was loaded from, or cannot be shaped for such a batch; whether each request is then
    answered as it would be alone, only running it can tell.
    """
    where = _locate(model.source)
    if isinstance(where, Path):
        proto, sha256 = onnx_file.read(where)
    else:
        proto, sha256 = zoo.build(where, model.seed), zoo.sha256(where, model.seed)
    if sha256 != model.sha256:
        problem = f"has changed since model {model.name} was loaded (sha256 {sha256[:12]}, was {model.sha256[:12]})"
        raise InputError(problem, where=model.source)
    with onnx_file.well_formed(model.source):
        proto = onnx_file.normalise(proto, model.source, batch)
    if [node.name for node in proto.graph.node] != [layer.name for layer in model.layers]:
        raise InputError(f"has other layers at a batch of {batch} than at 1", where=model.source)
    return proto


def sha256_here(model: Model) -> str:
    """The hash of what `model.source` is on this machine, now. InputError when it is not there."""
    where = _locate(model.source)
    return onnx_file.read(where)[1] if isinstance(where, Path) else zoo.sha256(where, model.seed)


def _locate(source: str | Path) -> Path | str:
    """A file's absolute path, or a zoo name."""
    path = Path(source)
    if os.path.isfile(path):  # as Path.is_file, and False for a name that no file can have
        return path.resolve()
    if str(source) in zoo.names():
        return str(source)
    name = unknown("model", str(source), zoo.names()).problem
    problem = "is not a file" if os.path.exists(path) else f"no such file, and {name}"
    allowed = f"the path of an .onnx file, or one of {', '.join(zoo.names())}"
    raise InputError(problem, where=source, allowed=allowed)


@lru_cache(maxsize=32)
def _load(where: Path | str, stamp: int, seed: int) -> Model:
    """`stamp`, the file's time of change, is part of the key of the cache only."""
    if isinstance(where, Path):
        proto, sha256 = onnx_file.read(where)
    else:
        proto, sha256 = zoo.build(where, None), zoo.sha256(where, seed)
    with onnx_file.well_formed(where):
        graph = onnx_file.normalise(proto, where).graph
        tensors = {v.name: tensor_of(v) for group in (graph.input, graph.value_info, graph.output) for v in group}
        parameters = {t.name: t for t in graph.initializer}
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        shapes |= {name: tuple(t.dims) for name, t in parameters.items()}
        layers = []
        for index, node in enumerate(graph.node):
            read = onnx_file.uses(node)
            outputs = tuple(name for name in node.output if name in tensors)
            inputs = [shapes.get(n, ()) for n in node.input]
            layers.append(
                Layer(
                    index=index,
                    name=node.name,
                    op=node.op_type,
                    inputs=tuple(n for n in read if n in tensors),
                    outputs=outputs,
                    flop=node_flop(node, inputs, shapes[outputs[0]]),
                    parameter_bytes=sum(_parameter_bytes(parameters[n]) for n in read if n in parameters),
                    activation_bytes=sum(tensors[n].bytes for n in outputs),
                )
            )
    inputs_first = [v.name for v in graph.input] + [name for layer in layers for name in layer.outputs]
    return Model(
        name=where.stem if isinstance(where, Path) else where,
        source=str(where),
        sha256=sha256,
        seed=seed,
        layers=tuple(layers),
        tensors={n: tensors[n] for n in inputs_first},
        inputs=tuple(v.name for v in graph.input),
        outputs=tuple(v.name for v in graph.output),
    )


def tensor_of(value: onnx.ValueInfoProto) -> Tensor:
    """What the graph says of a tensor of static shape."""
    kind = value.type.tensor_type
    shape = tuple(d.dim_value for d in kind.shape.dim)
    dtype: np.dtype[np.generic] = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
    return Tensor(value.name, shape, dtype.name, prod(shape) * dtype.itemsize)


def _parameter_bytes(tensor: onnx.TensorProto) -> int:
    dtype: np.dtype[np.generic] = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return int(prod(tensor.dims)) * dtype.itemsize
