"""Any continuous distribution of scipy.stats as a table of its quantiles, so that one draw costs one look-up.

Knows scipy and nothing else. scipy's own scalar quantiles take 100 µs and more, a look-up less than one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np

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


def check_name(name: str, others: tuple[str, ...]) -> None:
    """InputError unless scipy, or `others`, have a distribution of that name."""
    if name not in others and name not in _names():
        problem = unknown("distribution", name, [*_names(), *others]).problem
        raise InputError(problem, allowed=", ".join([*others, "any continuous distribution of scipy.stats"]))


@cache
def _names() -> frozenset[str]:
    from scipy import stats  # takes half a second, and few testbeds need it

    return frozenset(name for name in dir(stats) if isinstance(getattr(stats, name), stats.rv_continuous))


def _frozen(name: str, parameters: Mapping[str, float]) -> Any:
    """scipy's distribution with its parameters, checked."""
    from scipy import stats

    check_name(name, ())
    law = getattr(stats, name)
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
