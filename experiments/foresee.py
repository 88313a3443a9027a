"""Predicting single requests without a run: what `isthmus plan` shows. Knows policies and their costs, no shell."""

from __future__ import annotations

from typing import Any

from isthmus.experiments.execute import Experiment
from isthmus.policies.bill import energy_j
from isthmus.policies.contract import View
from isthmus.policies.cost import latency_s, predict
from isthmus.policies.dispatch import Compiler, Dispatcher
from isthmus.policies.plan import Plan, split
from isthmus.policies.records import Kind
from isthmus.policies.static import Local, server_for
from isthmus.workloads.requests import Request
from isthmus.workloads.testbed import Testbed


def foresee(experiment: Experiment, *, cuts: bool = False) -> list[dict[str, Any]]:
    """One row per source and policy, or per source and cut to its fastest server: plan, latency and what it is made of.

    Nothing else is going on, and links have their mean rates.
    """
    testbed, rows = experiment.testbed.at_seed(experiment.spec.seeds[0]), []
    for source in experiment.spec.workload:
        node = experiment.testbed_spec.members(source.node)[0]  # the others of a group are alike
        request = Request(0, node, source.model, 0.0)
        if cuts:
            model = testbed.models[source.model]
            view = Dispatcher(node, Local(), testbed, Compiler(testbed)).view(0.0)
            server = server_for(None, request, view)
            plans = [(str(c.index), split(model, (c.index,), (node, server))) for c in model.cuts]
        else:
            plans = []
            for policy in experiment.policies:
                chosen: list[Plan] = []

                def watch(_request: Request, _attempt: int, _view: View, plan: Plan, into: list[Plan] = chosen) -> None:
                    into.append(plan)

                dispatcher = Dispatcher(
                    node,
                    policy.make(experiment.spec.seeds[0]),
                    testbed,
                    Compiler(testbed),
                    name=policy.label,
                    watch=watch,
                )
                dispatcher.arrive(request, 0.0)
                plans.append((policy.label, chosen[0]))
        rows += [_row(label, plan, request, testbed) for label, plan in plans]
    return rows


def _row(label: str, plan: Plan, request: Request, testbed: Testbed) -> dict[str, Any]:
    compiler = Compiler(testbed)
    view = Dispatcher(request.source, Local(), testbed, compiler).view(0.0)
    spans = predict(compiler(plan, request.model, request.source), view)

    def total(*kinds: Kind) -> float:
        return sum(span.end_s - span.start_s for span in spans if span.kind in kinds)

    return {
        "policy": label,
        "source": request.source,
        "model": request.model,
        "plan": str(plan),
        "latency_s": latency_s(spans),
        "compute_s": total(Kind.COMPUTE),
        "links_s": total(Kind.SEND),
        "energy_j": energy_j(spans, testbed),
    }
