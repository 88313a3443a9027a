"""The rate of a link over time: piecewise constant, integrated exactly. Knows no queue, no clock and no file.

Transfers are answered one at a time by bisection (`finish_s`, for the shells) or as arrays (`finish_all_s`, for
policies); both do the same arithmetic in the same order, so they give the same numbers.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from dataclasses import KW_ONLY, InitVar, dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from isthmus.workloads.errors import InputError

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Rate:
    """Bytes per second from each of `starts_s` on; the last rate holds, or what follows `repeat_from_s` repeats.

    It repeats every `period_s`; by default from 0 on, which is the whole. Raises InputError unless the starts begin at
    0 and increase, and some rate that lasts is above 0. With `may_end` it may be 0 for ever in the end, as a link is
    that was cut: what is then still to be moved is finished at infinity.
    """

    starts_s: tuple[float, ...]
    bytes_per_s: tuple[float, ...]
    period_s: float | None = None
    _: KW_ONLY
    repeat_from_s: float = 0.0
    may_end: InitVar[bool] = False

    @classmethod
    def constant(cls, bytes_per_s: float) -> Rate:
        return cls((0.0,), (bytes_per_s,))

    def __post_init__(self, may_end: bool) -> None:
        starts, rates = np.asarray(self.starts_s, dtype=float), np.asarray(self.bytes_per_s, dtype=float)
        if len(starts) == 0 or len(starts) != len(rates):
            raise InputError("a rate needs as many values as times, and at least one")
        if not (np.isfinite(starts).all() and np.isfinite(rates).all()) or (rates < 0).any():
            raise InputError("a rate has a value that is not finite or below 0")
        if starts[0] != 0 or (np.diff(starts) <= 0).any():
            raise InputError("the times of a rate start at 0 and increase", allowed="0 = t0 < t1 < …")
        if self.period_s is None:
            lasts = rates[-1] > 0
        else:
            if not 0 <= self.repeat_from_s < math.inf or not starts[-1] < self.repeat_from_s + self.period_s < math.inf:
                raise InputError(f"the period {self.period_s:g} s does not end after the last time {starts[-1]:g} s")
            lasts = rates[max(int(np.searchsorted(starts, self.repeat_from_s, side="right")) - 1, 0) :].any()
            may_end = False
        if not lasts and not may_end:
            raise InputError(
                "a rate that ends at 0 never finishes a transfer", allowed="a last rate above 0, or a period"
            )

    @cached_property
    def is_constant(self) -> bool:
        return all(rate == self.bytes_per_s[0] for rate in self.bytes_per_s)

    @cached_property
    def mean_bytes_per_s(self) -> float:
        """Over one period; without a period, the mean of the values weighted by how long each lasts.

        The last value, which has no end, then counts as long as the one before it.
        """
        if len(self.starts_s) == 1:
            return self.bytes_per_s[0]
        if self.period_s is not None:
            return self._per_period / self.period_s
        last_s = 2 * self.starts_s[-1] - self.starts_s[-2]
        return self._moved_at(last_s) / last_s

    def at(self, time_s: float) -> float:
        """The rate at a time, in bytes per second."""
        return self.bytes_per_s[bisect_right(self.starts_s, self._folded(time_s)[1]) - 1]

    def change_after_s(self, time_s: float) -> float:
        """The next time after `time_s` at which the rate changes; infinity where it never does.

        Always later than `time_s`, so that whoever goes from change to change gets on. Where a period is no binary
        number, a change may be answered twice, a rounding apart.
        """
        turns, inside = self._folded(time_s)
        changes = self._changes
        index = bisect_right(changes, inside)
        if self.period_s is None:
            return changes[index] if index < len(changes) else math.inf
        if index == len(changes):  # the first one of the next turn
            index, turns = bisect_right(changes, self.repeat_from_s), turns + 1
            if index == len(changes):
                return math.inf
        return max(changes[index] + turns * self.period_s, math.nextafter(time_s, math.inf))

    def finish_s(self, start_s: float, size_bytes: float) -> float:
        """When a transfer that begins at `start_s` has moved `size_bytes`: O(log n). Infinity where it never has."""
        rates, starts = self.bytes_per_s, self.starts_s
        if not size_bytes > 0 or start_s == math.inf:  # as behind a transfer that never ends
            return start_s
        if len(rates) == 1:
            return start_s + size_bytes / rates[0] if rates[0] else math.inf
        moved = self._moved
        turns, inside = self._folded(start_s)
        piece = bisect_right(starts, inside) - 1
        target = moved[piece] + (inside - starts[piece]) * rates[piece] + size_bytes
        if self.period_s is not None and target > self._head:
            whole, target = divmod(target - self._head, self._per_period)
            # Exactly one period's bytes are done when its last byte is, not when the next flowing piece begins.
            if target == 0 and whole > 0:
                whole, target = whole - 1, self._per_period
            turns, target = turns + whole, self._head + target
        piece = max(bisect_left(moved, target) - 1, 0)
        # A piece of rate 0 moves nothing, and `bisect_left` stops before it: rate 0 here is the end of all.
        if not rates[piece]:
            return math.inf
        end = starts[piece] + (target - moved[piece]) / rates[piece]
        if self.period_s is not None:
            end += turns * self.period_s
        # The maximum: a size so small that it is lost beside the bytes moved before would end before it starts.
        return max(end, start_s)

    def finish_all_s(self, start_s: npt.ArrayLike, size_bytes: npt.ArrayLike) -> Floats:
        """`finish_s` for arrays that broadcast against each other."""
        start, size = np.asarray(start_s, dtype=float), np.asarray(size_bytes, dtype=float)
        starts, rates, moved = self._arrays
        with np.errstate(divide="ignore", invalid="ignore"):
            if len(rates) == 1:
                return np.asarray(np.where(size > 0, start + size / rates[0], start))
            turns: Floats | float = 0.0
            inside = start
            if self.period_s is not None:
                over = start > self.repeat_from_s
                turn, rest = np.divmod(start - self.repeat_from_s, self.period_s)
                turns, inside = np.where(over, turn, 0.0), np.where(over, self.repeat_from_s + rest, start)
            piece = np.searchsorted(starts, inside, side="right") - 1
            target = moved[piece] + (inside - starts[piece]) * rates[piece] + size
            if self.period_s is not None:
                whole, rest = np.divmod(target - self._head, self._per_period)
                full = (rest == 0) & (whole > 0)
                beyond = self._head + np.where(full, self._per_period, rest)
                over = target > self._head
                turns, target = turns + np.where(over, whole - full, 0.0), np.where(over, beyond, target)
            piece = np.maximum(np.searchsorted(moved, target, side="left") - 1, 0)
            end = np.where(rates[piece] > 0, starts[piece] + (target - moved[piece]) / rates[piece], np.inf)
            if self.period_s is not None:
                end = end + turns * self.period_s
            return np.asarray(np.where((size > 0) & (start < np.inf), np.maximum(end, start), start), dtype=float)

    def pieces(self, until_s: float) -> tuple[Floats, Floats]:
        """Starts and rates, shape (n,) each, of all that begins before `until_s`, with repetitions written out."""
        starts, rates, _ = self._arrays
        if self.period_s is not None:
            first = int(np.searchsorted(starts, self.repeat_from_s, side="right")) - 1
            again = np.maximum(starts[first:], self.repeat_from_s)
            turns = np.arange(1, max(math.ceil((until_s - self.repeat_from_s) / self.period_s), 1))
            starts = np.concatenate([starts, (again + self.period_s * turns[:, None]).ravel()])
            rates = np.concatenate([rates, np.tile(rates[first:], len(turns))])
        before = starts < until_s
        return starts[before], rates[before]

    def times(self, factor: Rate) -> Rate:
        """The product of two rates, such as a link's and the share of it that is up. It may be 0 for ever in the end.

        InputError when both repeat and neither period is a multiple of the other: the product would be very long.
        """
        settled_s = max(r.starts_s[-1] if r.period_s is None else r.repeat_from_s for r in (self, factor))
        period_s = _common_period_s(self, factor)
        if any(r.period_s is None and r.bytes_per_s[-1] == 0 for r in (self, factor)):
            period_s = None  # 0 from then on, whatever the other does
        until_s = math.nextafter(settled_s, math.inf) if period_s is None else settled_s + period_s
        (mine, my_rates), (theirs, their_rates) = self.pieces(until_s), factor.pieces(until_s)
        starts = np.union1d(mine, theirs)
        rates = (
            my_rates[np.searchsorted(mine, starts, side="right") - 1]
            * their_rates[np.searchsorted(theirs, starts, side="right") - 1]
        )
        if period_s is not None and not rates[np.searchsorted(starts, settled_s, side="right") - 1 :].any():
            period_s = None  # on when the other is off: 0 for ever
        pieces = tuple(starts.tolist()), tuple(rates.tolist())
        return Rate(*pieces, period_s, repeat_from_s=0.0 if period_s is None else settled_s, may_end=True)

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # what is derived is derived again

    def _folded(self, time_s: float) -> tuple[float, float]:
        """Whole periods until a time, and the time of the first pass that it repeats."""
        if self.period_s is None or time_s <= self.repeat_from_s:
            return 0.0, time_s
        # divmod, not floor and subtract: its remainder never falls outside the period by a rounding.
        turns, rest = divmod(time_s - self.repeat_from_s, self.period_s)
        return turns, self.repeat_from_s + rest

    @cached_property
    def _arrays(self) -> tuple[Floats, Floats, Floats]:
        """Starts, rates, and the bytes moved from 0 until each start."""
        starts, rates = np.asarray(self.starts_s, dtype=float), np.asarray(self.bytes_per_s, dtype=float)
        return starts, rates, np.concatenate([[0.0], np.cumsum(np.diff(starts) * rates[:-1])])

    @cached_property
    def _moved(self) -> list[float]:
        found: list[float] = self._arrays[2].tolist()
        return found

    def _moved_at(self, time_s: float) -> float:
        """Bytes moved from 0 until a time of the first pass."""
        piece = bisect_right(self.starts_s, time_s) - 1
        return self._moved[piece] + (time_s - self.starts_s[piece]) * self.bytes_per_s[piece]

    @cached_property
    def _head(self) -> float:
        """Bytes moved before anything repeats."""
        return self._moved_at(self.repeat_from_s)

    @cached_property
    def _per_period(self) -> float:
        assert self.period_s is not None
        return self._moved_at(self.repeat_from_s + self.period_s) - self._head

    @cached_property
    def _changes(self) -> list[float]:
        """When the rate changes in its first pass, and at its end where the next pass begins otherwise."""
        starts, rates, _ = self._arrays
        found: list[float] = starts[1:][np.diff(rates) != 0].tolist()
        if self.period_s is not None and self.at(self.repeat_from_s) != self.bytes_per_s[-1]:
            found.append(self.repeat_from_s + self.period_s)
        return found


def _common_period_s(a: Rate, b: Rate) -> float | None:
    """The period of a product: the longer one, where it is a multiple of the shorter."""
    periods = [rate.period_s for rate in (a, b) if rate.period_s is not None and not rate.is_constant]
    if not periods:
        return None
    short, long = min(periods), max(periods)
    if abs(long / short - round(long / short)) > 1e-9:
        raise InputError(
            f"two rates that repeat every {short:g} s and every {long:g} s have no short common period",
            allowed="periods of which one is a multiple of the other",
        )
    return long
