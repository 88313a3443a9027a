"""Arrival processes: when a source asks. Knows neither requests nor who answers them.

A process is a description without state; `times_s` starts it. Times are in seconds from the start of the run,
increasing, endless unless a process ends by nature, and the same for the same generator however many of them are taken.
They are drawn in small chunks that grow, because a run may have a hundred thousand sources of a few arrivals each.
"""

from __future__ import annotations

import csv
import math
from bisect import bisect
from collections.abc import Callable, Iterator
from itertools import accumulate, chain, count, repeat
from operator import add
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from isthmus.workloads.documents import read_text
from isthmus.workloads.errors import InputError, unknown
from isthmus.workloads.units import PerSecond, PerSecondOrZero, Seconds, parse_time, show_time

_FIRST_CHUNKS, _CHUNK = (8, 16, 32, 64), 128  # beyond, a larger chunk saves no more than 3 ns per number


def _sizes() -> Iterator[int]:
    return chain(_FIRST_CHUNKS, repeat(_CHUNK))


def _one_by_one(draw: Callable[[int], npt.NDArray[Any]]) -> Iterator[float]:
    """What `draw(size)` draws, chunk after chunk. A memoryview makes floats as they are taken: 8 bytes each, not 32."""
    return chain.from_iterable(draw(size).data for size in _sizes())


