"""What people see in a terminal: tables, progress, numbers with units. Knows rich; no experiment."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

_WIDTH = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120
"""A pipe or a file has no width of its own; 80 columns would break tables that have room."""
console = Console(width=_WIDTH)
messages = Console(stderr=True)
"""For what is not the result: progress, notes, errors. Standard output stays clean for --json."""


def emit(data: Any) -> None:
    """JSON on standard output."""
    json.dump(data, sys.stdout, indent=1, allow_nan=False, default=str)
    sys.stdout.write("\n")


@contextmanager
def progress(title: str, *, quiet: bool = False) -> Iterator[Callable[[int, int, str], None]]:
    """A bar that the callback moves: done, total, what is being done."""
    columns = (
        TextColumn("{task.fields[title]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.description}"),
    )
    with Progress(*columns, console=messages, disable=quiet, transient=not messages.is_terminal) as bar:
        task = bar.add_task("", total=None, title=title)

        def move(done: int, total: int, text: str) -> None:
            bar.update(task, completed=done, total=total, description=text)

        yield move


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, caption: str | None = None) -> None:
    """A table; columns whose heading ends in `>` are set flush right."""
    made = Table(
        title=escape(title),
        caption=None if caption is None else escape(caption),
        title_justify="left",
        caption_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for number, column in enumerate(columns):
        right = column.endswith(">")
        made.add_column(
            column.rstrip(">"), justify="right" if right else "left", overflow="fold", no_wrap=right or number == 0
        )
    for row in rows:
        made.add_row(*("–" if cell is None else escape(str(cell)) for cell in row))
    console.print(made)


def warn(text: str) -> None:
    messages.print(f"[yellow]warning:[/] {escape(text)}", highlight=False, soft_wrap=True)


def milliseconds(seconds: float | None) -> str | None:
    if seconds is None or seconds != seconds:
        return None
    return f"{seconds * 1e3:.1f}" if seconds < 0.1 else f"{seconds * 1e3:.0f}"


def percent(share: float | None, unit: str = " %") -> str | None:
    return None if share is None or share != share else f"{share * 100:.1f}{unit}"
