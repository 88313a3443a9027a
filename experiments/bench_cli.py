"""`isthmus bench`: figures that anyone can measure again, from the command line. What is measured is elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from isthmus.experiments import catalogue, present, tables
from isthmus.experiments.options import Json
from isthmus.experiments.present import emit
from isthmus.workloads.backend import BackendSpec

app = typer.Typer(help="Figures that anyone can measure again.", no_args_is_help=True)


@app.command("fidelity")
def fidelity(
    out: Annotated[Path, typer.Option(help="Where to write.")] = Path("runs/fidelity"),
    model: Annotated[list[str] | None, typer.Option(help="Only these models.")] = None,
    as_json: Json = False,
) -> None:
    """How far simulation and real (emulated) runs are apart: two models, two uplinks, six policies, one repeat."""
    from isthmus.experiments.fidelity import run_fidelity

    with present.progress("bench fidelity", quiet=as_json) as move:
        comparison, path = run_fidelity(out, models=model, progress=move)
    tables.show_comparison(comparison, as_json, path)


@app.command("profile")
def profile(
    model: Annotated[list[str] | None, typer.Option(help="Models to profile.")] = None,
    parts: Annotated[int, typer.Option(min=1, help="Random interior parts per model.")] = 40,
    as_json: Json = False,
) -> None:
    """How well a profile predicts parts that it has not measured."""
    from isthmus.experiments.bench_profile import bench_profile as measure

    with present.progress("bench profile", quiet=as_json) as move:
        data = measure(model, parts=parts, progress=move) if model else measure(parts=parts, progress=move)
    emit(data) if as_json else tables.bench_profile_table(data["rows"])


@app.command("backends")
def backends(
    model: Annotated[list[str] | None, typer.Option(help="Models, by name or file.", show_default="all nine")] = None,
    backend: Annotated[list[str] | None, typer.Option(help="Backends.", show_default="all that work here")] = None,
    as_json: Json = False,
) -> None:
    """How far the backends' answers are from ONNX Runtime's, whole and joined at cuts, and what they take."""
    from isthmus.experiments.bench_backends import bench_backends as measure
    from isthmus.workloads import zoo

    here = [row["name"] for row in catalogue.list_backends() if row["problem"] is None]
    specs = [BackendSpec.of(text, where="--backend") for text in backend or here]
    with present.progress("bench backends", quiet=as_json) as move:
        rows = measure(model or zoo.names(), specs, progress=move)
    emit(rows) if as_json else tables.bench_backends_table(rows)


@app.command("real")
def real(
    requests: Annotated[int, typer.Option(min=20, help="Requests of one measurement.")] = 100,
    as_json: Json = False,
) -> None:
    """What real runs add to the parts' own time and raw TCP, and how full a pipeline of three stages runs."""
    from isthmus.experiments.bench_real import bench_real as measure

    with present.progress("bench real", quiet=as_json) as move:
        data = measure(requests=requests, progress=move)
    emit(data) if as_json else tables.bench_real_table(data)


@app.command("sim")
def sim(
    requests: Annotated[int, typer.Option(min=1000, help="Requests of one measurement.")] = 100_000,
    repeats: Annotated[int, typer.Option(min=1, help="Measurements of each way, in turn.")] = 5,
    long: Annotated[int, typer.Option(min=2000, help="Requests of the run whose memory is watched.")] = 2_000_000,
    as_json: Json = False,
) -> None:
    """How fast the simulator is, beside plain SimPy on the same work: requests per CPU second."""
    from isthmus.experiments.bench_sim import bench_sim as measure

    with present.progress("bench sim", quiet=as_json) as move:
        data = measure(requests=requests, repeats=repeats, long=long, progress=move)
    emit(data) if as_json else tables.bench_sim_table(data)


@app.command("scale")
def scale(
    devices: Annotated[list[int] | None, typer.Option(min=1, help="Numbers of devices.")] = None,
    requests: Annotated[int, typer.Option(min=1000, help="Requests per row, at least 100 per device.")] = 1_000_000,
    as_json: Json = False,
) -> None:
    """What a request costs to simulate among 10 to 100 000 devices: CPU time, set-up included, and memory.

    At one server and the same total load, and with a server for every fifty devices.
    """
    from isthmus.experiments.bench_sim import SCALE
    from isthmus.experiments.bench_sim import bench_scale as measure

    with present.progress("bench scale", quiet=as_json) as move:
        rows = measure(devices=tuple(devices or SCALE), requests=requests, progress=move)
    emit(rows) if as_json else tables.bench_scale_table(rows)
