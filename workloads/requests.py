"""Requests, and the sources that they come from. Drawn from streams of their own, so a run cannot change them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from isthmus.workloads.arrivals import Arrivals, Closed, Diurnal, Replay
from isthmus.workloads.errors import InputError
from isthmus.workloads.random import stream
from isthmus.workloads.units import Seconds


class Request(NamedTuple):
    """One inference asked for at one time by one source.

    `number` counts the requests of one source from 0; (source, number) is the identity in a run. `deadline_s` is on
    the run's clock, like `arrival_s`. `timeout_s` is how long an attempt may stay unanswered before it is given up. The
    higher `priority` goes first, at nodes whose discipline it is.
    """

    number: int
    source: str
    model: str
    arrival_s: float
    deadline_s: float | None = None
    timeout_s: float | None = None
    priority: int = 0


class Source(BaseModel):
    """A stream of requests: where they arise, for which model, when, how many, and how soon they are wanted."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    node: str
    model: str
    arrivals: Arrivals
    requests: int | None = Field(default=None, gt=0, description="stop after so many")
    duration: Seconds | None = Field(default=None, description="stop after so long")
    deadline: Seconds | None = Field(default=None, description="from arrival; a later answer counts as late")
    timeout: Seconds | None = Field(default=None, description="from the start of an attempt; then it has failed")
    priority: int = Field(default=0, description="the higher goes first, at nodes with `discipline: priority`")

    @property
    def expected_s(self) -> float:
        """About when its last request will come; of a closed loop, if answers come at once."""
        arrivals = self.arrivals
        if isinstance(arrivals, Replay):
            return max(arrivals.times or (0.0,))
        rate = arrivals.users / arrivals.think if isinstance(arrivals, Closed) else arrivals.rate
        by_number = math.inf if self.requests is None else self.requests / rate
        if isinstance(arrivals, Diurnal):  # it may begin at night
            by_number += arrivals.period
        return min(by_number, math.inf if self.duration is None else self.duration)

    def resolved(self, folder: Path) -> Source:
        """With what its files say in their place. `folder` is what relative paths start from."""
        if not isinstance(self.arrivals, Replay):
            return self
        return self.model_copy(update={"arrivals": self.arrivals.resolved(folder)})

    @property
    def expected(self) -> int:
        """About how many requests a run will have; of a closed loop, as many as if answers came at once."""
        arrivals, counts = self.arrivals, [] if self.requests is None else [self.requests]
        if isinstance(arrivals, Replay):
            counts.append(len(arrivals.times or ()))
        elif self.duration is not None:
            rate = arrivals.users / arrivals.think if isinstance(arrivals, Closed) else arrivals.rate
            counts.append(round(self.duration * rate))
        return min(counts)

    def loop(self, seed: int) -> ClosedLoop:
        """The requests of a closed loop, which only a run can ask for."""
        assert isinstance(self.arrivals, Closed)
        return ClosedLoop(self, self.arrivals, self.arrivals.think_s(stream(seed, self.node, "arrivals")))

    def draw(self, seed: int) -> list[Request]:
        """The requests of one run, in order of arrival. The same seed gives the same requests under every policy."""
        return list(self.arrive(seed))

    def arrive(self, seed: int) -> Iterator[Request]:
        """The requests of `draw`, one by one as they are taken: for sources that are many, long or endless.

        InputError when the arrivals are a closed loop.
        """
        if isinstance(self.arrivals, Closed):
            raise InputError(
                f"the arrivals of {self.node!r} are a closed loop: they depend on the answers",
                allowed="closed loops in the simulator",
            )
        times_s = self.arrivals.times_s(stream(seed, self.node, "arrivals"))
        return self._asked(islice(times_s, self.requests))

    def _asked(self, times_s: Iterator[float]) -> Iterator[Request]:
        make = tuple.__new__  # what Request() calls, in a third less time
        node, model, deadline, timeout = self.node, self.model, self.deadline, self.timeout
        priority = self.priority
        end_s = math.inf if self.duration is None else self.duration
        for number, now_s in enumerate(times_s):
            if now_s > end_s:
                return
            deadline_s = None if deadline is None else now_s + deadline
            yield make(Request, (number, node, model, now_s, deadline_s, timeout, priority))


class ClosedLoop:
    """The users of one source. Each has a request under way or is thinking."""

    def __init__(self, source: Source, arrivals: Closed, think_s: Iterator[float]) -> None:
        self._source, self._users, self._think_s = source, arrivals.users, think_s
        self._number = 0

    @property
    def until_s(self) -> float:
        """When nobody asks any more."""
        return math.inf if self._source.duration is None else self._source.duration

    def is_last(self, request: Request) -> bool:
        """Whether no request will come after this one, because there have been so many."""
        return self._source.requests is not None and request.number + 1 == self._source.requests

    def first(self) -> list[Request]:
        """What the users ask first."""
        return [request for _ in range(self._users) if (request := self.after(0.0)) is not None]

    def after(self, now_s: float) -> Request | None:
        """What a user asks next whose request has ended now, however it did; None where the source has stopped."""
        source, number = self._source, self._number
        arrival_s = now_s + next(self._think_s)
        if number == source.requests or (source.duration is not None and arrival_s > source.duration):
            return None
        self._number += 1
        deadline_s = None if source.deadline is None else arrival_s + source.deadline
        return Request(number, source.node, source.model, arrival_s, deadline_s, source.timeout, source.priority)
