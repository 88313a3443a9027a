"""Rolling out new versions of models while requests go on: staged node by node, switched source by source, or undone.

A version that is rolled out
1. is *staged*: node by node gets its files, and loads, warms and checks what it has of the model, beside the old one;
2. is *switched* to: source by source begins its attempts with it, and its first answers are watched;
3. is alone, when no attempt that was begun with the old one is open: nodes forget that.
An attempt is of one version from beginning to end, so that no answer is a mix. Where a check fails, sources are
switched back, and when no attempt of the new version is open, nodes forget that one.

It never waits: the loop that drives the cell calls `step` again and again. Knows the fleet and records.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from isthmus.policies.plan import Plan
from isthmus.policies.records import Record
from isthmus.real.cluster import ActorGone
from isthmus.real.fleet import Fleet
from isthmus.real.letters import Version
from isthmus.real.release import Release, release
from isthmus.workloads.errors import IsthmusError
from isthmus.workloads.updates import Update

_WATCHED = 5
"""Answers of a source that are watched before the next one is switched,"""
_WATCHED_S = 10.0
"""or those that come in this time, if they are fewer."""


class _Undone(Exception):
    """A check has failed."""


class Rollouts:
    """All those of one cell, one after another. `sources` says which models are asked for where."""

    def __init__(self, fleet: Fleet, sources: Mapping[str, Collection[str]], updates: Sequence[Update]) -> None:
        self._fleet, self._sources = fleet, sources
        self._due = deque((update.at_s, release(update.model, fleet.parts_of(update.model.name))) for update in updates)
        self.versions = {name: model.version for name, model in fleet.testbed.models.items()}
        """With which attempts are to begin, by model, at a source that starts now."""
        self.rows: list[dict[str, Any]] = [
            {"model": of.model.name, "from": None, "to": of.model.version, "began_s": None, "done_s": None,
             "outcome": "unfinished", "reason": "the run ended before it"}
            for _, of in self._due
        ]  # fmt: skip
        """What became of each, as `run.json` has it."""
        self._begun = 0
        self._course: Iterator[list[Any]] | None = None
        self._awaited: list[Any] = []
        self._now_s = 0.0
        self._under_way: Mapping[str, Collection[Version]] = {}
        self._watched: Version | None = None
        self._seen: Counter[str] = Counter()
        self._wrong: str | None = None

    @property
    def going(self) -> bool:
        """Whether one is under way."""
        return self._course is not None

    @property
    def next_s(self) -> float:
        """When the next one is due."""
        return self._due[0][0] if self._due else math.inf

    def see(self, record: Record) -> None:
        """An answer has come."""
        if record.version is None or (record.model, record.version) != self._watched:
            return
        self._seen[record.source] += 1
        error = record.answer_error
        lossy = record.plan is not None and bool(Plan.from_json(record.plan).codecs)
        if (record.correct is False and not lossy) or (error is not None and not math.isfinite(error)):
            self._wrong = self._wrong or f"an answer at {record.source} was not the whole model's: {error:.2g} off"

    def hear(self, spoilt: Mapping[Version, str]) -> None:
        """Attempts have come to nothing at a node: of these versions, and why."""
        if self._watched is not None and self._watched in spoilt:
            self._wrong = self._wrong or spoilt[self._watched]

    def step(self, now_s: float, under_way: Mapping[str, Collection[Version]]) -> None:
        """Go on as far as possible. `under_way` are the sources that run, and what their open attempts began with."""
        self._now_s, self._under_way = now_s, under_way
        if self._course is None and self.next_s <= now_s:
            self._course, self._awaited = self._roll_out(self._due.popleft()[1], self.rows[self._begun]), []
            self._begun += 1
        if self._course is not None and self._fleet.are_done(self._awaited):
            try:
                self._awaited = next(self._course)
            except StopIteration:
                self._course = None

    # Each yields what to wait for before it goes on

    def _roll_out(self, new: Release, row: dict[str, Any]) -> Iterator[list[Any]]:
        model, version = new.model.name, new.model.version
        old = self.versions[model]
        row |= {"from": old, "began_s": self._now_s, "reason": "the run ended meanwhile"}
        if old == version:
            row |= {"done_s": self._now_s, "outcome": "done", "reason": None}
            return
        self._watched, self._wrong = (model, version), None
        self._seen.clear()
        try:
            yield from self._stage(new)
            self.versions[model] = version
            for source in self._asking(model):
                yield from self._switch(source, model, version)
            yield from self._until_none(model, old, check=True)
        except _Undone as why:
            self.versions[model] = old
            for source in self._asking(model):
                self._fleet.ask(source, "use", model, old)
            yield []
            yield from self._until_none(model, version, check=False)
            self._fleet.withdraw((model, version))
            row |= {"done_s": self._now_s, "outcome": "rolled-back", "reason": str(why)}
        else:
            self._fleet.withdraw((model, old))
            row |= {"done_s": self._now_s, "outcome": "done", "reason": None}
        self._watched = None

    def _stage(self, new: Release) -> Iterator[list[Any]]:
        self._fleet.offer(new)
        version = new.model.name, new.model.version
        while (lacking := self._fleet.lacking(version)) is not None:
            staging = self._fleet.stage(lacking, version)
            yield [staging.done]
            try:
                self._fleet.staged(staging)
            except ActorGone:  # who comes back in its place is given it before it is let in
                yield []
            except IsthmusError as error:
                raise _Undone(f"{lacking}: {error}") from None

    def _switch(self, source: str, model: str, version: str) -> Iterator[list[Any]]:
        if source not in self._under_way:
            return  # if it starts again, then with what `versions` says
        self._fleet.ask(source, "use", model, version)
        until_s = self._now_s + _WATCHED_S
        while source in self._under_way and self._seen[source] < _WATCHED and self._now_s < until_s:
            yield []
            self._check()

    def _until_none(self, model: str, version: str, *, check: bool) -> Iterator[list[Any]]:
        """Until no attempt is open that was begun with a version."""
        yield []  # what is under way is known from before
        while any((model, version) in of for of in self._under_way.values()):
            if check:
                self._check()
            yield []
        if check:
            self._check()

    def _check(self) -> None:
        wrong = self._wrong or (self._watched and self._fleet.broken.get(self._watched))
        if wrong:
            raise _Undone(wrong)

    def _asking(self, model: str) -> list[str]:
        return [source for source, models in self._sources.items() if model in models]
