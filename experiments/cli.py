"""The command line: arguments in, tables or JSON out. Knows how to ask and how to show; carrying out is elsewhere.

Exit codes: 0 done, 1 the run failed, 2 the input is wrong. Results go to standard output, all else to standard error.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

import isthmus
from isthmus.experiments import bench_cli, catalogue, cluster_cli, execute, lab_cli, present, tables
from isthmus.experiments.execute import Experiment
from isthmus.experiments.lab import as_here, ground_here
from isthmus.experiments.options import Files, Into, Json, KeepProfiles, Repeat, by_name
from isthmus.experiments.present import emit, messages
from isthmus.experiments.run_folder import Run
from isthmus.workloads.backend import BackendSpec
from isthmus.workloads.errors import InputError, IsthmusError
from isthmus.workloads.experiment import ExperimentSpec

app = typer.Typer(
    help="Edge-cloud offloading: simulate policies on measured costs, run them for real, see how far apart they are.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench_cli.app, name="bench")
app.add_typer(lab_cli.app, name="lab")
app.add_typer(cluster_cli.app, name="cluster")

File = Annotated[Path, typer.Argument(help="An experiment file (YAML).", show_default=False)]
Out = Annotated[Path | None, typer.Option("--out", help="Where to write; by default a new folder in runs/.")]
Trace = Annotated[Path | None, typer.Option("--trace", help="Also write a trace for Perfetto or chrome://tracing.")]
Policies = Annotated[
    list[str] | None, typer.Option("--policy", help="Run these policies instead of the file's; name or module:Class.")
]
Seeds = Annotated[list[int] | None, typer.Option("--seed", help="Run these seeds instead of the file's.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the finished run that --out may hold.")]
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
    except KeyboardInterrupt:
        _fail("interrupted; what was finished is kept", 130)
    except OSError as error:
        _fail(f"{error.filename or 'output'}: {error.strerror or error}", 1)
    except Exception as error:
        # Usage errors are click's, and typer may bring a click of its own: they are told by what they can do.
        if not hasattr(error, "format_message"):
            raise
        _fail(error.format_message(), getattr(error, "exit_code", 2))


def _fail(text: str, code: int) -> None:
    messages.print(f"[bold red]error:[/] {escape(' '.join(text.split()))}", highlight=False, soft_wrap=True)
    raise SystemExit(code)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(isthmus.__version__)  # noqa: T201
        raise typer.Exit


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
    changed = as_here(changed)
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
    from isthmus.workloads.model import load_model

    if file is None:
        rows = catalogue.list_models()
        emit(rows) if as_json else tables.models_table(rows)
        return
    model = load_model(file)
    cuts = catalogue.list_cuts(model)
    if as_json:
        emit({"name": model.name, "sha256": model.sha256, "layers": len(model.layers), "cuts": cuts})
    else:
        tables.cuts_table(model, cuts)


@app.command()
def policies(as_json: Json = False) -> None:
    """List the policies that are installed."""
    rows = catalogue.list_policies()
    emit(rows) if as_json else tables.policies_table(rows)


@app.command()
def backends(as_json: Json = False) -> None:
    """List what can run the parts of models here: runtimes, their versions and devices."""
    rows = catalogue.list_backends()
    emit(rows) if as_json else tables.backends_table(rows)


@app.command()
def traces(
    files: Annotated[
        list[Path], typer.Argument(help="Experiments or testbeds (YAML), or files of rates.", show_default=False)
    ],
    seed: Annotated[int | None, typer.Option(min=0, help="Of rates that are drawn.", show_default="the first")] = None,
    time: Annotated[str | None, typer.Option(help="Column of times of a csv file.")] = None,
    rate: Annotated[str | None, typer.Option(help="Column of rates of a csv file.")] = None,
    unit: Annotated[str | None, typer.Option(help="Unit of the rates in a file.", show_default="Mbit")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw them into this HTML file.")] = None,
    as_json: Json = False,
) -> None:
    """Show the rates of links, or those in trace files: how fast, how changing, how often out."""
    from isthmus.experiments.traces import find_traces, summary, write_plot

    found = [trace for file in files for trace in find_traces(file, seed=seed, time=time, rate=rate, unit=unit)]
    rows = [summary(trace) for trace in found]
    if plot is not None:
        write_plot(plot, found)
    if as_json:
        emit({"traces": rows} | ({} if plot is None else {"plot": str(plot)}))
        return
    tables.traces_table(found, rows)
    if plot is not None:
        present.console.print(f"Plot: [bold]{escape(str(plot))}[/]", soft_wrap=True)


@app.command()
def profile(
    model: Annotated[str, typer.Argument(help="A model by name, or a file.onnx.", show_default=False)],
    quick: Annotated[bool, typer.Option(help="Seconds instead of a minute or two, at about twice the error.")] = False,
    label: Annotated[str, typer.Option(help="What this machine is called in testbeds.")] = "host",
    pace: Annotated[str, typer.Option(help="Idle time before each run, as between requests.")] = "20ms",
    backend: Annotated[
        str, typer.Option(help="What runs it: a name that `isthmus backends` lists, or YAML as nodes have it.")
    ] = "onnxruntime",
    out: Annotated[
        Path | None, typer.Option(help="File to write.", show_default="profiles/MODEL@LABEL[+BACKEND].json")
    ] = None,
    batches: Annotated[
        str | None, typer.Option(help="Also what batches of these sizes cost, such as 1,2,4,8.", show_default="none")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure a model on this machine: the cost of every block, from real sessions."""
    from isthmus.real.batches import measure_batches
    from isthmus.real.profiler import profile_model
    from isthmus.workloads.model import load_model
    from isthmus.workloads.testbed import profile_path
    from isthmus.workloads.units import parse_time

    loaded, pace_s, sizes = load_model(model), parse_time(pace), _sizes(batches)
    runtime = BackendSpec.of(backend, where="--backend")
    path = out or profile_path(Path("profiles"), loaded.name, label, runtime)
    with present.progress(f"profiling {loaded.name}", quiet=as_json) as move:
        made = profile_model(loaded, quick=quick, label=label, pace_s=pace_s, backend=runtime, progress=move)
        try:
            made = made.with_batches(measure_batches(loaded, sizes, pace_s=pace_s, backend=runtime, progress=move))
        except InputError as error:  # what a profile is for most of the time, it is without batches
            messages.print(escape(f"note: no batches: {error}"), highlight=False, soft_wrap=True)
    made.save(path)
    if as_json:
        whole_s = made.part_s(loaded, loaded.whole())
        emit({"file": str(path), "model": loaded.name, "whole_s": whole_s, "session_s": made.session_s,
              "blocks_s": [b.seconds for b in made.blocks], "batches": {b.size: b.ratio for b in made.batches},
              "backend": made.backend, "backend_version": made.backend_version, "provider": made.provider,
              "clock": made.clock, "provenance": made.provenance})  # fmt: skip
    else:
        tables.profile_table(loaded, made, path)


