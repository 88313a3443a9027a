"""Neurosurgeon: one cut between device and server, by latency or by the device's energy.

Kang et al., ASPLOS 2017: T_i = Σ_{j≤i} td_j + D_i/B + K·Σ_{k>i} tc_k and
E_i = Σ_{j≤i} td_j·P_compute + (D_i/B)·P_radio.
As in the paper no queue on device or link is seen. The server's load factor K is 1 + the stages that it is believed
to hold per slot; the way back of the answer, which the paper leaves out, is counted like any transfer.
"""

from __future__ import annotations

from typing import Literal

from isthmus.policies.contract import View
from isthmus.policies.cost import KnownSplits, Recent, Splits
from isthmus.policies.plan import Plan
from isthmus.policies.static import server_for
from isthmus.workloads.errors import InputError
from isthmus.workloads.requests import Request
from isthmus.workloads.routing import LinkId


class Neurosurgeon:
    """The best single cut for the rate last believed. `server` defaults to the fastest node in reach."""

    def __init__(self, objective: Literal["latency", "energy"] = "latency", server: str | None = None) -> None:
        if objective not in ("latency", "energy"):
            raise InputError(f"neurosurgeon has no objective {objective!r}", allowed="latency, energy")
        self.objective, self.server = objective, server
        self._along = KnownSplits().along
        self._splits = Recent[tuple[str, str, frozenset[LinkId]], Splits](64)

    def decide(self, request: Request, view: View) -> Plan:
        testbed = view.testbed
        key = (view.source, request.model, testbed.down)
        splits = self._splits.get(key)
        if splits is None:
            server = server_for(self.server, request, view)
            route, model = testbed.route(view.source, server), testbed.models[request.model]
            splits = self._splits.put(key, self._along(testbed, model, route, frozenset((view.source, server))))
        if self.objective == "energy":
            if not testbed.nodes[view.source].power.busy:
                raise InputError(
                    f"node {view.source!r} has no power, so its energy is unknown", allowed="power.busy > 0"
                )
            return splits.plan(int(splits.source_energy_j(view).argmin()))
        costs, server = splits.latency_s(view, queues=False), splits.route[-1]
        if queue := view.nodes[server].queue:
            costs = costs + queue / testbed.nodes[server].slots * splits.compute_s[:, -1]
        return splits.plan(int(costs.argmin()))
