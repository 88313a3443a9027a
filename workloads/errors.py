"""The two ways in which Isthmus refuses, told apart by who has to act. Knows nothing else.

`InputError`: what was asked for is wrong; the command line prints it and exits with 2.
`RunFailure`: what was asked for is right, and doing it failed; exit 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class IsthmusError(Exception):
    """Base of every error that Isthmus raises on purpose. Its text is one line for a person."""


class InputError(IsthmusError):
    """Wrong input. The text names the place (file and field), the value, and what is allowed."""

    def __init__(self, problem: str, *, where: object = None, allowed: str | None = None) -> None:
        self.problem, self.where, self.allowed = problem, where, allowed
        text = problem if where is None else f"{where}: {problem}"
        super().__init__(text if allowed is None else f"{text} (allowed: {allowed})")

    def __reduce__(self) -> tuple[object, ...]:
        return (_again, (type(self), self.problem, self.where, self.allowed))


class RunFailure(IsthmusError):
    """The work itself failed: a policy raised, an actor could not be started, the disk is full."""


def _again(kind: type[InputError], problem: str, where: object, allowed: str | None) -> InputError:
    return kind(problem, where=where, allowed=allowed)


def unknown(what: str, name: str, known: Iterable[str], *, where: object = None) -> InputError:
    """The error for a name that is not there, with the nearest names that are."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return InputError(f"unknown {what} {name!r}{hint}", where=where, allowed=", ".join(known) or "none are defined")


@contextmanager
def within(where: object) -> Iterator[None]:
    """What is wrong inside is wrong at a field: its place, where it has one, becomes part of the problem."""
    try:
        yield
    except InputError as error:
        problem = error.problem if error.where is None else f"{error.where}: {error.problem}"
        raise InputError(problem, where=where, allowed=error.allowed) from None