def _sizes(text: str | None) -> list[int]:
    """Sizes of batches as people type them; InputError for what is none."""
    said = [] if text is None else text.split(",")
    if any(not size.strip().isdecimal() or int(size) < 1 for size in said):
        raise InputError(f"{text!r} are not sizes of batches", where="--batches", allowed="such as 1,2,4,8")
    return [int(size) for size in said]


@app.command()
def calibrate(
    file: File,
    quick: Annotated[bool, typer.Option(help="Profile in seconds, at about twice the error.")] = False,
    keep_profiles: Annotated[bool, typer.Option(help="All but the profiles, a minute or less.")] = False,
    resume: Annotated[bool, typer.Option(help="Go on where a calibration was broken off.")] = False,
    as_json: Json = False,
) -> None:
    """Measure all that simulating an experiment needs: profiles on every machine, links between them, overheads."""
    from isthmus.experiments.calibrating import calibrate as measure

    experiment = _load(file, None, None)
    with present.progress("calibrating", quiet=as_json) as move:
        ground = ground_here(experiment)
        written = measure(
            experiment,
            quick=quick,
            keep_profiles=keep_profiles,
            resume=resume,
            steady=None if ground is None else ground.hold,
            progress=move,
        )
    overheads = experiment.testbed.overheads
    if as_json:
        emit({"files": [str(p) for p in written], "overheads": overheads.model_dump()})
    else:
        tables.overheads_table(overheads, written)


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
    emit(rows) if as_json else tables.plans_table(rows, cuts=cuts)


