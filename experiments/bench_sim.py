"""How fast the simulator is: beside plain SimPy on the same work, and over the number of devices.

The work: devices that ask at Poisson times, each over a link of its own to one server (50 × 2 requests/s, 100 kB over
10 Mbit/s FIFO, a FIFO server of 5 ms, policy `remote`). Ours goes through everything that `isthmus simulate` does, and
writes its tables. The plain way is what a SimPy user writes first (sim/plain.py), and records nothing. CPU seconds of
this process, each way in turn, medians.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import onnx
import psutil
from onnx import TensorProto, helper

from isthmus.experiments import execute
from isthmus.experiments.execute import Experiment
from isthmus.experiments.run_folder import Run
from isthmus.sim.plain import plain_simpy
from isthmus.workloads.progress import Progress

DEVICES, RATE_PER_S, LINK_BYTES_PER_S, SERVICE_S = 50, 2.0, 10e6 / 8, 5e-3
EARLY = 100_000
"""Requests after which memory is looked at first."""
_INPUT_BYTES, _OUTPUT_BYTES = 100_000, 40


def bench_sim(
    *, requests: int = 100_000, repeats: int = 5, long: int = 2_000_000, progress: Progress | None = None
) -> dict[str, Any]:
    """Requests per CPU second of ours and of plain SimPy, and how memory grows over a run of `long` requests.

    `requests` are those of one measurement. Ratios are medians of ratios within one repeat.
    """
    per_device = max(requests // DEVICES, 1)
    up_s, back_s = _INPUT_BYTES / LINK_BYTES_PER_S, _OUTPUT_BYTES / LINK_BYTES_PER_S
    with tempfile.TemporaryDirectory() as folder:
        experiment = canonical(Path(folder), DEVICES, per_device)

        def plain(back_s: float | None) -> float:
            return plain_simpy(
                devices=DEVICES, rate_per_s=RATE_PER_S, requests=per_device,
                up_s=up_s, service_s=SERVICE_S, back_s=back_s,
            )  # fmt: skip

        def ours(*, spans: bool) -> float:
            return mean_latency_s(execute.simulate(experiment, Path(folder) / "run", spans=spans, replace=True))

        ways: dict[str, Callable[[], float]] = {
            "simpy": lambda: plain(back_s),
            "simpy_one_way": lambda: plain(None),
            "ours": lambda: ours(spans=True),
            "ours_without_spans": lambda: ours(spans=False),
        }
        per_s: dict[str, list[float]] = {name: [] for name in ways}
        mean_s: dict[str, float] = {}
        for repeat in range(repeats):
            for number, (name, way) in enumerate(ways.items()):
                if progress is not None:
                    progress(repeat * len(ways) + number, repeats * len(ways) + 1, name.replace("_", " "))
                began = time.process_time()
                mean_s[name] = way()
                per_s[name].append(per_device * DEVICES / (time.process_time() - began))
        if progress is not None:
            progress(repeats * len(ways), repeats * len(ways) + 1, f"memory over {long} requests")
        growth = rss_growth_bytes(Path(folder), long)

    def ratio(ours: str, theirs: str) -> float:
        return statistics.median(a / b for a, b in zip(per_s[ours], per_s[theirs], strict=True))

    return {
        "requests": per_device * DEVICES,
        "repeats": repeats,
        "requests_per_cpu_s": statistics.median(per_s["ours"]),
        "requests_per_cpu_s_without_spans": statistics.median(per_s["ours_without_spans"]),
        "simpy_requests_per_cpu_s": statistics.median(per_s["simpy"]),
        "simpy_one_way_requests_per_cpu_s": statistics.median(per_s["simpy_one_way"]),
        "ratio": ratio("ours", "simpy"),
        "ratio_without_spans": ratio("ours_without_spans", "simpy"),
        "ratio_to_one_way": ratio("ours", "simpy_one_way"),
        "ratio_to_one_way_without_spans": ratio("ours_without_spans", "simpy_one_way"),
        "mean_latency_s": mean_s["ours"],
        "simpy_mean_latency_s": mean_s["simpy"],
        "theory_s": theory_s(),
        "early_requests": min(EARLY, long // 2),
        "long_requests": long,
        "rss_growth_bytes": growth,
    }


def theory_s() -> float:
    """Mean latency: M/D/1 at the uplink, M/D/1 at the server as if its arrivals were Poisson, and the way back.

    What leaves fifty lightly loaded queues is nearly Poisson; that is the approximation. Pollaczek and Khinchine: a
    wait of ρ·S / (2(1 − ρ)).
    """
    up_s = _INPUT_BYTES / LINK_BYTES_PER_S
    waits = 0.0
    for rate, service in ((RATE_PER_S, up_s), (RATE_PER_S * DEVICES, SERVICE_S)):
        load = rate * service
        waits += load * service / (2 * (1 - load))
    return waits + up_s + SERVICE_S + _OUTPUT_BYTES / LINK_BYTES_PER_S


SCALE = (10, 100, 1_000, 10_000, 100_000)


def bench_scale(
    *, devices: tuple[int, ...] = SCALE, requests: int = 1_000_000, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """Rows per number of devices, of at least `requests` and 100 per device: CPU microseconds per request, and memory.

    Two cases. `one server`: the load of the canonical workload, spread over more and more devices, so that the same
    happens at the same time and only the number of devices differs. `a server per 50`: every device at the canonical
    rate, and every fifty with a server of their own, so that with the devices grows what happens at the same time.

    Each row is measured in a process of its own. Set-up is all that comes before the first event: reading, checking,
    linking.
    """
    rows = []
    rounds = [(count, alone) for alone in (True, False) for count in devices]
    for number, (count, alone) in enumerate(rounds):
        if progress is not None:
            progress(number, len(rounds), f"{count:,} devices, {_CASES[alone]}")
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            rows.append(pool.submit(_scale_row, count, max(requests // count, 100), alone).result())
    return rows


_CASES = {True: "one server", False: f"a server per {DEVICES}"}


def _scale_row(devices: int, per_device: int, alone: bool) -> dict[str, Any]:
    process = psutil.Process()
    servers, rate_per_s = (1, RATE_PER_S * DEVICES / devices) if alone else (max(devices // DEVICES, 1), RATE_PER_S)
    with tempfile.TemporaryDirectory() as folder:
        ready: list[float] = []
        experiment = canonical(Path(folder), devices, per_device, servers=servers, rate_per_s=rate_per_s)
        began = time.process_time()

        def first(done: int, total: int, text: str) -> None:
            if not ready:
                ready.append(time.process_time())

        execute.simulate(experiment, Path(folder) / "run", progress=first)
        made, spent_s = devices * per_device, time.process_time() - began
    return {
        "case": _CASES[alone],
        "devices": devices,
        "requests": made,
        "cpu_us_per_request": 1e6 * spent_s / made,
        "setup_us_per_request": 1e6 * (ready[0] - began) / made,
        "rss_bytes": process.memory_info().rss,
    }


def canonical(
    folder: Path, devices: int, requests: int, *, servers: int = 1, rate_per_s: float = RATE_PER_S
) -> Experiment:
    """The workload as an experiment; `requests` and `rate_per_s` are per device."""
    _save_model(folder / "pool.onnx")
    return Experiment.of(
        {
            "name": "canonical",
            "testbed": {
                "models": {"pool": "pool.onnx"},
                "nodes": {
                    "device": {"service": {"mean": "1s"}, "count": devices},
                    "server": {"service": {"mean": SERVICE_S}, "count": servers, "serves": True},
                },
                "links": [{"between": ["device", "server"], "rate": LINK_BYTES_PER_S}],
            },
            "workload": [
                {
                    "node": "device",
                    "model": "pool",
                    "arrivals": {"kind": "poisson", "rate": rate_per_s},
                    "requests": requests,
                }
            ],
            "policies": ["remote"],
        },
        folder,
    )


def mean_latency_s(run: Run) -> float:
    return float(run.requests["latency_s"].mean())


def rss_growth_bytes(folder: Path, requests: int) -> int:
    """How much more memory this process holds at the end of a run than after its first `EARLY` requests."""
    process, early = psutil.Process(), min(EARLY, requests // 2)
    seen: list[int] = []

    def look(done: int, total: int, text: str) -> None:
        if done >= early:
            seen.append(process.memory_info().rss)

    execute.simulate(
        canonical(folder, DEVICES, max(requests // DEVICES, 1)), folder / "long", replace=True, progress=look
    )
    return max(seen) - seen[0]


def _save_model(path: Path) -> None:
    """The least that takes 100 kB and gives 40 bytes: a server's time is given, not computed."""
    shape = [1, 10, 50, 50]
    graph = helper.make_graph(
        [helper.make_node("GlobalAveragePool", ["x"], ["y"])],
        "pool",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 10, 1, 1])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)
