"""The memory of a node: which parts are resident, which is loaded next, which has to go. The same in both worlds.

Knows no clock and no queue.

A part is resident as a whole, with its own weights, as a runtime's session is: two parts that share layers share no
bytes. Nothing is resident when a run begins.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Generic, TypeVar

Item = TypeVar("Item")
"""A part; where each size of batch has a session of its own, a part and a size."""
Finish = Callable[[float, float], float]
"""When so many seconds of work that begin at a time are done."""


@dataclass(slots=True)
class _Resident:
    bytes: float
    loaded_s: float
    pins: int = 0


class Memory(Generic[Item]):
    """`needs` says what a part takes: bytes, and seconds to load. The least recently used part that nobody uses goes.

    No part needs more than the budget: plans that want one are refused.
    """

    __slots__ = ("_budget", "_needs", "_parts", "_pinned", "_used", "evictions", "loads")

    def __init__(self, budget_bytes: float, needs: Callable[[Item], tuple[float, float]]) -> None:
        self._budget = budget_bytes
        self._needs = cache(needs)  # it looks at every layer of a part, and a part may come and go with every job
        self._parts: dict[Item, _Resident] = {}  # the least recently used first
        self._used = self._pinned = 0.0
        self.loads = self.evictions = 0

    @property
    def resident(self) -> tuple[Item, ...]:
        """The parts that are there, the least recently used first."""
        return tuple(self._parts)

    def admits(self, part: Item) -> bool:
        """Whether a part is there, or fits beside those in use."""
        return part in self._parts or self._pinned + self._needs(part)[0] <= self._budget

    def use(self, part: Item, now_s: float, finish: Finish) -> float:
        """Use a part that is admitted, until `release`; when it is loaded. One that is being loaded is loaded once."""
        found = self._parts.pop(part, None)
        if found is None:
            size, load_s = self._needs(part)
            self._make_room(size)
            found = _Resident(size, finish(now_s, load_s) if load_s else now_s)
            self._used += size
            self.loads += 1
        self._parts[part] = found
        if not found.pins:
            self._pinned += found.bytes
        found.pins += 1
        return max(now_s, found.loaded_s)

    def release(self, part: Item) -> None:
        """One use of a part is over."""
        found = self._parts[part]
        found.pins -= 1
        if not found.pins:
            self._pinned -= found.bytes

    def clear(self) -> None:
        """All is gone: the node went down. That is no eviction."""
        self._parts.clear()
        self._used = self._pinned = 0.0

    def _make_room(self, size: float) -> None:
        unused = (part for part, it in tuple(self._parts.items()) if not it.pins)
        while self._used + size > self._budget:
            self._used -= self._parts.pop(next(unused)).bytes
            self.evictions += 1
