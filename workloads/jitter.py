"""The extra delay of a message: what people may write for it, and one draw. Knows no link and no clock.

    5ms                                                 exponential with that mean
    {distribution: gamma, mean: 5ms, spread: 0.8}       also lognormal, uniform (from 0), constant
    {distribution: weibull_min, mean: 5ms, parameters: {c: 0.7}}    any one of scipy.stats, scaled to the mean
    {samples: [0.8ms, 1.1ms, 9ms]}                      measured: each as likely as the others
    {file: delay.csv, column: seconds}                  the same, from a file

A draw is the distribution's quantile of a uniform number, so it belongs to whatever the number belongs to.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema

from isthmus.workloads.arrivals import read_times
from isthmus.workloads.quantiles import Law
from isthmus.workloads.units import Seconds


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Distributed(Law):
    """A delay with a distribution. It is never below 0, and its mean is finite."""

    kind: Literal["distributed"] = "distributed"
    mean: Seconds
    distribution: Annotated[str, Field(description=Law.model_fields["distribution"].description)] = "exponential"

    def realise(self, folder: Path) -> Distributed:
        return self

    @property
    def mean_s(self) -> float:
        return self.mean

    def quantile_s(self, u: float) -> float:
        """The delay that a share `u` of all delays, in [0, 1), lies below."""
        return self.mean * self._quantile(u)

    @cached_property
    def _quantile(self) -> Callable[[float], float]:
        return self.quantile


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
