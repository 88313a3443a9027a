"""Links: what people write of them, and what one direction of a link comes to. Knows no node and no clock.

What the fields mean, in formulas, is in docs/physics.md; workloads/jitter.py and workloads/transport.py have them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from isthmus.workloads.jitter import Jitter, JitterSpec, Sampled
from isthmus.workloads.rate import Rate
from isthmus.workloads.rates import Constant, RateSpec, Schedule
from isthmus.workloads.routing import LinkId
from isthmus.workloads.trace_file import TraceFile
from isthmus.workloads.units import Bytes, Seconds

MediumName = Annotated[str, Field(pattern=r"^\S+$")]


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SlowStart(_Spec):
    """TCP slow start: a window per round-trip time, which doubles; while a connection is idle it halves again."""

    window: Annotated[Bytes, Field(gt=0, description="the first window, such as 14600B: ten packets (RFC 6928)")] = (
        14600.0
    )
    idle: Annotated[
        Annotated[Seconds, Field(gt=0)] | None,
        Field(description="without traffic, in which the window halves; by default a round trip and 200 ms (Linux)"),
    ] = None


Discipline = Annotated[
    Literal["fifo", "fair"],
    Field(description="one message after the other (fifo, unless there is a `medium`), or all at once, max–min fair"),
]
Loss = Annotated[
    float,
    Field(ge=0, lt=1, allow_inf_nan=False, description="probability that a packet is lost; it is sent again"),
]
SlowStartSpec = Annotated[
    bool | SlowStart,
    Field(description="true, or {window: 14600B, idle: 240ms}: the connection is slow when it is new, or was idle"),
]


class DirectionSpec(_Spec):
    """The way back, where it differs from the way there."""

    rate: RateSpec | None = None
    period: Seconds | None = None
    latency: Seconds | None = None
    discipline: Discipline | None = None
    jitter: JitterSpec | None = None
    loss: Loss | None = None
    slow_start: SlowStartSpec | None = None
    overhead: Bytes | None = None


class LinkSpec(_Spec):
    """A link between two nodes. `back` is the second node to the first; what it leaves out is as on the way there.

    Between a group and a node there is one link per member, between two groups members are dealt out evenly: each of
    the larger group has one link. What moves has a link to each, of which one at a time is up. A rate that is drawn is
    drawn for each of them and for each direction.
    """

    between: tuple[str, str]
    rate: RateSpec | None = None  # may be left out on a medium
    period: Seconds | None = Field(default=None, description="after which a schedule of rates repeats")
    latency: Seconds = 0.0
    medium: str | None = Field(
        default=None, description="one of `media`, whose rate is shared with other links; `rate` is then at most what "
        "this link gets of it"
    )  # fmt: skip
    discipline: Discipline | None = None
    jitter: JitterSpec | None = None
    loss: Loss = 0.0
    slow_start: SlowStartSpec = False
    overhead: Annotated[Bytes, Field(description="headers and framing of every message, such as 60B")] = 0.0
    back: DirectionSpec = DirectionSpec()

    @model_validator(mode="after")
    def _possible(self) -> LinkSpec:
        self.ways()
        if self.medium is not None and "fifo" in (self.discipline, self.back.discipline):
            raise ValueError("has a `medium`, on which messages share the rate, and `discipline: fifo` (allowed: fair)")
        return self

    def ways(self) -> tuple[Way, Way]:
        """There and back."""
        rates = _rates(self)
        there = Way(*(getattr(self, name) for name in Way._fields))
        there = there._replace(rate=rates[0], discipline=self.discipline or ("fifo" if self.medium is None else "fair"))
        given = {name: value for name, value in self.back if value is not None and name in Way._fields}
        return there, there._replace(**{**given, "rate": rates[1]})


def _rates(spec: LinkSpec | MediumSpec) -> tuple[RateSpec | None, RateSpec | None]:
    """There and back."""
    back = spec.back
    rate = spec.rate if back.rate is None else back.rate
    period = spec.period if back.rate is None and back.period is None else back.period
    return _repeating(spec.rate, spec.period), _repeating(rate, period)


def _repeating(rate: RateSpec | None, period: float | None) -> RateSpec | None:
    """A rate with the `period` that stands beside it."""
    if period is None or isinstance(rate, Constant):
        return rate
    if isinstance(rate, Schedule):
        return rate.model_copy(update={"period": period})
    said = "no rate" if rate is None else f"a rate of the kind {rate.kind!r}, which has its own"
    raise ValueError(f"has a `period`, and {said} (allowed: a schedule)")


class Way(NamedTuple):
    """One direction of a link as it was written, with nothing left out; None is a rate that only its medium has."""

    rate: RateSpec | None
    latency: float
    discipline: str
    jitter: Jitter | None
    loss: float
    slow_start: bool | SlowStart
    overhead: float

    def more(self, folder: Path) -> dict[str, Any]:
        """What it is beyond a rate and a latency, as fields of `Link`. InputError for a file of delays."""
        jitter = self.jitter and self.jitter.realise(folder)
        return {
            "discipline": self.discipline,
            "jitter": jitter if jitter and jitter.mean_s > 0 else None,
            "loss": self.loss,
            "slow_start": SlowStart() if self.slow_start is True else self.slow_start or None,
            "overhead_bytes": self.overhead,
        }


class MediumBackSpec(_Spec):
    """The rate of a medium for what goes from the second node of a link to the first."""

    rate: RateSpec | None = None
    period: Seconds | None = None


class MediumSpec(_Spec):
    """What several links share: a cell, a wireless network, a bus. Each direction has a capacity of its own.

    `rate` is for what goes from the first node of a link's `between` to the second, `back` for the other way; by
    default it is as much.
    """

    rate: RateSpec
    period: Seconds | None = Field(default=None, description="after which a schedule of rates repeats")
    back: MediumBackSpec = MediumBackSpec()

    @model_validator(mode="after")
    def _periods_are_of_schedules(self) -> MediumSpec:
        _rates(self)
        return self


def way_back(medium: str) -> str:
    """What the other direction of a medium is called."""
    return f"{medium} back"


def named_media(media: Mapping[str, MediumSpec]) -> Iterator[tuple[str, RateSpec]]:
    """Both directions of every medium, by name, with their rates."""
    for name, spec in media.items():
        for called, rate in zip((name, way_back(name)), _rates(spec), strict=True):
            assert rate is not None
            yield called, rate


Described = TypeVar("Described", LinkSpec, MediumSpec)


def at_rates(spec: Described, there_bytes_per_s: float, back_bytes_per_s: float) -> Described:
    """The same at constant rates."""
    there, back = ({"rate": Constant(rate=rate), "period": None} for rate in (there_bytes_per_s, back_bytes_per_s))
    return spec.model_copy(update={**there, "back": spec.back.model_copy(update=back)})


def smooth(spec: LinkSpec) -> LinkSpec:
    """The same without what makes some messages take longer than others."""
    nothing = {name: LinkSpec.model_fields[name].default for name in ("jitter", "loss", "slow_start")}
    back = spec.back.model_copy(update=dict.fromkeys(nothing))
    return spec.model_copy(update={**nothing, "back": back})


def files(spec: BaseModel) -> Iterator[str]:
    """The files that a link or a medium names."""
    for _, value in spec:
        if isinstance(value, TraceFile | Sampled):
            yield from [value.file] if value.file is not None else ()
        elif isinstance(value, DirectionSpec | MediumBackSpec):
            yield from files(value)


Named = TypeVar("Named", bound=BaseModel)


def with_files(spec: Named, name: Callable[[str], str]) -> Named:
    """The same with the files that it names under other names."""
    update: dict[str, Any] = {}
    for field, value in spec:
        if isinstance(value, TraceFile | Sampled) and value.file is not None:
            update[field] = value.model_copy(update={"file": name(value.file)})
        elif isinstance(value, DirectionSpec | MediumBackSpec):
            update[field] = with_files(value, name)
    return spec.model_copy(update=update)


@dataclass(frozen=True)
class Medium:
    """One direction of a medium."""

    name: str
    """With ` back`, where it is that."""
    rate: Rate


@dataclass(frozen=True)
class Link:
    """One direction of a link. Without what has a default: a FIFO transmitter of a rate, then a constant latency.

    On a medium the rate is at most what the link gets of it.
    """

    id: LinkId
    rate: Rate
    latency_s: float
    discipline: str = "fifo"
    medium: Medium | None = None
    jitter: Jitter | None = None
    loss: float = 0.0
    slow_start: SlowStart | None = None
    overhead_bytes: float = 0.0

    @property
    def is_plain(self) -> bool:
        return all(getattr(self, name) == plain for name, plain in _PLAIN.items())

    @property
    def features(self) -> list[str]:
        """What it has beyond a rate and a latency, by the names of the testbed file."""
        more = [name for name, plain in _PLAIN.items() if getattr(self, name) != plain]
        # A medium says more than that its links are fair.
        return [name.removesuffix("_bytes") for name in more if name != "discipline" or self.medium is None]

    @property
    def bottleneck(self) -> Rate:
        """The rate of a message that is alone; of its own and its medium's, the one that is smaller on average."""
        rates = [self.rate] if self.medium is None else [self.rate, self.medium.rate]
        return min(rates, key=lambda rate: rate.mean_bytes_per_s)


_PLAIN = {field.name: field.default for field in fields(Link) if field.default is not MISSING}
