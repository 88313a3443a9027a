"""ONNX Runtime, on the CPU or through any other of its execution providers: the reference for all other backends.

Knows ONNX Runtime. Must not know models, testbeds or Ray.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnxruntime as ort

from isthmus.real.backend import Array, Clock, one_line
from isthmus.workloads.errors import InputError, unknown

CPU = "CPUExecutionProvider"


class OnnxRuntime:
    """ONNX Runtime with the execution providers that its package has, in order of preference."""

    name = "onnxruntime"
    version: str = ort.__version__
    exact = True

    def __init__(self, providers: Sequence[str] = (CPU,), options: Mapping[str, Any] | None = None) -> None:
        """`options` are those of the first provider. InputError for one that this ONNX Runtime does not have.

        Layers that a provider cannot run go to the next one that is named. Where the CPU is not named nothing goes
        there: loading fails instead.
        """
        if isinstance(providers, str) or not providers:
            raise InputError(f"providers: {providers!r} is no list", where="backend", allowed=", ".join(self.devices()))
        for provider in providers:
            if provider not in self.devices():
                raise unknown("execution provider", provider, self.devices(), where="backend.providers")
        self.providers = list(providers)
        self.options = [{name: str(value) for name, value in (options or {}).items()}, *({} for _ in providers[1:])]
        self.device = ", ".join(self.providers)
        # Accelerators may compute with 10 bits of mantissa (TF32) where they are not told otherwise.
        self.tolerance = 1e-5 if self.providers == [CPU] else 1e-3

    @staticmethod
    def devices() -> list[str]:
        return list(ort.get_available_providers())

    def clock(self, threads: int) -> Clock:
        return "cpu" if self.providers == [CPU] and threads == 1 else "wall"

    def load(self, graph: bytes, *, threads: int, optimize: bool) -> _Session:
        options = session_options(threads, optimize)
        if CPU not in self.providers:
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        try:
            session = ort.InferenceSession(graph, options, self.providers, self.options)
        except Exception as error:  # ONNX Runtime has a family of its own, without a common base
            raise InputError(f"ONNX Runtime cannot load it on {self.device}: {one_line(error)}") from None
        # A provider whose libraries are missing is left out with no more than a line in a log.
        if missing := [p for p in self.providers if p not in session.get_providers()]:
            raise InputError(
                f"ONNX Runtime does not start {', '.join(missing)}, and would go on without",
                where="backend.providers",
                allowed=", ".join(session.get_providers()),
            )
        return _Session(session)


class _Session:
    def __init__(self, session: ort.InferenceSession) -> None:
        self._session = session

    def run(self, feeds: Mapping[str, Array]) -> Sequence[Array]:
        return self._session.run(None, feeds)  # type: ignore[no-any-return]


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
