"""A part of a model, loaded and ready to run: the only file that calls ONNX Runtime to compute.

Knows ONNX Runtime. Must not know Ray, policies, links or how slow the emulated hardware is.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort

from isthmus.real.cutter import Graph, graph_of
from isthmus.workloads.errors import InputError
from isthmus.workloads.model import Model, Part

Array = npt.NDArray[Any]
PROVIDER = "CPUExecutionProvider"


class PartSession:
    """One part in ONNX Runtime on the CPU.

    With one thread all the work is done on the thread that calls, so that its CPU time is the cost of the
    part, however busy the host is. `load_s` is the CPU time that creating the session took.
    """

    def __init__(
        self,
        model: Model,
        part: Part,
        *,
        threads: int = 1,
        optimize: bool = True,
        proto: onnx.ModelProto | None = None,
        graph: Graph | None = None,
    ) -> None:
        """`optimize=False` keeps the graph as it is: slower, and cut models then agree bit for bit.

        `proto` is `model_proto(model)`, for who loads several parts, or that of a batch; `graph` the part itself, for
        who has it. Raises InputError as `cut_out` does, or if ONNX Runtime does not take the part.
        """
        if graph is None:
            graph = graph_of(model, part, proto)
        self.part = part
        self.inputs = model.part_inputs(part)
        self.outputs = model.part_outputs(part)
        self.takes, self.gives = graph.inputs, graph.outputs
        content = graph.content
        started_s = time.thread_time()
        try:
            self._session = ort.InferenceSession(content, session_options(threads, optimize), [PROVIDER])
        except Exception as error:  # ONNX Runtime has a family of its own, without a common base
            raise InputError(f"ONNX Runtime cannot load {part}: {error}", where=model.source) from None
        self.load_s = time.thread_time() - started_s

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs by name, given the inputs by name. Raises InputError if they are not as declared."""
        return self.timed(feeds)[0]

    def timed(self, feeds: Mapping[str, Array]) -> tuple[dict[str, Array], float]:
        """As `run`, and the CPU seconds that the calling thread spent on computing."""
        self._check(feeds)
        given = dict(feeds)
        started_s = time.thread_time()
        values = self._session.run(self.outputs, given)
        cpu_s = time.thread_time() - started_s
        return dict(zip(self.outputs, values, strict=True)), cpu_s

    def _check(self, feeds: Mapping[str, Array]) -> None:
        if feeds.keys() != self.takes.keys():
            given = ", ".join(feeds) or "nothing"
            raise InputError(f"{self.part} was given {given}", allowed=", ".join(self.inputs))
        for name, value in feeds.items():
            tensor = self.takes[name]
            if value.shape != tensor.shape or value.dtype.name != tensor.dtype:
                problem = f"{self.part} was given {name!r} as {value.dtype.name} {list(value.shape)}"
                raise InputError(problem, allowed=f"{tensor.dtype} {list(tensor.shape)}")


def session_options(threads: int = 1, optimize: bool = True) -> ort.SessionOptions:
    """ONNX Runtime's options as everything here uses them: no spinning threads, errors only in its log."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


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
