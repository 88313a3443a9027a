"""Distributions of times as people write them, and their quantiles: one draw is the quantile of a uniform number.

A few have formulas. Any continuous one of scipy.stats is a table of its quantiles, so that one draw costs one look-up:
scipy's own scalar quantiles take 100 µs and more. Knows scipy and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from scipy import special

from isthmus.workloads.errors import InputError, unknown

OCTAVES, STEPS = 40, 128
"""Each tail is tabulated at STEPS probabilities per factor of two, down to 2^-OCTAVES: about 1e-12."""


class Quantiles:
    """The quantile function of a distribution that is scaled to a mean of 1; made by `quantiles`.

    Linear between tabulated points: the relative error is below 1e-4 where the density is smooth (6e-6 of an
    exponential). Beyond the last point, once in 1e12 draws on either side, the last point is drawn.
    """

    __slots__ = ("_key", "_tails")

    def __init__(self, name: str, parameters: tuple[tuple[str, float], ...]) -> None:
        self._key = name, parameters
        law = _frozen(name, dict(parameters))
        mean = float(law.mean())
        # Row k holds the probabilities from 2^-(k+1) to 2^-k; row 0, which serves one half only, the median.
        share = 0.5 + np.arange(STEPS + 1) / (2 * STEPS)
        p = share * 0.5 ** np.arange(OCTAVES + 1)[:, None]
        p[0] = 0.5
        with np.errstate(all="ignore"):
            low, high = np.asarray(law.ppf(p)) / mean, np.asarray(law.isf(p)) / mean
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise InputError(f"scipy has no finite quantiles of {name!r} with {dict(parameters)}")
        self._tails: tuple[list[float], list[float]] = (low.ravel().tolist(), high.ravel().tolist())

    def __reduce__(self) -> tuple[object, ...]:
        return quantiles, self._key

    def __call__(self, u: float) -> float:
        """The quantile of `u` in [0, 1)."""
        upper = u >= 0.5
        mantissa, exponent = math.frexp(1 - u if upper else u)
        if exponent < -OCTAVES or not mantissa:
            mantissa, exponent = 0.5, -OCTAVES
        place = (mantissa - 0.5) * (2 * STEPS)
        step = int(place)
        table, row = self._tails[upper], step - exponent * (STEPS + 1)
        before = table[row]
        return before + (place - step) * (table[row + 1] - before)


@cache
def quantiles(name: str, parameters: tuple[tuple[str, float], ...]) -> Quantiles:
    """The quantiles of a distribution by its name in scipy.stats, with its shape parameters and `loc`.

    InputError unless there is such a distribution, it has these parameters, a mean, and no values below 0.
    """
    return Quantiles(name, parameters)


@cache
def _names() -> frozenset[str]:
    from scipy import stats  # takes half a second, and few testbeds need it

    return frozenset(name for name in dir(stats) if isinstance(getattr(stats, name), stats.rv_continuous))


def _check_name(name: str) -> None:
    if name not in FORMULAS and name not in _names():
        problem = unknown("distribution", name, [*_names(), *FORMULAS]).problem
        raise InputError(problem, allowed=", ".join([*FORMULAS, "any continuous distribution of scipy.stats"]))


def _frozen(name: str, parameters: Mapping[str, float]) -> Any:
    """scipy's distribution with its parameters, checked."""
    from scipy import stats

    _check_name(name)
    law = getattr(stats, name, None)
    if law is None:
        raise InputError(f"the distribution {name} has no parameters", allowed="those of scipy.stats have")
    shapes = [shape.strip() for shape in law.shapes.split(",")] if law.shapes else []
    said = ", ".join(f"{key}: {value:g}" for key, value in parameters.items())
    if not set(shapes) <= set(parameters) <= {*shapes, "loc", "scale"}:
        raise InputError(
            f"{name} with the parameters {{{said}}}",
            allowed=f"{{{', '.join(f'{shape}: …' for shape in shapes)}}}, and `loc`; the scale follows from the mean",
        )
    frozen = law(**parameters)
    with np.errstate(all="ignore"):
        least, mean = float(frozen.support()[0]), float(frozen.mean())
    if math.isnan(mean) or math.isnan(least):
        raise InputError(f"{name} is not defined for {{{said}}}")
    if least < 0:
        raise InputError(f"{name} with {{{said}}} can be below 0, which no time is")
    if not 0 < mean < math.inf:
        raise InputError(f"{name} with {{{said}}} has no finite mean above 0")
    return frozen


def _gamma(u: float, spread: float) -> float:
    return spread**2 * float(special.gammaincinv(1 / spread**2, u))


def _lognormal(u: float, spread: float) -> float:
    variance = math.log1p(spread**2)
    return math.exp(math.sqrt(variance) * float(special.ndtri(u)) - variance / 2)


FORMULAS: dict[str, Callable[[float, float], float]] = {
    "constant": lambda u, _: 1.0,
    "exponential": lambda u, _: -math.log1p(-u),
    "gamma": _gamma,
    "lognormal": _lognormal,
    "uniform": lambda u, _: 2 * u,
}
"""Of mean 1, by a uniform number in [0, 1) and the standard deviation over the mean, which two of them heed."""


class Law(BaseModel):
    """A distribution, which is scaled to a mean that is given elsewhere."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    distribution: str = Field(
        default="constant",
        description="constant, exponential, gamma, lognormal, uniform (from 0 to twice the mean), or the name of a "
        "continuous one in scipy.stats, such as weibull_min",
        examples=list(FORMULAS),
    )
    spread: float = Field(
        default=0.5, gt=0, allow_inf_nan=False, description="standard deviation over mean, for gamma and lognormal"
    )
    parameters: dict[str, float] = Field(
        default={}, description="shape, and `loc`, of a distribution of scipy.stats, such as {c: 1.5}"
    )

    @field_validator("distribution")
    @classmethod
    def _is_there(cls, name: str) -> str:
        try:
            _check_name(name)
        except InputError as error:
            raise ValueError(str(error)) from None
        return name

    @model_validator(mode="after")
    def _has_quantiles(self) -> Law:
        try:
            table = self._table
        except InputError as error:
            raise ValueError(str(error)) from None
        if table is not None and self.spread != type(self).model_fields["spread"].default:  # what is dumped has it
            raise ValueError(f"has a `spread`, which {self.distribution} takes from its `parameters`")
        return self

    @property
    def _table(self) -> Quantiles | None:
        """None for one that has a formula. `gamma` and `uniform` with parameters are scipy's."""
        if self.distribution in FORMULAS and not self.parameters:
            return None
        return quantiles(self.distribution, tuple(sorted(self.parameters.items())))

    @property
    def quantile(self) -> Callable[[float], float]:
        """The quantiles, scaled to a mean of 1, by a number in [0, 1)."""
        table = self._table
        return _Formula(self.distribution, self.spread) if table is None else table


class _Formula:
    """One of `FORMULAS` with its spread; it pickles."""

    __slots__ = ("_name", "_of", "_spread")

    def __init__(self, name: str, spread: float) -> None:
        self._name, self._spread, self._of = name, spread, FORMULAS[name]

    def __reduce__(self) -> tuple[object, ...]:
        return _Formula, (self._name, self._spread)

    def __call__(self, u: float) -> float:
        return self._of(u, self._spread)