class _Process(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    closed: ClassVar[bool] = False
    """Whether an arrival depends on how earlier requests went. Then there is no `times_s`."""


class Poisson(_Process):
    """Memoryless arrivals at a mean rate."""

    kind: Literal["poisson"] = "poisson"
    rate: PerSecond

    def times_s(self, generator: np.random.Generator) -> Iterator[float]:
        """Arrival times, endless."""
        mean_s = 1 / self.rate
        return accumulate(_one_by_one(lambda size: generator.exponential(mean_s, size)))


def _phase(value: Any) -> float | Literal["random"]:
    try:
        return "random" if value == "random" else parse_time(value)
    except InputError as error:
        raise ValueError(f"{error}, or random") from None


Phase = Annotated[
    float | Literal["random"],
    BeforeValidator(_phase),
    WithJsonSchema({"type": ["string", "number"], "description": "time, such as 15ms, or random: within one period"}),
]


class Periodic(_Process):
    """One arrival every 1/rate seconds, each late by a jitter of its own, uniform from 0 up to `jitter`.

    Lateness does not add up: the arrivals keep to the beat. With `phase: random` the first is due at any time within
    the first period with equal probability, so that a thousand cameras do not all fire at once.
    """

    kind: Literal["periodic"] = "periodic"
    rate: PerSecond
    jitter: Seconds = 0.0
    phase: Phase | None = Field(default=None, description="when the first is due; left out: after one period")

    @model_validator(mode="after")
    def _none_overtakes(self) -> Periodic:
        if self.jitter > 1 / self.rate:
            said = f"the jitter {show_time(self.jitter)} is longer than the period"
            raise ValueError(f"{said} (allowed: at most {show_time(1 / self.rate)}, so that arrivals keep their order)")
        return self

    def times_s(self, generator: np.random.Generator) -> Iterator[float]:
        """Arrival times, endless."""
        rate, jitter_s = self.rate, self.jitter
        first, phase_s = (1, 0.0) if self.phase is None else (0, self.phase)
        if phase_s == "random":
            phase_s = generator.random() / rate
        due = (phase_s + number / rate for number in count(first))  # a sum of periods would drift past `duration`
        return map(add, due, _one_by_one(lambda size: jitter_s * generator.random(size))) if jitter_s else due


class Markov(_Process):
    """Markov-modulated Poisson arrivals: bursts and lulls. Each state has a rate and a mean sojourn.

    Sojourns are exponential, and the next state is any other with equal probability. The process is stationary from
    the start: a state is the first with the probability of finding the process in it, its share of all mean sojourns.
    Source: Fischer and Meier-Hellstern, "The Markov-modulated Poisson process (MMPP) cookbook", 1993.
    """

    kind: Literal["markov"] = "markov"
    states: tuple[tuple[PerSecondOrZero, Annotated[Seconds, Field(gt=0)]], ...] = Field(
        min_length=2, description="pairs of rate and mean sojourn, such as [[20/s, 10s], [1/s, 60s]]"
    )

    @model_validator(mode="after")
    def _never_silent_for_ever(self) -> Markov:
        if not any(rate for rate, _ in self.states):
            raise ValueError("every state has rate 0 (allowed: some rate > 0)")
        return self

    @property
    def rate(self) -> float:
        """Arrivals per second in the long run."""
        return sum(rate * sojourn for rate, sojourn in self.states) / sum(sojourn for _, sojourn in self.states)

    def times_s(self, generator: np.random.Generator) -> Iterator[float]:
        """Arrival times, endless. Exact: both clocks are memoryless, so they may start anew when the state changes."""
        states, sojourns = self.states, [sojourn for _, sojourn in self.states]
        exponentials = _one_by_one(generator.standard_exponential)
        steps = _one_by_one(lambda size: generator.integers(1, len(states), size))
        state = bisect(list(accumulate(sojourns)), generator.random() * sum(sojourns))
        end_s = 0.0
        while True:
            rate, sojourn_s = states[state]
            now_s, end_s = end_s, end_s + sojourn_s * next(exponentials)
            if rate:
                gap_s = 1 / rate
                while (now_s := now_s + gap_s * next(exponentials)) < end_s:
                    yield now_s
            state = (state + int(next(steps))) % len(states)


class Diurnal(_Process):
    """Poisson arrivals whose rate swings like a day: rate·(1 + swing·cos(2π(t − peak)/period)) at time t.

    `rate` is the mean over a period; a swing of 1 falls to 0 half a period after the peak.
    """

    kind: Literal["diurnal"] = "diurnal"
    rate: PerSecond
    swing: float = Field(ge=0, le=1, description="by what share of the mean the rate rises and falls")
    period: Annotated[Seconds, Field(gt=0)] = 86_400.0
    peak: Seconds = Field(default=0.0, description="time of a peak, from the start of the run")

    def times_s(self, generator: np.random.Generator) -> Iterator[float]:
        """Arrival times, endless. Exact, by thinning.

        Source: Lewis and Shedler, "Simulation of nonhomogeneous Poisson processes by thinning", 1979, Theorem 1.
        """
        return chain.from_iterable(chunk.data for chunk in self._thinned(generator))

    def _thinned(self, generator: np.random.Generator) -> Iterator[npt.NDArray[np.float64]]:
        swing, turn, peak_s = self.swing, 2 * math.pi / self.period, self.peak
        highest, now_s = 1 + swing, 0.0  # relative to the mean
        for size in _sizes():
            times_s = generator.exponential(1 / (highest * self.rate), size)
            times_s[0] += now_s
            np.cumsum(times_s, out=times_s)
            now_s = times_s[-1]
            yield times_s[highest * generator.random(size) < 1 + swing * np.cos(turn * (times_s - peak_s))]


def _in_order(times: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(sorted(times))


class Replay(_Process):
    """Arrivals at given times, in seconds from the start of the run, here or in a file.

    A file has one number per line, or is a CSV with the times in `column`; `#` starts a comment. Reading an experiment
    puts the times in the file's place, so that a run says by itself when its requests came.
    """

    kind: Literal["replay"] = "replay"
    times: Annotated[tuple[Seconds, ...], Field(min_length=1), AfterValidator(_in_order)] | None = None
    file: str | None = Field(default=None, description="with the times, relative to the experiment's folder")
    column: str | None = Field(default=None, description="of a CSV file")

    @model_validator(mode="after")
    def _one_origin(self) -> Replay:
        if (self.times is None) == (self.file is None):
            raise ValueError("has to have either `times` or `file`")
        if self.column is not None and self.file is None:
            raise ValueError("has a `column` without a `file`")
        return self

    def resolved(self, folder: Path) -> Replay:
        """With the times of the file, whose path starts from `folder`. InputError names file, line and value."""
        if self.file is None:
            return self
        times = _in_order(read_times(folder / self.file, self.column))
        return self.model_copy(update={"times": times, "file": None, "column": None})

    def times_s(self, generator: np.random.Generator) -> Iterator[float]:
        """Arrival times, in order. InputError when they are still in a file."""
        if self.times is None:
            raise InputError(f"{self.file} has not been read", allowed="arrivals of an experiment that was loaded")
        return iter(self.times)


class Closed(_Process):
    """A closed loop: each of `users` thinks, asks, waits until its request has ended in whatever way, and so on.

    They begin by thinking, so that they do not all ask at once. Such arrivals depend on the answers: they exist only
    as a run goes on.
    """

    closed: ClassVar[bool] = True

    kind: Literal["closed"] = "closed"
    users: int = Field(ge=1)
    think: Seconds = Field(gt=0, description="mean time between an answer and the same user's next request")
    distribution: Literal["exponential", "constant"] = "exponential"

    def think_s(self, generator: np.random.Generator) -> Iterator[float]:
        """Think times in seconds, endless."""
        mean_s = self.think
        if self.distribution == "constant":
            return repeat(mean_s)
        return _one_by_one(lambda size: generator.exponential(mean_s, size))


Arrivals = Annotated[Poisson | Periodic | Markov | Diurnal | Replay | Closed, Field(discriminator="kind")]


def read_times(path: Path, column: str | None) -> tuple[float, ...]:
    """Times in seconds, or durations, of a file: one number >= 0 per line, or in a column of a CSV file.

    InputError names file, line and value.
    """
    try:
        times = tuple(_time(text, f"{path}:{line}") for line, text in _cells(path, column))
    except csv.Error as error:
        raise InputError(f"not CSV: {error}", where=path) from None
    if not times:
        raise InputError("holds no times", where=path)
    return times


def _cells(path: Path, column: str | None) -> Iterator[tuple[int, str]]:
    """What stands for a time, with the number of its line."""
    lines = read_text(path).removeprefix("\ufeff").splitlines()  # spreadsheets write a byte order mark
    if column is None:
        values = ((number, line.partition("#")[0].strip()) for number, line in enumerate(lines, 1))
        yield from (value for value in values if value[1])
        return
    reader = csv.reader(("" if line.startswith("#") else line for line in lines), skipinitialspace=True)
    rows = (row for row in reader if row)
    names = next(rows, [])
    if column not in names:
        raise unknown("column", column, names, where=path)
    place = names.index(column)
    for row in rows:
        yield reader.line_num, row[place] if place < len(row) else ""


def _time(text: str, where: str) -> float:
    try:
        time_s = float(text)
    except ValueError:
        time_s = math.nan
    if not (math.isfinite(time_s) and time_s >= 0):
        allowed = "one number >= 0 per line, in seconds; of a CSV file, name the `column`"
        raise InputError(f"{text!r} is not a time", where=where, allowed=allowed)
    return time_s