@app.command()
def simulate(
    file: File,
    out: Out = None,
    policy: Policies = None,
    seed: Seeds = None,
    requests: Requests = None,
    trace: Trace = None,
    force: Force = False,
    views: Annotated[bool, typer.Option(help="Keep what every decision was based on.")] = False,
    spans: Annotated[bool, typer.Option(help="Keep where the time of each request went; off: a third faster.")] = True,
    as_json: Json = False,
) -> None:
    """Simulate an experiment."""
    experiment = _load(file, policy, seed, requests)
    with present.progress("simulating", quiet=as_json) as move:
        made = execute.simulate(experiment, out, views=views, spans=spans, replace=force, progress=move)
    _show_run(made, trace, as_json)


@app.command()
def run(
    file: File,
    out: Out = None,
    policy: Policies = None,
    seed: Seeds = None,
    requests: Requests = None,
    trace: Trace = None,
    force: Force = False,
    cold: Annotated[bool, typer.Option("--cold", help="Load parts when they are first wanted, not before.")] = False,
    as_json: Json = False,
) -> None:
    """Run an experiment for real: nodes with a `host` on that machine, others here, as slowly as what they emulate."""
    from isthmus.experiments.real_run import run as run_for_real

    experiment = _load(file, policy, seed, requests)
    with present.progress("running", quiet=as_json) as move:
        made = run_for_real(experiment, out, replace=force, cold=cold, ground=ground_here(experiment), progress=move)
    _show_run(made, trace, as_json)


def _show_run(made: Run, trace: Path | None, as_json: bool) -> None:
    if trace is not None:
        from isthmus.experiments.trace import write_trace

        write_trace(made, trace)
    if not as_json:
        tables.run_table(made, trace)
        return
    rows = [{k: None if v != v else v for k, v in row.items()} for row in made.summary().to_dict("records")]
    said = {"run": str(made.folder), "world": made.world, "policies": rows, "warnings": made.facts.get("warnings", [])}
    if "updates" in made.facts:
        said |= {"updates": made.facts["updates"], "versions": made.versions().to_dict("records")}
    emit(said)


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
    tables.show_comparison(comparison, as_json, report)


@app.command()
def validate(
    files: Files,
    out: Into = Path("runs/validation"),
    repeat: Repeat = True,
    keep_profiles: KeepProfiles = False,
    as_json: Json = False,
) -> None:
    """Calibrate, simulate and run experiments, twice, and lay the runs side by side: the whole job in one."""
    from isthmus.experiments.compare import merge
    from isthmus.experiments.report import write_report
    from isthmus.experiments.validate import validate as measure

    experiments = {name: _load(file, None, None) for name, file in by_name(files).items()}
    with present.progress("validate", quiet=as_json) as move:
        found = [
            measure(it, out / name, name=name, repeat=repeat, keep_profiles=keep_profiles, progress=move)
            for name, it in experiments.items()
        ]
    path = out / "report.html"
    write_report(path, [merge(found)], title="Isthmus: validation")
    tables.show_comparison(merge(found), as_json, path)


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

    with present.progress("demo", quiet=as_json) as move:
        comparison, path = run_demo(out, requests=requests, progress=move)
    tables.show_comparison(comparison, as_json, path)
