"""Quantities as people type them ("20Mbit", "15ms", "100kB") and as they are printed. SI everywhere else."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema

from isthmus.workloads.errors import InputError

_NUMBER = re.compile(r"^\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*([a-zA-Zµ/]*)\s*$")

_TIME_S = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9, "min": 60.0, "h": 3600.0}
_BYTES = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30}
_RATE = {
    "bit": 1 / 8,
    "kbit": 1e3 / 8,
    "Mbit": 1e6 / 8,
    "Gbit": 1e9 / 8,
    "B/s": 1.0,
    "kB/s": 1e3,
    "MB/s": 1e6,
    "GB/s": 1e9,
}
_RATE |= {f"{unit}/s": size for unit, size in list(_RATE.items()) if unit.endswith("bit")}
_PER_S = {"/s": 1.0, "Hz": 1.0, "/min": 1 / 60, "/h": 1 / 3600}
_WATT = {"W": 1.0, "mW": 1e-3}
_JOULE = {"J": 1.0, "mJ": 1e-3, "kJ": 1e3, "MJ": 1e6, "Wh": 3600.0, "mWh": 3.6, "kWh": 3.6e6}


def as_float(value: float) -> float:
    """A number as a float; infinity for whole numbers that are too large for one."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _parser(kind: str, units: dict[str, float], example: str, *, zero: bool) -> Callable[[Any], float]:
    allowed = f"a number {'>= 0' if zero else '> 0'} with one of {', '.join(units)}, such as {example}"

    def parse(value: Any) -> float:
        if isinstance(value, bool):
            raise InputError(f"{value!r} is not a {kind}", allowed=allowed)
        if isinstance(value, int | float):
            number = as_float(value)  # already SI
        else:
            match = _NUMBER.match(str(value))
            if match is None:
                raise InputError(f"{value!r} is not a {kind}", allowed=allowed)
            if match[2] not in units:
                said = f"has the unknown unit {match[2]!r}" if match[2] else "has no unit"
                raise InputError(f"the {kind} {value!r} {said}", allowed=allowed)
            number = float(match[1]) * units[match[2]]
        if not math.isfinite(number) or number < 0 or (number == 0 and not zero):
            raise InputError(f"the {kind} {value!r} is out of range", allowed=allowed)
        return number

    return parse


parse_time = _parser("time", _TIME_S, "15ms", zero=True)
parse_bytes = _parser("size", _BYTES, "100kB", zero=True)
parse_rate = _parser("rate", _RATE, "20Mbit", zero=False)
_parse_rate_or_zero = _parser("rate", _RATE, "20Mbit", zero=True)
parse_frequency = _parser("frequency", _PER_S, "2/s", zero=False)
_parse_frequency_or_zero = _parser("frequency", _PER_S, "2/s", zero=True)
parse_power = _parser("power", _WATT, "2.5W", zero=True)
parse_energy = _parser("energy", _JOULE, "10kJ", zero=False)


def _field(parse: Callable[[Any], float], what: str) -> tuple[BeforeValidator, WithJsonSchema]:
    def check(value: Any) -> float:
        try:
            return parse(value)
        except InputError as error:
            raise ValueError(str(error)) from None

    return BeforeValidator(check), WithJsonSchema({"type": ["string", "number"], "description": what})


# Pydantic fields: what is typed with a unit arrives as a float in SI. A bare number is taken as SI.
Seconds = Annotated[float, *_field(parse_time, "time, such as 15ms (a bare number is seconds)")]
Bytes = Annotated[float, *_field(parse_bytes, "size, such as 100kB (a bare number is bytes)")]
BytesPerSecond = Annotated[float, *_field(parse_rate, "rate, such as 20Mbit (a bare number is bytes per second)")]
BytesPerSecondOrZero = Annotated[float, *_field(_parse_rate_or_zero, "rate, such as 20Mbit, or 0 for an outage")]
PerSecond = Annotated[float, *_field(parse_frequency, "frequency, such as 2/s")]
PerSecondOrZero = Annotated[float, *_field(_parse_frequency_or_zero, "frequency, such as 2/s, or 0")]
Watt = Annotated[float, *_field(parse_power, "power, such as 2.5W")]
Joules = Annotated[float, *_field(parse_energy, "energy, such as 10kJ or 3Wh (a bare number is joules)")]


def _scaled(value: float, units: tuple[tuple[float, str], ...]) -> str:
    # 0.9995: what rounds to 1000 of a unit is shown as 1 of the next.
    size, unit = next(((s, u) for s, u in units if abs(value) >= 0.9995 * s), units[-1])
    shown = value / size
    return f"{shown:.0f} {unit}" if abs(shown) >= 999.5 else f"{shown:.3g} {unit}"


def show_time(value_s: float) -> str:
    """Seconds for people: 0.0153 -> '15.3 ms'."""
    return _scaled(value_s, ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")))


def show_bytes(value: float) -> str:
    return _scaled(value, ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")))


def show_rate(value_bytes_per_s: float) -> str:
    return _scaled(8 * value_bytes_per_s, ((1e9, "Gbit/s"), (1e6, "Mbit/s"), (1e3, "kbit/s"), (1.0, "bit/s")))
