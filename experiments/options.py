"""Options that several groups of commands have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from isthmus.workloads.errors import InputError

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and no progress.")]
Described = Annotated[Path, typer.Argument(help="An experiment or a testbed (YAML).", show_default=False)]
Files = Annotated[list[Path], typer.Argument(help="Experiment files (YAML).", show_default=False)]
Into = Annotated[Path, typer.Option("--out", help="Where to write; a folder per experiment in it.")]
Repeat = Annotated[bool, typer.Option(help="Run a second time: how far can two real runs be apart?")]
KeepProfiles = Annotated[bool, typer.Option(help="Calibrate all but the profiles anew.")]


def by_name(files: Sequence[Path]) -> dict[str, Path]:
    """Files by the folders that they are to have. InputError for two of one name."""
    named: dict[str, Path] = {}
    for file in files:
        if (other := named.setdefault(file.stem, file)) is not file:
            raise InputError(f"would be written to where {other} is", where=file, allowed="files of different names")
    return named
