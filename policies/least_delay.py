"""Least delay: the split that should answer soonest, given the queues on nodes and links at once."""

from __future__ import annotations

import numpy as np

from isthmus.policies.contract import View
from isthmus.policies.cost import Finish, KnownSplits, Recent, Splits, all_splits
from isthmus.policies.plan import Plan
from isthmus.workloads.requests import Request
from isthmus.workloads.routing import LinkId


class LeastDelay:
    """Costs every split over every route under the view, and takes the least. What is believed down is left out."""

    def __init__(self) -> None:
        self._along = KnownSplits().along
        self._splits = Recent[tuple[str, str, frozenset[LinkId]], list[Splits]](64)

    def decide(self, request: Request, view: View) -> Plan:
        return self._best(request, view, None)

    def _best(self, request: Request, view: View, finish: Finish | None) -> Plan:
        testbed = view.testbed
        key = (view.source, request.model, testbed.down)
        found = self._splits.get(key)
        if found is None:
            found = self._splits.put(key, all_splits(testbed, testbed.models[request.model], view.source, self._along))
        best: tuple[float, Splits, int] | None = None
        for splits in found:
            costs, up = splits.latency_s(view, finish=finish), splits.uses(view)
            if up is not None:
                costs = np.where(up, costs, np.inf)
            row = int(costs.argmin())
            if best is None or costs[row] < best[0]:
                best = float(costs[row]), splits, row
        assert best is not None  # all_splits finds some, or says that there is none
        return best[1].plan(best[2])
