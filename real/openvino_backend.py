"""OpenVINO, on the CPU or any other of its devices. Knows OpenVINO. Must not know models, testbeds or Ray."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import openvino as ov

from isthmus.real.backend import Array, Clock, one_line
from isthmus.workloads.errors import InputError, unknown


class OpenVino:
    """OpenVINO on one of its devices, in single precision unless `options` say otherwise."""

    name = "openvino"
    version: str = ov.__version__.split("-")[0]
    exact = False  # it always optimises

    def __init__(self, device: str = "CPU", options: Mapping[str, Any] | None = None) -> None:
        """`options` are properties of OpenVINO, such as `INFERENCE_PRECISION_HINT: bf16`.

        InputError for a device that is not there.
        """
        if device not in self.devices():
            raise unknown("device of OpenVINO", device, self.devices(), where="backend.device")
        self.device, self.options = device, dict(options or {})
        self.tolerance = 1e-5 if device == "CPU" and not self.options else 1e-2

    @staticmethod
    def devices() -> list[str]:
        return list(_core().available_devices)

    def clock(self, threads: int) -> Clock:
        # With one stream of one thread the caller's thread does all of it: its CPU time is the process's.
        return "cpu" if self.device == "CPU" and threads == 1 and not self.options else "wall"

    def load(self, graph: bytes, *, threads: int, optimize: bool) -> _Compiled:
        """It always optimises. Runs that overlap take turns, as on one stream they do."""
        said: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
        if self.device == "CPU":
            said |= {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "ENABLE_CPU_PINNING": False}
        try:
            return _Compiled(_core().compile_model(_core().read_model(graph), self.device, said | self.options))
        except Exception as error:  # RuntimeError, with the place in its sources before what it says
            raise InputError(f"OpenVINO cannot load it on {self.device}: {_said(error)}") from None


class _Compiled:
    def __init__(self, model: ov.CompiledModel) -> None:
        self._model = model
        self._of_thread = threading.local()  # a request is for one caller at a time

    def run(self, feeds: Mapping[str, Array]) -> Sequence[Array]:
        request = getattr(self._of_thread, "request", None)
        if request is None:
            request = self._of_thread.request = self._model.create_infer_request()
        answer = request.infer(dict(feeds), share_inputs=True)
        return [answer[index] for index in range(len(self._model.outputs))]


@lru_cache(maxsize=1)
def _core() -> ov.Core:
    return ov.Core()


def _said(error: Exception) -> str:
    lines = [line for line in one_line(error).split("Exception from ") if line]
    return lines[-1]
