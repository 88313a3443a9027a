"""The rate of a link over time: piecewise constant, integrated exactly. Knows no queue and no clock."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from isthmus.workloads.errors import InputError

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Rate:
    """Bytes per second from each of `starts_s` on; the last rate holds, or the whole repeats after `period_s`.

    Raises InputError unless the starts begin at 0 and increase, and some rate that lasts is above 0.
    """

    starts_s: tuple[float, ...]
    bytes_per_s: tuple[float, ...]
    period_s: float | None = None

    @classmethod
    def constant(cls, bytes_per_s: float) -> Rate:
        return cls((0.0,), (bytes_per_s,))

    def __post_init__(self) -> None:
        starts, rates = np.asarray(self.starts_s), np.asarray(self.bytes_per_s)
        if len(starts) == 0 or len(starts) != len(rates):
            raise InputError("a rate needs as many values as times, and at least one")
        if not (np.isfinite(starts).all() and np.isfinite(rates).all()) or (rates < 0).any():
            raise InputError("a rate has a value that is not finite or below 0")
        if starts[0] != 0 or (np.diff(starts) <= 0).any():
            raise InputError("the times of a rate start at 0 and increase", allowed="0 = t0 < t1 < …")
        if self.period_s is not None and not starts[-1] < self.period_s < np.inf:
            raise InputError(f"the period {self.period_s:g} s does not end after the last time {starts[-1]:g} s")
        if (self.period_s is None and rates[-1] == 0) or not rates.any():
            raise InputError(
                "a rate that ends at 0 never finishes a transfer", allowed="a last rate above 0, or a period"
            )

    @property
    def is_constant(self) -> bool:
        return len(set(self.bytes_per_s)) == 1

    @cached_property
    def mean_bytes_per_s(self) -> float:
        """Over one period; without a period, the mean of the values weighted by how long each lasts."""
        if len(self.starts_s) == 1:
            return self.bytes_per_s[0]
        last = self.period_s if self.period_s is not None else 2 * self.starts_s[-1] - self.starts_s[-2]
        return float(np.dot(np.diff([*self.starts_s, last]), self.bytes_per_s) / last)

    def at(self, time_s: float) -> float:
        """The rate at a time, in bytes per second."""
        if self.period_s is not None:
            time_s %= self.period_s
        return self.bytes_per_s[int(np.searchsorted(self._starts, time_s, side="right")) - 1]

    def change_after_s(self, time_s: float) -> float:
        """The next time, always after `time_s`, at which another of the rates begins; infinity if none does."""
        if len(self.bytes_per_s) == 1:
            return math.inf
        begin, inside = 0.0, time_s
        if self.period_s is not None:
            inside = time_s % self.period_s
            begin = time_s - inside
        piece = bisect_right(self.starts_s, inside)
        following = self.starts_s[piece] if piece < len(self.starts_s) else self.period_s
        # By a rounding, `at` may see the change one float later than the sum says.
        return math.inf if following is None else max(begin + following, math.nextafter(time_s, math.inf))

    def finish_s(self, start_s: float, size_bytes: float) -> float:
        """When a transfer that begins at `start_s` has moved `size_bytes`."""
        if len(self.bytes_per_s) == 1:
            return start_s + size_bytes / self.bytes_per_s[0]
        return float(self.finish_all_s(np.float64(start_s), np.float64(size_bytes)))

    def finish_all_s(self, start_s: npt.ArrayLike, size_bytes: npt.ArrayLike) -> Floats:
        """`finish_s` for arrays that broadcast against each other."""
        start, size = np.asarray(start_s, dtype=float), np.asarray(size_bytes, dtype=float)
        if len(self.bytes_per_s) == 1:
            return np.asarray(start + size / self.bytes_per_s[0])
        # divmod, not floor and subtract: its remainder never falls outside the period by a rounding.
        turns, inside = (0.0, start) if self.period_s is None else np.divmod(start, self.period_s)
        piece = np.searchsorted(self._starts, inside, side="right") - 1
        rates = np.asarray(self.bytes_per_s)
        target = self._moved[piece] + (inside - self._starts[piece]) * rates[piece] + size
        if self.period_s is not None:
            whole, target = np.divmod(target, self._per_period)
            # Exactly one period's bytes are done when its last byte is, not when the next flowing piece begins.
            full = (target == 0) & (whole > 0)
            turns, target = turns + whole - full, np.where(full, self._per_period, target)
        piece = np.maximum(np.searchsorted(self._moved, target, side="left") - 1, 0)
        # A piece of rate 0 moves nothing: `side="left"` stops before it, so the rate is above 0 unless size is 0.
        with np.errstate(divide="ignore", invalid="ignore"):
            end = self._starts[piece] + (target - self._moved[piece]) / rates[piece]
        if self.period_s is not None:
            end = end + turns * self.period_s
        # The maximum: a size so small that it is lost beside the bytes moved before would end before it starts.
        return np.asarray(np.where(size > 0, np.maximum(end, start), start), dtype=float)

    @cached_property
    def _starts(self) -> Floats:
        return np.asarray(self.starts_s, dtype=float)

    @cached_property
    def _moved(self) -> Floats:
        """Bytes moved from 0 until each start."""
        return np.concatenate([[0.0], np.cumsum(np.diff(self._starts) * np.asarray(self.bytes_per_s[:-1]))])

    @cached_property
    def _per_period(self) -> float:
        assert self.period_s is not None
        return float(self._moved[-1] + (self.period_s - self._starts[-1]) * self.bytes_per_s[-1])
