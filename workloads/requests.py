"""Requests, and when they come. Arrivals are drawn once, before a run, from streams of their own."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Annotated, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from isthmus.workloads.random import stream
from isthmus.workloads.units import PerSecond, Seconds


class Request(NamedTuple):
    """One inference asked for at one time by one source.

    `number` counts the requests of one source from 0; (source, number) is the identity in a run. `deadline_s` is on
    the run's clock, like `arrival_s`. `timeout_s` is how long an attempt may stay unanswered before it is given up.
    """

    number: int
    source: str
    model: str
    arrival_s: float
    deadline_s: float | None = None
    timeout_s: float | None = None


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Poisson(_Spec):
    """Memoryless arrivals at a mean rate."""

    kind: Literal["poisson"] = "poisson"
    rate: PerSecond

    def times_s(self, generator: np.random.Generator) -> Iterator[float]:
        now_s = 0.0
        while True:
            for gap_s in generator.exponential(1 / self.rate, 256).tolist():
                yield (now_s := now_s + gap_s)


class Periodic(_Spec):
    """One arrival every 1/rate seconds, the first after one period."""

    kind: Literal["periodic"] = "periodic"
    rate: PerSecond

    def times_s(self, generator: np.random.Generator) -> Iterator[float]:
        return (number / self.rate for number in count(1))  # a sum of periods would drift past `duration`


class Replay(_Spec):
    """Arrivals at given times, in seconds from the start of the run."""

    kind: Literal["replay"] = "replay"
    times: tuple[Seconds, ...] = Field(min_length=1)

    def times_s(self, generator: np.random.Generator) -> Iterator[float]:
        return iter(sorted(self.times))


Arrivals = Annotated[Poisson | Periodic | Replay, Field(discriminator="kind")]


class Source(_Spec):
    """A stream of requests: where they arise, for which model, when, how many, and how soon they are wanted."""

    node: str
    model: str
    arrivals: Arrivals
    requests: int | None = Field(default=None, gt=0, description="stop after so many")
    duration: Seconds | None = Field(default=None, description="stop after so long")
    deadline: Seconds | None = Field(default=None, description="from arrival; a later answer counts as late")
    timeout: Seconds | None = Field(default=None, description="from the start of an attempt; then it has failed")

    def draw(self, seed: int) -> list[Request]:
        """The requests of one run, in order of arrival. The same seed gives the same requests under every policy."""
        made: list[Request] = []
        for now in self.arrivals.times_s(stream(seed, self.node, "arrivals")):
            if len(made) == self.requests or (self.duration is not None and now > self.duration):
                break
            deadline = None if self.deadline is None else now + self.deadline
            made.append(Request(len(made), self.node, self.model, now, deadline, self.timeout))
        return made
