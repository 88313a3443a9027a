"""What one model costs on one node: the measured samples, and the cost of every part that follows from them.

Knows models and the file format. Must not know how the numbers were measured, nor who asks.
"""

from __future__ import annotations

from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PrivateAttr,
    model_validator,
)

from isthmus.workloads.backend import BackendSpec
from isthmus.workloads.documents import parse, read_json, write_text
from isthmus.workloads.errors import InputError
from isthmus.workloads.fit import Floats, fit_line, typical
from isthmus.workloads.model import Model, Part, members

Source = Literal["measured", "fitted", "published", "scaled"]


Seconds = TypeVar("Seconds", float, Floats)


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Machine(_Frozen):
    """Where it was measured."""

    label: str
    cpu: str
    cores: int = Field(ge=1)
    platform: str
    python: str


class SessionCost(_Frozen):
    """The blocks `first` to `last - 1` as one session. `samples_s` are in the order in which they were taken.

    They are autocorrelated, so whoever draws from them should draw runs of neighbours. `mean_s` is theirs with
    the machine's drift divided out (`fit.session_means`), so that sessions can be compared.
    """

    first: int = Field(ge=0)
    last: int = Field(ge=1)
    kind: Literal["head", "tail", "block", "whole", "part"]
    load_s: NonNegativeFloat
    weights_bytes: int = Field(ge=0)
    mean_s: NonNegativeFloat
    samples_s: tuple[NonNegativeFloat, ...] = Field(min_length=1)


class BlockCost(_Frozen):
    """Mean seconds of one block inside a session, and where the number comes from."""

    seconds: NonNegativeFloat
    source: Source


class CutCost(_Frozen):
    """What a session costs besides for beginning or ending at one cut; negative where that saves something."""

    enter_s: float = 0.0
    leave_s: float = 0.0


_ENOUGH = 50
"""Single runs that tell how runs scatter. Among fewer, one that was disturbed would count for too much."""


class Rhythm(_Frozen):
    """How a part costs in a run: `scale` times what it took in the profiler's loop, and `shift_s` more.

    A part that runs after idling finds cold caches, which costs a constant; and a machine is a little faster or slower
    than when it was profiled. A pilot run finds both.
    """

    scale: PositiveFloat = 1.0
    shift_s: NonNegativeFloat = 0.0
    provenance: str = "none: as in the profiler's loop"
    sessions: tuple[SessionCost, ...] = ()
    """What the pilot measured; the spread of single runs comes from here, where there is something."""

    def paced_s(self, seconds: Seconds) -> Seconds:
        """Seconds in a run of what takes `seconds` in the loop; a number or an array."""
        return self.scale * seconds + self.shift_s


class BatchCost(_Frozen):
    """The whole model on `size` requests at once: how many times longer than on one."""

    size: int = Field(ge=2)
    ratio: PositiveFloat
    samples_s: tuple[NonNegativeFloat, ...] = ()


