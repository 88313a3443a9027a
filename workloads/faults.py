"""Faults as the experiment gives them: the same schedule for the simulator and for the real run."""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict, model_validator

from isthmus.workloads.units import Seconds


class NodeFault(BaseModel):
    """A node goes at `down`, losing all that it holds, and is back at `up`; without `up` it stays away."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    node: str
    down: Seconds
    up: Seconds | None = None

    @model_validator(mode="after")
    def _in_order(self) -> NodeFault:
        if self.up is not None and self.up <= self.down:
            raise ValueError(f"is up again at {self.up:g} s, before it goes down at {self.down:g} s")
        return self

    def overlaps(self, other: NodeFault) -> bool:
        """Whether both have the same node down at one time, or one ends as the other begins."""
        ends = [math.inf if fault.up is None else fault.up for fault in (self, other)]
        return self.node == other.node and self.down <= ends[1] and other.down <= ends[0]
