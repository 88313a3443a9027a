"""The parts that a node has loaded, one session for each size of batch. Knows sessions and files; no time, no Ray.

A session that was dropped is loaded again from a file of its own, as on any device: reading the model and cutting the
part out of it, which takes several times as long, is done once. These files have no names, so that they go with the
process, however it ends.
"""

from __future__ import annotations

import ctypes
import tempfile
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from isthmus.real.backend import backend
from isthmus.real.cutter import Graph, graph_of
from isthmus.real.session import PartSession, random_tensors
from isthmus.real.together import run_together
from isthmus.workloads.backend import BackendSpec
from isthmus.workloads.model import Model, Part, model_proto

Shaped = tuple[Part, int]
"""A part, and the requests at once that it is shaped for."""

_WARM_UPS = 5
_PERSISTENT = "/var/tmp"  # where files are on a disk: /tmp may be memory


class Residents:
    """With `filed` nothing is loaded before it is needed, and then from its file."""

    def __init__(self, models: Mapping[str, Model], runs_in: BackendSpec, *, filed: bool = False) -> None:
        self._models, self._runs_in = models, runs_in
        self._sessions: dict[Shaped, PartSession] = {}
        self._files: dict[Shaped, tuple[IO[bytes], Graph]] | None = {} if filed else None
        self._loading = threading.Lock()

    @property
    def resident(self) -> tuple[Shaped, ...]:
        return tuple(self._sessions)

    def prepare(self, parts: Iterable[Shaped]) -> None:
        """Have exactly these resident and warm, or in their files and none resident."""
        wanted = list(parts)
        self.keep(() if self._files is not None else wanted)
        protos: dict[tuple[str, int], Any] = {}
        for part, size in wanted:
            if (part, size) in (self._sessions if self._files is None else self._files):
                continue
            model = self._models[part.model]
            if (model.name, size) not in protos:
                protos[model.name, size] = model_proto(model, size)
            proto = protos[model.name, size]
            if self._files is None:
                session = PartSession(model, part, proto=proto, backend=backend(self._runs_in))
                self._sessions[part, size] = _warm(session, model, size)
            else:
                self._files[part, size] = _filed(graph_of(model, part, proto))

    def keep(self, parts: Iterable[Shaped]) -> None:
        """Drop all others."""
        kept = set(parts)
        for shaped in [it for it in list(self._sessions) if it not in kept]:
            self._sessions.pop(shaped).close()

    def begin(self) -> None:
        """A run begins: with files, nothing is resident."""
        if self._files is not None:
            self.keep(())
            _trim()

    def session(self, part: Part, size: int = 1) -> tuple[PartSession, float]:
        """A part for so many requests at once; the seconds of loading it, if that had to be waited for, else 0."""
        found = self._sessions.get((part, size))
        if found is not None:
            return found, 0.0
        with self._loading:
            found = self._sessions.get((part, size))
            if found is None:
                model = self._models[part.model]
                graph = self._graph(model, part, size)
                found = PartSession(model, part, graph=graph, backend=backend(self._runs_in))
                self._sessions[part, size] = found
                del graph
                if self._files is not None:
                    _trim()
            return found, found.load_s

    def _graph(self, model: Model, part: Part, size: int) -> Graph:
        if self._files is None:
            return graph_of(model, part, model_proto(model, size))
        if (part, size) not in self._files:
            self._files[part, size] = _filed(graph_of(model, part, model_proto(model, size)))
        file, graph = self._files[part, size]
        file.seek(0)
        return graph._replace(content=file.read())


def _filed(graph: Graph) -> tuple[IO[bytes], Graph]:
    """A graph with its content in a file, which is gone when it is closed."""
    file = tempfile.TemporaryFile(dir=_PERSISTENT if Path(_PERSISTENT).is_dir() else None)  # noqa: SIM115
    file.write(graph.content)
    return file, graph._replace(content=b"")


def _trim() -> None:
    """Let the system have the memory that was freed: what dropped sessions had, and what loading took for a while.

    The C library keeps it for later otherwise, and a process may seem to hold several times what it uses.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)


def _warm(session: PartSession, model: Model, size: int) -> PartSession:
    feeds = random_tensors(model, session.inputs, np.random.default_rng(0))
    for _ in range(_WARM_UPS):
        run_together(session, model, [feeds] * size, size)
    return session
