"""The plain policies that every comparison needs: all here, all there, one cut for ever, any cut at random."""

from __future__ import annotations

import numpy as np

from isthmus.policies.contract import View, blind
from isthmus.policies.plan import Plan, split, whole_on
from isthmus.workloads.errors import InputError, unknown
from isthmus.workloads.requests import Request


class Constant:
    """Base of policies that give a source the same plan for a model for ever, whatever the view."""

    __slots__ = ("_model", "_plan", "_source")

    def __init__(self) -> None:
        self._source = self._model = ""
        self._plan: Plan | None = None

    @blind
    def decide(self, request: Request, view: View) -> Plan:
        plan = self._plan  # there is one policy per source, and a source has one model
        if plan is None or self._source != request.source or self._model != request.model:
            self._source, self._model = request.source, request.model
            plan = self._plan = self.plan(request, view)
        return plan

    def plan(self, request: Request, view: View) -> Plan:
        """The plan for all requests like this one."""
        raise NotImplementedError


class Local(Constant):
    """The whole model on the source."""

    __slots__ = ()

    def plan(self, request: Request, view: View) -> Plan:
        return whole_on(view.testbed.models[request.model], view.source)


class Remote(Constant):
    """The whole model on one other node: `server`, or else the fastest one that the source can reach."""

    __slots__ = ("server",)

    def __init__(self, server: str | None = None) -> None:
        super().__init__()
        self.server = server

    def plan(self, request: Request, view: View) -> Plan:
        return whole_on(view.testbed.models[request.model], server_for(self.server, request, view))


class Fixed(Constant):
    """Always the same cut: blocks before `cut` (default: the middle one) on the source, the rest on `server`."""

    __slots__ = ("cut", "server")

    def __init__(self, cut: int | None = None, server: str | None = None) -> None:
        super().__init__()
        self.cut, self.server = cut, server

    def plan(self, request: Request, view: View) -> Plan:
        model = view.testbed.models[request.model]
        last = len(model.blocks)
        cut = last // 2 if self.cut is None else self.cut
        if not 0 <= cut <= last:
            raise InputError(f"{model.name!r} has no cut {cut}", allowed=f"0 to {last}")
        return split(model, (cut,), (view.source, server_for(self.server, request, view)))


class Random:
    """A cut and a server drawn anew for every request: what no policy should lose to."""

    def __init__(self, seed: int = 0, cuts: tuple[int, ...] | None = None) -> None:
        self._generator = np.random.default_rng(seed)
        self.cuts = cuts

    @blind
    def decide(self, request: Request, view: View) -> Plan:
        model = view.testbed.models[request.model]
        servers = view.testbed.reachable(view.source)
        if not servers:
            return whole_on(model, view.source)
        cut = self._generator.choice(self.cuts) if self.cuts else self._generator.integers(len(model.cuts))
        server = servers[int(self._generator.integers(len(servers)))]
        return split(model, (int(cut),), (view.source, server))


def server_for(named: str | None, request: Request, view: View) -> str:
    """The server that a policy was told to use, or the fastest for this model among those in reach.

    InputError when it does not exist, or none is in reach.
    """
    if named is not None:
        if named not in view.testbed.nodes:
            raise unknown("node", named, view.testbed.nodes)
        return named
    servers = view.testbed.reachable(view.source)
    if not servers:
        raise InputError(f"{view.source!r} reaches no other node")
    model = view.testbed.models[request.model]
    return min(servers, key=lambda node: view.testbed.service(node, model.name).mean_s(model.whole()))
