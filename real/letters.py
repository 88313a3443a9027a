"""What the actors of one cell say to each other and to the driver. Data only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from isthmus.policies.plan import Plan
from isthmus.policies.records import Kind, Record, Span
from isthmus.real.backend import Array
from isthmus.workloads.faults import Fault
from isthmus.workloads.requests import Request

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
    message: int
    hop: int
    at_s: float
    spans: tuple[Span, ...]
    overruns: int
    tolerance: float = 0.0
    """The largest of the backends that it has passed."""

    @property
    def number(self) -> int:
        return self.request.number


@dataclass
class Collected:
    """What a source hands over now and then."""

    records: list[Record]
    decisions: list[dict[str, Any]]
    """As `decision_row` makes them."""
    done: bool
    failure: BaseException | None
    refusals: list[str]
    """What was wrong with messages that the actor did not take."""


def took(
    kind: Kind, place: str, start_s: float, end_s: float, attempt: int, stage: int = -1, size: int | None = None
) -> tuple[Span, ...]:
    """The span, if it took any time."""
    return (Span(kind, place, start_s, end_s, attempt, stage, size),) if end_s > start_s else ()


def place_of(link: tuple[str, str]) -> str:
    """As spans name it."""
    return f"{link[0]}>{link[1]}"
