"""How links are described: what the documentation shows, what a run keeps, and what is wrong said in a line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from isthmus.experiments.execute import Experiment, simulate
from isthmus.experiments.real_run import check_real
from isthmus.experiments.schemas import schemas
from isthmus.experiments.traces import find_traces
from isthmus.workloads.errors import InputError
from isthmus.workloads.testbed import Testbed

PAIR = ("device", "cloud")


def linked(**more: Any) -> list[dict[str, Any]]:
    return [{"between": list(PAIR), "rate": "1MB/s", **more}]


def test_a_run_keeps_what_its_links_were_read_from(chain, tmp_path):
    """The run folder alone builds the same links again, and `isthmus traces` shows the rates of media."""
    (tmp_path / "delay.csv").write_text("0.25\n0.75\n")
    testbed = {
        "models": {"chain": str(chain)},
        "nodes": {n: {"service": {"mean": 1}} for n in PAIR},
        "links": [{"between": list(PAIR), "medium": "cell", "jitter": {"file": "delay.csv"}, "loss": 0.1}],
        "media": {"cell": {"rate": [[0, "1MB/s"], [1, "2MB/s"]], "period": 3, "back": {"rate": "4MB/s"}}},
    }
    workload = [{"node": "device", "model": "chain", "arrivals": {"kind": "poisson", "rate": 1}, "requests": 3}]
    fields = {"testbed": testbed, "workload": workload, "policies": ["remote"]}
    (tmp_path / "experiment.yaml").write_text(json.dumps(fields))
    experiment = Experiment.load(tmp_path / "experiment.yaml")
    shown = [(t.name, t.kind) for t in find_traces(tmp_path / "experiment.yaml")]
    assert shown == [("cell", "schedule"), ("cell back", "constant")]
    run = simulate(experiment, tmp_path / "out")
    (tmp_path / "delay.csv").unlink()
    assert run.testbed.links == experiment.testbed.links
    assert len(run.spans.query("kind == 'send' and place == 'device>cloud'")) == 3


@pytest.mark.parametrize("page", ["README.md", "docs/physics.md"])
def test_what_the_documentation_shows_is_a_testbed(page, synthetic):
    text = (Path(__file__).parents[1] / page).read_text()
    [shown] = [b for b in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) if "media:" in b]
    described = yaml.safe_load(shown)
    nodes = {n: {"service": {"mean": 1}} for link in described["links"] for n in link["between"]}
    testbed = synthetic(nodes, **described)
    assert {link.discipline for link in testbed.links.values()} == {"fifo", "fair"}
    fields = {"models": {"m": "m.onnx"}, "nodes": nodes, **described}
    Draft202012Validator(json.loads(schemas()["testbed.schema.json"])).validate(fields)


@pytest.mark.parametrize(
    ("link", "media", "said"),
    [
        ({"loss": 1}, {}, ["links[0].loss", "less than 1"]),
        ({"loss": -0.1}, {}, ["links[0].loss", "greater than or equal to 0"]),
        ({"back": {"loss": 1}}, {}, ["links[0].back.loss", "less than 1"]),
        ({"jitter": "-5ms"}, {}, ["links[0].jitter", "'-5ms'", ">= 0"]),
        ({"jitter": {"samples": ["-1ms"]}}, {}, ["links[0].jitter.samples[0]", ">= 0"]),
        ({"jitter": {"file": "nope.csv"}}, {}, ["links[0].jitter", "nope.csv", "no such file"]),
        ({"jitter": {"file": "a.csv", "samples": [1]}}, {}, ["links[0].jitter", "either"]),
        ({"jitter": {"distribution": "gama", "mean": 1}}, {}, ["links[0].jitter", "did you mean gamma", "scipy"]),
        ({"jitter": {"distribution": "pareto", "mean": 1, "parameters": {"b": 1}}}, {}, ["jitter", "no finite mean"]),
        ({"jitter": {"distribution": "pareto", "mean": 1}}, {}, ["jitter", "pareto with the parameters {}", "{b: …}"]),
        ({"jitter": {"distribution": "norm", "mean": 1}}, {}, ["jitter", "below 0"]),
        ({"discipline": "fare"}, {}, ["links[0].discipline", "'fifo' or 'fair'", "'fare'"]),
        ({"slow_start": {"window": 0}}, {}, ["links[0].slow_start.window", "greater than 0"]),
        ({"slow_start": {"windw": 1}}, {}, ["links[0].slow_start.windw", "(allowed: idle, window)"]),
        ({"overhead": "60"}, {}, ["links[0].overhead", "no unit"]),
        ({"medium": "cel"}, {"cell": {"rate": 1}}, ["links[0].medium", "did you mean cell"]),
        ({}, {"cell": {"rate": 1}}, ["media.cell", "no link is on it"]),
        ({"rate": None}, {}, ["links[0].rate", "missing", "medium"]),
        ({"medium": "cell", "rate": None, "period": 1}, {"cell": {"rate": 1}}, ["links[0]", "`period`", "no rate"]),
        ({"medium": "cell", "discipline": "fifo"}, {"cell": {"rate": 1}}, ["links[0]", "(allowed: fair)"]),
        ({"medium": "cell"}, {"cell": {"rate": [[0, 1], [1, 0]]}}, ["media.cell.rate", "ends at 0"]),
        ({"medium": "cell"}, {"cell": {"rate": 1, "back": {"rate": "x"}}}, ["media.cell.back.rate", "'x'"]),
    ],
)
def test_what_is_wrong_with_a_link_is_said_in_a_line(chain, tmp_path, link, media, said):
    nodes = {n: {"service": {"mean": 1}} for n in PAIR}
    fields = {"models": {"chain": str(chain)}, "nodes": nodes, "links": linked(**link), "media": media}
    path = tmp_path / "bed.yaml"
    path.write_text(json.dumps(fields))
    with pytest.raises(InputError) as caught:
        Testbed.load(path)
    text = str(caught.value)
    assert "\n" not in text
    for part in ("bed.yaml", *said):
        assert part in text, text


@pytest.mark.parametrize(
    ("more", "media", "field"),
    [
        ({"jitter": "1ms"}, {}, "links[0].jitter"),
        ({"back": {"loss": 0.1}}, {}, "links[0].back.loss"),
        ({"slow_start": True}, {}, "links[0].slow_start"),
        ({"overhead": "60B"}, {}, "links[0].overhead"),
        ({"discipline": "fair"}, {}, "links[0].discipline"),
        ({"medium": "cell"}, {"cell": {"rate": 1}}, "links[0].medium"),
        ({"discipline": "fifo", "rate": [[0, 1], [1, 2]]}, {}, None),
    ],
)
def test_what_no_emulation_has_is_refused_there(chain, more, media, field):
    nodes = {n: {"service": {"mean": 1}} for n in PAIR}
    testbed = {"models": {"chain": str(chain)}, "nodes": nodes, "links": linked(**more), "media": media}
    workload = [{"node": "device", "model": "chain", "arrivals": {"kind": "poisson", "rate": 1}, "requests": 1}]
    experiment = Experiment.of({"testbed": testbed, "workload": workload, "policies": ["remote"]})
    if field is None:
        assert check_real(experiment) == []
        return
    with pytest.raises(InputError) as caught:
        check_real(experiment)
    assert f"{field}: is simulated only, so far" in str(caught.value)
