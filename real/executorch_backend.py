"""ExecuTorch: parts become PyTorch modules, are exported, lowered to XNNPACK, and run by ExecuTorch's own runtime.

Lowering leaves several times a part's weights in the memory of its process (ExecuTorch 1.5), so it has one of its own:
this file, run as a program, makes a program for ExecuTorch of the ONNX on its input. Knows ExecuTorch and PyTorch. Must
not know models, testbeds or Ray.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from importlib.metadata import version

import numpy as np
import onnx
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from executorch.extension.pybindings import portable_lib
from executorch.runtime import Runtime
from onnx import helper

from isthmus.real.backend import Array, Clock, one_line
from isthmus.real.torch_backend import converted
from isthmus.workloads.errors import InputError


class ExecuTorch:
    """ExecuTorch on the CPU, with XNNPACK for the operators that it has.

    Loading a part converts it, which takes ten seconds to a minute.
    """

    name = "executorch"
    version: str = version("executorch")
    device = "XnnpackBackend"
    tolerance = 1e-5
    exact = False  # what is fused depends on where a part ends

    @staticmethod
    def devices() -> list[str]:
        return [name for name in Runtime.get().backend_registry.registered_backend_names if "Xnnpack" in name]

    def clock(self, threads: int) -> Clock:
        return "cpu" if threads == 1 else "wall"

    def load(self, graph: bytes, *, threads: int, optimize: bool) -> _Method:
        """It always optimises. The number of threads is that of the whole process: the last one asked for."""
        if portable_lib._threadpool_get_thread_count() != threads:
            portable_lib._unsafe_reset_threadpool(threads)
        command = [sys.executable, "-c", f"from {__name__} import main; main()"]
        path = os.pathsep.join(os.path.abspath(p) for p in sys.path)  # ours is found there as it was here
        made = subprocess.run(command, input=graph, capture_output=True, env={**os.environ, "PYTHONPATH": path})
        if made.returncode:
            said = made.stderr.decode(errors="replace").strip().splitlines()
            raise InputError(f"ExecuTorch cannot convert it: {said[-1] if said else made.returncode}")
        return _Method(made.stdout, [value.name for value in onnx.load_from_string(graph).graph.input])


class _Method:
    def __init__(self, program: bytes, inputs: list[str]) -> None:
        self._program = Runtime.get().load_program(program)
        self._method = self._program.load_method("forward")
        self._inputs, self._lock = inputs, threading.Lock()  # what it computes in belongs to one caller at a time

    def run(self, feeds: Mapping[str, Array]) -> Sequence[Array]:
        given = [torch.from_numpy(np.ascontiguousarray(feeds[name])) for name in self._inputs]
        with self._lock:
            return [output.numpy() for output in self._method.execute(given)]


def main() -> None:
    """ONNX on standard input becomes a program on standard output; or one line on standard error, and exit code 1."""
    try:
        sys.stdout.buffer.write(program(onnx.load_from_string(sys.stdin.buffer.read())))
    except Exception as error:  # the exporter's, the lowering's, protobuf's
        text = str(error) if isinstance(error, InputError) else one_line(error)
        sys.exit("\n" + text[:300])


def program(proto: onnx.ModelProto) -> bytes:
    """A program for ExecuTorch; `proto` loses its weights to it."""
    examples = tuple(_example(value) for value in proto.graph.input)
    exported = torch.export.export(converted(proto), examples)
    lowered = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
    return bytes(lowered.to_executorch().buffer)


def _example(value: onnx.ValueInfoProto) -> torch.Tensor:
    kind = value.type.tensor_type
    shape = [dimension.dim_value for dimension in kind.shape.dim]
    return torch.from_numpy(np.zeros(shape, helper.tensor_dtype_to_np_dtype(kind.elem_type)))
