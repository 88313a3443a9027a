"""What the actors of one cell say to each other and to the driver. Data only: letters are written as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from isthmus.policies.contract import Policy
from isthmus.policies.plan import Plan
from isthmus.policies.records import Kind, Record, Span
from isthmus.real.session import Array
from isthmus.workloads.errors import InputError
from isthmus.workloads.faults import Fault
from isthmus.workloads.requests import Request
from isthmus.workloads.routing import NONE_DOWN, LinkId

Tensors = Mapping[str, Array]


@dataclass(frozen=True)
class Cell:
    """One policy under one seed: what the actors need to know of it.

    `epoch` is its time 0 on the clock of the actor that is told. `cuts_links`: something else makes faults of links
    felt, as the lab does; otherwise senders keep messages back.
    """

    id: int
    epoch: float
    seed: int
    name: str
    faults: tuple[Fault, ...] = ()
    cuts_links: bool = False


@dataclass(frozen=True, slots=True)
class Letter:
    """A message under way: which one, of which attempt, how far it has come, and what happened to it so far.

    `at_s` is when it is delivered, over an emulated link; over a physical one, when its sender handed it over.
    """

    cell: int
    plan: Plan
    request: Request
    attempt: int
    version: str
    """Of the request's model: every part that this attempt needs is computed with it."""
    message: int
    hop: int
    at_s: float
    spans: tuple[Span, ...]
    overruns: int
    tolerance: float = 0.0
    """The largest of the backends that it has passed."""
    down: frozenset[LinkId] = NONE_DOWN
    """Links that its plan was laid out around."""

    @property
    def number(self) -> int:
        return self.request.number


Version = tuple[str, str]
"""A model's name, and which version of it."""


@dataclass(frozen=True)
class Work:
    """What arises at a source in a cell; what is open at `end_s` stays unfinished."""

    requests: Sequence[Request]
    policy: Policy
    end_s: float
    versions: Mapping[str, str]
    """What attempts begin with, by model."""
    away: Sequence[str] = ()
    """Nodes that are down when it begins."""


@dataclass
class Collected:
    """What a node hands over now and then."""

    records: list[Record]
    decisions: list[dict[str, Any]]
    """As `decision_row` makes them."""
    done: bool
    failure: BaseException | None
    refusals: list[str]
    """What was wrong with messages that the actor did not take."""
    spoilt: Mapping[Version, str]
    """Versions of which an attempt has come to nothing here, and why."""
    versions: frozenset[Version]
    """What attempts at requests that are open were begun with."""


def took(
    kind: Kind, place: str, start_s: float, end_s: float, attempt: int, stage: int = -1, size: int | None = None
) -> tuple[Span, ...]:
    """The span, if it took any time."""
    return (Span(kind, place, start_s, end_s, attempt, stage, size),) if end_s > start_s else ()


def place_of(link: tuple[str, str]) -> str:
    """As spans name it."""
    return f"{link[0]}>{link[1]}"


Shapes = Sequence[tuple[np.dtype[Any], tuple[int, ...]]]
"""Of the tensors that go with a letter."""
_KINDS = {kind.value: kind for kind in Kind}
_read_plan = lru_cache(maxsize=4096)(Plan.from_json)


def letter_to(letter: Letter, shapes: Sequence[tuple[str, tuple[int, ...]]]) -> bytes:
    """As it goes over the wire."""
    said = [
        letter.cell, letter.plan.to_json(), letter.request, letter.attempt, letter.version, letter.message,
        letter.hop, letter.at_s, letter.spans, letter.overruns, letter.tolerance, sorted(letter.down), shapes,
    ]  # fmt: skip
    return json.dumps(said).encode()


def letter_from(content: bytes) -> tuple[Letter, Shapes]:
    """What `letter_to` wrote. InputError for anything else; whether its plan is possible, its receiver finds out."""
    try:
        (
            cell, plan, request, attempt, version, message, hop, at_s, spans, overruns, tolerance, down, shapes,
        ) = json.loads(content)  # fmt: skip
        letter = Letter(
            _whole(cell), _read_plan(plan), _request(request), _whole(attempt), _text(version), _whole(message),
            _whole(hop), _number(at_s), tuple(map(_span, spans)), _whole(overruns), _number(tolerance),
            frozenset((_text(a), _text(b)) for a, b in down),
        )  # fmt: skip
        return letter, [(_dtype(dtype), tuple(map(_whole, shape))) for dtype, shape in shapes]
    except (ValueError, OverflowError, TypeError, KeyError, RecursionError) as error:
        raise InputError(f"not a letter: {type(error).__name__}: {error}") from None


def refusal_from(value: Sequence[Any]) -> tuple[str, tuple[Span, ...]]:
    """Why a node refused an attempt, and what took time in it, from JSON. InputError for anything else."""
    try:
        reason, spans = value
        return _text(reason), tuple(map(_span, spans))
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"not a refusal: {type(error).__name__}: {error}") from None


def _whole(value: Any) -> int:
    if type(value) is not int or not -1 <= value < 2**53:
        raise ValueError(f"{value!r} is no count")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no number")
    return float(value)


def _text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError(f"{value!r} is no text")
    return value


def _dtype(value: Any) -> np.dtype[Any]:
    dtype = np.dtype(_text(value))
    if dtype.kind not in "biuf":
        raise ValueError(f"tensors of {value!r}")
    return dtype


def _request(value: Any) -> Request:
    number, source, model, arrival_s, deadline_s, timeout_s, priority = value
    deadline_s, timeout_s = (None if it is None else _number(it) for it in (deadline_s, timeout_s))
    if type(priority) is not int:
        raise ValueError(f"{priority!r} is no priority")
    return Request(_whole(number), _text(source), _text(model), _number(arrival_s), deadline_s, timeout_s, priority)


def _span(value: Any) -> Span:
    kind, place, start_s, end_s, attempt, stage, size = value
    bytes_ = None if size is None else _whole(size)
    return Span(_KINDS[kind], _text(place), _number(start_s), _number(end_s), _whole(attempt), _whole(stage), bytes_)
