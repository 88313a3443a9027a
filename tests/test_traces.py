"""`isthmus traces`: figures that can be worked out by hand, and a plot that needs no network."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("plotly")

from isthmus.experiments.cli import app
from isthmus.experiments.traces import POINTS, Trace, find_traces, sampled, sparkline, summary, write_plot
from isthmus.workloads.errors import InputError
from isthmus.workloads.rate import Rate

BED = """
models: {m: not-needed.onnx}
nodes: {a: {}, b: {}, c: {}, "<i&d": {}}
links:
  - {between: [a, b], rate: 20Mbit}
  - {between: [b, c], rate: [[0s, 80Mbit], [5s, 0]], period: 8s, back: {rate: {file: log.csv, time: t, rate: up}}}
  - {between: [c, "<i&d"], rate: {kind: on-off, rate: 20Mbit, on: 30s, off: 2s}}
"""


@pytest.fixture
def bed(tmp_path: Path) -> Path:
    (tmp_path / "log.csv").write_text("t,down,up\n0,1,8\n1,1,16\n")
    (tmp_path / "bed.yaml").write_text(BED)
    return tmp_path / "bed.yaml"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    app([str(a) for a in arguments], standalone_mode=False)
    return capsys.readouterr().out


def test_the_links_of_a_testbed_without_its_models(bed):
    found = {trace.name: trace for trace in find_traces(bed)}
    assert {name: trace.kind for name, trace in found.items()} == {
        "a ⇄ b": "constant",
        "b → c": "schedule",
        "c → b": "trace log.csv",
        "c → <i&d": "on-off, seed 1",
        "<i&d → c": "on-off, seed 1",
    }
    again = {trace.name: trace for trace in find_traces(bed, seed=2)}
    assert again["c → <i&d"].rate != found["c → <i&d"].rate
    assert again["c → b"] == found["c → b"]


def test_an_experiment_with_its_first_seed(bed):
    (bed.parent / "experiment.yaml").write_text(
        "testbed: bed.yaml\nseeds: [7]\npolicies: [local]\n"
        "workload: [{node: a, model: m, arrivals: {kind: poisson, rate: 1/s}, requests: 1}]\n"
    )
    assert find_traces(bed.parent / "experiment.yaml") == find_traces(bed, seed=7)


def test_figures_are_shares_of_time():
    rate = Rate((0.0, 1.0, 5.0), (10.0, 0.0, 30.0), 10.0)
    assert summary(Trace("x", "k", rate)) == {
        "name": "x",
        "kind": "k",
        "duration_s": 10.0,
        "mean_bytes_per_s": 16.0,
        "p5_bytes_per_s": 0.0,
        "p50_bytes_per_s": 10.0,
        "p95_bytes_per_s": 30.0,
        "lowest_bytes_per_s": 0.0,
        "outage_share": 0.4,
    }
    assert summary(Trace("x", "k", Rate.constant(5.0)))["duration_s"] is None
    assert summary(Trace("x", "k", Rate((0.0, 2.0), (10.0, 20.0))))["duration_s"] == 4.0


def test_a_rate_as_a_line():
    assert sparkline(Rate((0.0, 1.0, 2.0, 3.0), (8.0, 0.0, 4.0, 1.0), 4.0), 4) == "█ ▄▁"
    assert sparkline(Rate.constant(3.0), 3) == "███"


def test_long_rates_are_drawn_as_means():
    starts = np.arange(100_000)
    rate = Rate(tuple((0.1 * starts).tolist()), tuple((1.0 + starts % 2).tolist()), 10_000.0)
    times, means = sampled(rate, 10_000.0)
    assert len(times) == len(means) == POINTS
    assert means.mean() == pytest.approx(1.5)
    times, exact = sampled(rate, 1.05)
    assert exact.tolist() == [1, 2] * 5 + [1]


def test_the_command(bed, capsys, tmp_path):
    (tmp_path / "p.txt").write_text("0 1\n1 2\n")
    shown = run(capsys, "traces", bed, tmp_path / "p.txt")
    for words in ("a ⇄ b", "on-off, seed 1", "pairs", "37.5", "█████"):
        assert words in shown
    plot = tmp_path / "rates.html"
    data = json.loads(run(capsys, "traces", bed, "--seed", 3, "--json", "--plot", plot))
    assert data["plot"] == str(plot)
    assert [row["kind"] for row in data["traces"]][-1] == "on-off, seed 3"
    log = json.loads(run(capsys, "traces", tmp_path / "log.csv", "--time", "t", "--rate", "up", "--json"))["traces"]
    assert log[0] | {"name": "log.csv", "kind": "csv", "mean_bytes_per_s": 1.5e6} == log[0]
    html = plot.read_text()
    assert "<i&d" not in html
    assert not re.search(r"<link|<img|<iframe|@import|<script[^>]*src=", html)


@pytest.mark.parametrize(
    ("name", "content", "columns", "said"),
    [
        ("x.yaml", BED, {"rate": "up"}, "no --rate"),
        ("x.yaml", BED.replace("log.csv", "lag.csv"), {}, r"links\[1\]\.back\.rate: .*lag.csv: no such file"),
        ("x.yaml", "", {}, "is empty"),
        ("x.csv", "t,down,up\n0,1,8\n", {}, "3 columns"),
        ("x.txt", "0 1\n", {"unit": "Mbps"}, "unit: 'Mbps'"),
        ("x.txt", "", {}, "is empty"),
    ],
)
def test_what_is_wrong_is_named(bed, name, content, columns, said):
    path = bed.with_name(name)
    path.write_text(content)
    with pytest.raises(InputError, match=said) as caught:
        find_traces(path, **columns)
    assert str(caught.value).startswith(str(path))


def test_a_plot_is_html(tmp_path):
    with pytest.raises(InputError, match="html"):
        write_plot(tmp_path / "rates.png", [])
