"""Least delay: the split that should answer soonest, given the queues on nodes and links at once."""

from __future__ import annotations

import numpy as np

from isthmus.policies.contract import View
from isthmus.policies.cost import Finish, Splits, all_splits
from isthmus.policies.plan import Plan
from isthmus.workloads.requests import Request
from isthmus.workloads.routing import LinkId


class LeastDelay:
    """Costs every split over every route under the view, and takes the least. What is believed down is left out."""

    def __init__(self) -> None:
        self._splits: dict[tuple[str, str, frozenset[LinkId]], list[Splits]] = {}

    def decide(self, request: Request, view: View) -> Plan:
        return self._best(request, view, None)

    def _best(self, request: Request, view: View, finish: Finish | None) -> Plan:
        key = (view.source, request.model, view.testbed.down)
        if key not in self._splits:
            self._splits[key] = all_splits(view.testbed, view.testbed.models[request.model], view.source)
        best: tuple[float, Plan] | None = None
        for splits in self._splits[key]:
            costs = np.where(splits.uses(view), splits.latency_s(view, finish=finish), np.inf)
            row = int(np.argmin(costs))
            if best is None or costs[row] < best[0]:
                best = float(costs[row]), splits.plan(row)
        assert best is not None  # all_splits finds some, or says that there is none
        return best[1]
