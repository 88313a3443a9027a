"""Counting over time. Knows nothing else."""

from __future__ import annotations


class Meter:
    """The integral over time of a number that changes now and then."""

    __slots__ = ("_since_s", "_total", "level")

    def __init__(self, level: int = 0) -> None:
        self.level, self._total, self._since_s = level, 0.0, 0.0

    def set(self, level: int, now_s: float) -> None:
        self._total += self.level * (now_s - self._since_s)
        self.level, self._since_s = level, now_s

    def read(self, now_s: float) -> float:
        return self._total + self.level * (now_s - self._since_s)
