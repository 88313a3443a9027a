"""What people may write for the rate of a link, and the `Rate` that it comes to. Knows no link and no testbed.

    20Mbit                                              it is constant
    [[0s, 20Mbit], [5s, 0]]                             a schedule; 0 is an outage; the link's `period` repeats it
    {file: traces/lte.csv, rate: uplink}                a measured trace (trace_file.py has the formats)
    {kind: gauss-markov, mean: 20Mbit, deviation: 8Mbit, correlation_time: 5s, step: 200ms}
    {kind: markov, states: [[20Mbit, 10s], [4Mbit, 3s]]}
    {kind: on-off, rate: 20Mbit, on: 30s, off: 2s}
    {kind: handover, rate: 50Mbit, every: 30s, outage: 300ms, fade: 0.3}

The last four are drawn: `duration` long (10 min by default), and then they repeat. The same generator draws the same
rate. `mean_bytes_per_s` is that of the definition; a single draw has a mean of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema

from isthmus.workloads.errors import unknown
from isthmus.workloads.rate import Rate
from isthmus.workloads.trace_file import TraceFile
from isthmus.workloads.units import BytesPerSecond, BytesPerSecondOrZero, Seconds

Floats = npt.NDArray[np.float64]
Positive = Annotated[Seconds, Field(gt=0)]

_MOST_PIECES = 1_000_000
_FADE_SHARE, _FADE_STEPS = 0.2, 4


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Constant(_Spec):
    """One rate, always."""

    kind: Literal["constant"] = "constant"
    rate: BytesPerSecond

    @property
    def mean_bytes_per_s(self) -> float:
        return self.rate

    def draw(self, generator: np.random.Generator | None = None) -> Rate:
        return Rate.constant(self.rate)

    def realise(self, folder: Path, generator: np.random.Generator | None = None) -> Rate:
        return self.draw()


class Schedule(_Spec):
    """Rates from given times on; the last one holds, or the whole repeats after `period`."""

    kind: Literal["schedule"] = "schedule"
    pieces: tuple[tuple[Seconds, BytesPerSecondOrZero], ...] = Field(min_length=1)
    period: Seconds | None = None

    def realise(self, folder: Path, generator: np.random.Generator | None = None) -> Rate:
        """InputError when the times do not start at 0 and increase, or the last rate is 0 and nothing repeats."""
        return Rate(tuple(t for t, _ in self.pieces), tuple(r for _, r in self.pieces), self.period)


class _Drawn(_Spec):
    """A random rate: `duration` of it, which then repeats."""

    duration: Positive = Field(default=600.0, description="how long it is; then it repeats")

    def draw(self, generator: np.random.Generator) -> Rate:
        """One realisation. The same state of the generator gives the same one in every process."""
        raise NotImplementedError

    def realise(self, folder: Path, generator: np.random.Generator) -> Rate:
        return self.draw(generator)

    def _check_pieces(self, mean_piece_s: float) -> None:
        if self.duration / mean_piece_s > _MOST_PIECES:
            raise ValueError(f"a duration of {self.duration:g} s has more than {_MOST_PIECES} changes of its rate")

    def _rate(self, lengths_s: Floats, rates: Floats) -> Rate:
        """Pieces one after another, up to `duration`. What lasts no time is left out."""
        ends = np.cumsum(lengths_s)
        starts = np.concatenate([[0.0], ends[:-1]])
        kept = (ends > starts) & (starts < self.duration)
        return Rate(tuple(starts[kept].tolist()), tuple(rates[kept].tolist()), self.duration)


class GaussMarkov(_Drawn):
    """A rate that is normally distributed, and whose correlation decays over `correlation_time` to 1/e.

    The Gauss–Markov (Ornstein–Uhlenbeck) process, sampled exactly every `step`, from its stationary distribution on;
    values under `lowest` are raised to it. Source: Uhlenbeck & Ornstein, Phys. Rev. 36 (1930); as a model of mobility
    Liang & Haas, INFOCOM 1999.
    """

    kind: Literal["gauss-markov"] = "gauss-markov"
    mean: BytesPerSecond
    deviation: BytesPerSecond = Field(description="standard deviation, before `lowest` cuts it")
    correlation_time: Positive
    step: Positive = 0.2
    lowest: BytesPerSecond = 125.0

    @model_validator(mode="after")
    def _possible(self) -> GaussMarkov:
        if self.lowest > self.mean:
            raise ValueError(f"has a `lowest` of {self.lowest:g} bytes/s, above its mean of {self.mean:g}")
        self._check_pieces(self.step)
        return self

    @property
    def mean_bytes_per_s(self) -> float:
        """The mean of a normal distribution whose lower tail is moved to `lowest`."""
        z = (self.lowest - self.mean) / self.deviation
        below = 0.5 * (1 + math.erf(z / math.sqrt(2)))
        density = math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
        return self.lowest * below + self.mean * (1 - below) + self.deviation * density

    def draw(self, generator: np.random.Generator) -> Rate:
        count = math.ceil(self.duration / self.step - 1e-9)
        keep = math.exp(-self.step / self.correlation_time)
        noise = generator.standard_normal(count)
        noise[1:] *= math.sqrt(1 - keep * keep)
        values = np.fromiter(accumulate(noise.tolist(), lambda last, new: keep * last + new), float, count)
        rates = np.maximum(self.mean + self.deviation * values, self.lowest)
        return Rate(tuple((self.step * np.arange(count)).tolist()), tuple(rates.tolist()), self.duration)


class MarkovRate(_Drawn):
    """A rate that stays in a state for an exponential time, and then goes to any other state alike.

    It begins as if it had gone on for ever: in a state with the probability of its share of time.
    """

    kind: Literal["markov"] = "markov"
    states: tuple[tuple[BytesPerSecondOrZero, Positive], ...] = Field(
        min_length=2, description="rate, and mean time in it"
    )

    @model_validator(mode="after")
    def _possible(self) -> MarkovRate:
        _check_cycle(self, [stay for _, stay in self.states], [rate for rate, _ in self.states])
        return self

    @property
    def mean_bytes_per_s(self) -> float:
        return _mean(self.states)

    def draw(self, generator: np.random.Generator) -> Rate:
        return _alternating(self, self.states, generator)


class OnOff(_Drawn):
    """Full rate and outages in turn, both exponential. It begins on or off with the probability of its share of time.

    Source: the Gilbert channel (Bell System Technical Journal 39, 1960) in continuous time.
    """

    kind: Literal["on-off"] = "on-off"
    rate: BytesPerSecond
    on: Positive = Field(description="mean time with the rate")
    off: Positive = Field(description="mean time without")

    @model_validator(mode="after")
    def _possible(self) -> OnOff:
        _check_cycle(self, [self.on, self.off], [self.rate])
        return self

    @property
    def mean_bytes_per_s(self) -> float:
        return self.rate * self.on / (self.on + self.off)

    def draw(self, generator: np.random.Generator) -> Rate:
        return _alternating(self, ((self.rate, self.on), (0.0, self.off)), generator)


class Handover(_Drawn):
    """A terminal that moves from cell to cell. It begins as a cell is entered.

    It stays in a cell for an exponential time of mean `every`. Over the last fifth of its stay the rate falls in four
    equal steps to `fade` times the rate; then comes an `outage`, then the next cell at full rate.
    """

    kind: Literal["handover"] = "handover"
    rate: BytesPerSecond
    every: Positive = Field(description="mean time in a cell, without the outage")
    outage: Seconds = 0.0
    fade: float = Field(default=1.0, ge=0, le=1, description="share of the rate that is left at the edge of a cell")

    @model_validator(mode="after")
    def _possible(self) -> Handover:
        _check_cycle(self, [self.every, self.outage], [self.rate])
        return self

    @property
    def _factors(self) -> Floats:
        return 1 - (1 - self.fade) * np.arange(_FADE_STEPS + 1) / _FADE_STEPS

    @property
    def _shares(self) -> Floats:
        return np.array([1 - _FADE_SHARE, *[_FADE_SHARE / _FADE_STEPS] * _FADE_STEPS])

    @property
    def mean_bytes_per_s(self) -> float:
        return float(self.rate * (self._factors @ self._shares) * self.every / (self.every + self.outage))

    def draw(self, generator: np.random.Generator) -> Rate:
        stays: list[float] = []
        left_s = self.duration
        while left_s > 0:
            stays.append(float(generator.exponential(self.every)))
            left_s -= stays[-1] + self.outage
        lengths = np.column_stack([np.outer(stays, self._shares), np.full(len(stays), self.outage)])
        rates = np.tile([*(self.rate * self._factors), 0.0], len(stays))
        return self._rate(lengths.ravel(), rates)


Drawn = GaussMarkov | MarkovRate | OnOff | Handover
"""What another seed draws otherwise."""


def _check_cycle(spec: _Drawn, stays_s: list[float], rates: list[float]) -> None:
    """ValueError where a draw would be too long, or might well hold nothing but an outage."""
    if not any(rates):
        raise ValueError("carries nothing: every state has a rate of 0")
    spec._check_pieces(sum(stays_s) / len(stays_s))
    if spec.duration < sum(stays_s):
        raise ValueError(
            f"has a duration of {spec.duration:g} s, less than the {sum(stays_s):g} s of all its states once"
        )


def _mean(states: tuple[tuple[float, float], ...]) -> float:
    # All states are visited alike often (the jumps are a doubly stochastic chain), so time is shared by mean stay.
    return sum(rate * stay for rate, stay in states) / sum(stay for _, stay in states)


def _alternating(spec: _Drawn, states: tuple[tuple[float, float], ...], generator: np.random.Generator) -> Rate:
    """States with exponential stays, from the stationary distribution on.

    A draw that carries nothing is drawn again: it would never finish a transfer. `_check_cycle` makes that rare.
    """
    rates, stays = (np.array(column) for column in zip(*states, strict=True))
    while True:
        path, lengths = zip(*_visits(stays, spec.duration, generator), strict=True)
        visited = rates[list(path)]
        if visited.any():
            return spec._rate(np.array(lengths), visited)


def _visits(stays_s: Floats, duration_s: float, generator: np.random.Generator) -> Iterator[tuple[int, float]]:
    """State and time in it, one after the other, until `duration_s` is full."""
    state = int(generator.choice(len(stays_s), p=stays_s / stays_s.sum()))
    now_s = 0.0
    while now_s < duration_s:
        length_s = float(generator.exponential(stays_s[state]))
        yield state, length_s
        now_s += length_s
        step = int(generator.integers(1, len(stays_s)))  # to any other one
        state = (state + step) % len(stays_s)


_KINDS = ("constant", "schedule", "gauss-markov", "markov", "on-off", "handover")


def _written(value: Any) -> Any:
    """What people write for short, as the fields that it stands for."""
    if isinstance(value, BaseModel):
        return value
    if isinstance(value, dict):
        if "file" in value:
            return {"kind": "trace", **value}
        if "kind" not in value:
            raise ValueError(f"has neither `file` nor `kind` (allowed kinds: {', '.join(_KINDS)})")
        if value["kind"] not in (*_KINDS, "trace"):
            raise ValueError(str(unknown("kind", str(value["kind"]), _KINDS)))
        return value
    if not isinstance(value, list | tuple):
        return {"kind": "constant", "rate": value}
    for piece in value:
        if not isinstance(piece, list | tuple) or len(piece) != 2:
            raise ValueError(f"{piece!r} is not a pair of time and rate (allowed: [[0s, 20Mbit], [5s, 4Mbit], …])")
    return {"kind": "schedule", "pieces": value}


class _Shorthands:
    """Tells editors of what `_written` understands."""

    @staticmethod
    def __get_pydantic_json_schema__(schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        typed = {"type": ["string", "number"]}
        return {
            "description": "rate, such as 20Mbit; pairs of time and rate, such as [[0s, 20Mbit], [5s, 0]]; "
            "a trace, such as {file: lte.csv}; or something drawn, such as {kind: on-off, …}",
            "anyOf": [
                typed,
                {"type": "array", "items": {"type": "array", "items": typed, "minItems": 2, "maxItems": 2}},
                {"type": "object"} | handler(schema),
            ],
        }


RateSpec = Annotated[
    Constant | Schedule | TraceFile | GaussMarkov | MarkovRate | OnOff | Handover,
    Field(discriminator="kind"),
    BeforeValidator(_written),
    _Shorthands(),
]
