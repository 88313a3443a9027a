"""How hard-pressed the host is: what an emulation must watch, since it borrows the host's processors."""

from __future__ import annotations

import os
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
