"""The contract between a policy and both worlds: what it sees, what it answers, what it is told afterwards.

A policy holds no clock, no environment and no handle on a shell. This file knows neither shell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

from isthmus.policies.plan import Plan
from isthmus.policies.records import Record
from isthmus.workloads.rate import Rate
from isthmus.workloads.requests import Request
from isthmus.workloads.routing import LinkId
from isthmus.workloads.testbed import Testbed


@dataclass(frozen=True, slots=True)
class LinkBelief:
    """What a controller believes of one direction of a link."""

    rate_bytes_per_s: float
    rtt_s: float
    """There and back, of an empty message; nominal, it is not estimated."""
    queued_bytes: float
    """Bytes that this controller has put on the link and not seen delivered."""
    age_s: float | None
    """Since the rate was last observed; None: never, it is the nominal one."""
    up: bool = True
    """False: nothing gets through now, and routes lead around it where they can."""


@dataclass(frozen=True, slots=True)
class NodeBelief:
    """What a controller believes of a node."""

    backlog_s: float
    """Work planned there that is not known to be done, in the node's own mean seconds, per slot."""
    queue: int
    """The same, as a number of stages."""
    age_s: float | None
    """Since something was last heard of the node; None: never."""
    up: bool = True
    battery_j: float | None = None
    """What is left, of the controller's own node where it has a battery; None of all others."""


@dataclass(frozen=True, slots=True)
class Truth:
    """What only an Oracle may know: the true rates, now and later."""

    rates: Mapping[LinkId, Rate]


class View(NamedTuple):
    """What the controller of one source can know when it decides: estimates with their age, and the static testbed.

    `testbed` is there for models, service means, nodes and routes. The true rates of links inside it are hidden: its
    links carry their nominal rate. Beliefs are worked out when they are looked at, from what was known at `now_s`.
    """

    now_s: float
    source: str
    testbed: Testbed
    links: Mapping[LinkId, LinkBelief]
    nodes: Mapping[str, NodeBelief]
    truth: Truth | None = None

    def to_data(self) -> dict[str, Any]:
        """What changes from view to view, as plain data; `from_data` is the way back."""
        return {
            "now_s": self.now_s,
            "source": self.source,
            "links": {f"{a}>{b}": asdict(belief) for (a, b), belief in self.links.items()},
            "nodes": {name: asdict(belief) for name, belief in self.nodes.items()},
        }

    @classmethod
    def from_data(cls, data: Mapping[str, Any], testbed: Testbed, truth: Truth | None = None) -> View:
        links = {(a, b): LinkBelief(**v) for k, v in data["links"].items() for a, _, b in [k.partition(">")]}
        nodes = {name: NodeBelief(**v) for name, v in data["nodes"].items()}
        return cls(data["now_s"], data["source"], testbed, links, nodes, truth)


def decision_row(request: Request, attempt: int, view: View, plan: Plan) -> dict[str, Any]:
    """One decision as plain data: what a policy was asked, what it saw, what it answered."""
    return {
        "source": request.source,
        "number": request.number,
        "attempt": attempt,
        "view": view.to_data(),
        "plan": plan.to_json(),
    }


class Policy(Protocol):
    """One signature for every policy. A policy that also has `learn(record)` is told how each request went."""

    def decide(self, request: Request, view: View) -> Plan:
        """The plan for one request. Called once per attempt."""


@runtime_checkable
class Learner(Protocol):
    """A policy that wants the records."""

    def learn(self, record: Record) -> None: ...


class Oracle:
    """Base of policies that are given `view.truth`. Every report marks them, and their thinking is not charged."""


Decide = TypeVar("Decide", bound=Callable[..., Plan])


def blind(decide: Decide) -> Decide:
    """Marks a `decide` that never looks at beliefs: nothing is estimated for it, its views have nominal values.

    Of the method and not of the class, so that a subclass which decides anew sees again.
    """
    decide.blind = True  # type: ignore[attr-defined]
    return decide


def is_blind(policy: Policy) -> bool:
    return getattr(policy.decide, "blind", False)


def is_oracle(policy: object) -> bool:
    return isinstance(policy, Oracle)
