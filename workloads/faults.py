"""What goes wrong, as an experiment says it: the same description for the simulator and for the real run.

A fault happens once, at a given time, or again and again, at times that belong to (seed, place). Knows names and times,
no shell.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from itertools import product
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from isthmus.workloads.random import stream
from isthmus.workloads.units import Seconds


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class _Outage(_Spec):
    down: Seconds
    up: Seconds | None = None

    @model_validator(mode="after")
    def _in_order(self) -> _Outage:
        if self.up is not None and self.up <= self.down:
            raise ValueError(f"is up again at {self.up:g} s, before it goes down at {self.down:g} s")
        return self

    @property
    def end_s(self) -> float:
        return math.inf if self.up is None else self.up


class NodeFault(_Outage):
    """A node goes at `down`, losing all that it holds, and is back at `up`; without `up` it stays away."""

    node: str

    def overlaps(self, other: NodeFault) -> bool:
        """Whether both have the same node down at one time, or one ends as the other begins."""
        return self.node == other.node and self.down <= other.end_s and other.down <= self.end_s


class LinkFault(_Outage):
    """A link carries nothing from `down` to `up`, in either direction: what is on it stands still, and goes on then."""

    link: tuple[str, str]


class _While(_Spec):
    start: Seconds = Field(default=0.0, alias="from")
    end: Seconds | None = Field(default=None, alias="to")

    @model_validator(mode="after")
    def _in_order(self) -> _While:
        if self.end is not None and self.end <= self.start:
            raise ValueError(f"ends at {self.end:g} s, before it begins at {self.start:g} s")
        return self

    @property
    def end_s(self) -> float:
        return math.inf if self.end is None else self.end


class SlowNode(_While):
    """A node is so many times slower for a while: a straggler."""

    node: str
    slower: float = Field(ge=1, allow_inf_nan=False)


class LostMessages(_While):
    """Of the messages on a link, in either direction, this share never arrives; a request's timeout has to notice."""

    link: tuple[str, str]
    lose: float = Field(gt=0, le=1)


class Recurring(_Spec):
    """A node or a link that goes again and again: up for `every` and away for `lasting`, both exponential means.

    With `slower` a node does not go, but is so many times slower.
    """

    node: str | None = None
    link: tuple[str, str] | None = None
    slower: float | None = Field(default=None, ge=1, allow_inf_nan=False)
    every: Seconds = Field(gt=0)
    lasting: Seconds = Field(gt=0)

    @model_validator(mode="after")
    def _one_place(self) -> Recurring:
        if (self.node is None) == (self.link is None):
            raise ValueError("happens to either a `node` or a `link`")
        if self.slower is not None and self.node is None:
            raise ValueError("`slower` is of a node; a link has a rate")
        return self

    @property
    def place(self) -> str:
        """Where it happens; a link is the same whichever end is named first."""
        return self.node or ">".join(sorted(self.link or ()))

    def draw(self, seed: int, until_s: float, which: int = 0) -> Iterator[Fault]:
        """What happens to one place up to a time. `which` tells apart what recurs at the same place."""
        draw = stream(seed, self.place, "faults", which)
        now_s = 0.0
        while (down := now_s + float(draw.exponential(self.every))) < until_s:
            now_s = max(down + float(draw.exponential(self.lasting)), math.nextafter(down, math.inf))
            if self.link is not None:
                yield LinkFault(link=self.link, down=down, up=now_s)
            elif self.slower is not None:
                yield SlowNode.model_validate({"node": self.node, "slower": self.slower, "from": down, "to": now_s})
            else:
                yield NodeFault(node=str(self.node), down=down, up=now_s)


def _kind(fault: Any) -> str:
    """Which kind is meant is told by the field that only it has."""
    if not isinstance(fault, dict):
        return type(fault).__name__ if isinstance(fault, _Spec) else NodeFault.__name__
    kinds = {"every": Recurring, "slower": SlowNode, "lose": LostMessages, "link": LinkFault}
    return next((kind for field, kind in kinds.items() if field in fault), NodeFault).__name__


Fault = NodeFault | LinkFault | SlowNode | LostMessages
"""One thing that goes wrong once."""

FaultSpec = Annotated[
    Annotated[NodeFault, Tag("NodeFault")]
    | Annotated[LinkFault, Tag("LinkFault")]
    | Annotated[SlowNode, Tag("SlowNode")]
    | Annotated[LostMessages, Tag("LostMessages")]
    | Annotated[Recurring, Tag("Recurring")],
    Discriminator(_kind),
]


def draw_faults(
    specs: Iterable[FaultSpec],
    members: Callable[[str], Sequence[str]],
    links: Container[tuple[str, str]],
    seed: int,
    until_s: float,
) -> list[Fault]:
    """What goes wrong in one run, groups resolved, outages merged. The same seed gives the same, whatever the policy.

    `members` are the nodes that a name stands for; between groups every one of the `links` is meant.
    """
    found: list[Fault] = []
    drawn: Counter[str] = Counter()
    for spec in specs:
        for place in places(spec, members, links):
            one = spec.model_copy(update=place)
            if isinstance(one, Recurring):
                found.extend(one.draw(seed, until_s, drawn[one.place]))
                drawn[one.place] += 1
            else:
                found.append(one)
    return merged(found)


def places(
    spec: FaultSpec, members: Callable[[str], Sequence[str]], links: Container[tuple[str, str]]
) -> list[dict[str, Any]]:
    """Where it happens: `{"node": name}` or `{"link": (a, b)}` for every place. KeyError for an unknown name."""
    link: tuple[str, str] | None = getattr(spec, "link", None)
    if link is None:
        return [{"node": name} for name in members(getattr(spec, "node", ""))]
    return [{"link": pair} for pair in product(members(link[0]), members(link[1])) if pair in links]


def begins_s(fault: Fault) -> float:
    return fault.down if isinstance(fault, _Outage) else fault.start


def merged(faults: Iterable[Fault]) -> list[Fault]:
    """In order of time; outages of one node, or of one link, that overlap or meet are one."""
    found: list[Fault] = []
    last: dict[str | frozenset[str], int] = {}
    for fault in sorted(faults, key=begins_s):
        if isinstance(fault, _Outage):
            place = fault.node if isinstance(fault, NodeFault) else frozenset(fault.link)
            before = found[last[place]] if place in last else None
            if isinstance(before, _Outage) and fault.down <= before.end_s:
                if fault.end_s > before.end_s:
                    found[last[place]] = before.model_copy(update={"up": fault.up})
                continue
            last[place] = len(found)
        found.append(fault)
    return found


def factor(whiles: Iterable[tuple[float, float, float]]) -> list[tuple[float, float]]:
    """A piecewise-constant factor, 1 where nothing is said, as pairs of start and value; overlaps multiply.

    `whiles` are (start_s, end_s, factor), of which an end may be infinite.
    """
    changes: dict[float, list[tuple[int, float | None]]] = {0.0: []}
    for number, (start, end, value) in enumerate(whiles):
        changes.setdefault(start, []).append((number, value))
        changes.setdefault(end, []).append((number, None))
    values: dict[int, float] = {}
    pieces: list[tuple[float, float]] = []
    for time in sorted(changes.keys() - {math.inf}):
        for number, begins in changes[time]:
            if begins is None:
                del values[number]
            else:
                values[number] = begins
        value_now = math.prod(values.values())
        if not pieces or pieces[-1][1] != value_now:
            pieces.append((time, value_now))
    return pieces
