"""The tables of the command line, from plain data and runs. Knows what a result means to a person, computes none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.markup import escape

from isthmus.experiments.compare import Comparison
from isthmus.experiments.present import console, emit, milliseconds, percent, table, warn
from isthmus.experiments.run_folder import Run
from isthmus.experiments.traces import Trace, sparkline
from isthmus.policies.records import Outcome
from isthmus.workloads.model import Model, members
from isthmus.workloads.overheads import Overheads
from isthmus.workloads.profile import Profile
from isthmus.workloads.units import show_bytes, show_time

if TYPE_CHECKING:
    from isthmus.real.clocks import Offset
    from isthmus.real.cluster_check import Checked
    from isthmus.real.host_facts import Facts

Rows = Sequence[Mapping[str, Any]]


def models_table(rows: Rows) -> None:
    table(
        "Models by name",
        ["name", "layers>", "cuts>", "GFLOP>", "weights>", "input"],
        [
            [
                r["name"],
                r["layers"],
                r["cuts"],
                f"{r['flop'] / 1e9:.2f}",
                show_bytes(r["parameter_bytes"]),
                ", ".join("×".join(map(str, shape)) for shape in r["input"].values()),
            ]
            for r in rows
        ],
        caption="Any .onnx file works too. These have seeded random weights: their speed is real, their answers not.",
    )


def cuts_table(model: Model, rows: Rows) -> None:
    table(
        f"{model.name}: {len(model.layers)} layers, {len(model.cuts)} cuts",
        ["cut>", "what crosses", "bytes>", "work before>"],
        [[r["cut"], ", ".join(r["crossing"]), show_bytes(r["bytes"]), f"{r['work_before']:.0%}"] for r in rows],
        caption="Cut 0 sends the input, the last cut nothing but the answer.",
    )


def policies_table(rows: Rows) -> None:
    table(
        "Policies",
        ["name", "what it does", "arguments"],
        [
            [
                r["name"] + (" (oracle)" if r["oracle"] else ""),
                r["about"],
                ", ".join(f"{k}={v}" for k, v in r["arguments"].items()),
            ]
            for r in rows
        ],
        caption="Your own: module:Class, or the entry-point group isthmus.policies of any installed package.",
    )


def backends_table(rows: Rows) -> None:
    table(
        "Backends",
        ["name", "version", "devices", "what it is, or why it is not here", "arguments"],
        [
            [
                r["name"],
                r["version"] or "–",
                ", ".join(r["devices"]),
                r["problem"] or r["about"],
                ", ".join(f"{k}={v}" for k, v in r["arguments"].items()),
            ]
            for r in rows
        ],
        caption="Your own: module:Class, or the entry-point group isthmus.backends of any installed package.",
    )


def traces_table(traces: Sequence[Trace], rows: Rows) -> None:
    def mbit(row: Mapping[str, Any], which: str) -> str:
        return f"{row[f'{which}_bytes_per_s'] * 8e-6:.3g}"

    table(
        "Rates, Mbit/s",
        ["link or file", "kind", "lasts>", *(f"{w}>" for w in _TRACE_RATES), "outage %>", "over time"],
        [
            [
                row["name"],
                row["kind"],
                None if row["duration_s"] is None else show_time(row["duration_s"]),
                *(mbit(row, which) for which in _TRACE_RATES),
                percent(row["outage_share"], ""),
                sparkline(trace.rate),
            ]
            for trace, row in zip(traces, rows, strict=True)
        ],
        caption="Shares of time over one period. A blank over time is an outage.",
    )


_TRACE_RATES = ("mean", "p5", "p50", "p95", "lowest")


def profile_table(model: Model, profile: Profile, path: Path) -> None:
    rows = []
    for index, (cost, cut, block) in enumerate(zip(profile.blocks, model.cuts[1:], model.blocks, strict=True)):
        ops = [model.layers[i].op for i in members(block)]
        said = " ".join(ops[:6]) + (" …" if len(ops) > 6 else "")
        rows.append([index, said, f"{cost.seconds * 1e3:.3f}", show_bytes(cut.bytes)])
    batches = ", ".join(f"{batch.size} take ×{batch.ratio:.2f}" for batch in profile.batches)
    table(
        f"{model.name} on {profile.machine.label} ({profile.machine.cpu})",
        ["block>", "layers", "ms>", "after it>"],
        rows,
        caption=f"The whole: {profile.part_s(model, model.whole()) * 1e3:.2f} ms, of which "
        f"{profile.session_s * 1e3:.2f} ms for having a session. {profile.provenance}. "
        f"{f'In batches {batches}. ' if batches else ''}Written to {path}",
    )


def overheads_table(overheads: Overheads, written: Sequence[Path]) -> None:
    rows = [["an answer is released late by", f"{overheads.wake_s * 1e3:.2f} ms"]]
    rows += [["an empty call from actor to actor (hidden by emulated links)", f"{overheads.actor_call_s * 1e3:.2f} ms"]]
    rows += [[f"a decision of {name}", f"{s * 1e3:.2f} ms"] for name, s in overheads.decide_s.items()]
    for name in overheads.codecs:
        there, back = overheads.encode_s(name, 1e6), overheads.decode_s(name, 1e6)
        rows.append([f"encoding, decoding 1 MB as {name}", f"{there * 1e3:.2f}, {back * 1e3:.2f} ms"])
    table("Calibrated", ["what", "on this machine>"], rows, caption="Written: " + ", ".join(map(str, written)))


def plans_table(rows: Rows, *, cuts: bool) -> None:
    table(
        "Predicted for one request on an idle testbed, at the links' mean rates",
        ["cut" if cuts else "policy", "plan", "latency\nms>", "compute\nms>", "links\nms>", "energy\nJ>"],
        [
            [
                r["policy"],
                r["plan"],
                *(milliseconds(r[k]) for k in ("latency_s", "compute_s", "links_s")),
                None if r["energy_j"] is None else f"{r['energy_j']:.3f}",
            ]
            for r in rows
        ],
    )


def cluster_tables(checked: Checked) -> None:
    told = [(host, host.facts) for host in checked.hosts if host.facts is not None]
    table(
        "Machines",
        ["host", "address", "Python", "Ray", "ONNX Runtime", "isthmus", "clock, ms>", "models"],
        [
            [
                host.name,
                host.address or None,
                *([None] * 4 if host.facts is None else _versions(host.facts)),
                host.clock and _clock(host.clock),
                ", ".join(f"{name} {way}" for name, way in host.models.items()) or None,
            ]
            for host in checked.hosts
        ],
        caption="A clock is that much ahead of the driver's.",
    )
    table(
        "What they have",
        ["host", "processor", "cores>", "load>", "memory free>", "disk free>", "shm>", "up>", "power meters"],
        [
            [
                host.name,
                facts.cpu,
                facts.cores,
                f"{facts.load_1:.1f}",
                f"{show_bytes(facts.memory_free_bytes)} of {show_bytes(facts.memory_bytes)}",
                show_bytes(facts.disk_free_bytes),
                None if facts.shm_bytes is None else show_bytes(facts.shm_bytes),
                f"{facts.up_s / 3600:.0f} h",
                ", ".join(facts.meters) or "none: modelled",
            ]
            for host, facts in told
        ],
    )
    for problem in checked.problems:
        colour = {"error": "bold red", "warning": "yellow", "note": "dim"}[problem.level]
        said = f"[{colour}]{problem.level}:[/] {escape(f'{problem.host}: {problem.what}')}"
        console.print(f"{said}\n  [green]fix:[/] {escape(problem.fix)}", highlight=False, soft_wrap=True)
    if checked.ready:
        console.print(f"{'All well' if not checked.problems else 'Ready for a run'}.")


def _versions(facts: Facts) -> list[str | None]:
    return [facts.python, *(facts.packages[package] for package in ("ray", "onnxruntime", "isthmus"))]


def _clock(clock: Offset) -> str:
    return "the same" if clock.error_s == 0 else f"{clock.offset_s * 1e3:+.3f} ± {clock.error_s * 1e3:.3f}"


def run_table(run: Run, trace: Path | None) -> None:
    summary, oracles = run.summary(), run.facts.get("oracles", [])
    outcomes = [outcome.value for outcome in Outcome if outcome.value in summary.columns]
    bills = [bill for bill in ("energy_j", "money_usd") if summary[bill].notna().any()]
    table(
        f"{run.experiment.name} ({run.world}): latency in ms",
        ["policy", *(f"{o}>" for o in outcomes), "mean>", "p50>", "p95>", "p99>", *(_BILLS[bill] for bill in bills)],
        [
            [
                row["policy"] + (" (oracle)" if row["policy"] in oracles else ""),
                *(row[outcome] for outcome in outcomes),
                *(milliseconds(row[c]) for c in ("mean_s", "p50_s", "p95_s", "p99_s")),
                *(None if pd.isna(row[bill]) else f"{row[bill]:.3g}" for bill in bills),
            ]
            for row in summary.to_dict("records")
        ],
        caption="completed: in time; figures are of all that was answered, in time or late. "
        f"Written to {run.folder}" + (f", trace to {trace}" if trace else ""),
    )
    reasons = run.reasons()
    for policy, of in reasons.groupby("policy", sort=False):
        said = [f"{r['outcome']}, {r['reason']}: {r['requests']}" for r in of.head(_REASONS).to_dict("records")]
        more = [f"and {len(of) - _REASONS} more"] if len(of) > _REASONS else []
        console.print(f"[dim]{escape(str(policy))}: {escape('; '.join([*said, *more]))}[/]", soft_wrap=True)
    if updates := run.facts.get("updates"):
        _updates_tables(run, updates)
    for warning in run.facts.get("warnings", []):
        warn(warning)


def _updates_tables(run: Run, updates: Rows) -> None:
    table(
        "Answers by version",
        ["policy", "model", "version", "answers>"],
        run.versions().to_numpy().tolist(),
    )
    for row in updates:
        lasted = "" if row["done_s"] is None else f", {row['began_s']:.1f} to {row['done_s']:.1f} s"
        why = "" if row["reason"] is None else f": {row['reason']}"
        said = f"{row['policy']}, seed {row['seed']}: {row['model']} to {row['to']}: {row['outcome']}{lasted}{why}"
        console.print(f"[dim]{escape(said)}[/]", soft_wrap=True)


_BILLS = {"energy_j": "energy\nJ each>", "money_usd": "money\nUSD each>"}
_REASONS = 4
"""Reasons that are listed per policy."""


def show_comparison(comparison: Comparison, as_json: bool, report: Path | None) -> None:
    """As tables, or as JSON."""
    if as_json:
        emit(comparison.to_json() | ({} if report is None else {"report": str(report)}))
    else:
        comparison_tables(comparison, report)


def comparison_tables(comparison: Comparison, report: Path | None) -> None:
    """One table per model and kind of link, what the columns mean, and the verdict over all."""
    data = comparison.to_json()
    for setting in dict.fromkeys((r["model"], r["link"]) for r in data["rows"]):
        _fidelity_table(setting, [r for r in data["rows"] if (r["model"], r["link"]) == setting], comparison.world)
    console.print(
        "err.: of the figures on its left, predicted from a profile taken before, against the real run; with its 95 % "
        "interval. struct.: per request, when the simulator is fed the real run's own part times. repeat: a second "
        "real run against the first. overrun: requests for which this host was too slow to keep emulated time. "
        "Emulated: true parts on this host, slowed down.",
        style="dim",
    )
    tau = data["kendall_tau"]
    ranking = "No two policies are 10 % apart." if tau is None else f"Kendall τ of the ranking: {tau:.2f} (1: alike)."
    console.print(
        f"Median error: mean {percent(data['median_mean_error'])}, p95 {percent(data['median_p95_error'])}; "
        f"worst mean {percent(data['worst_mean_error'])}. {ranking}"
    )
    grave = [said for said in comparison.warnings if any(word in said for word in ("INVALID", "answers", "as far as"))]
    for warning in grave:
        warn(warning)
    if more := len(comparison.warnings) - len(grave):
        warn(f"{more} more in run.json of the runs, such as: {next(w for w in comparison.warnings if w not in grave)}")
    if report is not None:
        console.print(f"Report: [bold]{escape(str(report))}[/]", soft_wrap=True)


def _fidelity_table(setting: tuple[str, str], rows: Rows, world: str) -> None:
    repeated = any(r["repeat_mean_error"] is not None for r in rows)
    requests = " or ".join(map(str, sorted({r["requests"] for r in rows})))
    table(
        f"{setting[0]}, {setting[1]} links, {requests} requests per policy; ms, simulated and {world}",
        [
            *(
                "policy",
                "mean\nsim>",
                "mean\nreal>",
                "err.\n%>",
                "95 %\nof it>",
                "p95\nsim>",
                "p95\nreal>",
                "err.\n%>",
            ),
            *("struct\nms>", *(["repeat\n%>"] if repeated else []), "over-\nrun %>"),
        ],
        [
            [
                r["policy"],
                milliseconds(r["sim_mean_s"]),
                milliseconds(r["real_mean_s"]),
                percent(r["mean_error"], ""),
                _interval(r["mean_error_low"], r["mean_error_high"]),
                milliseconds(r["sim_p95_s"]),
                milliseconds(r["real_p95_s"]),
                percent(r["p95_error"], ""),
                None if r["structural_error_s"] is None else f"{r['structural_error_s'] * 1e3:.2f}",
                *([percent(r["repeat_mean_error"], "")] if repeated else []),
                percent(r["overruns"], ""),
            ]
            for r in rows
        ],
    )


def _interval(low: float | None, high: float | None) -> str | None:
    return None if low is None or high is None else f"{abs(low) * 100:.0f}–{high * 100:.0f}"


def bench_profile_table(rows: Rows) -> None:
    table(
        "Predicted time of parts that were not measured, against measuring them",
        ["model", "parts>", "mean error>", "worst>", "sessions>"],
        [[r["model"], r["parts"], percent(r["mean_error"]), percent(r["worst_error"]), r["sessions"]] for r in rows],
    )


def bench_backends_table(rows: Rows) -> None:
    table(
        "Backends, beside ONNX Runtime on the CPU",
        ["model", "backend", "largest error>", "run, ms>", "times ORT>", "load, s>", "clock"],
        [
            [r["model"], r["backend"], r["problem"], "", "", "", ""]
            if r["problem"]
            else [
                r["model"],
                r["backend"],
                f"{r['error']:.1e}",
                f"{1e3 * r['run_s']:.1f}",
                f"{r['relative']:.2f}",
                f"{r['load_s']:.2f}",
                r["clock"],
            ]
            for r in rows
        ],
        caption="error: relative to the largest number of the answer; whole, and joined at three cuts.",
    )


def bench_sim_table(data: Mapping[str, Any]) -> None:
    ways = [
        ("plain SimPy, the same work", "simpy", None),
        ("plain SimPy, without the way back", "simpy_one_way", None),
        ("isthmus, requests and spans written", "", ("ratio", "ratio_to_one_way")),
        ("isthmus, requests written", "_without_spans", ("ratio_without_spans", "ratio_to_one_way_without_spans")),
    ]
    rows = []
    for said, name, ratios in ways:
        key = f"{name}_requests_per_cpu_s" if ratios is None else f"requests_per_cpu_s{name}"
        rows.append([said, f"{data[key]:,.0f}", *(f"{data[ratio]:.2f}" for ratio in ratios or ())])
    table(
        f"{data['requests']:,} requests, medians of {data['repeats']} turns",
        ["way", "requests per\nCPU second>", "times\nSimPy>", "times SimPy\none way>"],
        [row + [None] * (4 - len(row)) for row in rows],
        caption=f"Mean latency {milliseconds(data['mean_latency_s'])} ms, of plain SimPy "
        f"{milliseconds(data['simpy_mean_latency_s'])} ms, in theory {milliseconds(data['theory_s'])} ms. Memory: "
        f"{show_bytes(data['rss_growth_bytes'])} more after {data['long_requests']:,} requests than after "
        f"{data['early_requests']:,}.",
    )


def bench_real_table(data: Mapping[str, Any]) -> None:
    """What the real side adds, in milliseconds and as a ratio."""
    table(
        "Two stages on two processes of this machine, per request; medians in ms",
        ["model", "latency>", "parts alone>", "raw TCP>", "KiB crossing>", "ratio>"],
        [
            [r["model"], *(f"{1e3 * r[k]:.2f}" for k in ("latency_s", "compute_s", "raw_tcp_s")),
             f"{r['bytes'] / 1024:.0f}", f"{r['ratio']:.3f}"]
            for r in data["two_stage"]
        ],
        caption="ratio: latency / (the parts' compute time in that run + raw TCP of the same bytes).",
    )  # fmt: skip
    stages = ", ".join(f"{1e3 * s:.1f}" for s in data["pipeline_stages_s"])
    console.print(
        f"A pipeline of three stages of {data['pipeline_model']} ({stages} ms) answers {data['pipeline_per_s']:.2f} "
        f"requests per second: {data['pipeline_efficiency']:.0%} of what its slowest stage, as it ran there, allows."
    )


def bench_scale_table(rows: Rows) -> None:
    table(
        "What a request costs to simulate",
        ["case", "devices>", "requests>", "CPU µs per request>", "of which set-up>", "memory>"],
        [
            [
                r["case"],
                f"{r['devices']:,}",
                f"{r['requests']:,}",
                f"{r['cpu_us_per_request']:.1f}",
                f"{r['setup_us_per_request']:.1f}",
                show_bytes(r["rss_bytes"]),
            ]
            for r in rows
        ],
        caption="Everything that `isthmus simulate` does, spans and requests written. One server: the same total load, "
        "spread over more devices.",
    )
