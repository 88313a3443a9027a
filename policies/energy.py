"""Energy of a request: what its spans cost on top of idling. Knows the power of nodes, and no shell."""

from __future__ import annotations

from collections.abc import Sequence

from isthmus.policies.records import Kind, Span
from isthmus.workloads.testbed import Testbed

_BUSY = (Kind.DECIDE, Kind.COMPUTE, Kind.ENCODE, Kind.DECODE, Kind.LOAD)


def energy_j(spans: Sequence[Span], testbed: Testbed) -> float | None:
    """Joules: busy power while computing, radio power of both ends while bytes flow. None where no power is given."""
    if not any(node.power.busy or node.power.tx or node.power.rx for node in testbed.nodes.values()):
        return None
    total = 0.0
    for span in spans:
        if span.kind in _BUSY:
            total += testbed.nodes[span.place].power.busy * (span.end_s - span.start_s)
        elif span.kind is Kind.SEND:
            a, _, b = span.place.partition(">")
            air_s = span.end_s - span.start_s - testbed.links[a, b].latency_s
            total += (testbed.nodes[a].power.tx + testbed.nodes[b].power.rx) * air_s
    return total
