"""How far the monotonic clocks of two hosts are apart, and how well that is known. Knows no Ray.

A host is asked for the time again and again. Its answer lies between question and reply, so each exchange bounds the
offset from both sides, whichever way the message took longer (Cristian 1989; NTP takes the same bound). What all
exchanges allow is at most as wide as the shortest round trip, and usually less.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

Reading = tuple[str, float]
"""Whose clock it is, and what it shows."""
_CALLS = 40


@dataclass(frozen=True)
class Offset:
    """Add `offset_s` to this host's monotonic time to have the other's; wrong by `error_s` at most.

    Without a clock service that steers them, clocks drift by some 10 to 50 µs in a second.
    """

    offset_s: float
    error_s: float

    def drifted_s(self, before: Offset) -> float:
        """How far it is certainly from what it was: beyond what either may be wrong by."""
        return max(abs(self.offset_s - before.offset_s) - self.error_s - before.error_s, 0.0)


def reading() -> Reading:
    """This host's monotonic clock. Hosts, and containers, that share one say the same of whose it is."""
    whose = ""
    for file in ("/proc/sys/kernel/random/boot_id", "/proc/self/timens_offsets"):
        with suppress(OSError):
            whose += " ".join(Path(file).read_text().split()) + " "
    return whose.strip(), time.monotonic()


def offset(read: Callable[[], Reading], calls: int = _CALLS) -> Offset:
    """Of the clock that `read` reads, far away. Exactly 0, without error, when it is this host's own."""
    mine, low, high = reading()[0], float("-inf"), float("inf")
    for _ in range(calls):
        before = time.monotonic()
        whose, there = read()
        after = time.monotonic()
        low, high = max(low, there - after), min(high, there - before)
    # A copy of a running virtual machine has the same boot id, and a clock of its own.
    if mine and whose == mine and low <= 0 <= high:
        return Offset(0.0, 0.0)
    return Offset((low + high) / 2, abs(high - low) / 2)
