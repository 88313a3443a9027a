"""What links between machines were measured to be. Kept beside the profiles; a simulation then uses it.

Knows links as directions between nodes. How they are measured is in `real/link_probe.py`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from isthmus.workloads.documents import parse, read_yaml, write_text
from isthmus.workloads.links import Link, SlowStart
from isthmus.workloads.rate import Rate
from isthmus.workloads.routing import LinkId


class LinkCost(BaseModel):
    """One direction of a link. Times are from handing a message over to having it at the other end."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    link: LinkId
    rate_bytes_per_s: float = Field(gt=0, description="of the tensors' bytes, of long messages")
    latency_s: float = Field(ge=0, description="of a message without bytes")
    jitter_s: float = Field(default=0.0, ge=0, description="standard deviation of single messages, the rate's part out")
    slow_start: SlowStart | None = Field(default=None, description="where messages after a pause take longer")
    declared_bytes_per_s: float | None = Field(
        default=None, description="mean rate that the testbed gave the link when it was measured"
    )
    clock_error_s: float = Field(default=0.0, description="what the latency may be wrong by, since clocks differ")
    samples: tuple[tuple[int, float], ...] = Field(default=(), description="bytes and seconds of each message")

    def of(self, link: Link) -> Link:
        """The link as it was measured; where the testbed says how its rate changes, that, to scale."""
        if self.declared_bytes_per_s is None:
            rate = Rate.constant(self.rate_bytes_per_s)
        else:
            share = self.rate_bytes_per_s / self.declared_bytes_per_s
            rate = link.rate.times(Rate.constant(share))
        return replace(link, rate=rate, latency_s=self.latency_s, slow_start=self.slow_start)


class LinkCosts(BaseModel):
    """All that was measured of a testbed's links."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = 1
    measured: str = Field(default="", description="when")
    links: tuple[LinkCost, ...] = ()

    @classmethod
    def find(cls, store: Path) -> LinkCosts:
        """Those kept beside the profiles, or none."""
        path = store / "links.json"
        return parse(cls, read_yaml(path), where=path) if os.path.exists(path) else cls()

    def save(self, store: Path) -> None:
        write_text(store / "links.json", self.model_dump_json(indent=1) + "\n")

    @property
    def by_link(self) -> Mapping[LinkId, LinkCost]:
        return {cost.link: cost for cost in self.links}
