"""The settings in which fidelity is measured: `isthmus demo` and `isthmus bench fidelity`. How is in `validate.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from isthmus.experiments.compare import Comparison, merge
from isthmus.experiments.execute import Experiment
from isthmus.experiments.report import write_report
from isthmus.experiments.validate import validate
from isthmus.workloads.documents import write_text
from isthmus.workloads.errors import unknown
from isthmus.workloads.progress import Progress

POLICIES = ("local", "remote", "fixed", "neurosurgeon", "least-delay", "oracle")


@dataclass(frozen=True)
class Setting:
    """A model on three tiers. Slowdowns are against this host, and keep each node about half loaded on its own.

    `uplinks`: what the device's link to the edge carries, constant and changing.
    """

    model: str
    slowdowns: dict[str, float]
    rate: str
    requests: int
    uplinks: dict[str, Any]

    def experiment(self, uplink: str, requests: int | None = None) -> dict[str, Any]:
        """The experiment file."""
        rate = self.uplinks[uplink]
        first = {"between": ["device", "edge"], "rate": rate, "latency": "5ms"}
        if isinstance(rate, list):
            first["period"] = "6s"
        return {
            "name": f"{self.model}-{uplink}",
            "testbed": {
                "name": "device, edge and cloud",
                "profiles": "profiles",
                "models": {self.model: self.model},
                "nodes": {node: {"slowdown": slowdown} for node, slowdown in self.slowdowns.items()},
                "links": [first, {"between": ["edge", "cloud"], "rate": "200Mbit", "latency": "15ms"}],
            },
            "workload": [
                {
                    "node": "device",
                    "model": self.model,
                    "arrivals": {"kind": "poisson", "rate": self.rate},
                    "requests": requests or self.requests,
                }
            ],
            "policies": list(POLICIES),
            "seeds": [1],
        }


SETTINGS = {
    setting.model: setting
    for setting in (
        Setting(
            "squeezenet",
            {"device": 10, "edge": 3, "cloud": 1.5},
            "12/s",
            300,
            {"constant": "120Mbit", "changing": [["0s", "120Mbit"], ["2s", "60Mbit"], ["4s", "160Mbit"]]},
        ),
        Setting(
            "resnet50",
            {"device": 3, "edge": 2, "cloud": 1.5},
            "3/s",
            100,
            {"constant": "40Mbit", "changing": [["0s", "40Mbit"], ["2s", "20Mbit"], ["4s", "60Mbit"]]},
        ),
    )
}


def run_demo(out: Path, *, requests: int, progress: Progress) -> tuple[Comparison, Path]:
    """SqueezeNet on both uplinks, each policy once; the comparison and where its report is."""
    return _measure(
        out, [SETTINGS["squeezenet"]], requests=requests, repeat=False, progress=progress, title="Isthmus demo"
    )


def run_fidelity(out: Path, *, models: Sequence[str] | None, progress: Progress) -> tuple[Comparison, Path]:
    """Every setting with a second real run; the comparison and where its report is."""
    for model in models or ():
        if model not in SETTINGS:
            raise unknown("fidelity setting", model, SETTINGS)
    chosen = [SETTINGS[model] for model in models or SETTINGS]
    return _measure(out, chosen, requests=None, repeat=True, progress=progress, title="Isthmus: fidelity")


def _measure(
    out: Path, settings: Sequence[Setting], *, requests: int | None, repeat: bool, progress: Progress, title: str
) -> tuple[Comparison, Path]:
    found = []
    for setting in settings:
        experiments = {}
        for uplink in setting.uplinks:
            path = out / f"{setting.model}-{uplink}.yaml"
            write_text(path, yaml.safe_dump(setting.experiment(uplink, requests), sort_keys=False))
            experiments[uplink] = Experiment.load(path)
        for number, (uplink, experiment) in enumerate(experiments.items()):
            found.append(
                validate(
                    experiment,
                    out / f"{setting.model}-{uplink}",
                    name=f"{setting.model}, {uplink} uplink",
                    repeat=repeat,
                    keep_profiles=number > 0,
                    progress=progress,
                )
            )
    merged = merge(found)
    report = out / "report.html"
    write_report(report, [merged], title=title)
    return merged, report
