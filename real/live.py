"""How a run fares, for who watches it: figures of the newest answers. Knows records."""

from __future__ import annotations

from collections import Counter, deque

import numpy as np

from isthmus.policies.records import Outcome, Record

_LATEST = 500
"""Answers that the figures are of."""


class Live:
    def __init__(self) -> None:
        self._latencies_s: deque[float] = deque(maxlen=_LATEST)
        self._outcomes: Counter[str] = Counter()
        self._ends_s: deque[float] = deque(maxlen=_LATEST)

    def see(self, record: Record) -> None:
        self._outcomes[str(record.outcome)] += 1
        if record.latency_s is not None and record.end_s is not None:
            self._latencies_s.append(record.latency_s)
            self._ends_s.append(record.end_s)

    def text(self) -> str:
        """Such as `8.1/s, p50 57 ms, p95 105 ms, 3 failed`."""
        said = []
        if len(self._ends_s) > 1 and (span_s := max(self._ends_s) - min(self._ends_s)) > 0:
            p50, p95 = np.percentile(list(self._latencies_s), (50, 95))
            said.append(f"{(len(self._ends_s) - 1) / span_s:.3g}/s, p50 {1e3 * p50:.3g} ms, p95 {1e3 * p95:.3g} ms")
        said += [f"{n} {outcome}" for outcome, n in self._outcomes.items() if outcome != Outcome.COMPLETED]
        return ", ".join(said)
