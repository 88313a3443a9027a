"""The machines of a testbed as people describe them: where they are found, and how they trust each other.

Knows no node's costs and no Ray. What a cluster does with it is in `real`.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

HostName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


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


def resource(host: str) -> str:
    """The custom Ray resource that says: this machine is that host. Each has one of it."""
    return f"isthmus:{host}"
