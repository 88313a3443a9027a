"""The report: whole, offline, and nobody's names become markup."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest

pytest.importorskip("plotly")
pytest.importorskip("jinja2")

from isthmus.experiments.compare import compare, merge
from isthmus.experiments.report import write_report
from isthmus.experiments.run_folder import Run, RunWriter
from isthmus.policies.registry import spec
from isthmus.sim.simulator import simulate
from isthmus.workloads.experiment import ExperimentSpec
from isthmus.workloads.testbed import Testbed, TestbedSpec

NASTY = "</script><b>&x"


def run(folder: Path, world: str, *, noise: int = 0, changing: bool = False) -> Run:
    """A run folder. A "real" run is imitated: a simulation with other noise that claims another world."""
    nodes = {
        "device": {"service": {"mean": "90ms", "distribution": "gamma"}},
        "<i&cloud": {"service": {"mean": "10ms", "distribution": "exponential"}},
    }
    rate = [["0s", "50Mbit"], ["2s", "5Mbit"]] if changing else "50Mbit"
    link = {"between": ["device", "<i&cloud"], "rate": rate, "period": "4s", "latency": "5ms"}
    testbed_spec = {"models": {"squeezenet": "squeezenet"}, "nodes": nodes, "links": [link]}
    source = {
        "node": "device",
        "model": "squeezenet",
        "arrivals": {"kind": "poisson", "rate": "5/s"},
        "requests": 40,
    }
    policies = ["local", {"least-delay": {"label": NASTY}}, "oracle"]
    experiment = ExperimentSpec.model_validate(
        {"name": "two <u>places", "testbed": testbed_spec, "workload": [source], "policies": policies}
    )
    assert isinstance(experiment.testbed, TestbedSpec)
    testbed = Testbed.build(experiment.testbed)
    with RunWriter(folder, world, experiment, testbed, oracles=["oracle"]) as writer:
        for policy in map(spec, policies):
            made = {"device": policy.make(1)}
            simulate(
                testbed, experiment.draw(1), made, writer.sink(policy.label, 1).keep, seed=1 + noise, name=policy.label
            )
    return Run.load(folder)


def page(path: Path) -> str:
    """The file without plotly.js, which is not ours."""
    text = path.read_text(encoding="utf-8")
    longest = max(re.findall(r"<script>.*?</script>", text, flags=re.S), key=len)
    assert "plotly.js v" in longest
    return text.replace(longest, "")


def test_a_comparison_in_one_offline_file(tmp_path: Path) -> None:
    simulated, real, again = (
        run(tmp_path / name, world, noise=noise, changing=True)
        for name, world, noise in (("s", "simulated", 0), ("r", "emulated", 9), ("a", "emulated", 99))
    )
    comparison = compare(simulated, real, again, resamples=50)
    write_report(tmp_path / "report.html", [comparison], title="A <title>")
    html = page(tmp_path / "report.html")
    assert "A &lt;title&gt;" in html
    assert 'class="badge sim">simulated' in html
    assert 'class="badge real">emulated' in html
    assert html.count("oracle</span>") >= 3  # in both tables and above its chart
    for heading in ("Results", "Fidelity", "Latency", "Where the time went", "Links that change", "Provenance"):
        assert heading in html
    assert simulated.facts["models"]["squeezenet"]["sha256"][:16] in html
    assert str(real.folder) in html
    # Nothing is loaded from elsewhere.
    assert not re.search(r"<link|<img|<iframe|@import|src=|url\(|https?://(?!www\.w3\.org)", html)
    # Names are text: in the page, and in the charts' data.
    for tag in ("<b>&", "<i&", "<u>places", "<title>A <"):
        assert tag not in html
    assert html.count("<script") == html.count("</script")
    assert "nan" not in re.sub(r"<script.*?</script>", "", html, flags=re.S).lower().split()

    write_report(tmp_path / "again.html", [comparison], title="A <title>")
    assert (tmp_path / "again.html").read_bytes() == (tmp_path / "report.html").read_bytes()


def test_one_run_alone(tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", [run(tmp_path / "s", "simulated")])
    html = page(tmp_path / "report.html")
    assert "Only one world is shown" in html
    assert "Fidelity" not in html
    assert "Links that change" not in html


def test_a_run_without_a_single_answer(tmp_path: Path) -> None:
    silent = run(tmp_path / "s", "simulated")
    for name, gone in (("requests.parquet", ["end_s", "latency_s"]), ("spans.parquet", None)):
        frame = pd.read_parquet(tmp_path / "s" / name)
        frame = frame.iloc[:0] if gone is None else frame.assign(**dict.fromkeys(gone, float("nan")))
        frame.to_parquet(tmp_path / "s" / name)
    write_report(tmp_path / "report.html", [silent])
    html = page(tmp_path / "report.html")
    assert html.count("Nothing was answered.") == 3
    assert "Where the time went" not in html


def test_several_comparisons(tmp_path: Path) -> None:
    found = [
        compare(
            run(tmp_path / f"s{changing}", "simulated", changing=changing),
            run(tmp_path / f"r{changing}", "physical", noise=9, changing=changing),
            resamples=0,
        )
        for changing in (False, True)
    ]
    write_report(tmp_path / "merged.html", [merge(found)])
    html = page(tmp_path / "merged.html")
    assert html.count("<section>") == 2
    assert html.count('class="badge real">physical') >= 4
    assert "emulated" not in html
    write_report(tmp_path / "listed.html", found)
    assert page(tmp_path / "listed.html") == html
