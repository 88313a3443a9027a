"""Simulation beside reality: how far apart two runs of one experiment are, per policy and for their ranking.

Three errors, over requests that are the same in all runs (common random numbers):

    predictive   the simulation from the profile taken before, against the real run: mean, p50, p95, p99
    structural   the simulation fed the real run's own plans, part times and decision times, request by request; only
                 requests for which the host kept emulated time, or the simulation would be fed the host's lateness
    repeat       a second real run against the first: what no simulation can beat

Percentages are relative to the real run; latency is that of answered requests. Knows run folders and the replay. Knows
no actor and draws no picture.

Intervals are 95 % percentile intervals of a block bootstrap: neighbouring requests share queues and slow spells of the
host, so single requests are not independent and resampling them one by one gives intervals that are too narrow.
Blocks do not overlap, do not span two seeds, and hold about √n requests in order of closing, the usual size of batch
means. (Tried on queues with autocorrelated service times, a nominal 95 % interval of the mean error held the truth in
87 % of the cases at n = 300 and 95 % at 1 000; with single requests in 41 % and 49 %.) All statistics of a policy come
from the same resamples, and a resample takes both worlds' answers to a request.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

from isthmus.experiments.places import by_group
from isthmus.experiments.run_folder import Run
from isthmus.policies.records import Kind, Record
from isthmus.sim.replay import replay
from isthmus.workloads.errors import InputError
from isthmus.workloads.testbed import TestbedSpec

Floats = npt.NDArray[np.float64]

PERCENTILES = (50, 95, 99)
APART = 0.1
"""Policies whose real means are closer than this share of the smaller one are not ranked: noise would decide."""

_ID = ["policy", "seed", "source", "number"]
_STATISTICS = ("mean_error", "p95_error", "structural_error_s")


@dataclass(frozen=True)
class Comparison:
    """What `compare` and `merge` found. `rows`: one row per policy, seeds pooled; missing is NaN or None.

    `*_error` are shares of the real value, without sign (`mean_bias` has it: above 0, the simulation is too slow).
    `*_low` and `*_high` bound them with 95 % confidence. Policies of equal `setting` met the same testbed and workload.
    """

    rows: pd.DataFrame
    simulated: Run | None = None
    real: Run | None = None
    repeat: Run | None = None
    parts: tuple[Comparison, ...] = ()
    """What was merged; empty where this is the comparison of one experiment."""

    @property
    def world(self) -> str:
        """The world of the real runs, such as `emulated`; several where comparisons of several were merged."""
        worlds = {part.real.world for part in (self.parts or (self,)) if part.real is not None}
        return " and ".join(sorted(worlds))

    @property
    def warnings(self) -> list[str]:
        """What the real runs said of themselves, such as that the host was too slow."""
        runs = [run for part in (self.parts or (self,)) for run in (part.real, part.repeat) if run is not None]
        said = [(run, f"{run.facts['status']}, and compared as far as it got") for run in runs if not run.is_complete]
        said += [(run, warning) for run in runs for warning in run.facts.get("warnings", [])]
        return [f"{run.folder}: {text}" for run, text in said]

    @property
    def median_mean_error(self) -> float | None:
        return _known(self.rows["mean_error"].median())

    @property
    def worst_mean_error(self) -> float | None:
        return _known(self.rows["mean_error"].max())

    @property
    def median_p95_error(self) -> float | None:
        return _known(self.rows["p95_error"].median())

    @property
    def structural_error_s(self) -> float | None:
        """Mean over all requests that were answered in the real run and in its replay."""
        paired = self.rows.dropna(subset="structural_error_s")
        if not paired["paired"].sum():
            return None
        return float(np.average(paired["structural_error_s"].astype(float), weights=paired["paired"]))

    @property
    def kendall_tau(self) -> float | None:
        """(concordant − discordant) / pairs, of the rankings by mean latency in both worlds.

        Over pairs of policies in one setting whose real means are at least 10 % apart; None where there is no such
        pair.
        """
        signs = [
            np.sign(b - a) * np.sign(y - x)
            for _, group in self.rows.groupby(["model", "link", "setting"], sort=False)
            for (a, x), (b, y) in combinations(group[["sim_mean_s", "real_mean_s"]].dropna().itertuples(index=False), 2)
            if abs(y - x) >= APART * min(x, y)
        ]
        return float(np.mean(signs)) if signs else None

    def to_json(self) -> dict[str, Any]:
        """As plain data; what is not known is None, so that it is valid JSON."""
        rows = [{k: _plain(v) for k, v in row.items()} for row in self.rows.to_dict("records")]
        return {
            "rows": rows,
            "median_mean_error": self.median_mean_error,
            "worst_mean_error": self.worst_mean_error,
            "median_p95_error": self.median_p95_error,
            "structural_error_s": self.structural_error_s,
            "kendall_tau": self.kendall_tau,
            "warnings": self.warnings,
        }


def compare(
    simulated: Run, real: Run, repeat: Run | None = None, *, resamples: int = 2000, seed: int = 0
) -> Comparison:
    """Lay a real run beside its simulation, and beside a second real run where there is one.

    `resamples` of the bootstrap; 0 leaves the intervals out. InputError when the runs are not of the same experiment,
    or not of the worlds that they are said to be. A run that was interrupted, or failed, is compared as far as it got.
    """
    if simulated.world != "simulated":
        raise InputError(f"is a run in the {simulated.world} world", where=simulated.folder, allowed="simulated")
    for run in (real, *([repeat] if repeat else [])):
        if run.world == "simulated":
            raise InputError("is a simulation", where=run.folder, allowed="a real run: emulated, lab, mixed, physical")
        _check_same(simulated, run)
    if repeat is not None and repeat.world != real.world:
        raise InputError(
            f"is {repeat.world}, the run that it repeats is {real.world}",
            where=repeat.folder,
            allowed=real.world,
        )
    sim, truth = _indexed(simulated), _indexed(real)
    _check_requests(simulated, sim, real, truth)
    again = None
    if repeat is not None:
        again = _indexed(repeat)
        _check_requests(simulated, sim, repeat, again)
    common = truth.index.intersection(sim.index, sort=False)
    sim, truth, replayed = sim.loc[common], truth.loc[common], _replayed(real)
    spec = real.experiment
    about = {
        "model": "+".join(dict.fromkeys(source.model for source in spec.workload)),
        "link": "constant" if all(link.rate.is_constant for link in real.testbed.links.values()) else "changing",
        "setting": _setting(real),
    }
    rows = []
    for policy in truth.index.unique("policy"):
        mine = truth.loc[[policy]]
        other = None if again is None else again.loc[again.index.isin(mine.index)]
        rows.append(
            {"policy": policy}
            | about
            | _row(sim.loc[mine.index], mine, replayed.reindex(mine.index), other, resamples, seed)
        )
    return Comparison(pd.DataFrame(rows), simulated, real, repeat)


def merge(comparisons: Sequence[Comparison]) -> Comparison:
    """Several experiments as one table. Policies are ranked only against others in the same setting."""
    if not comparisons:
        raise InputError("nothing to merge", allowed="at least one comparison")
    parts = tuple(part for c in comparisons for part in (c.parts or (c,)))
    return Comparison(pd.concat([part.rows for part in parts], ignore_index=True), parts=parts)


def breakdown(run: Run) -> pd.DataFrame:
    """Where the time went: mean seconds per answered request, by policy × (kind, place), groups taken together.

    Stages that overlap count each for itself, so a row's sum can be more than the latency.
    """
    answered = run.requests.dropna(subset="latency_s")
    spans = run.spans.merge(answered[_ID], on=_ID)
    spans["seconds"], spans["place"] = spans["end_s"] - spans["start_s"], by_group(spans["place"], run)
    total = spans.pivot_table(
        index="policy", columns=["kind", "place"], values="seconds", aggfunc="sum", fill_value=0.0
    )
    requests = answered.groupby("policy", sort=False).size()
    return total.div(requests, axis=0).reindex(requests.index)


# The same experiment?


def _check_same(simulated: Run, other: Run) -> None:
    ours, theirs = _essence(simulated), _essence(other)
    different = [name for name in ours if ours[name] != theirs[name]]
    if different:
        raise InputError(
            f"is not a run of the same experiment as {simulated.folder}: {', '.join(different)} differ",
            where=other.folder,
            allowed="the same testbed, models, workload, policies, seeds and faults",
        )


def _essence(run: Run) -> dict[str, Any]:
    """What has to be equal. Models and traces count by content: the same file lies elsewhere on another host."""
    spec = run.experiment
    assert isinstance(spec.testbed, TestbedSpec)
    traces = run.facts.get("traces", {})
    by_content = spec.testbed.with_traces(lambda file: str(traces[file]["sha256"]))
    testbed = by_content.model_dump(exclude={"models", "profiles"})
    return {
        **{f"testbed.{part}": value for part, value in testbed.items()},
        "models": {name: model["sha256"] for name, model in run.facts["models"].items()},
        **{part: getattr(spec, part) for part in ("workload", "policies", "seeds", "faults", "drain")},
    }


def _setting(run: Run) -> str:
    """A short name of testbed and workload: equal exactly where policies met the same conditions."""
    essence = {k: v for k, v in _essence(run).items() if k not in ("policies", "testbed.name")}
    text = json.dumps(essence, default=lambda v: v.model_dump(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _check_requests(simulated: Run, sim: pd.DataFrame, other: Run, table: pd.DataFrame) -> None:
    """Whole runs hold exactly the same requests."""
    if sim.index.intersection(table.index).empty:
        raise InputError(f"has no request in common with {simulated.folder}", where=other.folder)
    if not (simulated.is_complete and other.is_complete):
        return
    lacking = sim.index.symmetric_difference(table.index)
    if len(lacking):
        policy, seed, source, number = lacking[0]
        raise InputError(
            f"{len(lacking)} requests are in only one of this run and {simulated.folder}, "
            f"the first under {policy!r}, seed {seed}: number {number} of {source!r}",
            where=other.folder,
            allowed="runs of the same policies and seeds",
        )


def _indexed(run: Run) -> pd.DataFrame:
    return pd.DataFrame(run.requests.set_index(_ID))


# The numbers


def _replayed(real: Run) -> pd.Series:
    """Latency of every request when the simulator is fed the real run's plans and durations."""
    spec, found = real.experiment, dict[tuple[str, int, str, int], float]()
    timed = real.spans[real.spans["kind"].isin([Kind.DECIDE, Kind.COMPUTE])]
    spans = {(policy, seed): rows for policy, seed, rows in _by_run(timed)}
    for policy, seed, rows in _by_run(real.requests.dropna(subset="plan")):  # what was planned can be replayed
        known = {(row["source"], row["number"]) for row in rows}
        requests = {
            source: [request for request in drawn if (source, request.number) in known]
            for source, drawn in spec.draw(seed).items()
        }
        records: list[Record] = []
        replay(
            real.testbed.at_seed(seed), requests, records.append, name=policy, seed=seed,
            rows=rows, spans=spans.get((policy, seed), []),
            decisions=[d for d in real.decisions if (d["policy"], d["seed"]) == (policy, seed)],
            faults=spec.draw_faults(seed), drain_s=spec.drain,
        )  # fmt: skip
        for record in records:
            latency = math.nan if record.latency_s is None else record.latency_s
            found[policy, seed, record.source, record.number] = latency
    return pd.Series(found.values(), pd.MultiIndex.from_tuples(found, names=_ID), dtype=float)


