"""How long work tells how far it is, to whoever shows it. Knows nothing else."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int, str], None]
"""Told: how much is done, of how much, and what is being done."""
