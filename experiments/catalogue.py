"""What there is to choose from: models, the cuts of one, policies, backends. Plain data; prints nothing."""

from __future__ import annotations

import inspect
from typing import Any

from isthmus.policies.contract import Oracle
from isthmus.policies.registry import find, installed
from isthmus.workloads import zoo
from isthmus.workloads.model import Model, load_model, members


def list_models() -> list[dict[str, Any]]:
    """The models that come by name."""
    return [
        {
            "name": model.name,
            "layers": len(model.layers),
            "cuts": len(model.cuts),
            "flop": model.flop,
            "parameter_bytes": model.parameter_bytes,
            "input": {tensor: list(model.tensors[tensor].shape) for tensor in model.inputs},
        }
        for model in map(load_model, zoo.names())
    ]


def list_cuts(model: Model) -> list[dict[str, Any]]:
    """Where one tensor crosses alone, and how much of the work lies before."""
    return [
        {
            "cut": cut.index,
            "crossing": list(cut.crossing),
            "bytes": cut.bytes,
            "work_before": sum(model.layers[i].flop for i in members(cut.before)) / max(model.flop, 1),
        }
        for cut in model.cuts
    ]


def list_backends() -> list[dict[str, Any]]:
    """The backends that have a name: which of them work here, and on what."""
    from isthmus.real.backend import offers  # each runtime is imported to find out

    return [
        {
            "name": offer.name,
            "version": offer.version,
            "devices": list(offer.devices),
            "arguments": dict(offer.arguments),
            "from": offer.origin,
            "about": offer.about,
            "problem": offer.problem,
        }
        for offer in offers()
    ]


def list_policies() -> list[dict[str, Any]]:
    """The policies that are installed, and what their constructors take."""
    rows = []
    for name, point in sorted(installed().items()):
        made = find(name)
        parameters = inspect.signature(made).parameters.values()
        rows.append(
            {
                "name": name,
                "arguments": {p.name: None if p.default is p.empty else p.default for p in parameters},
                "oracle": isinstance(made, type) and issubclass(made, Oracle),
                "from": point.value,
                "about": (inspect.getdoc(made) or "").split("\n")[0],
            }
        )
    return rows
