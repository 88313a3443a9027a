"""The conformance kit: it passes what keeps the contract, and says which clause anything else breaks."""

from __future__ import annotations

import numpy as np
import pytest

from isthmus.policies.check import check_policy
from isthmus.policies.contract import LinkBelief, Oracle
from isthmus.policies.plan import Plan, Stage, split, whole_on
from isthmus.policies.registry import installed, spec
from isthmus.policies.static import Fixed, Local, Remote
from isthmus.workloads.model import Part


@pytest.mark.parametrize("name", sorted(installed()))
def test_every_policy_that_is_installed_keeps_the_contract(name):
    check_policy(lambda: spec(name).make(1))


def test_variants_keep_it_too():
    check_policy(lambda: spec({"neurosurgeon": {"objective": "energy"}}).make(1))
    check_policy(lambda: spec({"fixed": {"cut": 1, "server": "edge"}}).make(1))
    check_policy(Learning)


class Learning(Local):
    """Takes turns after what it was told: state that must travel with it."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def decide(self, request, view):
        return whole_on(view.testbed.models[request.model], "cloud" if len(self.seen) % 7 < 3 else "edge")

    def learn(self, record) -> None:
        if record.latency_s is not None:
            self.seen.append(record.latency_s)


class Unseeded(Fixed):
    def decide(self, request, view):
        cut = int(np.random.default_rng().integers(3))
        return split(view.testbed.models[request.model], (cut,), ("device", "cloud"))


class Forgetful(Learning):
    """Pickles, but without what it learned."""

    def __getstate__(self):
        return {"seen": []}


class Unpicklable(Remote):
    def __init__(self) -> None:
        super().__init__()
        self.weigh = lambda x: x


class Impossible(Local):
    def decide(self, request, view):
        return Plan((Stage("mars", Part(request.model, 1)),))


class NoPlan(Local):
    def decide(self, request, view):
        return "local"


class Raises(Local):
    def decide(self, request, view):
        raise RuntimeError("out of ideas")


class Stubborn(Local):
    """Cannot live without the cloud."""

    def decide(self, request, view):
        if not view.nodes["cloud"].up:
            raise LookupError("where is my cloud")
        return super().decide(request, view)


class ChangesBeliefs(Local):
    def decide(self, request, view):
        view.links["device", "edge"] = LinkBelief(1.0, 1.0, 0.0, None)
        return super().decide(request, view)


class ChangesTestbed(Local):
    def decide(self, request, view):
        view.testbed.nodes.pop("cloud", None)
        return super().decide(request, view)


class ChangesServices(Local):
    def decide(self, request, view):
        view.testbed.service("cloud", request.model).span_s()[0, 1] = 0.0
        return super().decide(request, view)


class ForgesTime(Local):
    def decide(self, request, view):
        object.__setattr__(view, "now_s", 0.0)
        return super().decide(request, view)


class ForgesRecords(Local):
    def learn(self, record) -> None:
        record.end_s = record.arrival_s


class BadPupil(Local):
    def learn(self, record) -> None:
        raise ValueError("too hard")


class Peeks(Local):
    """Wants the truth without saying so."""

    def decide(self, request, view):
        return super().decide(request, view) if view.truth.rates else None


class Mute:
    pass


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        (Unseeded, "two fresh policies answer the same views differently"),
        (Forgetful, "pickled on the way"),
        (Unpicklable, "does not pickle"),
        (Impossible, "impossible plan .*unknown node 'mars'"),
        (NoPlan, "not with str"),
        (Raises, "RuntimeError: out of ideas"),
        (Stubborn, "where is my cloud"),
        (ChangesBeliefs, "does not support item assignment"),
        (ChangesTestbed, "decide changes the view that it is given, or its testbed"),
        (ChangesServices, "read-only"),
        (ForgesTime, "can't set attribute"),
        (ForgesRecords, "can't set attribute"),
        (BadPupil, "ValueError: too hard"),
        (Peeks, "NoneType"),
        (Mute, r"has no method decide\(request, view\)"),
    ],
)
def test_what_breaks_the_contract_is_caught(policy, said):
    with pytest.raises(AssertionError, match=said):
        check_policy(policy)


def test_an_oracle_is_given_the_truth():
    class Seer(Oracle, Peeks):
        pass

    globals()["Seer"] = Seer
    Seer.__qualname__ = "Seer"
    check_policy(Seer)
