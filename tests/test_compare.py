"""Comparison: known errors come out as they were put in, and a replay is the run again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from isthmus.experiments.compare import Comparison, breakdown, compare, merge
from isthmus.experiments.run_folder import Run, RunWriter
from isthmus.policies.plan import compile_plan, whole_on
from isthmus.policies.records import Outcome, Record
from isthmus.policies.registry import spec
from isthmus.sim.replay import Recorded, Replayed
from isthmus.sim.simulator import simulate
from isthmus.workloads.errors import InputError
from isthmus.workloads.experiment import ExperimentSpec
from isthmus.workloads.testbed import Testbed, TestbedSpec

POLICIES = ("local", "remote", "least-delay")


def experiment(**changes: Any) -> ExperimentSpec:
    nodes = {
        "device": {"service": {"mean": "90ms", "distribution": "gamma", "spread": 0.2}},
        "cloud": {"service": {"mean": "10ms", "distribution": "exponential"}},
    }
    link = {"between": ["device", "cloud"], "rate": "20Mbit", "latency": "5ms"}
    testbed = {"models": {"squeezenet": "squeezenet"}, "nodes": nodes, "links": [link | changes.pop("link", {})]}
    source = {
        "node": "device",
        "model": "squeezenet",
        "arrivals": {"kind": "poisson", "rate": "5/s"},
        "requests": 60,
    }
    return ExperimentSpec.model_validate(
        {
            "testbed": testbed,
            "workload": [source | changes.pop("source", {})],
            "policies": list(POLICIES),
            "seeds": [1, 2],
        }
        | changes
    )


def run(
    folder: Path,
    world: str,
    spec_: ExperimentSpec | None = None,
    *,
    noise: int = 0,
    alter: Callable[[Record], Record] = lambda record: record,
) -> Run:
    """A run folder. A "real" run is imitated: simulated with other noise, its records altered, its world claimed."""
    spec_ = spec_ or experiment()
    assert isinstance(spec_.testbed, TestbedSpec)
    testbed = Testbed.build(spec_.testbed)
    with RunWriter(folder, world, spec_, testbed) as writer:
        for seed in spec_.seeds:
            for name in POLICIES:
                sink = writer.sink(name, seed).keep
                policies = {"device": spec(name).make(seed)}
                simulate(
                    testbed,
                    spec_.draw(seed),
                    policies,
                    lambda record, sink=sink: sink(alter(record)),  # type: ignore[misc]
                    seed=seed + noise,
                    name=name,
                    faults=spec_.faults,
                )
    return Run.load(folder)


def slower(record: Record) -> Record:
    """Every answer takes a quarter longer than the simulation would have it."""
    assert record.latency_s is not None
    return record._replace(end_s=record.arrival_s + 1.25 * record.latency_s, overruns=record.number % 2)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(tmp_path_factory.mktemp("simulated"), "simulated")


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(tmp_path_factory.mktemp("emulated"), "emulated", noise=100)


def test_a_replay_is_the_run_again(simulated: Run, emulated: Run) -> None:
    found = compare(simulated, emulated, resamples=0)
    assert found.rows["mean_error"].min() > 0  # other noise: the prediction is not exact …
    assert found.rows["structural_error_s"].max() < 1e-9  # … but with the run's own times the simulator is
    assert (found.rows["paired"] == 120).all()


def test_a_replay_is_the_run_again_over_a_changing_link_with_losses(tmp_path: Path) -> None:
    harsh = experiment(
        link={"rate": [["0s", "20Mbit"], ["3s", "2Mbit"]], "period": "5s"},
        source={"timeout": "400ms", "deadline": "300ms"},
        faults=[{"node": "cloud", "down": "2s", "up": "4s"}],
    )
    real = run(tmp_path / "real", "emulated", harsh, noise=100)
    assert real.requests["attempts"].max() > 1
    found = compare(run(tmp_path / "sim", "simulated", harsh), real, resamples=0)
    assert found.rows["link"].unique().tolist() == ["changing"]
    # What was given up left no times behind, so what waits behind it is replayed from means.
    alone = found.rows.set_index("policy").loc["local"]
    assert alone["structural_error_s"] < 1e-9


def test_a_known_error_comes_out(simulated: Run, tmp_path: Path) -> None:
    real = run(tmp_path / "real", "emulated", alter=slower)
    again = run(tmp_path / "again", "emulated", alter=lambda r: slower(slower(r)))
    found = compare(simulated, real, again, resamples=200)
    for _, row in found.rows.iterrows():
        for what in ("mean", "p50", "p95", "p99"):
            assert row[f"{what}_error"] == pytest.approx(0.2)
        assert row["mean_bias"] == pytest.approx(-0.2)
        kept = real.requests.query("policy == @row.policy and overruns == 0")["latency_s"]
        assert row["structural_error_s"] == pytest.approx(kept.mean() / 5)  # where the host kept emulated time
        assert [row["repeat_mean_error"], row["repeat_p95_error"]] == pytest.approx([0.25, 0.25])
        assert row["overruns"] == 0.5
        # Every request is off by the same share: no resample says anything else.
        assert [row["mean_error_low"], row["mean_error_high"]] == pytest.approx([0.2, 0.2])
        assert row["structural_error_s_low"] < row["structural_error_s"] < row["structural_error_s_high"]
    assert found.median_mean_error == pytest.approx(found.worst_mean_error) == pytest.approx(0.2)
    assert found.kendall_tau == 1.0


def test_intervals_hold_the_estimate_and_are_the_same_again(simulated: Run, emulated: Run) -> None:
    found, again = (compare(simulated, emulated, resamples=300) for _ in range(2))
    pd.testing.assert_frame_equal(found.rows, again.rows)
    for name in ("mean_error", "p95_error"):
        assert (found.rows[f"{name}_low"] <= found.rows[name]).all()
        assert (found.rows[name] <= found.rows[f"{name}_high"]).all()


def test_answers_that_never_came_are_none_and_json_has_no_nan(simulated: Run, tmp_path: Path) -> None:
    def silent(record: Record) -> Record:
        if json.loads(record.plan or "")["stages"][0][0] == "cloud":
            return record._replace(end_s=None, outcome=Outcome.FAILED, reason="lost", spans=())
        return record

    real = run(tmp_path / "real", "physical", alter=silent)
    found = compare(simulated, real, resamples=50).to_json()
    json.dumps(found, allow_nan=False)
    remote = next(row for row in found["rows"] if row["policy"] == "remote")
    assert remote["outcomes_real"] == {"failed": 120}
    assert remote["outcomes_sim"] == {"completed": 120}
    for key in ("real_mean_s", "mean_error", "mean_error_low", "structural_error_s", "repeat_mean_error", "overruns"):
        assert remote[key] is None
    assert remote["sim_mean_s"] > 0
    assert found["worst_mean_error"] is not None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seeds": [1]}, "seeds"),
        ({"policies": ["local"]}, "policies"),
        ({"source": {"requests": 50}}, "workload"),
        ({"link": {"rate": "30Mbit"}}, "testbed.links"),
    ],
)
def test_runs_of_different_experiments_are_refused(
    simulated: Run, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(InputError, match=f"{named} differ"):
        compare(simulated, run(tmp_path, "emulated", experiment(**changes)))


def test_worlds_have_their_places(simulated: Run, emulated: Run, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="allowed: simulated"):
        compare(emulated, emulated)
    with pytest.raises(InputError, match="is a simulation"):
        compare(simulated, simulated)
    with pytest.raises(InputError, match="allowed: emulated"):
        compare(simulated, emulated, run(tmp_path, "physical"))


def test_a_whole_run_that_lacks_a_policy_is_refused(simulated: Run, tmp_path: Path) -> None:
    real = run(tmp_path, "emulated", noise=100)
    table = tmp_path / "requests.parquet"
    frame = pd.read_parquet(table)
    frame[frame["policy"] != "remote"].to_parquet(table)
    with pytest.raises(InputError, match="120 requests are in only one"):
        compare(simulated, Run.load(tmp_path))
    interrupted = Run(real.folder, {**real.facts, "status": "interrupted"})
    compared = compare(simulated, interrupted, resamples=0)
    assert compared.rows["policy"].tolist() == ["local", "least-delay"]
    assert compared.warnings == [f"{real.folder}: interrupted, and compared as far as it got"]


def rows(*means: tuple[float, float], **more: str) -> Comparison:
    about = {"model": "m", "link": "constant", "setting": "s"} | more
    return Comparison(pd.DataFrame([about | {"sim_mean_s": s, "real_mean_s": r, "mean_error": 0.1} for s, r in means]))


def test_kendall_tau_ranks_only_what_is_apart() -> None:
    assert rows((1, 1), (2, 2), (3, 3)).kendall_tau == 1.0
    assert rows((3, 1), (2, 2), (1, 3)).kendall_tau == -1.0
    assert rows((1, 1), (3, 2), (2, 3)).kendall_tau == pytest.approx(1 / 3)
    assert rows((2, 1.0), (1, 1.05)).kendall_tau is None  # 5 % apart: which is faster is noise
    assert rows((2, 1.0), (1, 1.05), (3, 2)).kendall_tau == 1.0
    assert rows((1, 1), (float("nan"), 2)).kendall_tau is None


def test_merged_experiments_are_ranked_each_for_itself() -> None:
    fast, slow = rows((1, 1), (2, 2)), rows((0.1, 10), (0.2, 20), setting="t")
    merged = merge([fast, slow])
    assert merged.kendall_tau == 1.0  # across the two settings it would be less
    assert len(merged.rows) == 4
    assert merge([merged, fast]).parts == (fast, slow, fast)


def test_breakdown_adds_up_to_the_latency(simulated: Run) -> None:
    table = breakdown(simulated)
    means = simulated.requests.groupby("policy", sort=False)["latency_s"].mean()
    assert table.index.tolist() == list(POLICIES)
    pd.testing.assert_series_equal(table.sum(axis=1), means, check_names=False)
    assert table.loc["local", ("compute", "cloud")] == 0
    assert table.loc["local", ("compute", "device")] == pytest.approx(0.09, rel=0.1)


def test_the_replay_takes_what_was_recorded_and_means_for_the_rest() -> None:
    spec_ = experiment()
    assert isinstance(spec_.testbed, TestbedSpec)
    testbed = Testbed.build(spec_.testbed)
    first, second = spec_.draw(1)["device"][:2]
    local, remote = (whole_on(testbed.models["squeezenet"], node) for node in ("device", "cloud"))
    row = {"source": "device", "number": 0, "plan": remote.to_json()}
    policy = Replayed([row], [row | {"attempt": 1, "plan": local.to_json()}])
    assert policy.decide(first, None) == local  # type: ignore[arg-type]
    assert policy.decide(first, None) == remote  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no plan for request 1"):
        policy.decide(second, None)  # type: ignore[arg-type]

    compiled = compile_plan(remote, testbed.models["squeezenet"], "device", testbed)
    span = {"source": "device", "number": 0, "attempt": 1, "stage": 0, "kind": "compute", "place": "cloud",
            "start_s": 1.0, "end_s": 1.5}  # fmt: skip
    recorded = Recorded(testbed, "remote", [span])
    assert recorded.compute_s(first, 1, 0, compiled) == 0.5
    assert recorded.compute_s(second, 1, 0, compiled) == pytest.approx(0.01)
    assert recorded.decide_s(first, 1) == 0
