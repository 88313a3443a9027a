"""Files of measured rates, read into a `Rate`. Knows three formats; no link and no testbed.

    mahimahi  one millisecond timestamp per line, each a chance to deliver 1500 bytes; equal timestamps are several
              chances. The rate is the mean of each window of `step`. Times count from 0, and the period is the last one
    pairs     time and rate per line, `seconds Mbit/s` unless `time_unit` and `unit` say otherwise
    csv       a header, then rows; `time` and `rate` name the columns. Of two columns the time is the first, unless one
              is named otherwise. Separated by what is most frequent in the header: comma, semicolon or tab

A `#` begins a comment; fields of `pairs` are separated by blanks or a comma. Times of `pairs` and `csv` increase, and
are counted from the first one: logs begin at any epoch. A trace repeats after its last time and the median step, as
long as the last value is taken to last, unless `repeat` is false: then the last value holds.

Where `format` is left out, the first line that says something decides, whatever the file is called: one whole number
is mahimahi, two numbers are pairs, several names are the header of a csv.

Sources: mahimahi: Netravali et al., "Mahimahi: Accurate Record-and-Replay for HTTP", USENIX ATC 2015, and the manual
page mm-link(1). Pairs are how broadband and 3G logs are commonly handed on.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from isthmus.workloads.documents import read_text
from isthmus.workloads.errors import InputError, unknown
from isthmus.workloads.rate import Rate
from isthmus.workloads.units import Seconds, parse_rate, parse_time

Floats = npt.NDArray[np.float64]
Format = Literal["mahimahi", "pairs", "csv"]

_OPTIONS = {"mahimahi": {"step"}, "pairs": {"unit", "time_unit"}, "csv": {"time", "rate", "unit", "time_unit"}}
"""What only some formats have."""
_PACKET_BYTES = 1500
_MOST_WINDOWS = 10_000_000
_SHAPES = "mahimahi: one whole number per line; pairs: `seconds Mbit/s`; csv: a header with the names of columns"


def _unit(parse: Callable[[str], float]) -> AfterValidator:
    def check(unit: str) -> str:
        try:
            parse(f"1{unit}")
        except InputError as error:
            raise ValueError(f"{unit!r} is no unit here (allowed: {error.allowed})") from None
        return unit

    return AfterValidator(check)


class TraceFile(BaseModel):
    """A file of measured rates. See the formats above."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["trace"] = "trace"
    file: str = Field(description="path, relative to the file that names it")
    format: Format | None = Field(default=None, description="by default what its first line looks like")
    time: str | None = Field(default=None, description="csv: the column of times")
    rate: str | None = Field(default=None, description="csv: the column of rates")
    unit: Annotated[str, _unit(parse_rate)] = Field(default="Mbit", description="csv, pairs: of the rates")
    time_unit: Annotated[str, _unit(parse_time)] = Field(default="s", description="csv, pairs: of the times")
    step: Seconds = Field(default=0.1, gt=0, description="mahimahi: the window over which a rate is counted")
    scale: float = Field(default=1.0, gt=0, allow_inf_nan=False, description="factor on the rate")
    repeat: bool = Field(default=True, description="begin anew after the end; otherwise the last rate holds")

    def realise(self, folder: Path, generator: np.random.Generator | None = None) -> Rate:
        """The rate; nothing is drawn. InputError names file, line, value and what is allowed."""
        path = folder / self.file
        text = _read(path)
        format_ = self.format or _format_of(text, path)
        for option in sorted({o for of in _OPTIONS.values() for o in of} - _OPTIONS[format_]):
            if getattr(self, option) != type(self).model_fields[option].default:
                fitting = " or ".join(f for f, options in _OPTIONS.items() if option in options)
                raise InputError(f"a {format_} trace takes no `{option}`", where=path, allowed=f"with {fitting}")
        if format_ == "mahimahi":
            return self._windows(_column(text, path), path)
        times, rates, line = (_pairs if format_ == "pairs" else self._csv)(text, path)
        for values, what, fine in (
            (times, "time", np.isfinite(times)),
            (rates, "rate", np.isfinite(rates) & (rates >= 0)),
        ):
            if not fine.all():
                row = int(np.argmin(fine))
                allowed = "finite numbers" + (" >= 0" if what == "rate" else "")
                raise InputError(f"the {what} {values[row]:g} is out of range", where=line(row), allowed=allowed)
        _check_order(times, line, strictly=True)
        times = (times - times[0]) * parse_time(f"1{self.time_unit}")
        if not (np.diff(times) > 0).all():
            raise InputError("its times are too close to each other", where=path)
        period_s = float(times[-1] + np.median(np.diff(times))) if self.repeat and len(times) > 1 else None
        return self._rate(times, rates, parse_rate(f"1{self.unit}"), period_s, path)

    def _csv(self, text: str, path: Path) -> tuple[Floats, Floats, Callable[[int], str]]:
        number, header = next(_lines(text))
        separator = max(",;\t", key=header.count)
        names = [name.strip() for name in next(csv.reader([header], delimiter=separator, skipinitialspace=True))]
        if all(map(_is_number, names)):
            raise InputError(f"{_short(header)} is no header", where=f"{path}:{number}", allowed="names of columns")
        chosen = {"time": self.time, "rate": self.rate}
        if len(names) == 2:
            first, second = names
            chosen["time"] = self.time or (second if self.rate == first else first)
            chosen["rate"] = self.rate or (first if self.time == second else second)
        columns = []
        for what, name in chosen.items():
            if name is None:
                raise InputError(
                    f"has {len(names)} columns, and no `{what}` says which one is the {what}",
                    where=f"{path}:{number}", allowed=", ".join(names),
                )  # fmt: skip
            if name not in names:
                raise unknown("column", name, names, where=f"{path}:{number}")
            columns.append(names.index(name))
        try:
            table = pd.read_csv(
                io.StringIO(text), sep=separator, usecols=sorted(set(columns)), comment="#", skipinitialspace=True,
                keep_default_na=False, index_col=False, low_memory=False,
            )  # fmt: skip
        except (ValueError, pd.errors.ParserError) as error:
            raise InputError(f"not a csv: {' '.join(str(error).split())}", where=path) from None
        if not len(table):
            raise InputError("has a header and no rows", where=path)

        def line(row: int) -> str:
            return f"{path}:{_line(text, row + 1)}"

        found: list[Floats] = []
        for index in columns:
            column = table.iloc[:, sorted(set(columns)).index(index)]
            try:
                values = pd.to_numeric(column, errors="coerce").to_numpy(dtype=float)
            except OverflowError:  # whole numbers of hundreds of digits
                raise InputError(f"column {names[index]!r}: a number is too large", where=path) from None
            if len(wrong := np.flatnonzero(np.isnan(values))):
                row = int(wrong[0])
                shown = str(column.iloc[row]).strip()
                said = f"{_short(shown)} is not a number" if shown else "is empty"
                raise InputError(f"column {names[index]!r}: {said}", where=line(row), allowed="finite numbers")
            found.append(values)
        return found[0], found[1], line

    def _windows(self, stamps_ms: Floats, path: Path) -> Rate:
        """Chances to deliver, in windows of `step` that are open at their beginning: the last chance is at the end."""
        step_ms = 1e3 * self.step
        count = math.ceil(stamps_ms[-1] / step_ms - 1e-9)
        if not count:
            raise InputError("its last timestamp is 0, so it lasts no time", where=path, allowed="a last one above 0")
        if count > _MOST_WINDOWS:
            raise InputError(
                f"lasts {stamps_ms[-1] / 1e3:g} s, which is {count} windows of {self.step:g} s",
                where=path, allowed=f"a `step` that makes at most {_MOST_WINDOWS}; timestamps count from 0",
            )  # fmt: skip
        window = np.maximum(np.ceil(stamps_ms / step_ms - 1e-9).astype(np.int64) - 1, 0)
        starts = self.step * np.arange(count)
        end_s = float(stamps_ms[-1]) / 1e3
        lengths = np.diff(starts, append=end_s)
        rates = np.bincount(window, minlength=count) / lengths
        return self._rate(starts, rates, _PACKET_BYTES, end_s if self.repeat else None, path)

    def _rate(self, starts: Floats, rates: Floats, unit: float, period_s: float | None, path: Path) -> Rate:
        if not rates.any():
            raise InputError("carries nothing: every rate is 0", where=path, allowed="some rate above 0")
        if period_s is None and not rates[-1]:
            raise InputError(
                "its last rate is 0, and would hold for ever", where=path, allowed="a last rate above 0, or `repeat`"
            )
        with np.errstate(over="ignore"):  # Rate refuses what is too large
            rates = rates * unit * self.scale
        try:
            return Rate(tuple(starts.tolist()), tuple(rates.tolist()), period_s)
        except InputError as error:
            raise InputError(error.problem, where=path, allowed=error.allowed) from None


