"""One direction of a link as an emulation and a simulation both make it: a FIFO transmitter, then latency.

Its state is when it is free again, so sending needs no event and no wait. Physical links have none of this.
"""

from __future__ import annotations

from isthmus.workloads.links import Link


class Transmitter:
    """Must be asked in order of time: what is sent first goes first."""

    def __init__(self, link: Link) -> None:
        self._rate, self._latency_s = link.rate, link.latency_s
        self._free_s = 0.0

    def send(self, now_s: float, size_bytes: int) -> tuple[float, float, float]:
        """When the first byte leaves, the last one leaves, and the last one arrives."""
        start = max(now_s, self._free_s)
        self._free_s = self._rate.finish_s(start, size_bytes)
        return start, self._free_s, self._free_s + self._latency_s
