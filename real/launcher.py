"""The file for Ray's own launcher, `ray up`, that starts a testbed's cluster. Knows its format and SSH; starts nothing.

Ray's on-premise provider gives all workers the same commands, and no way to tell them apart. So the commands ask the
machine they run on which of the known addresses is its own, and name its resource after that.
"""

from __future__ import annotations

import getpass
import json
import re
import shlex
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import yaml

from isthmus.real.cluster import tls_settings
from isthmus.workloads.cluster import HEAD, ClusterSpec, host_files, resource
from isthmus.workloads.errors import InputError

HOME = "$HOME/.isthmus"
"""On each machine of the cluster: a virtual environment, the token, the certificates."""
PORTS = {"node-manager-port": 6380, "object-manager-port": 6381, "min-worker-port": 10002, "max-worker-port": 10999}
"""Fixed, so that a firewall can let them through; that of the head is the testbed's."""
_PINNED = ("ray", "onnxruntime")
_HEADER = """\
# Written by `isthmus cluster file` for Ray's launcher: `ray up {file}` starts the cluster, `ray down {file}` stops it.
# Both stop any other Ray of that user on these machines. Then: `isthmus cluster check` with the same testbed.
"""


def launcher_file(spec: ClusterSpec, folder: Path, *, name: str, file: str, wheel: Path | None = None) -> str:
    """The text of the file. `folder` is what the paths of `spec` start from.

    With a `wheel` of Isthmus every machine installs it, with Ray as it is here; without, all must be there already.
    InputError for what `ray up` cannot do, such as hosts with several users, and for files that are missing.
    """
    data = launcher(spec, folder, name=name, wheel=wheel)
    return _HEADER.format(file=file) + yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=10_000)


def launcher(spec: ClusterSpec, folder: Path, *, name: str, wheel: Path | None = None) -> dict[str, Any]:
    """The same as data."""
    if not spec.hosts:
        raise InputError("names no machines", where="cluster.hosts", allowed="hosts: {cam-1: {address: 10.0.0.5}}")
    users = {host.user or spec.user or getpass.getuser() for host in spec.hosts.values()}
    if len(users) > 1:
        raise InputError(
            f"Ray's launcher logs in as one user everywhere, and these are {', '.join(sorted(users))}",
            where="cluster.hosts",
            allowed="one `user` for all",
        )
    addresses = [host.address for host in spec.hosts.values()]
    if twice := sorted({address for address in addresses if addresses.count(address) > 1}):
        raise InputError(f"two machines have the address {twice[0]}", where="cluster.hosts")
    head, port = spec.address.rsplit(":", 1)
    auth: dict[str, str] = {"ssh_user": users.pop()}
    if spec.key is not None:
        auth["ssh_private_key"] = str(_there(folder / Path(spec.key).expanduser(), "cluster.key"))
    head_start = f"--head --port={port} --include-dashboard=false --autoscaling-config=~/ray_bootstrap_config.yaml"
    return {
        "cluster_name": "isthmus-" + re.sub(r"[^A-Za-z0-9-]+", "-", name),
        "provider": {"type": "local", "head_ip": head, "worker_ips": [a for a in addresses if a != head]},
        "auth": auth,
        "file_mounts": _files(spec, folder, wheel),
        "setup_commands": _setup(wheel),
        "head_start_ray_commands": [_start(spec, head_start)],
        "worker_start_ray_commands": [_start(spec, f"--address={spec.address}")],
    }


def join_command(spec: ClusterSpec, host: str) -> str:
    """What to type on a host for it to join the cluster by hand, with its files where the launcher puts them."""
    options = _options(host, spec.hosts[host].address) if host in spec.hosts else _options(host, "")
    environment = [f"{name}={value}" for name, value in _settings(spec, host).items()]
    return " ".join([*environment, f"ray start --address={spec.address}", *map(shlex.quote, options)])


