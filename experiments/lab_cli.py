"""`isthmus lab`: a cluster of several hosts inside this machine, from the command line. Knows how to ask and to show.

Whatever is run in a lab finds it by the environment, and reads experiments as they are there: `lab run` is no more than
`up`, `exec -- isthmus validate`, and `down`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from isthmus.experiments import present
from isthmus.experiments.execute import Experiment
from isthmus.experiments.lab import hosts_and_links
from isthmus.experiments.options import Described, Files, Into, Json, KeepProfiles, Repeat, by_name
from isthmus.real.lab import HEAD, LABS, Lab, MadeBy, names
from isthmus.real.lab_ray import environment, start_ray
from isthmus.real.lab_up import up
from isthmus.workloads.errors import InputError, RunFailure
from isthmus.workloads.units import show_bytes, show_rate

app = typer.Typer(help="A cluster of several hosts inside this Linux machine (root).", no_args_is_help=True)

Cpu = Annotated[
    list[str] | None, typer.Option("--cpu", help="NODE=SHARE: processors that a host may keep busy, such as edge=0.5.")
]
Shaper = Annotated[
    MadeBy | None, typer.Option(help="What makes links: tc or relay.", show_default="tc where the kernel has netem")
]
Name = Annotated[str | None, typer.Option("--name", help="Of the lab.", show_default="the only one")]
_GRACE_S = 60


def _shares(said: list[str] | None) -> dict[str, float]:
    shares = {}
    for text in said or ():
        node, _, share = text.partition("=")
        try:
            shares[node] = float(share)
        except ValueError:
            raise InputError(f"{text!r} is no limit", where="--cpu", allowed="NODE=SHARE, such as edge=0.5") from None
    return shares


def _up(name: str, file: Path, cpu: list[str] | None, shaper: MadeBy | None, seed: int | None = None) -> Lab:
    nodes, links = hosts_and_links(file, seed)
    return up(name, nodes, links, cpu=_shares(cpu), shaper=shaper)


def _the_lab(name: str | None) -> Lab:
    found = names()
    if name is None and len(found) != 1:
        said = f"{len(found)} labs are up" if found else "no lab is up"
        raise InputError(said, where="lab", allowed=", ".join(found) or "`isthmus lab up FILE` before")
    return Lab.load(LABS / (name or found[0]))


@app.command("up")
def up_(
    file: Described,
    name: Annotated[str | None, typer.Option(help="Of the lab.", show_default="the file's")] = None,
    cpu: Cpu = None,
    shaper: Shaper = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of rates that are drawn.", show_default="the first")] = None,
    ray: Annotated[bool, typer.Option(help="Start a Ray cluster in it.")] = True,
    as_json: Json = False,
) -> None:
    """Build a lab for an experiment, and leave it up: a host for every node, one for the driver, the links between."""
    lab = _up(name or file.stem, file, cpu, shaper, seed)
    if ray:
        try:
            start_ray(lab)
        except BaseException:
            lab.down()
            raise
    _show([lab], as_json)


@app.command("run")
def run(
    files: Files,
    out: Into = Path("runs/lab"),
    repeat: Repeat = True,
    keep_profiles: KeepProfiles = False,
    cpu: Cpu = None,
    shaper: Shaper = None,
    as_json: Json = False,
) -> None:
    """Build a lab for each experiment; in it calibrate, simulate and run twice; take it down; compare.

    Of experiments that share a model and a folder, the first one takes the profile.
    """
    from isthmus.experiments.compare import merge
    from isthmus.experiments.report import write_report
    from isthmus.experiments.tables import show_comparison
    from isthmus.experiments.validate import compared

    profiled: set[tuple[Path, str]] = set()
    for name, file in by_name(files).items():
        experiment = Experiment.load(file)
        models = {(experiment.store, source.model) for source in experiment.spec.workload}
        more = ["--repeat" if repeat else "--no-repeat", f"--out={out}"]
        more += ["--keep-profiles"] if keep_profiles or models <= profiled else []
        profiled |= models
        with _taken_down(partial(_up, f"{name}-{os.getpid()}", file, cpu, shaper)) as lab:
            start_ray(lab)
            # Its own table is of one experiment; the one of all comes in the end.
            if code := _call(lab, HEAD, [*_ISTHMUS, "validate", str(file), *more], quiet=True):
                raise typer.Exit(code)
    merged = merge([compared(out / name, repeat=repeat) for name in by_name(files)])
    report = out / "report.html"
    write_report(report, [merged], title="Isthmus: lab")
    show_comparison(merged, as_json, report)


_ISTHMUS = (sys.executable, "-c", "from isthmus.experiments.cli import main; main()")


@contextmanager
def _taken_down(make: Any) -> Iterator[Lab]:
    """A lab that is taken down in the end, also after Ctrl-C and when this process is asked to end."""

    here = os.getpid()

    def end(number: int, _: object) -> None:
        if os.getpid() != here:  # a fork of a library's: the lab is not its to take down
            os._exit(128 + number)
        raise SystemExit(128 + number)

    before = {asked: signal.signal(asked, end) for asked in (signal.SIGTERM, signal.SIGHUP)}
    try:
        lab: Lab = make()
        try:
            yield lab
        finally:
            lab.down()
    finally:
        for asked, handler in before.items():
            signal.signal(asked, handler)


def _call(lab: Lab, host: str, arguments: list[str], *, quiet: bool = False) -> int:
    """Run a command in a host; its exit code. After Ctrl-C it has some seconds to end as it would alone."""
    out = subprocess.DEVNULL if quiet else None
    process = subprocess.Popen(lab.command(host, arguments), env=environment(lab), stdout=out)
    try:
        return process.wait()
    except KeyboardInterrupt:
        try:
            process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
        raise


@app.command("exec", context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True})
def exec_(
    words: Annotated[list[str], typer.Argument(metavar="[HOST --] COMMAND...", show_default=False)],
    name: Name = None,
) -> None:
    """Run a command in a host of a lab, by default in that of the driver: `exec edge -- ip address`."""
    host, command = (words[0], words[2:]) if words[1:2] == ["--"] else (HEAD, words)
    if not command:
        raise InputError("no command", where="lab exec", allowed=f"{host} -- COMMAND")
    if command[0] == "isthmus":  # the one that this is
        command = [*_ISTHMUS, *command[1:]]
    lab = _the_lab(name)
    started = lab.command(host, command)
    sys.stdout.flush()
    os.execvpe(started[0], started, environment(lab))


@app.command()
def down(
    name: Annotated[str | None, typer.Argument(help="Of the lab.", show_default="the only one")] = None,
    every: Annotated[bool, typer.Option("--all", help="All labs of this machine.")] = False,
) -> None:
    """Take a lab down: end what it has started, and nothing else. Does no harm where there is none."""
    found = names()
    if name is None and not every and len(found) > 1:
        raise InputError("several labs are up", where="lab down", allowed=f"--all, or one of {', '.join(found)}")
    for one in found:
        if name in (None, one):
            Lab.load(LABS / one).down()
            present.messages.print(f"Lab {one} is down.", highlight=False)
    if name not in (None, *found):
        present.messages.print(f"There is no lab {name}; up: {', '.join(found) or 'none'}.", highlight=False)


@app.command()
def status(name: Annotated[str | None, typer.Argument(show_default="all")] = None, as_json: Json = False) -> None:
    """Show the labs that are up: hosts, links, and what these have carried."""
    _show([Lab.load(LABS / one) for one in ([name] if name else names())], as_json)


def _show(labs: list[Lab], as_json: bool) -> None:
    rows = [_described(lab) for lab in labs]
    if as_json:
        present.emit(rows)
        return
    for row in rows:
        present.table(
            f"Lab {row['name']}",
            ["host", "address", "cpu>", "up"],
            [[h["name"], h["address"], h["cpu"], "yes" if h["up"] else "no"] for h in row["hosts"]],
        )
        present.table(
            "Links",
            ["from", "to", "made by", "mean rate>", "carried>", "dropped>"],
            [[k["from"], k["to"], k["made_by"], show_rate(k["mean_bytes_per_s"]), show_bytes(k["bytes"]), k["dropped"]]
             for k in row["links"]],
            caption=f"isthmus lab exec --name {row['name']} [HOST --] COMMAND",
        )  # fmt: skip
    if not rows:
        present.console.print("No lab is up.")


def _described(lab: Lab) -> dict[str, Any]:
    try:
        totals = lab.totals()
    except RunFailure:  # it is not quite up, or half down
        totals = {}
    made_by = {tuple(ends): wire["made_by"] for wire in lab.wires for ends in (wire["between"], wire["between"][::-1])}
    return {
        "name": lab.name,
        "folder": str(lab.folder),
        "hosts": [
            {"name": h.name, "address": h.address, "cpu": h.cpu, "pid": h.pid, "up": _is_up(h.processes)}
            for h in lab.hosts
        ],
        "links": [{"from": a, "to": b, "made_by": made_by[a, b], **carried} for (a, b), carried in totals.items()],
        "at_s": time.monotonic(),
    }


def _is_up(processes: Any) -> bool:
    return bool(processes) and all(process.is_alive for process in processes)
