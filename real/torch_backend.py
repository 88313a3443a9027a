"""PyTorch: parts are converted by onnx2pytorch and run layer by layer, not compiled.

Knows PyTorch and the converter. Must not know models, testbeds or Ray.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from torch.library import Library

from isthmus.real.backend import Array, Clock, one_line
from isthmus.workloads.errors import InputError, unknown

try:
    import torchvision  # noqa: F401  # onnx2pytorch imports it, for a few operators of detectors
except RuntimeError:
    # Beside a torch without CUDA its own operators do not load, and importing it fails because it describes two of
    # them that nobody has declared. Declared, they can be described; a model that uses them still fails, and says so.
    _OPERATORS: Any = Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for _name in ("nms", "qnms"):
        _OPERATORS.define(f"{_name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
from onnx2pytorch import ConvertModel
from onnx2pytorch.convert.operations import get_buffer_name

# Tensors that come from another process are read-only, and nothing here writes to them. PyTorch warns of it once per
# process: now, unheard.
_READ_ONLY = np.zeros(1)
_READ_ONLY.flags.writeable = False
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.from_numpy(_READ_ONLY)


class Torch:
    """PyTorch on one of its devices, layer by layer as onnx2pytorch converts them."""

    name = "torch"
    version: str = torch.__version__
    exact = True

    def __init__(self, device: str = "cpu") -> None:
        """InputError for a device that is not there."""
        if device not in self.devices():
            raise unknown("device of PyTorch", device, self.devices(), where="backend.device")
        self.device = device
        self.tolerance = 1e-5 if device == "cpu" else 1e-3  # accelerators may compute in TF32

    @staticmethod
    def devices() -> list[str]:
        return ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]

    def clock(self, threads: int) -> Clock:
        return "cpu" if self.device == "cpu" and threads == 1 else "wall"

    def load(self, graph: bytes, *, threads: int, optimize: bool) -> _Module:
        """It does not optimise. InputError names the operator that cannot be converted."""
        try:
            proto = onnx.load_from_string(graph)
        except Exception as error:  # protobuf's, of no public name
            raise InputError(f"is not ONNX: {one_line(error)}") from None
        return _Module(converted(proto).to(self.device), [value.name for value in proto.graph.input], threads)


class _Module:
    def __init__(self, module: torch.nn.Module, inputs: list[str], threads: int) -> None:
        self._module, self._inputs, self._threads = module, inputs, threads
        self._device = next((buffer.device for buffer in module.buffers()), torch.device("cpu"))

    def run(self, feeds: Mapping[str, Array]) -> Sequence[Array]:
        if torch.get_num_threads() != self._threads:  # a number that every calling thread has of its own
            torch.set_num_threads(self._threads)
        with torch.inference_mode():
            given = [torch.from_numpy(feeds[name]).to(self._device) for name in self._inputs]
            answer = self._module(*given)
        outputs = answer if isinstance(answer, list | tuple) else [answer]
        return [output.numpy(force=True) for output in outputs]


def converted(proto: onnx.ModelProto) -> torch.nn.Module:
    """An ONNX model as a module; `proto` loses its weights to it. InputError for operators without a conversion."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module: torch.nn.Module = ConvertModel(proto).eval()
    except Exception as error:  # NotImplementedError, and whatever else converting an operator raises
        raise InputError(f"onnx2pytorch cannot convert it: {one_line(error)}") from None
    # Shapes that are constant the layers know already; as tensors they would be read at every run, and stop an export.
    for node in proto.graph.node:
        if node.op_type == "Reshape" and hasattr(module, get_buffer_name(node.input[1])):
            setattr(module, get_buffer_name(node.input[1]), None)
    del proto.graph.initializer[:]  # the module has them as tensors, and keeps the graph to walk along it
    return module
