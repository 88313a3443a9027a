"""Nodes that move, and the cell that serves each: the nearest. Knows positions and time; no link and no shell.

A path is piecewise linear, at constant speed between its points. Between two points the squared distances to all cells
differ only by what is linear in time, so the moments of handover are exact: where lines cross.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count, pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from isthmus.workloads.errors import InputError, unknown
from isthmus.workloads.units import Seconds

Position = tuple[FiniteFloat, FiniteFloat]
"""Metres east and north of anywhere."""
Point = tuple[float, float, float]
"""A time in seconds, and where the node is then."""


class _Mobility(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    handover: Seconds = Field(default=0.0, description="how long a node is without a link when its cell changes")


class Waypoints(_Mobility):
    """Along given points, at constant speed from each to the next; it stays at the last, or begins anew."""

    kind: Literal["waypoints"] = "waypoints"
    points: tuple[tuple[Seconds, FiniteFloat, FiniteFloat], ...] = Field(
        min_length=1, description="[time, x, y] in order of time; metres"
    )
    repeat: bool = Field(default=False, description="go back to the first, at once, after the last")

    @model_validator(mode="after")
    def _in_order(self) -> Waypoints:
        if self.points[0][0] != 0 or any(b[0] <= a[0] for a, b in pairwise(self.points)):
            raise ValueError("the times of waypoints start at 0 and increase")
        if self.repeat and len(self.points) < 2:
            raise ValueError("one waypoint does not repeat")
        return self

    def path(self, draw: np.random.Generator) -> Iterator[Point]:
        """The points of the path; endless where it repeats."""
        last = self.points[-1][0]
        for turn in count() if self.repeat else (0,):
            yield from ((turn * last + t, x, y) for t, x, y in self.points)


ANYWHERE = Waypoints(points=((0.0, 0.0, 0.0),))
"""Of a node that moves, when it is not to be told where."""


class RandomWaypoint(_Mobility):
    """To a random place in a rectangle, straight, at a random speed; then a pause, then on (Johnson and Maltz 1996).

    Speeds are uniform between two limits above 0: with a lower limit of 0 nodes would slow down for ever (Yoon, Liu
    and Noble 2003).
    """

    kind: Literal["random-waypoint"] = "random-waypoint"
    area: tuple[Position, Position] = Field(description="two opposite corners, [[x, y], [x, y]] in metres")
    speed: tuple[Annotated[FiniteFloat, Field(gt=0)], Annotated[FiniteFloat, Field(gt=0)]] = Field(
        default=(1.0, 2.0), description="slowest and fastest, metres per second"
    )
    pause: Seconds = 0.0

    @model_validator(mode="after")
    def _a_range(self) -> RandomWaypoint:
        if self.speed[0] > self.speed[1]:
            raise ValueError(f"its slowest speed {self.speed[0]:g} is above its fastest {self.speed[1]:g}")
        if self.area[0] == self.area[1]:
            raise ValueError("its area is a point")
        return self

    def path(self, draw: np.random.Generator) -> Iterator[Point]:
        """The points of the path, endless."""
        corner, other = np.sort(self.area, axis=0)
        now_s, here = 0.0, draw.uniform(corner, other)
        yield now_s, *here.tolist()
        while True:
            there, speed = draw.uniform(corner, other), draw.uniform(*self.speed)
            now_s += float(np.hypot(*(there - here)) / speed)
            here = there
            yield now_s, *here.tolist()
            if self.pause:
                now_s += self.pause
                yield now_s, *here.tolist()


class Positions(_Mobility):
    """Along the positions of a CSV file: one row per moment, and per node where there is a column for it."""

    kind: Literal["file"] = "file"
    file: str = Field(description="CSV, relative to the testbed's file")
    time: str = "time"
    x: str = "x"
    y: str = "y"
    node: str | None = Field(default=None, description="the column with the node's name")

    def read(self, folder: Path, nodes: Sequence[str]) -> list[Waypoints]:
        """The waypoints of each node. Time 0 is the first in the file; until its own first a node is where that has it.

        InputError names the file, and the column or row that is wrong.
        """
        path = folder / self.file
        try:
            table = pd.read_csv(path, comment="#", dtype={self.node: str} if self.node else None)
        except FileNotFoundError:
            raise InputError("no such file", where=path) from None
        except (OSError, ValueError) as error:
            raise InputError(f"not a CSV file: {' '.join(str(error).split())}", where=path) from None
        for column in (self.time, self.x, self.y, *([self.node] if self.node else [])):
            if column not in table.columns:
                raise unknown("column", column, map(str, table.columns), where=path)
        if table.empty:
            raise InputError("holds no position", where=path)
        numbers = table[[self.time, self.x, self.y]].apply(pd.to_numeric, errors="coerce").to_numpy(dtype=float)
        if len(wrong := np.flatnonzero(~np.isfinite(numbers).all(axis=1))):
            raise InputError(f"row {wrong[0] + 1} is not three numbers: time, x, y", where=path)
        numbers = numbers - [numbers[:, 0].min(), 0.0, 0.0]
        if self.node is None:
            return [self._along(numbers, np.arange(len(table)), path)] * len(nodes)
        rows = table.groupby(self.node).indices
        if missing := [node for node in nodes if node not in rows]:
            raise InputError(f"has no row of node {missing[0]!r}", where=path)
        return [self._along(numbers, np.asarray(rows[node]), path) for node in nodes]

    def _along(self, numbers: npt.NDArray[np.float64], rows: npt.NDArray[np.int64], path: Path) -> Waypoints:
        """Through some rows of the file."""
        mine = numbers[rows]
        if len(early := np.flatnonzero(np.diff(mine[:, 0]) <= 0)):
            raise InputError(f"row {rows[early[0] + 1] + 1} is not after the one before it", where=path)
        if mine[0, 0] > 0:
            mine = np.concatenate([[[0.0, *mine[0, 1:]]], mine])
        return Waypoints(points=tuple(map(tuple, mine.tolist())), handover=self.handover)


QUIET = 64
"""Points of a path without a handover, after which `serving` tells where the node is."""

Mobility = Annotated[Waypoints | RandomWaypoint | Positions, Field(discriminator="kind")]


def serving(path: Iterator[Point], cells: Sequence[Position]) -> Iterator[tuple[float, int]]:
    """When which cell becomes the nearest: (0, first), then one entry for every handover, in order of time.

    Of cells that are equally near the one that is named first serves to begin with; later, the one that serves already.
    After a long way without a handover there is an entry with the same cell: whoever follows an endless path within one
    cell has to get on.
    """
    at = np.array(cells, dtype=float)
    origin = at[0].copy()
    at -= origin  # so that squares stay small, and precise, wherever the coordinates begin
    offset = (at**2).sum(axis=1)

    def heights(x: float, y: float) -> Any:
        """Squared distances to all cells, less what is the same for all."""
        return offset - 2 * at @ (x - origin[0], y - origin[1])

    now_s, x, y = next(path)
    cell = int(np.argmin(heights(x, y)))
    yield now_s, cell
    quiet = 0
    for then_s, to_x, to_y in path:
        before = cell
        start, end = heights(x, y), heights(to_x, to_y)
        if then_s == now_s:  # it is somewhere else at once
            nearest = int(np.argmin(end))
            if nearest != cell:
                cell = nearest
                yield now_s, cell
        else:
            share = 0.0
            while end.min() < end[cell]:
                # Lines that are below ours at the end cross ours somewhere: the first of them takes over.
                below = np.flatnonzero(end < end[cell])
                closing = (start[below] - start[cell]) - (end[below] - end[cell])
                crossing = np.maximum((start[below] - start[cell]) / closing, share)
                first = int(np.argmin(crossing))
                tied = below[crossing == crossing[first]]
                share, cell = float(crossing[first]), int(tied[np.argmin(end[tied])])
                yield now_s + share * (then_s - now_s), cell
        now_s, x, y = then_s, to_x, to_y
        quiet = quiet + 1 if cell == before else 0
        if quiet == QUIET:
            quiet = 0
            yield now_s, cell
