"""What the repository says of itself is true: schemas are current, the README's example is the file, names import."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

import isthmus
from isthmus.experiments.execute import Experiment
from isthmus.experiments.fidelity import SETTINGS
from isthmus.experiments.schemas import schemas

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("file", schemas())
def test_schemas_are_current(file):
    assert (ROOT / "docs/schemas" / file).read_text() == schemas()[file], (
        "python -m isthmus.experiments.schemas docs/schemas"
    )


def test_the_example_is_the_readmes_and_fits_the_schema():
    text = (ROOT / "examples/camera.yaml").read_text()
    assert text in (ROOT / "README.md").read_text()
    Draft202012Validator(json.loads(schemas()["experiment.schema.json"])).validate(yaml.safe_load(text))
    assert [p.label for p in Experiment.load(ROOT / "examples/camera.yaml").policies]


def test_the_readmes_policy_keeps_the_contract(tmp_path, monkeypatch):
    [code] = re.findall(r"```python\n# mine.py\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "readme_policy.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    isthmus.check_policy(importlib.import_module("readme_policy").Cautious)


@pytest.mark.parametrize("model", SETTINGS)
@pytest.mark.parametrize("uplink", ["constant", "changing"])
def test_the_settings_of_the_benchmark_are_experiments(model, uplink):
    experiment = Experiment.of(SETTINGS[model].experiment(uplink))
    assert len(experiment.policies) == 6
    testbed = experiment.build_testbed(need_profiles=False)
    assert testbed.links["device", "edge"].rate.is_constant == (uplink == "constant")


def test_every_public_name_is_there():
    for name in isthmus.__all__:
        assert getattr(isthmus, name) is not None
    assert re.fullmatch(r"\d+\.\d+\.\d+", isthmus.__version__)


@pytest.mark.parametrize("room", ["workloads", "policies", "sim", "real", "experiments"])
def test_rooms_refuse_their_bare_names(room):
    done = subprocess.run([sys.executable, "-c", f"import {room}"], cwd=ROOT, capture_output=True, text=True)
    assert f"isthmus.{room}" in done.stderr


def test_simulating_needs_no_ray(tmp_path, chain):
    code = (
        "import sys, isthmus, yaml\n"
        f"testbed = {{'models': {{'net': {str(chain)!r}}}, 'nodes': {{'device': {{'service': {{'mean': '5ms'}}}}}}}}\n"
        "arrivals = {'kind': 'periodic', 'rate': '5/s'}\n"
        "workload = [{'node': 'device', 'model': 'net', 'arrivals': arrivals, 'requests': 3}]\n"
        "experiment = isthmus.Experiment.of({'testbed': testbed, 'workload': workload, 'policies': ['local']})\n"
        "assert len(isthmus.simulate(experiment).requests) == 3\n"
        "sys.exit('ray' in sys.modules)\n"
    )
    environment = {"PYTHONPATH": str(ROOT / ".src"), "PATH": os.environ["PATH"]}
    assert subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path).returncode == 0
