"""What a backend is, and finding one by name. Knows no runtime by itself: each is imported when it is asked for.

A backend runs parts, which it is given as ONNX. The node of a testbed names it: `backend: openvino`. Ours are in a
table here; other packages bring theirs with the entry-point group `isthmus.backends`, and `module:Class` needs neither.
`check.py` tells whether one keeps the contract.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from isthmus.workloads.backend import DEFAULT, BackendSpec
from isthmus.workloads.errors import InputError, unknown

Array = npt.NDArray[Any]
Clock = Literal["cpu", "wall"]

GROUP = "isthmus.backends"
_OURS = {
    "onnxruntime": "isthmus.real.onnxruntime_backend:OnnxRuntime",
    "openvino": "isthmus.real.openvino_backend:OpenVino",
    "torch": "isthmus.real.torch_backend:Torch",
    "executorch": "isthmus.real.executorch_backend:ExecuTorch",
}

CLOCKS: Mapping[Clock, Callable[[], float]] = {"cpu": time.thread_time, "wall": time.perf_counter}
"""How a backend's work is timed, in seconds.

`cpu` is the CPU time of the thread that calls, which other work on the host does not stretch. It is right only where
all the work is done on that thread. Accelerators and pools of threads work elsewhere: of them the `wall` time is taken,
and a busy host makes it longer.
"""


class Loaded(Protocol):
    """A part that is ready to run. Threads may run it at the same time. It may have a `close()`."""

    def run(self, feeds: Mapping[str, Array]) -> Sequence[Array]:
        """The outputs in the order of the graph, in memory that later runs leave alone.

        `feeds` are all its inputs by name, of the declared type and shape, and may be read-only: they are not changed.
        """
        ...


class Backend(Protocol):
    """A runtime as a node uses it; what a node's `backend` says besides the name, its constructor is given."""

    name: str
    version: str
    device: str
    """What it computes on, in its own words: execution providers, `CPU`, `cuda:0`."""
    tolerance: float
    """Largest difference from ONNX Runtime on the CPU, relative to the largest number of a tensor, that is its own."""
    exact: bool
    """Whether, loaded without `optimize`, parts joined again give its own whole model's answer bit for bit."""

    def clock(self, threads: int) -> Clock:
        """How its work is timed with so many threads: see `CLOCKS`."""
        ...

    def load(self, graph: bytes, *, threads: int, optimize: bool) -> Loaded:
        """Load an ONNX model, serialised. InputError where it cannot run it, which says why in one line."""
        ...


@dataclass(frozen=True)
class Offer:
    """A backend that can be named, and what is known of it without using it."""

    name: str
    origin: str
    version: str | None
    devices: tuple[str, ...]
    arguments: Mapping[str, Any]
    about: str
    problem: str | None
    """Why it cannot be used here, in one line."""


def backend(spec: BackendSpec = DEFAULT) -> Backend:
    """The backend that a node names, made once per process.

    InputError when there is none of that name, when what it needs is not installed, or for arguments that it does not
    take.
    """
    return _made(spec.name, spec.key, spec)


_cache: dict[tuple[str, str], Backend] = {}


def _made(name: str, key: str, spec: BackendSpec) -> Backend:
    if (name, key) not in _cache:
        factory = find(name)
        signature = inspect.signature(factory)
        try:
            signature.bind(**spec.arguments)
        except TypeError as error:
            allowed = ", ".join(signature.parameters) or "it takes no arguments"
            raise InputError(f"backend {name!r}: {error}", allowed=allowed) from None
        try:
            _cache[name, key] = factory(**spec.arguments)
        except InputError:
            raise
        except Exception as error:  # whatever somebody's constructor may raise
            raise InputError(f"backend {name!r} cannot be made: {one_line(error)}") from error
    return _cache[name, key]


def find(name: str) -> Any:
    """The class or function that makes a backend."""
    if ":" in name:
        point = EntryPoint(name, name, GROUP)
    elif name in installed():
        point = installed()[name]
    else:
        raise unknown("backend", name, [*installed(), "module:Class"])
    try:
        factory = point.load()
    except InputError:
        raise
    except Exception as error:  # whatever importing somebody's module may raise
        allowed = f"pip install 'isthmus[{name}]'" if name in _OURS and isinstance(error, ImportError) else None
        raise InputError(f"backend {name!r} cannot be loaded: {one_line(error)}", allowed=allowed) from error
    if not callable(factory):
        raise InputError(f"backend {name!r} is no class or function, but {factory!r}")
    return factory


@lru_cache(maxsize=1)
def installed() -> dict[str, EntryPoint]:
    """Every backend that has a name; whether it works is another question. InputError when a name is claimed twice."""
    found = {name: EntryPoint(name, value, GROUP) for name, value in _OURS.items()}
    for point in entry_points(group=GROUP):
        other = found.setdefault(point.name, point)
        if other.value != point.value:
            raise InputError(f"backend {point.name!r} is claimed twice: {other.value} and {point.value}; uninstall one")
    return found


def offers() -> list[Offer]:
    """Every backend that has a name: what it is, and whether it can be used here."""
    return [_offer(name, point) for name, point in sorted(installed().items())]


def _offer(name: str, point: EntryPoint) -> Offer:
    try:
        factory = find(name)
        parameters = inspect.signature(factory).parameters.values()
        devices = factory.devices() if hasattr(factory, "devices") else ()
    except InputError as error:
        return Offer(name, point.value, None, (), {}, "", str(error))
    return Offer(
        name,
        point.value,
        getattr(factory, "version", None),
        tuple(devices),
        {p.name: None if p.default is p.empty else p.default for p in parameters},
        (inspect.getdoc(factory) or "").split("\n")[0],
        None,
    )


def same(answer: Array, expected: Array, tolerance: float) -> bool:
    """Whether two tensors agree: within `tolerance` of the largest number, and exactly where they are no fractions."""
    if answer.shape != expected.shape or answer.dtype != expected.dtype:
        return False
    if not np.issubdtype(expected.dtype, np.floating):
        return bool(np.array_equal(answer, expected))
    return difference(answer, expected) <= tolerance


def difference(answer: Array, expected: Array) -> float:
    """The largest difference of two tensors of one shape, relative to the largest number in the expected one."""
    wide = expected.astype(np.float64)
    scale = np.abs(wide).max(initial=0.0) or 1.0
    return float(np.abs(answer.astype(np.float64) - wide).max(initial=0.0) / scale)


def one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
