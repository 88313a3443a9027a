"""What goes wrong, as an experiment says it: the same description for the simulator and for the real run.

A fault happens once, at a given time, or again and again, at times that belong to (seed, place). Knows names and times,
no shell.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from itertools import pairwise, product
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

    def draw(self, seed: int, until_s: float) -> Iterator[Fault]:
        """What happens to one place up to a time."""
        draw = stream(seed, self.node or ">".join(self.link or ()), "faults")
        now_s = 0.0
        while (down := now_s + float(draw.exponential(self.every))) < until_s:
            now_s = down + float(draw.exponential(self.lasting))
            if self.link is not None:
                yield LinkFault(link=self.link, down=down, up=now_s)
            elif self.slower is not None:
                yield SlowNode.model_validate({"node": self.node, "slower": self.slower, "from": down, "to": now_s})
            else:
                yield NodeFault(node=str(self.node), down=down, up=now_s)


def _kind(fault: Any) -> str:
    """Which kind is meant is told by the field that only it has."""
    has = fault if isinstance(fault, dict) else getattr(fault, "model_fields_set", ())
    return next((field for field in ("every", "slower", "lose", "link") if field in has), "node")


Fault = NodeFault | LinkFault | SlowNode | LostMessages
"""One thing that goes wrong once."""

FaultSpec = Annotated[
    Annotated[NodeFault, Tag("node")]
    | Annotated[LinkFault, Tag("link")]
    | Annotated[SlowNode, Tag("slower")]
    | Annotated[LostMessages, Tag("lose")]
    | Annotated[Recurring, Tag("every")],
    Discriminator(_kind),
]


def draw_faults(
    specs: Iterable[FaultSpec],
    members: Callable[[str], Sequence[str]],
    links: Container[tuple[str, str]],
    seed: int,
    until_s: float,
) -> list[Fault]:
    """What goes wrong in one run, groups resolved; in order of time. The same seed gives the same, whatever the policy.

    `members` are the nodes that a name stands for; between groups every one of the `links` is meant. Outages of one
    node that overlap are one.
    """
    found: list[Fault] = []
    for spec in specs:
        for place in places(spec, members, links):
            one = spec.model_copy(update=place)
            found.extend(one.draw(seed, until_s) if isinstance(one, Recurring) else [one])
    return sorted([*_merged(found), *(f for f in found if not isinstance(f, NodeFault))], key=begins_s)


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


def _merged(faults: Iterable[Fault]) -> Iterator[NodeFault]:
    """Outages of nodes, those that overlap as one."""
    by_node: dict[str, list[NodeFault]] = {}
    for fault in faults:
        if isinstance(fault, NodeFault):
            by_node.setdefault(fault.node, []).append(fault)
    for node, outages in by_node.items():
        outages.sort(key=begins_s)
        down, end_s = outages[0].down, outages[0].end_s
        for outage in outages[1:]:
            if outage.down <= end_s:
                end_s = max(end_s, outage.end_s)
                continue
            yield NodeFault(node=node, down=down, up=end_s)
            down, end_s = outage.down, outage.end_s
        yield NodeFault(node=node, down=down, up=None if end_s == math.inf else end_s)


def factor(whiles: Iterable[tuple[float, float, float]]) -> list[tuple[float, float]]:
    """A piecewise-constant factor, 1 where nothing is said, as pairs of start and value; overlaps multiply.

    `whiles` are (start_s, end_s, factor), of which an end may be infinite.
    """
    spans = list(whiles)
    edges = sorted({0.0, *(t for start, end, _ in spans for t in (start, end) if t < math.inf)})
    pieces = [(t, math.prod(value for start, end, value in spans if start <= t < end)) for t in edges]
    return [pieces[0], *(b for a, b in pairwise(pieces) if a[1] != b[1])]