def _files(spec: ClusterSpec, folder: Path, wheel: Path | None) -> dict[str, str]:
    """What is copied to every machine: not the key of the authority, with which others could be let in."""
    there = HOME.replace("$HOME", "~")
    files = {f"{there}/token": _there(spec.token_file(folder), "cluster.token")}
    if (keys := spec.key_folder(folder)) is not None:
        for machine in _names(spec).values():
            for file in host_files(keys, machine):
                files[f"{there}/certificates/{file.name}"] = _there(file, "cluster.certificates")
    if wheel is not None:
        files[f"{there}/{wheel.name}"] = _there(wheel, "wheel")
    return {there: str(here) for there, here in files.items()}


def _setup(wheel: Path | None) -> list[str]:
    """Ray, ONNX Runtime and Isthmus in an environment of their own, of the same versions as here."""
    python = f"{HOME}/venv/bin/python"
    # `ray down` calls `ray` by its name, and takes no notice when there is none.
    path = f"grep -qs isthmus/venv ~/.bashrc || echo 'PATH=$PATH:{HOME}/venv/bin' >> ~/.bashrc"
    if wheel is None:
        return [f"{python} -c 'import ray, onnxruntime, isthmus'", path]
    pins = " ".join(f"{package}=={found}" for package in _PINNED if (found := _version(package)))
    minor = f"python{sys.version_info.major}.{sys.version_info.minor}"  # Ray wants the same on all machines
    return [
        f"test -x {python} || {minor} -m venv {HOME}/venv",
        f'{python} -m pip install --quiet {pins} "{HOME}/{wheel.name}[real]"',
        f"{python} -m pip install --quiet --no-deps --force-reinstall {HOME}/{wheel.name}",  # of the same version, too
        path,
    ]


def _start(spec: ClusterSpec, how: str) -> str:
    """Commands for any machine: which one is this, its environment, and Ray.

    The third word of SSH_CONNECTION is the address at which this machine was reached.
    """
    cases = [
        f"  *' {address} '*) host={name}; options='{' '.join(_options(name, address))}' ;;"
        for address, name in _names(spec).items()
    ]
    return "\n".join(
        [
            "set -- $SSH_CONNECTION",
            'case " $3 $(hostname -I) $(hostname) $(hostname).local $(hostname -f) " in',
            *cases,
            "  *) echo 'isthmus: this machine has none of the addresses in `cluster.hosts`' >&2; exit 1 ;;",
            "esac",
            "export RAY_enable_autoscaler_v2=0",  # it knows no on-premise provider (ray-project/ray#57153)
            *(f"export {name}={value}" for name, value in _settings(spec, "$host").items()),
            f"{HOME}/venv/bin/ray stop",
            f"{HOME}/venv/bin/ray start {how} $options " + " ".join(f"--{name}={port}" for name, port in PORTS.items()),
        ]
    )


def _names(spec: ClusterSpec) -> dict[str, str]:
    """The machines that run Ray, by address. A head that is none of the hosts computes nothing."""
    return {spec.address.rsplit(":", 1)[0]: HEAD} | {host.address: name for name, host in spec.hosts.items()}


def _options(host: str, address: str) -> list[str]:
    """Of `ray start` on a host."""
    options = [] if host == HEAD else ["--resources=" + json.dumps({resource(host): 1}, separators=(",", ":"))]
    try:
        ip_address(address)
    except ValueError:
        return options  # a name may stand for another address there than here: Ray finds its own
    return [*options, f"--node-ip-address={address}"]


def _settings(spec: ClusterSpec, host: str) -> Mapping[str, str]:
    """The environment of Ray on a host, for a shell."""
    said = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": f"{HOME}/token",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    return said if spec.certificates is None else said | tls_settings(host_files(Path(f"{HOME}/certificates"), host))


def _there(path: Path, field: str) -> Path:
    if not path.is_file():
        raise InputError("no such file", where=f"{field}: {path}")
    return path.resolve()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


class _Dumper(yaml.SafeDumper):
    """Writes commands of several lines as such."""


def _lines(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _lines)
