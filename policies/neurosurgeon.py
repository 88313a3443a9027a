"""Neurosurgeon: one cut between device and server, by latency or by the device's energy.

Kang et al., ASPLOS 2017: T_i = Σ_{j≤i} td_j + D_i/B + K·Σ_{k>i} tc_k and
E_i = Σ_{j≤i} td_j·P_compute + (D_i/B)·P_radio.
As in the paper no queue on device or link is seen. The server's load factor K is 1 + the stages that it is believed
to hold per slot; the way back of the answer, which the paper leaves out, is counted like any transfer.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from isthmus.policies.contract import View
from isthmus.policies.cost import Splits
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
        self._splits: dict[tuple[str, str, str, frozenset[LinkId]], Splits] = {}

    def decide(self, request: Request, view: View) -> Plan:
        server = server_for(self.server, request, view)
        key = (view.source, server, request.model, view.testbed.down)
        if key not in self._splits:
            route = view.testbed.route(view.source, server)
            model = view.testbed.models[request.model]
            self._splits[key] = Splits.along(view.testbed, model, route, frozenset((view.source, server)))
        splits = self._splits[key]
        if self.objective == "energy":
            if not view.testbed.nodes[view.source].power.busy:
                raise InputError(
                    f"node {view.source!r} has no power, so its energy is unknown", allowed="power.busy > 0"
                )
            return splits.plan(int(np.argmin(splits.source_energy_j(view))))
        load = view.nodes[server].queue / view.testbed.nodes[server].slots
        return splits.plan(int(np.argmin(splits.latency_s(view, queues=False) + load * splits.compute_s[:, -1])))
