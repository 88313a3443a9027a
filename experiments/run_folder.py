"""A run on disk: two Parquet tables and `run.json`. The writer streams, the reader gives pandas frames.

    run.json          schema version, world, resolved experiment, seeds, git revision, host, packages, profile hashes
    requests.parquet  one row per request (policies/records.py has the columns)
    spans.parquet     one row per thing that took time inside a request
    nodes.parquet     one row per node: what it did in all (simulations)
    links.parquet     one row per link and direction (simulations)
    decisions.jsonl   the views that a controller decided on, and its plans (real runs)
    profiles/         copies of the profiles and overheads that the run used
    traces/           copies of the trace files of its links, named by their content; one of more than 16 MiB is not
                      copied: run.json then names it where it lies, and has its hash as of every other

A run that has not ended has `.partial` files and no tables: nothing half-written looks whole.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, product
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel

from isthmus.policies.contract import View, decision_row
from isthmus.policies.plan import Plan
from isthmus.policies.records import REQUEST_COLUMNS, SPAN_COLUMNS, Outcome, Record, Span
from isthmus.sim.link import LinkTotals
from isthmus.sim.node import NodeTotals
from isthmus.workloads.documents import parse, read_json, read_text
from isthmus.workloads.errors import InputError, RunFailure
from isthmus.workloads.experiment import ExperimentSpec
from isthmus.workloads.link_costs import LinkCosts
from isthmus.workloads.requests import Request
from isthmus.workloads.service import Measured
from isthmus.workloads.testbed import Testbed, TestbedSpec, profile_path

SCHEMA_VERSION = 1
_COPIED_BYTES = 16 * 2**20
_CHUNK = 2_000
"""Records that are kept as they are, before they become columns; few, so that they are still in the cache then."""
_ROW_GROUP = 100_000
_TABLES = ("requests.parquet", "spans.parquet", "nodes.parquet", "links.parquet")
_PACKAGES = ("isthmus", "numpy", "onnx", "onnxruntime", "simpy", "ray")
_KINDS = {"str": "string", "int": "int64", "float": "float64"}
_TYPES = {"string": pa.string(), "int64": pa.int64(), "float64": pa.float64(), "bool": pa.bool_()}


class _Table:
    """Columns in, row groups out; memory holds one row group."""

    def __init__(self, path: Path, columns: Mapping[str, str]) -> None:
        self.path, self.partial = path, path.with_name(path.name + ".partial")
        self._schema = pa.schema([(name, _TYPES[kind]) for name, kind in columns.items()])
        self._batches: list[pa.RecordBatch] = []
        self._rows = 0
        text = [name for name, kind in columns.items() if kind == "string"]  # times are all different
        self._writer = pq.ParquetWriter(self.partial, self._schema, compression="zstd", use_dictionary=text)

    def add(self, columns: Mapping[str, Any]) -> None:
        """Values by column, all of one length; one that is not there is null."""
        rows = len(next(iter(columns.values())))
        arrays = [
            pa.nulls(rows, field.type) if field.name not in columns else _array(columns[field.name], field.type)
            for field in self._schema
        ]
        self._batches.append(pa.RecordBatch.from_arrays(arrays, schema=self._schema))
        self._rows += rows
        if self._rows >= _ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._batches:
            try:
                self._writer.write_table(pa.Table.from_batches(self._batches))
            except OSError as error:
                raise RunFailure(f"{self.path}: cannot be written: {error.strerror or error}") from None
            self._batches.clear()
            self._rows = 0

    def close(self, *, whole: bool) -> None:
        try:
            if whole:
                self._flush()
        finally:
            self._writer.close()
        if whole:
            os.replace(self.partial, self.path)
        else:
            self.partial.unlink(missing_ok=True)


def _array(values: Any, kind: pa.DataType) -> pa.Array:
    return values if isinstance(values, pa.Array) else pa.array(values, kind)


def _cell(policy: str, seed: int, rows: int) -> dict[str, pa.Array]:
    return {"policy": pa.repeat(policy, rows), "seed": pa.repeat(pa.scalar(seed, pa.int64()), rows)}


def _columns(row: type[NamedTuple]) -> dict[str, str]:
    """The columns of a table of such rows, each with the policy and the seed that it is of."""
    kinds = {
        field: next(kind for part, kind in _KINDS.items() if part in str(hint))
        for field, hint in row.__annotations__.items()
    }
    return {"policy": "string", "seed": "int64"} | kinds


class Sink:
    """Takes the records of one policy and seed, and turns them into columns, many at a time."""

    def __init__(
        self, requests: _Table, spans: _Table | None, policy: str, seed: int, tick: Callable[[int], None] | None
    ) -> None:
        self._requests, self._spans = requests, spans
        self._policy, self._seed, self._tick = policy, seed, tick
        self._records: list[Record] = []
        self.kept = 0

    def keep(self, record: Record) -> None:
        self._records.append(record)
        if len(self._records) >= _CHUNK:
            self.flush()

    def flush(self) -> None:
        if not self._records:
            return
        columns = dict(zip(Record._fields, zip(*self._records, strict=True), strict=True))
        spans = columns.pop("spans")
        arrival_s, end_s = (pa.array(columns[name], pa.float64()) for name in ("arrival_s", "end_s"))
        latency_s = pc.subtract(end_s, arrival_s)
        count = len(self._records)
        self._requests.add(
            {
                **columns,
                **_cell(self._policy, self._seed, count),
                "arrival_s": arrival_s,
                "end_s": end_s,
                "latency_s": latency_s,
            }
        )
        if self._spans is not None and (rows := list(chain.from_iterable(spans))):
            lengths = [len(of) for of in spans]
            which = pa.array(np.repeat(np.arange(count), lengths))
            of = {name: pa.array(columns[name]).take(which) for name in ("source", "number")}
            self._spans.add(
                {
                    **dict(zip(Span._fields, zip(*rows, strict=True), strict=True)),
                    **of,
                    **_cell(self._policy, self._seed, len(rows)),
                }
            )
        self._records.clear()
        self.kept += count
        if self._tick is not None:
            self._tick(self.kept)


class RunWriter:
    """Writes a run folder while the run goes on. Use as a context; an error inside leaves no tables behind.

    KeyboardInterrupt keeps what there is: the run is then marked `interrupted`. So do errors of the kind `keep`, which
    mark it `failed`. RunFailure when nothing can be written.
    """

    def __init__(
        self,
        folder: Path,
        world: str,
        spec: ExperimentSpec,
        testbed: Testbed,
        *,
        keep: type[BaseException] = KeyboardInterrupt,
        **facts: Any,
    ) -> None:
        self.folder = folder
        self._keep = (KeyboardInterrupt, keep)
        self._facts = {**_facts(world, spec, testbed), **facts}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for old in ("run.json", *_TABLES, "decisions.jsonl"):
                (folder / old).unlink(missing_ok=True)
            _keep_inputs(folder, testbed)
            self._requests = _Table(folder / "requests.parquet", REQUEST_COLUMNS)
            self._spans = _Table(folder / "spans.parquet", SPAN_COLUMNS)
            self._sink: Sink | None = None
            self._totals: dict[str, _Table] = {}
            if world == "simulated":
                for name, row in (("nodes", NodeTotals), ("links", LinkTotals)):
                    self._totals[name] = _Table(folder / f"{name}.parquet", _columns(row))
            self._decisions = (folder / "decisions.jsonl.partial").open("w", encoding="utf-8")
        except OSError as error:
            raise RunFailure(f"{folder}: cannot be written: {error.strerror or error}") from None

    def sink(self, policy: str, seed: int, *, spans: bool = True, tick: Callable[[int], None] | None = None) -> Sink:
        """Where the records of one policy and seed go. Without `spans` only the request is kept.

        `tick` is told now and then how many it has taken.
        """
        self._flush()
        self._sink = Sink(self._requests, self._spans if spans else None, policy, seed, tick)
        return self._sink

    def _flush(self) -> None:
        if self._sink is not None:
            self._sink.flush()

    def watch(self, policy: str, seed: int) -> Callable[[Request, int, View, Plan], None]:
        """Where the decisions of one policy and seed go."""

        def keep(request: Request, attempt: int, view: View, plan: Plan) -> None:
            self.decision(decision_row(request, attempt, view, plan), policy, seed)

        return keep

    def totals(self, name: str, rows: Sequence[NamedTuple], policy: str, seed: int) -> None:
        """What every place did under one policy and seed of a simulation, into the table `nodes` or `links`."""
        if not rows:
            return
        values = dict(zip(rows[0]._fields, zip(*rows, strict=True), strict=True))
        self._totals[name].add({**values, **_cell(policy, seed, len(rows))})

    def decision(self, row: Mapping[str, Any], policy: str, seed: int) -> None:
        self._decisions.write(json.dumps({"policy": policy, "seed": seed, **row}) + "\n")

    def add_facts(self, **facts: Any) -> None:
        """More for run.json, known only now."""
        self._facts.update(facts)

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        whole = kind is None or issubclass(kind, self._keep)
        try:
            self._decisions.close()
            partial = Path(self._decisions.name)
            if whole and partial.stat().st_size:
                os.replace(partial, self.folder / "decisions.jsonl")
            else:
                partial.unlink()
            if whole:
                self._flush()
            self._requests.close(whole=whole)
            self._spans.close(whole=whole)
            for totals in self._totals.values():
                totals.close(whole=whole)
            if whole:
                stopped = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
                self._facts["status"] = "complete" if kind is None else stopped
                text = json.dumps(self._facts, indent=1, default=str) + "\n"
                partial = self.folder / "run.json.partial"
                partial.write_text(text, encoding="utf-8")
                os.replace(partial, self.folder / "run.json")
        except OSError as problem:
            for left in self.folder.glob("*.partial"):
                with suppress(OSError):
                    left.unlink()
            for table in (*_TABLES, "decisions.jsonl"):
                with suppress(OSError):
                    (self.folder / table).unlink()
            if whole:
                raise RunFailure(f"{self.folder}: cannot be written: {problem.strerror or problem}") from None


class _Hashed(BaseModel):
    """What a file or a model was."""

    sha256: str


class _Facts(BaseModel):
    """Of run.json, what is made use of when it is read."""

    schema_version: int
    world: str
    experiment: dict[str, Any]
    models: dict[str, _Hashed]
    traces: dict[str, _Hashed] = {}
    oracles: list[str] = []
    warnings: list[str] = []
    status: str = ""


@dataclass(frozen=True)
class Run:
    """A finished run, read from its folder."""

    folder: Path
    facts: Mapping[str, Any]

    @property
    def is_complete(self) -> bool:
        """Whether nothing ended it early."""
        return self.facts.get("status") not in ("interrupted", "failed")

    @classmethod
    def load(cls, folder: str | Path) -> Run:
        """InputError when the folder holds no finished run."""
        path = Path(folder) / "run.json"
        if not path.exists():
            raise InputError("no finished run here (run.json is missing)", where=folder)
        facts = read_json(path)
        version = parse(_Facts, facts, where=path).schema_version
        if version != SCHEMA_VERSION:
            raise InputError(f"schema version {version}", where=path, allowed=str(SCHEMA_VERSION))
        return cls(Path(folder), facts)

    @property
    def world(self) -> str:
        """`simulated`, `emulated`, `lab`, `mixed` or `physical`."""
        return str(self.facts["world"])

    @property
    def experiment(self) -> ExperimentSpec:
        return parse(ExperimentSpec, self.facts["experiment"], where=f"{self.folder}/run.json: experiment")

    @cached_property
    def testbed(self) -> Testbed:
        """The testbed of the run, with the profiles that it used. `at_seed` has the rates that a seed drew."""
        spec = self.experiment.testbed
        assert isinstance(spec, TestbedSpec)
        used = frozenset(source.model for source in self.experiment.workload)
        return Testbed.build(spec, folder=self.folder, where=self.folder / "run.json", only_models=used)

    @cached_property
    def requests(self) -> pd.DataFrame:
        """One row per request."""
        return self._table("requests.parquet")

    @cached_property
    def spans(self) -> pd.DataFrame:
        """One row per wait, compute, encode, send, decode, decide, load."""
        return self._table("spans.parquet")

    @cached_property
    def nodes(self) -> pd.DataFrame:
        """One row per policy, seed and node: what it did in all. InputError for a run that has none."""
        return self._table("nodes.parquet")

    @cached_property
    def links(self) -> pd.DataFrame:
        """The same of every link, by direction."""
        return self._table("links.parquet")

    @cached_property
    def decisions(self) -> list[dict[str, Any]]:
        """Views and plans, where the run recorded them."""
        path = self.folder / "decisions.jsonl"
        try:
            return [json.loads(line) for line in read_text(path).splitlines()] if path.exists() else []
        except (ValueError, RecursionError) as error:
            raise InputError(f"is not JSON, line by line: {error}", where=path) from None

    def summary(self) -> pd.DataFrame:
        """Per policy: requests by outcome, latency (mean, p50, p95, p99 of what was answered), energy and money."""
        rows = []
        for policy, of in self.requests.groupby("policy", sort=False):
            latency = of["latency_s"].dropna()
            row = {
                "policy": policy,
                "requests": len(of),
                **of["outcome"].value_counts().sort_index().to_dict(),
            }
            row |= {"mean_s": latency.mean()} | {f"p{p}_s": latency.quantile(p / 100) for p in (50, 95, 99)}
            rows.append(row | {"energy_j": of["energy_j"].mean(), "money_usd": of["money_usd"].mean()})
        columns = list(dict.fromkeys(name for row in rows for name in row)) or _SUMMARY  # a run may have no request
        frame = pd.DataFrame(rows, columns=columns)
        counts = [c for c in frame.columns if c in _OUTCOMES]
        frame[counts] = frame[counts].fillna(0).astype(int)
        return frame

    def versions(self) -> pd.DataFrame:
        """How many answers each version of each model gave: policy, model, version in the order of use, answers."""
        answered = self.requests.dropna(subset="version")
        counted = answered.groupby(["policy", "model", "version"], sort=False).size().rename("answers").reset_index()
        place = {policy: number for number, policy in enumerate(dict.fromkeys(counted["policy"]))}
        return counted.sort_values(
            ["policy", "model"], key=lambda of: of.map(place) if of.name == "policy" else of, kind="stable"
        )

    def reasons(self) -> pd.DataFrame:
        """Why requests were not answered: policy, outcome, reason and how many, the most frequent first."""
        unanswered = self.requests.dropna(subset="reason")
        counted = unanswered.groupby(["policy", "outcome", "reason"], sort=False).size()
        return counted.sort_values(ascending=False).rename("requests").reset_index()

    def _table(self, name: str) -> pd.DataFrame:
        try:
            frame: pd.DataFrame = pq.read_table(self.folder / name).to_pandas()
            return frame
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"cannot be read: {error}", where=self.folder / name) from None


_SUMMARY = ["policy", "requests", "mean_s", "p50_s", "p95_s", "p99_s", "energy_j", "money_usd"]
_OUTCOMES = tuple(outcome.value for outcome in Outcome)


def _keep_inputs(folder: Path, testbed: Testbed) -> None:
    """Copies of what was measured, so that the run can be understood and replayed when the originals have changed."""
    store = folder / "profiles"
    store.mkdir(exist_ok=True)
    kept = {id(service): (model, service) for (_, model), service in testbed.services.items()}  # groups share theirs
    for model, service in kept.values():
        if isinstance(service, Measured):
            profile = service.profile
            profile.save(profile_path(store, model, profile.machine.label, profile.measured_with))
    testbed.overheads.save(store)
    if testbed.measured_links:
        LinkCosts(links=tuple(testbed.measured_links.values())).save(store)
    for file in testbed.spec.traces:
        if (copy := folder / _trace(file)[0]) != Path(file):
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)


def _trace(file: str) -> tuple[str, str]:
    """What a run folder calls a trace file, and its hash. Runs over the same content call it the same."""
    path = Path(file)
    with path.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    small = path.stat().st_size <= _COPIED_BYTES
    return f"traces/{path.stem}-{digest[:12]}{path.suffix}" if small else file, digest


def _resolved(spec: ExperimentSpec, testbed: Testbed) -> ExperimentSpec:
    """The experiment as it can be read from the run folder: profiles and traces in it, model files by absolute path."""
    models = {
        n: str(Path(m.source).resolve()) if os.path.isfile(m.source) else m.source for n, m in testbed.models.items()
    }
    models = {**testbed.spec.models, **models}
    kept = testbed.spec.with_traces(lambda file: _trace(file)[0])
    return spec.model_copy(
        update={"testbed": kept.model_copy(update={"profiles": "profiles", "models": models})},
    )


def _facts(world: str, spec: ExperimentSpec, testbed: Testbed) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "world": world,
        "experiment": json.loads(_resolved(spec, testbed).model_dump_json()),
        "seeds": list(spec.seeds),
        "revision": _revision(),
        "host": {"node": platform.node(), "machine": platform.machine(), "system": platform.platform()},
        "packages": {name: _version(name) for name in _PACKAGES},
        "models": {name: {"source": m.source, "sha256": m.sha256} for name, m in testbed.models.items()},
        "traces": {
            name: {"source": file, "sha256": digest} for file in testbed.spec.traces for name, digest in [_trace(file)]
        },
        "services": {
            f"{node}/{model}": {"provenance": service.provenance, "sha256": _profile_hash(service)}
            for node, model in product(testbed.spec.nodes, testbed.models)
            if (service := testbed.services.get((testbed.spec.members(node)[0], model))) is not None
        },
        "overheads": testbed.overheads.model_dump(),
    }


def _profile_hash(service: object) -> str | None:
    profile = getattr(service, "profile", None)
    return None if profile is None else hashlib.sha256(profile.model_dump_json().encode()).hexdigest()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _revision() -> str | None:
    """The git revision of this code, with a + when it was changed since; None outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        revision = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"],
            capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return revision.stdout.strip()
