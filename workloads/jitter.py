"""The extra delay of a message: what people may write for it, and one draw. Knows no link and no clock.

    5ms                                                 exponential with that mean
    {distribution: gamma, mean: 5ms, spread: 0.8}       also exponential, uniform (from 0), lognormal
    {distribution: weibull_min, mean: 5ms, shape: {c: 0.7}}     any continuous one of scipy.stats, scaled to the mean
    {samples: [0.8ms, 1.1ms, 9ms]}                      measured: each as likely as the others
    {file: delay.csv, column: seconds}                  the same, from a file

A draw is the distribution's quantile of a uniform number, so it belongs to whatever the number belongs to.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema
from scipy import special

from isthmus.workloads.arrivals import read_times
from isthmus.workloads.errors import InputError, unknown
from isthmus.workloads.units import Seconds


def _gamma(u: float, spread: float) -> float:
    return spread**2 * float(special.gammaincinv(1 / spread**2, u))


def _lognormal(u: float, spread: float) -> float:
    variance = math.log1p(spread**2)
    return math.exp(math.sqrt(variance) * float(special.ndtri(u)) - variance / 2)


_QUANTILES: dict[str, Callable[[float, float], float]] = {
    "exponential": lambda u, _: -math.log1p(-u),
    "gamma": _gamma,
    "lognormal": _lognormal,
    "uniform": lambda u, _: 2 * u,
}
"""Of mean 1, by a uniform number in [0, 1) and the standard deviation over the mean, which two of them heed."""


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Distributed(_Spec):
    """A delay with a distribution. It is never below 0, and its mean is finite."""

    kind: Literal["distributed"] = "distributed"
    mean: Seconds
    distribution: str = Field(
        default="exponential",
        description="exponential, gamma, lognormal, uniform (from 0 to twice the mean), or a continuous one of "
        "scipy.stats, which is scaled to the mean",
    )
    spread: float = Field(
        default=0.5, gt=0, allow_inf_nan=False, description="standard deviation over mean, of gamma and lognormal"
    )
    shape: dict[str, float] = Field(default={}, description="shape parameters of a distribution of scipy.stats")

    @model_validator(mode="after")
    def _possible(self) -> Distributed:
        if self.distribution not in _QUANTILES:
            try:
                _ = self._unit
            except InputError as error:
                raise ValueError(str(error)) from None
        elif self.shape:
            raise ValueError(f"has a `shape`, which {self.distribution} does not (allowed: `spread`)")
        return self

    @cached_property
    def _unit(self) -> tuple[Any, float]:
        """The distribution of scipy.stats, and its mean before it is scaled."""
        from scipy import stats  # takes most of a second to import, and is rarely needed

        name, found = self.distribution, getattr(stats, self.distribution, None)
        if not isinstance(found, stats.rv_continuous):
            known = [n for n in dir(stats) if isinstance(getattr(stats, n), stats.rv_continuous)]
            allowed = f"{', '.join(_QUANTILES)}, or a continuous one of scipy.stats"
            raise InputError(unknown("distribution", name, {*_QUANTILES, *known}).problem, allowed=allowed)
        wanted = found.shapes.split(", ") if found.shapes else []
        if set(wanted) != set(self.shape):
            raise InputError(f"the distribution {name} has the shape parameters: {', '.join(wanted) or 'none'}")
        frozen = found(**self.shape)
        mean, lowest = float(frozen.mean()), float(frozen.support()[0])
        if not math.isfinite(mean):
            raise InputError(f"the distribution {name} has no finite mean with the shape {self.shape}")
        if lowest < 0 or mean <= 0:
            raise InputError(f"the distribution {name} can be below 0, and a message cannot arrive before it was sent")
        return frozen, mean

    def realise(self, folder: Path) -> Distributed:
        return self

    @property
    def mean_s(self) -> float:
        return self.mean

    def quantile_s(self, u: float) -> float:
        """The delay that a share `u` of all delays, in [0, 1), lies below."""
        quantile = _QUANTILES.get(self.distribution)
        if quantile is not None:
            return self.mean * quantile(u, self.spread)
        unit, mean = self._unit
        return self.mean * float(unit.ppf(u)) / mean


class Sampled(_Spec):
    """Delays as they were measured, each as likely as the others, in a list or in a file (CSV with a `column`).

    They are what comes on top of the link's `latency`: of measured round trips take the smallest off, and half of it.
    """

    kind: Literal["sampled"] = "sampled"
    samples: Annotated[tuple[Seconds, ...], Field(min_length=1)] | None = None
    file: str | None = Field(default=None, description="with the delays in seconds, relative to the testbed's folder")
    column: str | None = Field(default=None, description="of a CSV file")

    @model_validator(mode="after")
    def _one_origin(self) -> Sampled:
        if (self.samples is None) == (self.file is None):
            raise ValueError("has to have either `samples` or `file`")
        if self.column is not None and self.file is None:
            raise ValueError("has a `column` without a `file`")
        return self

    def realise(self, folder: Path) -> Sampled:
        """With the delays of the file, whose path starts from `folder`. InputError names file, line and value."""
        return self if self.file is None else Sampled(samples=read_times(folder / self.file, self.column))

    @cached_property
    def mean_s(self) -> float:
        assert self.samples is not None
        return float(np.mean(self.samples))

    def quantile_s(self, u: float) -> float:
        assert self.samples is not None
        return self.samples[int(u * len(self.samples))]


def _written(value: Any) -> Any:
    """What people write for short, as the fields that it stands for."""
    if isinstance(value, BaseModel) or (isinstance(value, dict) and "kind" in value):
        return value
    if not isinstance(value, dict):
        return {"kind": "distributed", "mean": value}
    return {"kind": "sampled" if {"samples", "file"} & set(value) else "distributed", **value}


class _Shorthands:
    """Tells editors of what `_written` understands."""

    @staticmethod
    def __get_pydantic_json_schema__(schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {
            "description": "extra delay of every message: 5ms (exponential with that mean), {distribution: gamma, "
            "mean: 5ms, spread: 0.8}, {samples: [1ms, 4ms]} or {file: delay.csv, column: seconds}",
            "anyOf": [{"type": ["string", "number"]}, {"type": "object"} | handler(schema)],
        }


Jitter = Distributed | Sampled
JitterSpec = Annotated[Jitter, Field(discriminator="kind"), BeforeValidator(_written), _Shorthands()]