def _by_run(table: pd.DataFrame) -> Iterator[tuple[str, int, list[dict[str, Any]]]]:
    """The rows of every policy and seed, as plain data."""
    for key, of in table.groupby(["policy", "seed"], sort=False):
        policy, seed = cast(tuple[str, int], key)
        yield policy, int(seed), cast(list[dict[str, Any]], of.to_dict("records"))


def _row(
    sim: pd.DataFrame,
    real: pd.DataFrame,
    replayed: pd.Series,
    repeat: pd.DataFrame | None,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """One policy. The tables have the same requests in the same order."""
    row: dict[str, Any] = {
        "requests": len(real),
        "outcomes_sim": sim["outcome"].value_counts().sort_index().to_dict(),
        "outcomes_real": real["outcome"].value_counts().sort_index().to_dict(),
    }
    for world, of in (("sim", sim), ("real", real)):
        row[f"{world}_mean_s"] = of["latency_s"].mean()
        row |= {f"{world}_p{p}_s": of["latency_s"].quantile(p / 100) for p in PERCENTILES}
    for what in ("mean", *(f"p{p}" for p in PERCENTILES)):
        row[f"{what}_error"] = abs(row[f"sim_{what}_s"] / row[f"real_{what}_s"] - 1)
    row["mean_bias"] = row["sim_mean_s"] / row["real_mean_s"] - 1
    apart = (replayed - real["latency_s"]).abs().where(real["overruns"].fillna(0) == 0)
    row |= {"structural_error_s": apart.mean(), "paired": int(apart.notna().sum())}
    row |= _intervals(sim["latency_s"], real["latency_s"], apart, resamples, seed)
    again = pd.Series(dtype=float) if repeat is None else repeat["latency_s"]
    row["repeat_mean_error"] = abs(again.mean() / row["real_mean_s"] - 1)
    row["repeat_p95_error"] = abs(again.quantile(0.95) / row["real_p95_s"] - 1)
    overruns = real["overruns"].dropna()
    row["overruns"] = (overruns > 0).mean() if len(overruns) else None
    return row


def _intervals(sim: pd.Series, real: pd.Series, apart: pd.Series, resamples: int, seed: int) -> dict[str, float]:
    """95 % intervals of the statistics, as `<statistic>_low` and `<statistic>_high`."""
    unknown = {f"{name}_{end}": math.nan for name in _STATISTICS for end in ("low", "high")}
    blocks = _blocks(real.index.get_level_values("seed").to_numpy())
    if not resamples or len(blocks) < 2 or not (sim.notna().any() and real.notna().any()):
        return unknown
    # One row per block, NaN where a block is shorter: the last entry, which is NaN, is what -1 picks.
    values = [np.append(series.to_numpy(dtype=float), np.nan)[blocks] for series in (sim, real, apart)]

    def statistics(chosen: npt.NDArray[np.int_], axis: int = -1) -> Floats:
        s, r, a = (v[chosen].reshape(*chosen.shape[:-1], -1) for v in values)
        mean = np.nanmean(s, axis=-1) / np.nanmean(r, axis=-1) - 1
        p95 = np.nanquantile(s, 0.95, axis=-1) / np.nanquantile(r, 0.95, axis=-1) - 1
        return np.stack([mean, p95, np.nanmean(a, axis=-1)])

    with warnings.catch_warnings():
        # A resample without a single answer has no mean; its interval is then unknown, which is the truth.
        warnings.simplefilter("ignore")
        found = stats.bootstrap(
            (np.arange(len(blocks)),), statistics, n_resamples=resamples, vectorized=True, axis=-1,
            method="percentile", batch=max(1, 1_000_000 // blocks.size), rng=np.random.default_rng(seed),
        ).confidence_interval  # fmt: skip
    bounds: dict[str, float] = {}
    ends = zip(_STATISTICS, np.asarray(found.low).tolist(), np.asarray(found.high).tolist(), strict=True)
    for name, low, high in ends:
        # The interval is of the signed error; without the sign, one that holds 0 begins at 0.
        bounds[f"{name}_low"] = 0.0 if low <= 0 <= high else min(abs(low), abs(high))
        bounds[f"{name}_high"] = max(abs(low), abs(high))
    return bounds


def _blocks(seeds: npt.NDArray[np.int_]) -> npt.NDArray[np.int_]:
    """Positions by block, √n neighbours each, never of two seeds; -1 fills what is short."""
    rows = []
    for seed in np.unique(seeds):
        of = np.flatnonzero(seeds == seed)
        rows += np.array_split(of, max(1, math.isqrt(len(of))))
    longest = max((len(row) for row in rows), default=0)
    return np.array([np.pad(row, (0, longest - len(row)), constant_values=-1) for row in rows], dtype=int)


def _known(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, np.generic):
        value = value.item()
    return _known(value) if isinstance(value, float) else value