def format_of(path: str | Path) -> Format:
    """The format of a file, by its first line that says something. InputError when it fits none, or there is none."""
    return _format_of(_read(Path(path)), path)


def _read(path: Path) -> str:
    text = read_text(path).removeprefix("\ufeff")
    if "\0" in text:
        raise InputError("cannot be read: not a text file", where=path)
    if next(_lines(text), None) is None:
        raise InputError("is empty", where=path, allowed=_SHAPES)
    return text


def _format_of(text: str, where: object) -> Format:
    number, line = next(_lines(text))
    words = line.replace(",", " ").split()
    numbers = sum(_is_number(word) for word in words)
    if len(words) == 1 and line.isdecimal():
        return "mahimahi"
    if len(words) == 2 and numbers == 2:
        return "pairs"
    if not numbers and any(separator in line for separator in ",;\t"):
        return "csv"
    raise InputError(f"{_short(line)} is the beginning of no trace", where=f"{where}:{number}", allowed=_SHAPES)


def _pairs(text: str, path: Path) -> tuple[Floats, Floats, Callable[[int], str]]:
    table = _numbers(text.replace(",", " "), path, 2, "a time and a rate")
    return table[:, 0], table[:, 1], lambda row: f"{path}:{_line(text, row)}"


def _column(text: str, path: Path) -> Floats:
    """Timestamps of a mahimahi trace: whole numbers that do not decrease."""
    stamps: Floats = _numbers(text, path, 1, "one timestamp in whole milliseconds")[:, 0]
    wrong = np.flatnonzero(~((stamps >= 0) & (stamps < 2**53) & (np.floor(stamps) == stamps)))
    if len(wrong):
        row = int(wrong[0])
        raise InputError(
            f"the timestamp {stamps[row]:g} is not a whole number of milliseconds",
            where=f"{path}:{_line(text, row)}", allowed="whole numbers >= 0",
        )  # fmt: skip
    _check_order(stamps, lambda row: f"{path}:{_line(text, row)}", strictly=False)
    return stamps


