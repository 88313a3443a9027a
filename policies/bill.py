"""What a request costs: energy and money, from its spans. Knows the power and prices of nodes, and no shell."""

from __future__ import annotations

from collections.abc import Sequence

from isthmus.policies.records import Kind, Span
from isthmus.workloads.testbed import Testbed

_BUSY = frozenset((Kind.DECIDE, Kind.COMPUTE, Kind.ENCODE, Kind.DECODE, Kind.LOAD))


def energy_j(spans: Sequence[Span], testbed: Testbed) -> float | None:
    """Joules on top of idling: busy power while computing, radio power of both ends while bytes flow.

    Every request that a batch or a shared processor serves at the same time pays the whole of it: what a node took
    in all is in the run's totals. None where no power is given.
    """
    if not testbed.has_power:
        return None
    total = 0.0
    for kind, place, start_s, end_s, _, _, size in spans:
        if kind in _BUSY:
            total += testbed.nodes[place].power.busy * (end_s - start_s)
        elif kind is Kind.SEND:
            a, _, b = place.partition(">")
            # Without bytes it was cut off before it was there, and may not have got to its latency.
            air_s = end_s - start_s - (0.0 if size is None else testbed.links[a, b].latency_s)
            total += (testbed.nodes[a].power.tx + testbed.nodes[b].power.rx) * air_s
    return total


def money_usd(spans: Sequence[Span], testbed: Testbed) -> float | None:
    """Dollars: the time that nodes worked, at their price, and the bytes that left them. None where no price is given.

    What a node costs while it idles is nobody's request; it is in the run's totals.
    """
    if not testbed.has_prices:
        return None
    total = 0.0
    for kind, place, start_s, end_s, _, _, size in spans:
        if kind in _BUSY:
            total += testbed.nodes[place].price.per_s * (end_s - start_s)
        elif kind is Kind.SEND:
            total += testbed.nodes[place.partition(">")[0]].price.per_byte * (size or 0)
    return total
