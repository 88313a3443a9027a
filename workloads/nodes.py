"""Nodes as people describe them and as everything else uses them: what a place that computes is like.

Knows units and rates. Must not know models, links, or how a shell makes a node behave so; docs/physics.md says what
each field means, with its formula.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from isthmus.workloads.backend import DEFAULT, BackendSpec
from isthmus.workloads.cluster import HostName
from isthmus.workloads.errors import InputError
from isthmus.workloads.mobility import Mobility, Position, Positions, RandomWaypoint, Waypoints
from isthmus.workloads.model import Model, Part
from isthmus.workloads.rate import Rate
from isthmus.workloads.service import SyntheticSpec
from isthmus.workloads.units import Bytes, Joules, Seconds, Watt, as_float, parse_time

Discipline = Literal["fifo", "edf", "priority", "ps"]


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _speed(value: Any) -> Any:
    """`0.8`, or a schedule `[[0s, 1], [60s, 0.6]]` in which 0 is standing still."""
    entries = value if isinstance(value, list | tuple) else [[0.0, value]]
    pairs = []
    for entry in entries:
        if not isinstance(entry, list | tuple) or len(entry) != 2:
            raise ValueError(f"{entry!r} is not a pair of time and speed (allowed: [[0s, 1], [60s, 0.6], …])")
        time, speed = entry
        if isinstance(speed, bool) or not isinstance(speed, int | float):
            raise ValueError(f"the speed {speed!r} is not a number (allowed: 1 is the node's usual speed, 0.5 half)")
        try:
            pairs.append((parse_time(time), as_float(speed)))
        except InputError as error:
            raise ValueError(str(error)) from None
    return tuple(pairs)


_PAIR: dict[str, Any] = {"type": "array", "items": {"type": ["string", "number"]}, "minItems": 2, "maxItems": 2}
Speed = Annotated[
    tuple[tuple[float, float], ...],
    BeforeValidator(_speed),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "array", "items": _PAIR}]}),
]


class Power(_Spec):
    """Electrical power of a node, in watts: while it is up, and on top of that while it computes, sends, receives."""

    idle: Watt = 0.0
    busy: Watt = 0.0
    tx: Watt = 0.0
    rx: Watt = 0.0


class Price(_Spec):
    """What a node costs: by the second that it works, or is rented where it scales; by the byte that leaves it. USD."""

    per_s: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    per_byte: float = Field(default=0.0, ge=0, allow_inf_nan=False)


class Batch(_Spec):
    """Dynamic batching: waiting jobs of the same part are served together, in one slot."""

    size: int = Field(ge=1, description="jobs in a batch at most; a full one starts as soon as a slot is free")
    wait: Seconds = Field(default=0.0, description="after which the job that came first waits for no others")
    cost: tuple[tuple[int, float], ...] | None = Field(
        default=None,
        description="pairs of batch size and time, relative to a batch of 1; by default as the profile has measured",
    )

    @model_validator(mode="after")
    def _cost_is_a_curve(self) -> Batch:
        if self.cost is not None:
            check_curve(self.cost, self.size)
        return self

    @property
    def sizes(self) -> tuple[int, ...]:
        """Those that are measured, and that physical nodes have sessions for: 1, 2, 4, … and the largest."""
        return (*(2**k for k in range((self.size - 1).bit_length())), self.size)

    def factor(self, size: int) -> float:
        """How many times longer than one job a batch takes, as `cost` says."""
        assert self.cost is not None
        return on_curve(self.cost, size)


def check_curve(points: tuple[tuple[int, float], ...], size: int = 1) -> None:
    """ValueError unless the points say what batches of 1 to `size` cost."""
    if not points or points[0] != (1, 1):
        raise ValueError("a cost begins with a batch of 1, which takes 1 (allowed: [[1, 1.0], [8, 3.2], …])")
    for (before, less), (after, more) in pairwise(points):
        if after <= before:
            raise ValueError(f"sizes of batches increase: {after} comes after {before}")
        if not less <= more < float("inf"):
            raise ValueError(f"a batch of {after} takes {more:g}, less than one of {before}, which takes {less:g}")
    if points[-1][0] < size:
        raise ValueError(
            f"a batch of {size} is larger than the largest of known cost, {points[-1][0]} "
            f"(allowed: a smaller `size`, or the cost of one of {size})"
        )


def on_curve(points: tuple[tuple[int, float], ...], size: int) -> float:
    """Linear between the points."""
    i = bisect_left(points, (size, 0.0))
    if points[i][0] == size:
        return points[i][1]
    (a, less), (b, more) = points[i - 1], points[i]
    return less + (more - less) * (size - a) / (b - a)


class Scale(_Spec):
    """A node that rents more slots while it needs them. `slots` is what it always has."""

    most: int = Field(ge=1, description="slots that it has at most")
    start_up: Seconds = Field(default=0.0, description="from ordering a slot until it serves")
    idle: Seconds = Field(default=60.0, description="a slot that idles for so long is given back")


class NodeSpec(_Spec):
    """A place that computes. With `service` its times are made up; without, they come from a profile.

    With `count` it is a group of alike: `cam` with a count of 3 is `cam-0`, `cam-1` and `cam-2`.
    """

    count: int | None = Field(default=None, ge=1, le=1_000_000, description="a group of so many: NAME-0, NAME-1, …")
    serves: bool | None = Field(
        default=None, description="whether policies may offload to it; by default all that are not in a group"
    )
    host: HostName | None = Field(
        default=None,
        description="the machine of the cluster that it is; with a `slowdown` or a `service`, emulated there",
    )
    profile: str | None = Field(
        default=None,
        description="label of the machine whose profiles this node takes; by default its `host`, or `host`",
    )
    slowdown: float = Field(default=1.0, gt=0, description="how many times slower than that machine")
    service: SyntheticSpec | None = None
    backend: BackendSpec = Field(
        default=DEFAULT, description="what runs its parts in a real run, as `isthmus backends` lists it"
    )
    slots: int = Field(default=1, ge=1, le=1_000_000, description="requests that it computes at the same time")
    discipline: Discipline = Field(
        default="fifo",
        description="who is served next: first come, earliest deadline, highest priority; ps: all at once, shared",
    )
    room: int | None = Field(
        default=None, ge=1, description="requests that it holds, waiting and in service; one more is dropped"
    )
    batch: Batch | None = None
    memory: Bytes | None = Field(
        default=None, description="for weights and activations, such as 512MB; parts are loaded as they are needed"
    )
    speed: Speed | None = Field(
        default=None, description="relative to its usual one; or pairs of time and speed: [[0s, 1], [60s, 0.6]]"
    )
    period: Seconds | None = Field(default=None, description="after which a schedule of speeds repeats")
    scale: Scale | None = None
    power: Power = Power()
    battery: Joules | None = Field(default=None, description="such as 10kJ or 3Wh; empty, the node is down for good")
    price: Price = Price()
    position: Position | None = Field(default=None, description="[x, y] in metres, of a cell that serves what moves")
    mobility: Mobility | None = Field(default=None, description="it moves, and is linked to the nearest cell only")

    @model_validator(mode="after")
    def _fields_go_together(self) -> NodeSpec:
        if self.service is not None and (self.profile is not None or self.slowdown != 1):
            raise ValueError("has both `service` and `profile` or `slowdown`: a node's times have one source")
        if self.host is not None and self.count is not None:
            raise ValueError("has both `host` and `count`: a host is one machine (allowed: one node per host)")
        if self.position is not None and self.mobility is not None:
            raise ValueError("has both `position` and `mobility`: the position is of a cell, which does not move")
        if self.discipline == "ps":
            for field in ("batch", "memory", "scale"):
                if getattr(self, field) is not None:
                    raise ValueError(
                        f"has `discipline: ps` and `{field}` (allowed: `{field}` with fifo, edf, priority)"
                    )
        if self.scale is not None and self.scale.most < self.slots:
            raise ValueError(
                f"scales to {self.scale.most} slots, and has {self.slots} already (allowed: most >= slots)"
            )
        if self.room is not None:
            least, of = max(
                (self.slots, "slots"),
                (self.scale.most if self.scale else 1, "scale.most"),
                (self.batch.size if self.batch else 1, "batch.size"),
            )
            if self.room < least:
                raise ValueError(f"has room for {self.room} requests, which leaves no use for {of} = {least}")
        if self.battery is not None and not any((self.power.idle, self.power.busy, self.power.tx, self.power.rx)):
            raise ValueError(
                "has a `battery` that nothing drains (allowed: with `power`, in watts: idle, busy, tx, rx)"
            )
        if self.period is not None and (self.speed is None or len(self.speed) == 1):
            raise ValueError("has a `period` without a schedule of speeds (allowed: speed: [[0s, 1], [60s, 0.6]])")
        _ = self.relative_speed  # says what is wrong with it
        return self

    @property
    def is_physical(self) -> bool:
        """Whether, in a real run, it takes the time that its host takes."""
        return self.host is not None and self.slowdown == 1 and self.service is None

    @property
    def label(self) -> str:
        """Of the machine whose profiles it takes."""
        return self.profile or self.host or "host"

    @cached_property
    def relative_speed(self) -> Rate | None:
        """Seconds of work done per second; None where that is always 1."""
        if self.speed is None or self.speed == ((0.0, 1.0),):
            return None
        try:
            return Rate(tuple(t for t, _ in self.speed), tuple(s for _, s in self.speed), self.period)
        except InputError as error:
            raise ValueError(f"speed: {error}".replace("a transfer", "its work")) from None

    def at_speed(self, speed: float) -> NodeSpec:
        """The same, always at one speed."""
        said = {field: getattr(self, field) for field in self.model_fields_set}
        return NodeSpec(**(said | {"speed": speed, "period": None}))

    def realise(self, names: Sequence[str], folder: Path) -> list[Node]:
        """The node of that name, or the members of the group. `folder` is what relative paths start from."""
        paths: Sequence[Waypoints | RandomWaypoint | None]
        if isinstance(self.mobility, Positions):
            paths = self.mobility.read(folder, names)
        else:
            paths = [self.mobility] * len(names)
        serves = self.count is None if self.serves is None else self.serves
        return [
            Node(
                name, serves, self.slots, self.power, self.price, self.slowdown, self.position, path,
                self.discipline, self.room, self.batch, self.memory, self.relative_speed, self.battery, self.scale,
                self.host, self.is_physical, self.backend,
            )
            for name, path in zip(names, paths, strict=True)
        ]  # fmt: skip


@dataclass(frozen=True)
class Node:
    name: str
    serves: bool
    """Whether policies may offload to it."""
    slots: int
    power: Power
    price: Price
    slowdown: float
    """How many times slower than this machine an emulation of the node is; 1 for synthetic service times."""
    position: Position | None = None
    mobility: Waypoints | RandomWaypoint | None = None
    discipline: Discipline = "fifo"
    room: int | None = None
    batch: Batch | None = None
    memory_bytes: float | None = None
    speed: Rate | None = None
    """Seconds of work done per second, over time; None where that is always 1."""
    battery_j: float | None = None
    scale: Scale | None = None
    host: str | None = None
    """The machine of the cluster that it is, or is emulated on; None for whatever machine the run is started on."""
    physical: bool = False
    """Whether it takes the time that its host takes."""
    backend: BackendSpec = DEFAULT

    @property
    def special(self) -> list[str]:
        """The fields in which it is more than slots and a FIFO queue."""
        given = {
            "discipline": None if self.discipline == "fifo" else self.discipline,
            "room": self.room,
            "batch": self.batch,
            "memory": self.memory_bytes,
            "speed": self.speed,
            "battery": self.battery_j,
            "scale": self.scale,
        }
        return [field for field, value in given.items() if value is not None]

    def needs_bytes(self, model: Model, part: Part) -> int:
        """The memory that a part takes here: weights, and activations for the largest batch."""
        return model.memory_bytes(part, 1 if self.batch is None else self.batch.size)

    def holds(self, model: Model, part: Part) -> bool:
        """Whether a part ever fits into its memory."""
        return self.memory_bytes is None or self.needs_bytes(model, part) <= self.memory_bytes
