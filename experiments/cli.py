"""The command line: arguments in, tables or JSON out. Knows how to ask and how to show; carrying out is elsewhere.

Exit codes: 0 done, 1 the run failed, 2 the input is wrong. Results go to standard output, all else to standard error.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from rich.markup import escape

import isthmus
from isthmus.experiments import execute, present
from isthmus.experiments.execute import Experiment
from isthmus.experiments.present import messages
from isthmus.experiments.run_folder import Run
from isthmus.workloads.errors import InputError, IsthmusError
from isthmus.workloads.experiment import ExperimentSpec

app = typer.Typer(
    help="Edge-cloud offloading: simulate policies on measured costs, run them for real, see how far apart they are.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench = typer.Typer(help="Figures that anyone can measure again.", no_args_is_help=True)
app.add_typer(bench, name="bench")

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and no progress.")]
File = Annotated[Path, typer.Argument(help="An experiment file (YAML).", show_default=False)]
Out = Annotated[Path | None, typer.Option("--out", help="Where to write; by default a new folder in runs/.")]
Trace = Annotated[Path | None, typer.Option("--trace", help="Also write a trace for Perfetto or chrome://tracing.")]
Policies = Annotated[
    list[str] | None, typer.Option("--policy", help="Run these policies instead of the file's; name or module:Class.")
]
Seeds = Annotated[list[int] | None, typer.Option("--seed", help="Run these seeds instead of the file's.")]
Requests = Annotated[int | None, typer.Option("--requests", min=1, help="So many requests per source.")]


def main() -> None:
    """Run the command line; the only place where errors become exit codes."""
    sys.path.insert(0, "")  # policies named module:Class are looked for where people stand
    try:
        code = app(standalone_mode=False)  # typer returns the code of an Exit, and 130 after Ctrl-C
        if code == 130:
            raise KeyboardInterrupt
        raise SystemExit(code)
    except InputError as error:
        _fail(str(error), 2)
    except IsthmusError as error:
        _fail(str(error), 1)
    except click.ClickException as error:
        _fail(error.format_message(), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted; what was finished is kept", 130)
    except OSError as error:
        _fail(f"{error.filename or 'output'}: {error.strerror or error}", 1)


def _fail(text: str, code: int) -> None:
    messages.print(f"[bold red]error:[/] {escape(' '.join(text.split()))}", highlight=False, soft_wrap=True)
    raise SystemExit(code)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(isthmus.__version__)  # noqa: T201
        raise typer.Exit


def emit(data: Any) -> None:
    """JSON on standard output."""
    json.dump(data, sys.stdout, indent=1, allow_nan=False, default=str)
    sys.stdout.write("\n")


@contextmanager
def _progress(title: str, as_json: bool) -> Iterator[execute.Progress]:
    with present.progress(title, quiet=as_json) as move:
        yield move


def _load(file: Path, policies: list[str] | None, seeds: list[int] | None, requests: int | None = None) -> Experiment:
    experiment = Experiment.load(file)
    fields = experiment.spec.model_dump()
    if policies:
        fields["policies"] = policies
    if seeds:
        fields["seeds"] = seeds
    if requests:
        for source in fields["workload"]:
            source["requests"] = requests
    changed = replace(experiment, spec=ExperimentSpec.of(fields, experiment.folder, where=file))
    changed.check_policies()  # before anything is measured
    for model in changed.build_testbed(need_profiles=False).models.values():
        if len(model.cuts) == 2:
            said = f"note: model {model.name!r} has no cut: nowhere does one tensor cross alone, so it runs whole"
            messages.print(escape(said), highlight=False, soft_wrap=True)
    return changed


@app.command()
def models(
    file: Annotated[
        str | None, typer.Argument(help="A model by name or file: show its cuts.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """List the models that come by name, or show the cuts of one."""
    from isthmus.workloads import zoo
    from isthmus.workloads.model import load_model
    from isthmus.workloads.units import show_bytes

    if file is not None:
        model = load_model(file)
        flop = 0
        rows: list[dict[str, Any]] = []
        for cut in model.cuts:
            if cut.index:
                flop += sum(layer.flop for layer in model.layers if model.blocks[cut.index - 1] >> layer.index & 1)
            rows.append({"cut": cut.index, "crossing": list(cut.crossing), "bytes": cut.bytes, "flop_before": flop})
        if as_json:
            emit({"name": model.name, "sha256": model.sha256, "layers": len(model.layers), "cuts": rows})
            return
        present.table(
            f"{model.name}: {len(model.layers)} layers, {len(model.cuts)} cuts",
            ["cut>", "what crosses", "bytes>", "work before>"],
            [
                [r["cut"], ", ".join(r["crossing"]), show_bytes(r["bytes"]), f"{r['flop_before'] / model.flop:.0%}"]
                for r in rows
            ],
            caption="Cut 0 sends the input, the last cut nothing but the answer.",
        )
        return
    found = [load_model(name) for name in zoo.names()]
    if as_json:
        emit(
            [
                {
                    "name": m.name,
                    "layers": len(m.layers),
                    "cuts": len(m.cuts),
                    "flop": m.flop,
                    "parameter_bytes": m.parameter_bytes,
                    "input": {t: list(m.tensors[t].shape) for t in m.inputs},
                }
                for m in found
            ]
        )
        return
    present.table(
        "Models by name",
        ["name", "layers>", "cuts>", "GFLOP>", "weights>", "input"],
        [
            [
                m.name,
                len(m.layers),
                len(m.cuts),
                f"{m.flop / 1e9:.2f}",
                show_bytes(m.parameter_bytes),
                "×".join(map(str, m.tensors[m.inputs[0]].shape)),
            ]
            for m in found
        ],
        caption="Any .onnx file works too. These have seeded random weights: their speed is real, their answers not.",
    )


@app.command()
def policies(as_json: Json = False) -> None:
    """List the policies that are installed."""
    from isthmus.policies.contract import Oracle
    from isthmus.policies.registry import find, installed

    rows: list[dict[str, Any]] = []
    for name in sorted(installed()):
        made = find(name)
        arguments = {
            p.name: None if p.default is inspect.Parameter.empty else p.default
            for p in inspect.signature(made).parameters.values()
        }
        point = installed()[name]
        rows.append(
            {
                "name": name,
                "arguments": arguments,
                "oracle": isinstance(made, type) and issubclass(made, Oracle),
                "from": point.value,
                "about": (inspect.getdoc(made) or "").split("\n")[0],
            }
        )
    if as_json:
        emit(rows)
        return
    present.table(
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


@app.command()
def profile(
    model: Annotated[str, typer.Argument(help="A model by name, or a file.onnx.", show_default=False)],
    quick: Annotated[bool, typer.Option(help="Seconds instead of a minute or two, at about twice the error.")] = False,
    label: Annotated[str, typer.Option(help="What this machine is called in testbeds.")] = "host",
    pace: Annotated[str, typer.Option(help="Idle time before each run, as between requests.")] = "20ms",
    out: Annotated[Path | None, typer.Option(help="File to write.", show_default="profiles/MODEL@LABEL.json")] = None,
    as_json: Json = False,
) -> None:
    """Measure a model on this machine: the cost of every block, from real sessions."""
    from isthmus.real.profiler import profile_model
    from isthmus.workloads.model import load_model
    from isthmus.workloads.testbed import profile_path
    from isthmus.workloads.units import parse_time

    loaded, pace_s = load_model(model), parse_time(pace)
    path = out or profile_path(Path("profiles"), loaded.name, label)
    with _progress(f"profiling {loaded.name}", as_json) as move:
        made = profile_model(loaded, quick=quick, label=label, pace_s=pace_s, progress=move)
    made.save(path)
    whole_s = made.part_s(loaded, loaded.whole())
    if as_json:
        emit({"file": str(path), "model": loaded.name, "whole_s": whole_s, "session_s": made.session_s,
              "blocks_s": [b.seconds for b in made.blocks], "provenance": made.provenance})  # fmt: skip
        return
    rows = []
    for index, (cost, cut) in enumerate(zip(made.blocks, loaded.cuts[1:], strict=True)):
        layers = [loaded.layers[i].op for i in range(len(loaded.layers)) if loaded.blocks[index] >> i & 1]
        rows.append(
            [index, " ".join(layers[:6]) + (" …" if len(layers) > 6 else ""), f"{cost.seconds * 1e3:.3f}", cut.bytes]
        )
    present.table(
        f"{loaded.name} on {made.machine.label} ({made.machine.cpu})",
        ["block>", "layers", "ms>", "bytes after it>"],
        rows,
        caption=f"The whole: {whole_s * 1e3:.2f} ms, of which {made.session_s * 1e3:.2f} ms for having a session. "
        f"{made.provenance}. Written to {path}",
    )


@app.command()
def calibrate(
    file: File,
    quick: Annotated[bool, typer.Option(help="Profile in seconds, at about twice the error.")] = False,
    keep_profiles: Annotated[bool, typer.Option(help="Only the pilot and the overheads, half a minute.")] = False,
    as_json: Json = False,
) -> None:
    """Measure on this machine all that simulating an experiment needs: profiles, codecs, decisions, releases."""
    experiment = _load(file, None, None)
    with _progress("calibrating", as_json) as move:
        written = execute.calibrate(experiment, quick=quick, keep_profiles=keep_profiles, progress=move)
    overheads = experiment.testbed.overheads
    if as_json:
        emit({"files": [str(p) for p in written], "overheads": overheads.model_dump()})
        return
    rows = [["an answer is released late by", f"{overheads.wake_s * 1e3:.2f} ms"]]
    rows += [["an empty call from actor to actor (hidden by emulated links)", f"{overheads.actor_call_s * 1e3:.2f} ms"]]
    rows += [[f"a decision of {name}", f"{s * 1e3:.2f} ms"] for name, s in overheads.decide_s.items()]
    rows += [
        [
            f"encoding, decoding 1 MB as {n}",
            f"{overheads.encode_s(n, 1e6) * 1e3:.2f}, {overheads.decode_s(n, 1e6) * 1e3:.2f} ms",
        ]
        for n in overheads.codecs
    ]
    present.table("Calibrated", ["what", "on this machine>"], rows, caption="Written: " + ", ".join(map(str, written)))


@app.command()
def plan(
    file: File,
    policy: Policies = None,
    cuts: Annotated[bool, typer.Option(help="Every cut to the fastest server.")] = False,
    as_json: Json = False,
) -> None:
    """Predict: what each policy plans for one request when nothing else is going on, and what that costs."""
    from isthmus.experiments.foresee import foresee

    rows = foresee(_load(file, policy, None), cuts=cuts)
    if as_json:
        emit(rows)
        return
    present.table(
        "Predicted for one request on an idle testbed, at the links' mean rates",
        ["policy" if not cuts else "cut", "plan", "latency ms>", "compute ms>", "links ms>", "energy J>"],
        [
            [
                r["policy"],
                r["plan"],
                *(present.milliseconds(r[k]) for k in ("latency_s", "compute_s", "links_s")),
                None if r["energy_j"] is None else f"{r['energy_j']:.3f}",
            ]
            for r in rows
        ],
    )


@app.command()
def simulate(
    file: File,
    out: Out = None,
    policy: Policies = None,
    seed: Seeds = None,
    requests: Requests = None,
    trace: Trace = None,
    views: Annotated[bool, typer.Option(help="Keep what every decision was based on.")] = False,
    as_json: Json = False,
) -> None:
    """Simulate an experiment."""
    experiment = _load(file, policy, seed, requests)
    with _progress("simulating", as_json) as move:
        made = execute.simulate(experiment, out, views=views, progress=move)
    _show_run(made, trace, as_json)


@app.command()
def run(
    file: File,
    out: Out = None,
    policy: Policies = None,
    seed: Seeds = None,
    requests: Requests = None,
    trace: Trace = None,
    as_json: Json = False,
) -> None:
    """Run an experiment for real: actors on this machine run the parts, as slowly as the nodes that they emulate."""
    experiment = _load(file, policy, seed, requests)
    with _progress("running", as_json) as move:
        made = execute.run(experiment, out, progress=move)
    _show_run(made, trace, as_json)


def _show_run(made: Run, trace: Path | None, as_json: bool) -> None:
    if trace is not None:
        from isthmus.experiments.trace import write_trace

        write_trace(made, trace)
    summary = made.summary()
    warnings = made.facts.get("warnings", [])
    if as_json:
        rows = [{k: None if v != v else v for k, v in row.items()} for row in summary.to_dict("records")]
        emit({"run": str(made.folder), "world": made.world, "policies": rows, "warnings": warnings})
        return
    outcomes = [c for c in summary.columns if c in ("completed", "late", "dropped", "failed", "unfinished")]
    energy = bool(summary["energy_j"].notna().any())
    present.table(
        f"{made.experiment.name} ({made.world}): latency in ms",
        ["policy", *(f"{c}>" for c in outcomes), "mean>", "p50>", "p95>", "p99>", *(["energy J>"] if energy else [])],
        [
            [
                _marked(made, row["policy"]),
                *(row[c] for c in outcomes),
                *(present.milliseconds(row[c]) for c in ("mean_s", "p50_s", "p95_s", "p99_s")),
                *([f"{row['energy_j']:.3f}"] if energy else []),
            ]
            for row in summary.to_dict("records")
        ],
        caption=f"Written to {made.folder}" + (f", trace to {trace}" if trace else ""),
    )
    for warning in warnings:
        present.warn(warning)


def _marked(made: Run, policy: str) -> str:
    return f"{policy} (oracle)" if policy in made.facts.get("oracles", []) else policy


@app.command()
def compare(
    simulated: Annotated[Path, typer.Argument(help="Run folder of a simulation.", show_default=False)],
    real: Annotated[Path, typer.Argument(help="Run folder of a real run of the same experiment.", show_default=False)],
    repeat: Annotated[Path | None, typer.Argument(help="Run folder of a second real run.", show_default=False)] = None,
    report: Annotated[Path | None, typer.Option(help="Also write an HTML report.")] = None,
    as_json: Json = False,
) -> None:
    """Lay a real run beside its simulation: how far apart are they, and do they rank policies alike?"""
    from isthmus.experiments.compare import compare as compare_runs

    again = None if repeat is None else Run.load(repeat)
    comparison = compare_runs(Run.load(simulated), Run.load(real), again)
    if report is not None:
        from isthmus.experiments.report import write_report

        write_report(report, [comparison], title=comparison.real.experiment.name if comparison.real else "comparison")
    show_comparison(comparison, as_json, report)


def show_comparison(comparison: Any, as_json: bool, report: Path | None) -> None:
    """The fidelity table, or the JSON that `bench fidelity` gives."""
    data = comparison.to_json()
    if as_json:
        emit(data if report is None else {**data, "report": str(report)})
        return
    for setting in dict.fromkeys((r["model"], r["link"]) for r in data["rows"]):
        rows = [r for r in data["rows"] if (r["model"], r["link"]) == setting]
        repeated = any(r["repeat_mean_error"] is not None for r in rows)
        requests = " or ".join(map(str, sorted({r["requests"] for r in rows})))
        world = comparison.world
        present.table(
            f"{setting[0]}, {setting[1]} links, {requests} requests per policy; ms, simulated and {world}",
            ["policy", "mean sim>", "mean real>", "error %>", "(95 %)>", "p95 sim>", "p95 real>", "error %>",
             "struct. ms>", *(["repeat %>"] if repeated else []), "overrun %>"],
            [
                [
                    r["policy"],
                    present.milliseconds(r["sim_mean_s"]),
                    present.milliseconds(r["real_mean_s"]),
                    present.percent(r["mean_error"], ""),
                    _interval(r["mean_error_low"], r["mean_error_high"]),
                    present.milliseconds(r["sim_p95_s"]),
                    present.milliseconds(r["real_p95_s"]),
                    present.percent(r["p95_error"], ""),
                    None if r["structural_error_s"] is None else f"{r['structural_error_s'] * 1e3:.2f}",
                    *([present.percent(r["repeat_mean_error"], "")] if repeated else []),
                    present.percent(r["overruns"], ""),
                ]
                for r in rows
            ],
        )  # fmt: skip
    present.console.print(
        "error: what the profile taken before predicted, against the real run. struct.: per request, when the "
        "simulator is fed the real run's own part times. repeat: a second real run against the first. overrun: "
        "requests for which this host was too slow to keep emulated time. Emulated: true parts on this host, "
        "slowed down.",
        style="dim",
    )
    tau = data["kendall_tau"]
    present.console.print(
        f"Median error: mean {present.percent(data['median_mean_error'])}, "
        f"p95 {present.percent(data['median_p95_error'])}; worst mean {present.percent(data['worst_mean_error'])}. "
        + (
            f"Kendall τ of the ranking: {tau:.2f}."
            if tau is not None
            else "No two policies are 10 % apart, so there is no ranking."
        )
    )
    for warning in comparison.warnings:
        present.warn(warning)
    if report is not None:
        present.console.print(f"Report: [bold]{escape(str(report))}[/]", soft_wrap=True)


def _interval(low: float | None, high: float | None) -> str | None:
    return None if low is None or high is None else f"{abs(low) * 100:.0f}–{high * 100:.0f}"


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.", show_default=False)],
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("report.html"),
    as_json: Json = False,
) -> None:
    """Write an HTML report of runs, simulated or real, that opens offline."""
    from isthmus.experiments.report import write_report

    loaded = [Run.load(folder) for folder in runs]
    write_report(out, loaded, title=loaded[0].experiment.name)
    if as_json:
        emit({"report": str(out)})
    else:
        present.console.print(f"Report: [bold]{out}[/]", soft_wrap=True)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where to write.")] = Path("runs/demo"),
    requests: Annotated[int, typer.Option(min=10, help="Requests per policy and uplink.")] = 100,
    as_json: Json = False,
) -> None:
    """Five minutes: measure a real network here, simulate six policies, run them for real, lay the two side by side."""
    from isthmus.experiments.fidelity import run_demo

    with _progress("demo", as_json) as move:
        comparison, path = run_demo(out, requests=requests, progress=move)
    show_comparison(comparison, as_json, path)


@bench.command("fidelity")
def bench_fidelity(
    out: Annotated[Path, typer.Option(help="Where to write.")] = Path("runs/fidelity"),
    model: Annotated[list[str] | None, typer.Option(help="Only these models.")] = None,
    as_json: Json = False,
) -> None:
    """How far simulation and real (emulated) runs are apart: two models, two uplinks, six policies, one repeat."""
    from isthmus.experiments.fidelity import run_fidelity

    with _progress("bench fidelity", as_json) as move:
        comparison, path = run_fidelity(out, models=model, progress=move)
    show_comparison(comparison, as_json, path)


@bench.command("profile")
def bench_profile(
    model: Annotated[list[str] | None, typer.Option(help="Models to profile.")] = None,
    parts: Annotated[int, typer.Option(min=1, help="Random interior parts per model.")] = 40,
    as_json: Json = False,
) -> None:
    """How well a profile predicts parts that it has not measured."""
    from isthmus.experiments.bench_profile import bench_profile as measure

    with _progress("bench profile", as_json) as move:
        data = measure(model, parts=parts, progress=move) if model else measure(parts=parts, progress=move)
    if as_json:
        emit(data)
        return
    present.table(
        "Predicted time of parts that were not measured, against measuring them",
        ["model", "parts>", "mean error>", "worst>", "sessions>"],
        [
            [r["model"], r["parts"], present.percent(r["mean_error"]), present.percent(r["worst_error"]), r["sessions"]]
            for r in data["rows"]
        ],
    )  # fmt: skip
