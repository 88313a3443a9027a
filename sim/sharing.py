"""A capacity shared max–min fairly among what is under way on it: a shared medium, or a node that shares its processor.

Knows SimPy's clock and rates. Must not know what is shared: bytes over a medium and seconds of work on a node
are amounts.

Flows with one cap between them always have the same rate, so their group needs a single number for all of them: how
much each member would have been served since the group was last empty. A flow ends when that number has grown by its
amount (Parekh and Gallager, A generalized processor sharing approach to flow control, 1993: virtual time). An
event costs O(groups under way + log flows), and no flow has a remainder that rounding could wear down.

SimPy withdraws no event, so the next one is armed only if none before it is: one that comes too early looks again. An
event that is left over when an earlier one was armed serves what comes after that one, instead of another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from operator import attrgetter
from typing import Any, NamedTuple

from isthmus.sim.clock import Clock
from isthmus.workloads.rate import Rate

ROUNDING = 1e-12
"""Relative. What ends within it of now ends now, so that rounding neither orders nor delays what is simultaneous."""


class Flow(NamedTuple):
    """An amount under way, made by `join`. A group's flows are a heap in this order, the order in which they end."""

    until: float
    """What its group will have served each member by its end."""
    number: int
    group: _Group
    done: Callable[[], None]


class _Reading:
    """A rate as it is now, looked up only when it changes."""

    __slots__ = ("_rate", "changes_s", "value")

    def __init__(self, rate: Rate) -> None:
        self._rate, self.value, self.changes_s = rate, 0.0, -math.inf

    def at(self, now_s: float) -> float:
        if now_s >= self.changes_s:
            self.value, self.changes_s = self._rate.at(now_s), self._rate.change_after_s(now_s)
        return self.value


@dataclass(slots=True, eq=False)
class _Group:
    """Flows under one cap, and what each of them is served."""

    cap: _Reading | None = None
    flows: list[Flow] = field(default_factory=list)
    served: float = 0.0
    rate: float = 0.0
    limit: float = 0.0


class Sharing:
    """`slots` servers of one rate, shared max–min fairly; a flow has the rate of one server at most.

    A medium is one slot, so its rate is its capacity; `caps` are the own rates of those groups that have one (the links
    of a cell), for all flows of the group together. A processor-sharing node has its slots, and its speed as the rate:
    n jobs on c slots get min(1, c/n) of it each. Rates are in units of amount per second.
    """

    def __init__(self, clock: Clock, rate: Rate, *, slots: int = 1, caps: Mapping[Any, Rate] | None = None) -> None:
        self._clock, self._rate, self._slots = clock, _Reading(rate), slots
        self._groups = {name: _Group(_Reading(cap)) for name, cap in (caps or {}).items()}
        self._uncapped = _Group()
        self._active: dict[_Group, None] = {}  # the groups that have flows; a dictionary keeps their order
        self._ended: list[Flow] = []  # no longer served; `done` is still to be called, at this same time
        self._number = 0
        self._now_s: float = clock.now
        self._due_s = math.inf
        self._armed_s = [math.inf]  # the events in SimPy's heap, the next one last

    def join(self, amount: float, done: Callable[[], None], group: object = None) -> Flow:
        """Begin now; `done` is called when the amount is served, never before this returns.

        A group that has no cap is as good as none. Raises ValueError for an amount below 0 or not a number; an infinite
        one is served for ever.
        """
        if not amount >= 0:
            raise ValueError(f"an amount is 0 or more, not {amount}")
        self._advance()
        home = self._groups.get(group, self._uncapped)
        if not home.flows:
            home.served = 0.0
        self._number += 1
        flow = Flow(home.served + amount, self._number, home, done)
        if flow.until > home.served:
            heappush(home.flows, flow)
            self._active[home] = None
        else:  # nothing to serve, so no outage matters
            self._ended.append(flow)
        self._plan()
        return flow

    def leave(self, flow: Flow) -> None:
        """Give it up: its `done` is not called. Nothing happens if it has ended."""
        self._advance()
        flows = flow.group.flows
        if flow in flows:
            flows.remove(flow)
            heapify(flows)
            if not flows:
                del self._active[flow.group]
        elif flow in self._ended:
            self._ended.remove(flow)
        self._plan()

    def clear(self) -> None:
        """All that is under way is lost: no `done` is called."""
        for group in self._active:
            group.flows.clear()
        self._active.clear()
        self._ended.clear()
        self._plan()

    def _advance(self) -> None:
        """Serve until now, at the rates planned; what has ended by now takes part no longer."""
        now = self._clock.now
        passed, self._now_s = now - self._now_s, now
        slack_s = ROUNDING * now + math.ulp(now)
        for group in tuple(self._active):
            flows, rate = group.flows, group.rate
            group.served += rate * passed
            reach = group.served + ROUNDING * group.served + rate * slack_s
            while flows and flows[0].until <= reach:
                self._ended.append(heappop(flows))
            if not flows:
                del self._active[group]

    def _plan(self) -> None:
        """Share the capacity out, and wake when that will be out of date: when a flow ends or a rate changes.

        Max–min: in ascending order of their limits, each takes an equal share of what is left, or its limit
        (Bertsekas and Gallager, Data Networks, 1992, §6.5.2).
        """
        now, due = self._now_s, math.inf
        if self._ended:
            due = now
        elif self._active:
            each = self._rate.at(now)
            due, left, flows = self._rate.changes_s, each * self._slots, 0
            for group in self._active:
                many = len(group.flows)
                flows += many
                group.limit = each
                if group.cap is not None:
                    group.limit = min(each, group.cap.at(now) / many)
                    due = min(due, group.cap.changes_s)
            for group in sorted(self._active, key=attrgetter("limit")):
                many = len(group.flows)
                group.rate = rate = min(group.limit, left / flows)
                left -= rate * many
                flows -= many
                if rate > 0:
                    due = min(due, now + (group.flows[0].until - group.served) / rate)
        self._due_s = due
        self._arm()

    def _arm(self) -> None:
        due = self._due_s
        if due < self._armed_s[-1]:
            self._armed_s.append(due)
            self._clock.call(due, self._woken)

    def _woken(self) -> None:
        if self._armed_s.pop() < self._due_s:  # what it was armed for has changed since
            self._arm()
            return
        self._due_s = math.inf
        self._advance()
        self._ended.sort(key=attrgetter("number"))
        while self._ended:  # a `done` may join, leave and clear
            self._ended.pop(0).done()
        self._plan()