class Profile(_Frozen):
    """The costs of one model on one node.

    A session of blocks i to j-1 takes `session_s`, their sum, entering at cut i and leaving at cut j
    (`workloads/fit.py` says why). One that is a single measured block takes what it took.
    """

    schema_version: Literal[1] = 1
    model: str
    sha256: str
    machine: Machine
    backend: str
    backend_version: str
    backend_arguments: dict[str, Any] = {}
    """What the backend was given besides its name, as a node of a testbed says it."""
    provider: str
    threads: int = Field(ge=1)
    date: str
    clock: Literal["cpu", "wall"] = "cpu"
    """CPU time of the thread that calls; wall time where a backend computes elsewhere."""
    pace_s: NonNegativeFloat
    batch: int = Field(default=1, ge=1)
    provenance: str
    session_s: NonNegativeFloat
    blocks: tuple[BlockCost, ...] = Field(min_length=1)
    cuts: tuple[CutCost, ...]
    sessions: tuple[SessionCost, ...]
    rhythm: Rhythm = Rhythm()
    batches: tuple[BatchCost, ...] = ()

    _path: Path | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _spans_exist(self) -> Self:
        if len(self.cuts) != len(self.blocks) + 1:
            raise ValueError(f"{len(self.blocks)} blocks lie between {len(self.blocks) + 1} cuts, not {len(self.cuts)}")
        for index, session in enumerate(self.sessions):
            if not session.first < session.last <= len(self.blocks):
                raise ValueError(f"sessions.{index} spans blocks {session.first} to {session.last}")
        sizes = [1, *(batch.size for batch in self.batches)]
        if any(after <= before for before, after in pairwise(sizes)):
            raise ValueError("the sizes of batches do not increase")
        return self

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read a profile. Raises InputError, naming the file and the first field that is wrong."""
        profile = parse(cls, read_json(path), where=path)
        profile._path = Path(path)
        return profile

    def save(self, path: str | Path) -> None:
        """Write it as JSON, wholly or not at all. Raises RunFailure if that is impossible."""
        write_text(path, self.model_dump_json(indent=1) + "\n")

    @property
    def measured_with(self) -> BackendSpec:
        return BackendSpec(name=self.backend, **self.backend_arguments)

    def check_model(self, model: Model) -> None:
        """Raise InputError unless this profile is of exactly this model: same file, same weights."""
        if self.sha256 != model.sha256 or len(self.blocks) != len(model.blocks):
            where = self._path or "profile"
            problem = f"is of model {self.model} ({self.sha256[:12]}), not of {model.name} ({model.sha256[:12]})"
            raise InputError(problem, where=where)

    def part_s(self, model: Model, part: Part) -> float:
        """Mean seconds of `part` as one session; 0 if it is empty.

        Inside a block, where nothing was measured, layers share the block's cost by their operations. Raises
        InputError if the profile is of another model.
        """
        self.check_model(model)
        if not part.layers:
            return 0.0
        span = model.span_of(part)
        if span is not None:
            return float(self.span_s()[span])
        costs = (
            cost.seconds * _share(model, block, part) for cost, block in zip(self.blocks, model.blocks, strict=True)
        )
        return self.rhythm.paced_s(self.session_s + sum(costs))

    def span_s(self) -> Floats:
        """Mean seconds of `model.span(i, j)` at [i, j], between all B + 1 cuts; 0 where i >= j. Read-only."""
        return self._span_s

    def load_s(self, model: Model, part: Part) -> float:
        """Seconds to load `part`: a constant and a rate per byte of weights, fitted to the measured sessions.

        0 if no session was measured. Raises InputError if the profile is of another model.
        """
        self.check_model(model)
        constant_s, s_per_byte = self._load
        return constant_s + s_per_byte * model.weights_bytes(part) if part.layers else 0.0

    def batch_factor(self, size: int) -> float:
        """How many times longer than one request a batch takes, linear between the sizes that were measured.

        InputError for a batch larger than those.
        """
        points = [(1, 1.0), *((batch.size, batch.ratio) for batch in self.batches)]
        if size > points[-1][0]:
            largest = f"the largest is {points[-1][0]}" if self.batches else "none were"
            raise InputError(
                f"what a batch of {size} costs was not measured on {self.machine.label!r}: {largest}",
                allowed="`cost: [[1, 1.0], [8, 3.2]]`, or a profile with `batches`: `isthmus calibrate` measures them",
            )
        sizes, ratios = zip(*points, strict=True)
        return float(np.interp(size, sizes, ratios))

    def at_rhythm(self, rhythm: Rhythm) -> Profile:
        """The same, as it is in a run; what was measured stays as it is, and a rhythm found before is replaced."""
        return Profile(**(dict(self) | {"rhythm": rhythm}))  # not model_copy, which would keep what is cached

    def with_batches(self, batches: tuple[BatchCost, ...]) -> Profile:
        """The same, with these costs of batches instead of those it has."""
        return Profile(**(dict(self) | {"batches": batches}))

    def residuals(self, seconds: float) -> Floats:
        """How single runs of a part of about `seconds` scatter: r in `t = mean * (1 + r)`, as taken.

        They are of the measured sessions whose means are nearest (by ratio), each about its own mean, without the
        host's hiccups: of as many as it takes to have enough of them. A single 0 if no session was measured. Read-only.
        """
        means, residuals = self._residuals
        nearest = np.abs(np.log(means / max(seconds, 1e-12))).argsort(kind="stable")
        enough = int(np.cumsum([len(residuals[i]) for i in nearest]).searchsorted(_ENOUGH)) + 1
        found = np.concatenate([residuals[i] for i in nearest[:enough]])
        found.flags.writeable = False
        return found

    @cached_property
    def _span_s(self) -> Floats:
        before = np.concatenate([[0.0], np.cumsum([block.seconds for block in self.blocks])])
        enter = np.array([cut.enter_s for cut in self.cuts]) - before
        leave = np.array([cut.leave_s for cut in self.cuts]) + before
        table: Floats = np.triu(self.session_s + enter[:, None] + leave[None, :], k=1).clip(min=0.0)
        for session in self.sessions:
            if session.kind == "block":
                table[session.first, session.last] = session.mean_s
        table = np.where(table > 0, self.rhythm.paced_s(table), 0.0)
        table.flags.writeable = False
        return table

    @cached_property
    def _load(self) -> tuple[float, float]:
        return fit_line([s.weights_bytes for s in self.sessions], [s.load_s for s in self.sessions])

    @cached_property
    def _residuals(self) -> tuple[Floats, list[Floats]]:
        """Means of the measured sessions, and the residuals of each."""
        sessions = self.rhythm.sessions or self.sessions
        samples = [typical(session.samples_s) for session in sessions if max(session.samples_s) > 0]
        residuals = [s / s.mean() - 1 for s in samples] or [np.zeros(1)]
        for array in residuals:
            array.flags.writeable = False
        return np.array([s.mean() for s in samples] or [1.0]), residuals


def _share(model: Model, block: int, part: Part) -> float:
    """The share of a block's operations that is in `part`; of its layers, if the block only moves data."""
    inside = part.layers & block
    if not inside:
        return 0.0
    total = sum(model.layers[index].flop for index in members(block))
    if not total:
        return inside.bit_count() / block.bit_count()
    return sum(model.layers[index].flop for index in members(inside)) / total
