"""Isthmus: an edge-cloud offloading testbed.

    import isthmus

    experiment = isthmus.Experiment.load("experiment.yaml")
    isthmus.calibrate(experiment)              # measure this machine
    simulated = isthmus.simulate(experiment)   # a Run: .requests and .spans are pandas frames
    real = isthmus.run(experiment)             # the same policies, for real
    isthmus.compare(simulated, real).rows      # how far the two are apart

Names are imported when they are first used, so that `import isthmus` is quick and a node needs only what it does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from isthmus.experiments.compare import Comparison, compare
    from isthmus.experiments.calibrating import calibrate
    from isthmus.experiments.execute import Experiment, simulate
    from isthmus.experiments.real_run import run
    from isthmus.experiments.real_run import run
    from isthmus.experiments.report import write_report
    from isthmus.experiments.run_folder import Run
    from isthmus.experiments.trace import write_trace
    from isthmus.policies.check import check_policy
    from isthmus.policies.contract import Oracle, Policy, View
    from isthmus.policies.plan import Plan, Stage, split, whole_on
    from isthmus.policies.records import Record
    from isthmus.real.check import check_backend
    from isthmus.workloads.errors import InputError, IsthmusError, RunFailure
    from isthmus.workloads.model import Model, Part, load_model
    from isthmus.workloads.profile import Profile
    from isthmus.workloads.requests import Request
    from isthmus.workloads.testbed import Testbed

_HOMES = {
    "experiments.compare": ("Comparison", "compare"),
    "experiments.calibrating": ("calibrate",),
    "experiments.execute": ("Experiment", "simulate"),
    "experiments.real_run": ("run",),
    "experiments.report": ("write_report",),
    "experiments.run_folder": ("Run",),
    "experiments.trace": ("write_trace",),
    "policies.check": ("check_policy",),
    "policies.contract": ("Oracle", "Policy", "View"),
    "policies.plan": ("Plan", "Stage", "split", "whole_on"),
    "policies.records": ("Record",),
    "real.check": ("check_backend",),
    "workloads.errors": ("InputError", "IsthmusError", "RunFailure"),
    "workloads.model": ("Model", "Part", "load_model"),
    "workloads.profile": ("Profile",),
    "workloads.requests": ("Request",),
    "workloads.testbed": ("Testbed",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Comparison",
    "Experiment",
    "InputError",
    "IsthmusError",
    "Model",
    "Oracle",
    "Part",
    "Plan",
    "Policy",
    "Profile",
    "Record",
    "Request",
    "Run",
    "RunFailure",
    "Stage",
    "Testbed",
    "View",
    "calibrate",
    "check_backend",
    "check_policy",
    "compare",
    "load_model",
    "run",
    "simulate",
    "split",
    "whole_on",
    "write_report",
    "write_trace",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'isthmus' has no attribute {name!r}")
    return getattr(import_module(f"isthmus.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
