"""A part of a model, loaded in some backend and ready to run: what goes in is checked, and what it costs is timed.

Knows parts and the interface of backends. Must not know a runtime, Ray, policies, links or how slow the emulated
hardware is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import onnx

from isthmus.real.backend import CLOCKS, Backend, one_line
from isthmus.real.backend import Array as Array
from isthmus.real.backend import backend as find_backend
from isthmus.real.cutter import Graph, graph_of
from isthmus.workloads.errors import InputError, RunFailure
from isthmus.workloads.model import Model, Part, model_proto


class PartSession:
    """One part in a backend, by default ONNX Runtime on the CPU.

    Times are the CPU time of the calling thread where the backend does all its work there, however busy the host is;
    where it does not they are wall time: `clock` says which. `load_s` is what loading took.
    """

    def __init__(
        self,
        model: Model,
        part: Part,
        *,
        threads: int = 1,
        optimize: bool = True,
        proto: onnx.ModelProto | None = None,
        backend: Backend | None = None,
        graph: Graph | None = None,
    ) -> None:
        """`optimize=False` keeps the graph as it is: slower, and cut models then agree bit for bit.

        `proto` is `model_proto(model)`, for who loads several parts, or that of a batch; `graph` the part itself, for
        who has it. Raises InputError as `cut_out` does, or if the backend does not take the part.
        """
        self.backend = find_backend() if backend is None else backend
        self.clock = self.backend.clock(threads)
        if graph is None:
            graph = graph_of(model, part, proto)
        self.part = part
        self.inputs = model.part_inputs(part)
        self.outputs = model.part_outputs(part)
        self.takes, self.gives = graph.inputs, graph.outputs
        now = CLOCKS[self.clock]
        started_s = now()
        try:
            self._loaded = self.backend.load(graph.content, threads=threads, optimize=optimize)
        except InputError as error:
            where = error.where or model.source
            raise InputError(f"{part}: {error.problem}", where=where, allowed=error.allowed) from None
        self.load_s = now() - started_s

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs by name, given the inputs by name. Raises InputError if they are not as declared."""
        return self.timed(feeds)[0]

    def timed(self, feeds: Mapping[str, Array]) -> tuple[dict[str, Array], float]:
        """As `run`, and the seconds that computing took, by the session's `clock`. RunFailure if it breaks."""
        self._check(feeds)
        given, now = dict(feeds), CLOCKS[self.clock]
        started_s = now()
        try:
            values = self._loaded.run(given)
        except Exception as error:  # a family of their own in every runtime
            raise RunFailure(f"{self.backend.name} cannot run {self.part}: {one_line(error)}") from error
        taken_s = now() - started_s
        return dict(zip(self.outputs, values, strict=True)), taken_s

    def close(self) -> None:
        """Give back what the backend holds beyond its memory, which goes with the session."""
        close = getattr(self._loaded, "close", None)
        if close is not None:
            close()

    def _check(self, feeds: Mapping[str, Array]) -> None:
        if feeds.keys() != self.takes.keys():
            given = ", ".join(feeds) or "nothing"
            raise InputError(f"{self.part} was given {given}", allowed=", ".join(self.inputs))
        for name, value in feeds.items():
            tensor = self.takes[name]
            if value.shape != tensor.shape or value.dtype.name != tensor.dtype:
                problem = f"{self.part} was given {name!r} as {value.dtype.name} {list(value.shape)}"
                raise InputError(problem, allowed=f"{tensor.dtype} {list(tensor.shape)}")


def inside(model: Model, names: Iterable[str], feeds: Mapping[str, Array]) -> dict[str, Array]:
    """What these tensors of the whole model are for these inputs in ONNX Runtime, also those that no output is."""
    proto = model_proto(model)
    outputs = {value.name for value in proto.graph.output}
    proto.graph.output.extend(v for v in proto.graph.value_info if v.name in set(names) - outputs)
    wanted = [value.name for value in proto.graph.output]
    loaded = find_backend().load(proto.SerializeToString(), threads=1, optimize=True)
    return {**feeds, **dict(zip(wanted, loaded.run(feeds), strict=True))}


def random_input(model: Model, index: int, seed: int) -> dict[str, Array]:
    """The inputs of request `index`: always the same for the same seed. See `random_tensors`."""
    return random_tensors(model, model.inputs, np.random.default_rng([seed, index]))


def random_tensors(model: Model, names: Iterable[str], rng: np.random.Generator) -> dict[str, Array]:
    """Values for these tensors: standard normal, or for whole numbers and truth values 0 and 1.

    Zero and one are valid as token, index and mask alike.
    """
    values: dict[str, Array] = {}
    for name in names:
        tensor = model.tensors[name]
        if np.issubdtype(np.dtype(tensor.dtype), np.floating):
            values[name] = rng.standard_normal(tensor.shape, np.float32).astype(tensor.dtype)
        else:
            values[name] = rng.integers(0, 2, tensor.shape).astype(tensor.dtype)
    return values
