"""How hard-pressed a host is: what an emulation must watch, since it borrows the host's processors."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Usage:
    """Of one process since it began, all its threads: seconds on a processor, and seconds ready but waiting for one."""

    cpu_s: float
    run_delay_s: float

    def __sub__(self, earlier: Usage) -> Usage:
        return Usage(self.cpu_s - earlier.cpu_s, self.run_delay_s - earlier.run_delay_s)


def usage() -> Usage:
    """This process's usage. Zero where the kernel does not tell (/proc/*/schedstat)."""
    cpu_ns = delay_ns = 0
    for task in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError, ValueError):  # a thread may end while it is read
            ran, waited, _ = map(int, task.read_text().split())
            cpu_ns, delay_ns = cpu_ns + ran, delay_ns + waited
    return Usage(cpu_ns / 1e9, delay_ns / 1e9)


def stalled_share() -> float | None:
    """Share of the last ten seconds in which some task of the host waited for a processor; None where unknown (PSI)."""
    with suppress(OSError, ValueError, IndexError):
        some = Path("/proc/pressure/cpu").read_text().split()
        return float(some[1].removeprefix("avg10=")) / 100
    return None


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Load:
    """What an actor used of its host during a cell, and how its host fared."""

    used: Usage
    host: str
    """Whose clock it reads: actors that share a host say the same."""
    cores: int
    stalled_share: float | None


@dataclass(frozen=True)
class Pressure:
    """How hard-pressed the hosts were during a cell. Beyond the limits of `warnings` the figures suffer."""

    overrun_share: float
    run_delay_share: float
    """Seconds that an actor's threads waited for a processor, over the time that the cell took; mean of the actors."""
    busy_share: float
    """Of its processors, what the actors of the busiest host kept busy on average."""
    stalled_share: float | None
    """Of the host where it was most, in the last ten seconds."""
    refused: int = 0
    """Messages that an actor did not take because something was wrong with them."""

    @classmethod
    def of(cls, overrun_share: float, loads: Collection[Load], lasted_s: float, refused: int) -> Pressure:
        busy: dict[str, float] = defaultdict(float)
        for load in loads:
            busy[load.host] += load.used.cpu_s / lasted_s / load.cores
        return cls(
            overrun_share,
            sum(load.used.run_delay_s for load in loads) / lasted_s / max(len(loads), 1),
            max(busy.values(), default=0.0),
            max((load.stalled_share for load in loads if load.stalled_share is not None), default=None),
            refused,
        )

    def warnings(self) -> list[str]:
        said = []
        if self.overrun_share > 0.05:
            said.append(f"INVALID: a host was too late for {self.overrun_share:.1%} of requests (limit 5 %)")
        elif self.overrun_share > 0.01:
            said.append(f"a host was too late for {self.overrun_share:.1%} of requests (good: up to 1 %)")
        if self.run_delay_share > 0.15:
            said.append(f"actors waited for a processor {self.run_delay_share:.0%} of the time (good: up to 15 %)")
        if self.busy_share > 0.6:
            said.append(f"actors kept {self.busy_share:.0%} of a host's processors busy (good: up to 60 %)")
        if self.stalled_share is not None and self.stalled_share > 0.2:
            said.append(f"tasks of a host waited for a processor {self.stalled_share:.0%} of the time (good: 20 %)")
        if self.refused:
            said.append(f"{self.refused} messages were refused: something was wrong with them")
        return said
