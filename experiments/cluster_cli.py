"""`isthmus cluster …`: what a cluster of machines needs before it runs experiments. Knows how to ask and to show."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from isthmus.experiments.options import Described, Json
from isthmus.experiments.present import console, emit
from isthmus.experiments.real_run import check_hosts
from isthmus.workloads.cluster import DRIVER, ClusterSpec
from isthmus.workloads.documents import write_text
from isthmus.workloads.errors import InputError, RunFailure
from isthmus.workloads.experiment import read_testbed

app = typer.Typer(help="Machines of a cluster: keys, and whether all is well.", no_args_is_help=True)

Replace = Annotated[bool, typer.Option("--replace", help="Lose the keys that there are.")]


@app.command()
def certs(
    folder: Annotated[Path, typer.Argument(help="Where to write: the `certificates` of the testbed.")],
    host: Annotated[
        list[str] | None, typer.Option(help="NAME=ADDRESS[,ADDRESS…]; by default all machines of --testbed.")
    ] = None,
    testbed: Annotated[Path | None, typer.Option(help="Testbed or experiment with a `cluster` (YAML).")] = None,
    replace: Replace = False,
    as_json: Json = False,
) -> None:
    """Make the certificates with which the machines of a cluster know each other, and its traffic is encrypted."""
    try:
        from isthmus.real.certs import make_certs
    except ImportError:
        raise RunFailure("making certificates needs `cryptography`: pip install 'isthmus[real]'") from None

    hosts = _hosts(host or [])
    if testbed is not None and not host:
        spec = cluster_of(testbed)
        hosts = {name: [address] for name, address in spec.machines.items()}
        hosts.setdefault(spec.this_machine, [_address_towards(spec.address)])
    made = make_certs(folder, hosts, replace=replace)
    if as_json:
        emit({"files": [str(path) for path in made], "hosts": hosts})
        return
    for path in made:
        console.print(escape(str(path)), soft_wrap=True, highlight=False)


@app.command()
def token(
    file: Annotated[Path, typer.Argument(help="Where to write: the `token` of the testbed.")] = Path(
        "~/.isthmus/token"
    ),
    replace: Replace = False,
    as_json: Json = False,
) -> None:
    """Make the token that all machines of a cluster share; without it nothing is let in."""
    try:
        from isthmus.real.certs import make_token
    except ImportError:
        raise RunFailure("making a token needs `cryptography`: pip install 'isthmus[real]'") from None

    path = make_token(file.expanduser(), replace=replace)
    if as_json:
        emit({"file": str(path)})
    else:
        console.print(escape(str(path)), soft_wrap=True, highlight=False)


@app.command()
def check(file: Described, as_json: Json = False) -> None:
    """Are all machines ready for a run? Who is there, as what, and what to do about what is wrong.

    Without a `cluster` in the testbed: this machine alone, for an emulated run. Exit code 1 if a run would break.
    """
    from isthmus.experiments.tables import cluster_tables
    from isthmus.real.cluster_check import check as check_machines
    from isthmus.workloads.model import load_model

    testbed, experiment = read_testbed(file)
    check_hosts(testbed, file)
    used = set(testbed.models) if experiment is None else {source.model for source in experiment.workload}
    found = {name: file.parent / source for name, source in testbed.models.items() if name in used}
    models = [load_model(f if f.is_file() else testbed.models[name], name=name) for name, f in found.items()]
    checked = check_machines(testbed, file.parent, models)
    emit(checked.to_json()) if as_json else cluster_tables(checked)
    if not checked.ready:
        raise typer.Exit(1)


@app.command("file")
def launcher(
    file: Described,
    out: Annotated[Path, typer.Option(help="Where to write.")] = Path("cluster.yaml"),
    wheel: Annotated[
        Path | None, typer.Option(help="Isthmus, for every machine to install (`python -m build`).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the file with which Ray's launcher starts and stops the cluster: `ray up`, `ray down`."""
    from isthmus.real.launcher import launcher_file

    cluster, name = cluster_of(file), read_testbed(file)[0].name
    write_text(out, launcher_file(cluster, file.parent, name=name, file=out.name, wheel=wheel))
    if as_json:
        emit({"file": str(out)})
    else:
        said = f"{out} is written; next: `ray up {out}`, and `isthmus cluster check {file}`"
        console.print(escape(said), soft_wrap=True, highlight=False)


def cluster_of(file: Path) -> ClusterSpec:
    """The cluster that a testbed, or the testbed of an experiment, names; paths in it as `file`'s folder has them."""
    cluster = read_testbed(file)[0].cluster
    if cluster is None:
        raise InputError("names no `cluster`", where=file, allowed="cluster: {address: 10.0.0.1:6379, hosts: {…}}")
    return cluster


def _hosts(said: list[str]) -> dict[str, list[str]]:
    hosts: dict[str, list[str]] = {}
    for text in said:
        name, _, addresses = text.partition("=")
        hosts[name] = addresses.split(",") if addresses else []
    return hosts


def _address_towards(head: str) -> str:
    """This machine's address in the network of the head. Nothing is sent."""
    import socket

    address, _, port = head.rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, int(port)))
        except OSError as error:
            raise InputError(
                f"no way to the head {head}: {error}", allowed=f"`{DRIVER}: ADDRESS` in `cluster`"
            ) from None
        return str(probe.getsockname()[0])
