"""PyTorch: parts are converted by onnx2pytorch and run layer by layer, not compiled.

Knows PyTorch and the converter. Must not know models, testbeds or Ray.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import onnx
import torch

from isthmus.real.backend import Array, Clock, one_line
from isthmus.workloads.errors import InputError, unknown


_TORCHVISION = torch.library.Library("torchvision", "FRAGMENT")


class Torch:
    """PyTorch, layer by layer, on one of its devices."""

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
        _converter()  # without it there is nothing to run on them
        return ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]

    def clock(self, threads: int) -> Clock:
        return "cpu" if self.device == "cpu" and threads == 1 else "wall"

    def load(self, graph: bytes, *, threads: int, optimize: bool) -> _Module:
        """It does not optimise. InputError names the operator that cannot be converted."""
        try:
            proto = onnx.load_from_string(graph)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module = _converter()(proto)
        except Exception as error:  # protobuf's, or whatever converting an operator raises
            raise InputError(f"onnx2pytorch cannot convert it: {one_line(error)}") from None
        del proto.graph.initializer[:]  # the module has them as tensors; it keeps the graph to walk along it
        return _Module(module.eval().to(self.device), self.device, threads)


class _Module:
    def __init__(self, module: torch.nn.Module, device: str, threads: int) -> None:
        self._module, self._device, self._threads = module, device, threads

    def run(self, feeds: Mapping[str, Array]) -> Sequence[Array]:
        if torch.get_num_threads() != self._threads:  # a number per calling thread
            torch.set_num_threads(self._threads)
        with torch.inference_mode():
            given = {name: torch.from_numpy(value).to(self._device) for name, value in feeds.items()}
            answer = self._module(**given)
        outputs = answer if isinstance(answer, list | tuple) else [answer]
        return [output.numpy(force=True) for output in outputs]


@lru_cache(maxsize=1)
def _converter() -> Any:
    """`onnx2pytorch.ConvertModel`.

    It imports torchvision for a few operators of detectors. Beside a torch without CUDA, torchvision's own operators
    do not load, and importing it fails because it describes two of them that nobody has declared. Declared, they can
    be described; a model that uses them still fails, and says so.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in ("nms", "qnms"):
            _TORCHVISION.define(f"{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
    # What is shared with senders is read-only; nothing here writes to it.
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    from onnx2pytorch import ConvertModel

    return ConvertModel
