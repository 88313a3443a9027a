"""The oracle: brute force over every split on the true rates, present and to come. Declared as such.

It knows what a link will carry, and its own work under way; it does not know the spread of single service times, nor
what other sources will ask for. It is greedy, one request at a time, so a policy that spares
a queue for later requests may still do better.
"""

from __future__ import annotations

import numpy as np

from isthmus.policies.contract import Oracle, View
from isthmus.policies.cost import Floats
from isthmus.policies.least_delay import LeastDelay
from isthmus.policies.plan import Plan
from isthmus.workloads.requests import Request
from isthmus.workloads.routing import LinkId


class BruteForce(Oracle, LeastDelay):
    """The split of least delay on the truth instead of the view's rates. Greedy: one request at a time."""

    def decide(self, request: Request, view: View) -> Plan:
        truth = view.truth
        assert truth is not None  # both shells give it to every Oracle

        def finish(link: LinkId, start: Floats, size: Floats) -> Floats:
            return np.asarray(truth.rates[link].finish_all_s(view.now_s + start, size) - view.now_s)

        return self._best(request, view, finish)
