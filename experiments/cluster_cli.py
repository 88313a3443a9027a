"""`isthmus cluster …`: what a cluster of machines needs before it runs experiments. Knows how to ask and to show."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from isthmus.experiments.present import console, emit
from isthmus.workloads.cluster import DRIVER, ClusterSpec
from isthmus.workloads.documents import parse, read_yaml
from isthmus.workloads.errors import InputError, RunFailure
from isthmus.workloads.experiment import ExperimentSpec
from isthmus.workloads.testbed import TestbedSpec

app = typer.Typer(help="Machines of a cluster: keys, and whether all is well.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
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


def cluster_of(file: Path) -> ClusterSpec:
    """The cluster that a testbed, or the testbed of an experiment, names; paths in it as `file`'s folder has them."""
    data = read_yaml(file)
    if isinstance(data, dict) and not {"testbed", "workload"}.isdisjoint(data):
        testbed = ExperimentSpec.of(data, file.parent, where=file).testbed
    else:
        testbed = parse(TestbedSpec, data, where=file)
    assert isinstance(testbed, TestbedSpec)
    if testbed.cluster is None:
        raise InputError("names no `cluster`", where=file, allowed="cluster: {address: 10.0.0.1:6379, hosts: {…}}")
    return testbed.cluster


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
