"""The machines of a testbed as people describe them: where they are found, and how they trust each other.

Knows no node's costs and no Ray. What a cluster does with it is in `real`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

HostName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


HEAD, DRIVER = "head", "driver"
"""Whose certificates these are: machines of the cluster that are none of its `hosts`."""


class HostFiles(NamedTuple):
    """What one machine proves itself with: its certificate, its key, and the certificate of the authority."""

    certificate: Path
    key: Path
    authority: Path


def host_files(folder: Path, host: str) -> HostFiles:
    """Where they are, in a folder that `isthmus cluster certs` made."""
    return HostFiles(folder / f"{host}.pem", folder / f"{host}.key", folder / "ca.pem")


class HostSpec(BaseModel):
    """A machine of the cluster, as Ray's launcher reaches it over SSH."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    address: str = Field(description="IP address or resolvable name, in the network of the cluster")
    user: str | None = Field(default=None, description="for SSH; by default that of the cluster")


class ClusterSpec(BaseModel):
    """A Ray cluster: the address of its head, and what is needed to be let in."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    address: str = Field(pattern=r"^[^\s:]+:\d+$", description="of the head, such as 10.0.0.1:6379")
    driver: str | None = Field(default=None, description="this machine's address in the cluster's network, if several")
    token: str = Field(default="~/.isthmus/token", description="file of the token that all machines share")
    certificates: str | None = Field(
        default=None, description="folder made by `isthmus cluster certs`; with it all of Ray's traffic is encrypted"
    )
    user: str | None = Field(default=None, description="for SSH, where a host names none")
    key: str | None = Field(default=None, description="file of the private key for SSH")
    hosts: dict[HostName, HostSpec] = Field(default={}, description="machines, by the names that nodes give as `host`")

    @property
    def machines(self) -> dict[str, str]:
        """The address of every machine that is known, by the name of its certificate; the driver's if it is given."""
        known = {name: host.address for name, host in self.hosts.items()}
        for name, address in ((HEAD, self.address.rpartition(":")[0]), (DRIVER, self.driver)):
            if address is not None and address not in known.values():
                known[name] = address
        return known

    @property
    def this_machine(self) -> str:
        """The name of the certificate of the machine that starts runs."""
        return next((name for name, address in self.machines.items() if address == self.driver), DRIVER)

    def token_file(self, folder: Path) -> Path:
        """`folder` is that of the file which describes the cluster."""
        return folder / Path(self.token).expanduser()

    def key_folder(self, folder: Path) -> Path | None:
        """Where the certificates are; None where there are none."""
        return None if self.certificates is None else folder / Path(self.certificates).expanduser()

    def moved(self, way: Path) -> ClusterSpec:
        """The same as it reads in another folder, from which its own is `way`."""
        changes = {name: getattr(self, name) for name in ("token", "certificates", "key")}
        relative = {n: p for n, p in changes.items() if p is not None and not p.startswith("~")}
        return self.model_copy(update={name: str(way / path) for name, path in relative.items()})


def resource(host: str) -> str:
    """The custom Ray resource that says: this machine is that host. Each has one of it."""
    return f"isthmus:{host}"
