"""Records: what happened to one request, as two flat tables that are the same from both worlds. Writes no file.

Missing is None, never 0. Times are seconds on the run's clock. Both are tuples: a simulation makes millions of them,
and a table is made of them by turning rows into columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple


class Outcome(StrEnum):
    """Every request ends in exactly one of these."""

    COMPLETED = "completed"
    LATE = "late"
    DROPPED = "dropped"
    FAILED = "failed"
    UNFINISHED = "unfinished"


class Kind(StrEnum):
    """What took time inside a request."""

    DECIDE = "decide"
    WAIT = "wait"
    LOAD = "load"
    COMPUTE = "compute"
    ENCODE = "encode"
    SEND = "send"
    DECODE = "decode"


class Span(NamedTuple):
    """One thing that took time: where, from when to when. `place` is a node, or `a>b` for a link.

    A `wait` at a link is for the transmitter; `send` is from the first byte sent to the last one delivered, latency
    included. `stage` is -1 for what belongs to no stage.
    """

    kind: Kind
    place: str
    start_s: float
    end_s: float
    attempt: int = 1
    stage: int = -1
    bytes: int | None = None


class Record(NamedTuple):
    """One request, closed."""

    number: int
    source: str
    model: str
    arrival_s: float
    deadline_s: float | None
    end_s: float | None
    outcome: Outcome
    reason: str | None
    plan: str | None
    """As `Plan.to_json` writes it: the plan of the last attempt."""
    attempts: int
    energy_j: float | None = None
    money_usd: float | None = None
    correct: bool | None = None
    """Whether the answer equals the whole model's; None where nothing was computed."""
    answer_error: float | None = None
    """Largest difference from the whole model's answer, relative to its largest value."""
    overruns: int | None = None
    """How often the host was late: a part or a message not ready at its emulated time; None where none was emulated."""
    version: str | None = None
    """Which version of the model answered, as `Model.version` has it; None where nothing was computed."""
    spans: Sequence[Span] = ()

    @property
    def latency_s(self) -> float | None:
        return None if self.end_s is None else self.end_s - self.arrival_s


REQUEST_COLUMNS: dict[str, str] = {
    "policy": "string",
    "seed": "int64",
    "source": "string",
    "number": "int64",
    "model": "string",
    "arrival_s": "float64",
    "deadline_s": "float64",
    "end_s": "float64",
    "latency_s": "float64",
    "outcome": "string",
    "reason": "string",
    "plan": "string",
    "attempts": "int64",
    "energy_j": "float64",
    "money_usd": "float64",
    "correct": "bool",
    "answer_error": "float64",
    "overruns": "int64",
    "version": "string",
}
"""The `requests` table: one row per request."""

SPAN_COLUMNS: dict[str, str] = {
    "policy": "string",
    "seed": "int64",
    "source": "string",
    "number": "int64",
    "attempt": "int64",
    "stage": "int64",
    "kind": "string",
    "place": "string",
    "start_s": "float64",
    "end_s": "float64",
    "bytes": "int64",
}
"""The `spans` table: one row per thing that took time."""
