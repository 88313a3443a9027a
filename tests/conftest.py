"""What several tests share: two small models, testbeds with made-up service times, and runs of the simulator."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, settings
from onnx import TensorProto, helper, numpy_helper

from isthmus.policies.records import Record
from isthmus.sim.simulator import simulate
from isthmus.workloads.requests import Request
from isthmus.workloads.testbed import Testbed, TestbedSpec

# No deadlines: how long an example takes says how busy the machine is. Set HYPOTHESIS_PROFILE=search for new examples.
settings.register_profile(
    "same", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.register_profile("search", settings.get_profile("same"), derandomize=False, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

NODES = {"device": "100ms", "edge": "30ms", "cloud": "10ms"}
LINKS = [
    {"between": ["device", "edge"], "rate": "20Mbit", "latency": "2ms"},
    {"between": ["edge", "cloud"], "rate": "100Mbit", "latency": "20ms"},
]


def _save(path: Path, nodes: list[onnx.NodeProto], output: list[int]) -> Path:
    generator = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(generator.normal(0, 0.2, (8, 3 if name == "w0" else 8, 3, 3)).astype(np.float32), name)
        for node in nodes
        for name in node.input
        if name.startswith("w")
    ]
    graph = helper.make_graph(
        nodes,
        path.stem,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 64, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, output)],
        weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)
    return path


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five convolutions in a row, each with half the side of the one before, and a Flatten without FLOPs: 7 cuts."""
    names = ["x", "a", "b", "c", "d", "e"]
    nodes = [
        helper.make_node("Conv", [names[i], f"w{i}"], [names[i + 1]], strides=[2, 2], pads=[1, 1, 1, 1])
        for i in range(5)
    ]
    nodes.append(helper.make_node("Flatten", ["e"], ["y"]))
    return _save(tmp_path_factory.mktemp("models") / "chain.onnx", nodes, [1, 32])


@pytest.fixture(scope="session")
def diamond(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layer 0 feeds layers 1 and 2, which layer 3 joins."""
    pads: dict[str, Any] = {"pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["stem"], strides=[4, 4], **pads),
        helper.make_node("Conv", ["stem", "w1"], ["left"], **pads),
        helper.make_node("Conv", ["stem", "w2"], ["right"], **pads),
        helper.make_node("Add", ["left", "right"], ["y"]),
    ]
    return _save(tmp_path_factory.mktemp("models") / "diamond.onnx", nodes, [1, 8, 16, 16])


Build = Callable[..., Testbed]


@pytest.fixture(scope="session")
def synthetic(chain: Path, diamond: Path) -> Build:
    """`synthetic(nodes, links, model, …)`: a testbed. A node is a mean service time, or all the file may say of it.

    Without arguments: device, edge and cloud in a row. The model is `chain` or `diamond`, and called so.
    """
    paths = {"chain": chain, "diamond": diamond}

    def build(
        nodes: Mapping[str, Any] = NODES, links: Sequence[Mapping[str, Any]] = LINKS, model: str = "chain", **more: Any
    ) -> Testbed:
        described = {n: {"service": {"mean": s}} if isinstance(s, str) else s for n, s in nodes.items()}
        spec = {"models": {model: str(paths[model])}, "nodes": described, "links": list(links), **more}
        return Testbed.build(TestbedSpec.model_validate(spec))

    return build


Play = Callable[..., list[Record]]


@pytest.fixture(scope="session")
def play() -> Play:
    """`play(testbed, policy, requests, …)`: simulate one source, or a mapping of them; the records as they closed.

    `policy` makes a policy; `requests` are arrival times at `device`, or requests by source.
    """

    def run(
        testbed: Testbed,
        policy: Callable[[], Any],
        requests: Sequence[float] | Mapping[str, Sequence[Request]],
        *,
        seed: int = 1,
        **more: Any,
    ) -> list[Record]:
        if not isinstance(requests, Mapping):
            [model] = testbed.models
            requests = {"device": [Request(i, "device", model, t) for i, t in enumerate(requests)]}
        records: list[Record] = []
        simulate(testbed, requests, {s: policy() for s in requests}, records.append, seed=seed, **more)
        return records

    return run


@pytest.fixture(scope="session")
def elsewhere() -> Callable[..., bytes]:
    """`elsewhere(code)`: what Python code prints in a process of its own, which hashes strings in its own way."""

    def run(code: str, *, hash_seed: int = 4711) -> bytes:
        source = Path(__file__).parents[1] / ".src"  # this checkout, whatever is installed
        environment = {**os.environ, "PYTHONPATH": str(source), "PYTHONHASHSEED": str(hash_seed)}
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True).stdout

    return run


@pytest.fixture(scope="session")
def ray() -> Iterator[Any]:
    """One Ray for all tests: it takes seconds to start."""
    from isthmus.real.cluster import local_ray

    with local_ray() as started:
        yield started
