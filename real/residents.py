"""The parts that a node has loaded: one session for each version of a model and each size of batch.

A session that was dropped is loaded again from a file of its own, as on any device: reading the model and cutting the
part out of it, which takes several times as long, is done once. These files have no names, so that they go with the
process, however it ends. Knows sessions and files; no time, no Ray.
"""

from __future__ import annotations

import ctypes
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import IO

import numpy as np

from isthmus.real.backend import backend
from isthmus.real.cutter import Graph, graph_of
from isthmus.real.letters import Version
from isthmus.real.session import PartSession, random_tensors
from isthmus.real.slots import CannotRun, Shaped
from isthmus.real.together import run_together
from isthmus.workloads.backend import BackendSpec
from isthmus.workloads.model import Model, Part, model_proto

_WARM_UPS = 5
_PERSISTENT = "/var/tmp"  # where files are on a disk: /tmp may be memory

Filed = tuple[IO[bytes], Graph]
"""A graph, with its content in the file."""


@dataclass
class Staged:
    """What a version of a model has beside the others, before it is admitted."""

    model: Model
    sessions: dict[Shaped, PartSession] = field(default_factory=dict)
    files: dict[Shaped, Filed] = field(default_factory=dict)


class Residents:
    """Of every part sessions for so many requests at once as `sizes` says.

    With `filed` nothing is loaded before it is needed, and then from its file.
    """

    def __init__(
        self, models: Mapping[str, Model], runs_in: BackendSpec, sizes: Sequence[int] = (1,), *, filed: bool = False
    ) -> None:
        self._own = models
        self._models: dict[Version, Model] = {(n, model.version): model for n, model in models.items()}
        self._runs_in, self._sizes, self._is_filed = runs_in, tuple(sizes), filed
        self._sessions: dict[Shaped, PartSession] = {}
        self._files: dict[Shaped, Filed] = {}
        self._loading = threading.RLock()

    @property
    def resident(self) -> tuple[Shaped, ...]:
        return tuple(self._sessions)

    def prepare(self, parts: Sequence[Part]) -> None:
        """Have exactly these resident and warm, or in their files and none resident; and its own versions only."""
        for name, version in [of for of in self._models if self._own[of[0]].version != of[1]]:
            self.forget(name, version)
        wanted = {(part, self._own[part.model].version, size) for part, size in product(parts, self._sizes)}
        self.keep(() if self._is_filed else wanted)
        missing = {part for part, *_ in wanted - (self._files if self._is_filed else self._sessions).keys()}
        for name, model in self._own.items():
            self.admit(self.stage(model, [part for part in missing if part.model == name], None))

    def stage(self, model: Model, parts: Iterable[Part], check: Callable[[PartSession], None] | None) -> Staged:
        """These parts of a version, warm or in their files; each has passed the check, where there is one."""
        staged = Staged(model)
        for part, size, graph in self._cut(model, parts):
            key = part, model.version, size
            if self._is_filed:
                staged.files[key] = _filed(graph)
            if check is not None or not self._is_filed:
                session = _warm(self._loaded(model, part, graph), model, size)
                if check is not None and size == 1:
                    check(session)
                if self._is_filed:
                    session.close()
                else:
                    staged.sessions[key] = session
        return staged

    def admit(self, staged: Staged) -> None:
        """Have what was staged."""
        with self._loading:
            self._sessions.update(staged.sessions)
            self._files.update(staged.files)
            self._models[staged.model.name, staged.model.version] = staged.model

    def parts(self, model: str) -> set[Part]:
        """What there is of a model, in whatever version."""
        with self._loading:
            return {part for part, *_ in (*self._sessions, *self._files) if part.model == model}

    def forget(self, model: str, version: str) -> None:
        """Have a version no longer."""
        of = (model, version)
        with self._loading:
            self._models.pop(of, None)
            self.keep([key for key in self._sessions if (key[0].model, key[1]) != of])
            for key in [key for key in self._files if (key[0].model, key[1]) == of]:
                self._files.pop(key)[0].close()

    def keep(self, sessions: Iterable[Shaped]) -> None:
        """Drop all others."""
        kept = set(sessions)
        with self._loading:
            for key in [key for key in self._sessions if key not in kept]:
                self._sessions.pop(key).close()

    def begin(self) -> None:
        """A run begins: with files, nothing is resident."""
        if self._is_filed:
            self.keep(())
            _trim()

    def session(self, part: Part, version: str, size: int = 1) -> tuple[PartSession, float]:
        """A part for so many requests at once; the seconds of loading it, if that had to be waited for, else 0.

        CannotRun for a version that is not here.
        """
        key = part, version, size
        found = self._sessions.get(key)
        if found is not None:
            return found, 0.0
        with self._loading:
            found = self._sessions.get(key)
            if found is None:
                model = self._models.get((part.model, version))
                if model is None:
                    raise absent(part.model, version)
                found = self._sessions[key] = self._loaded(model, part, self._graph(model, part, size))
                if self._is_filed:
                    _trim()
            return found, found.load_s

    def _loaded(self, model: Model, part: Part, graph: Graph) -> PartSession:
        return PartSession(model, part, graph=graph, backend=backend(self._runs_in))

    def _cut(self, model: Model, parts: Iterable[Part]) -> Iterator[tuple[Part, int, Graph]]:
        ordered = sorted(parts, key=lambda part: part.layers)
        for size in self._sizes if ordered else ():
            proto = model_proto(model, size)
            for part in ordered:
                yield part, size, graph_of(model, part, proto)

    def _graph(self, model: Model, part: Part, size: int) -> Graph:
        key = part, model.version, size
        if not self._is_filed:
            return graph_of(model, part, model_proto(model, size))
        if key not in self._files:
            self._files[key] = _filed(graph_of(model, part, model_proto(model, size)))
        file, graph = self._files[key]
        file.seek(0)
        return graph._replace(content=file.read())


def absent(model: str, version: str) -> CannotRun:
    """Of a version that is not here."""
    return CannotRun(f"has no version {version} of {model}")


def _filed(graph: Graph) -> Filed:
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