def _numbers(text: str, path: Path, width: int, what: str) -> Floats:
    """A table of numbers, shape (lines, width)."""
    try:
        table: Floats = np.loadtxt(io.StringIO(text), dtype=float, comments="#", ndmin=2)
        if table.shape[1] == width:
            return table
    except ValueError:
        pass
    # Quick reading does not tell lines; only where something is wrong are they looked at one by one.
    for number, line in _lines(text):
        words = line.split()
        if len(words) != width or not all(map(_is_number, words)):
            raise InputError(f"{_short(line)} is not {what}", where=f"{path}:{number}", allowed=what)
    raise InputError(f"is not a table of {width} columns of numbers", where=path, allowed=_SHAPES)


def _check_order(times: Floats, line: Callable[[int], str], *, strictly: bool) -> None:
    steps = np.diff(times)
    if len(wrong := np.flatnonzero(steps <= 0 if strictly else steps < 0)):
        row = int(wrong[0]) + 1
        raise InputError(
            f"the time {times[row]:.15g} follows on {times[row - 1]:.15g}",
            where=line(row), allowed="times that increase" if strictly else "times that do not decrease",
        )  # fmt: skip


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Number (from 1) and content of the lines that say something."""
    for number, line in enumerate(io.StringIO(text), 1):
        if said := line.partition("#")[0].strip():
            yield number, said


def _line(text: str, row: int) -> int:
    """The number of the line that says the `row`-th thing, from 0."""
    return next((number for index, (number, _) in enumerate(_lines(text)) if index == row), 0)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _short(line: str) -> str:
    return repr(line if len(line) <= 40 else line[:39] + "…")
