"""Validation: calibrate, simulate, run for real, once more, and lay the runs side by side. For any experiment."""

from __future__ import annotations

from pathlib import Path

from isthmus.experiments.calibrating import calibrate
from isthmus.experiments.compare import Comparison, compare
from isthmus.experiments.execute import Experiment, simulate
from isthmus.experiments.lab import ground_here
from isthmus.experiments.real_run import run
from isthmus.experiments.run_folder import Run
from isthmus.workloads.progress import Progress

SIMULATED, REAL, REPEAT = "simulated", "real", "repeat"
"""The run folders that a validation leaves."""


def validate(
    experiment: Experiment,
    folder: Path,
    *,
    name: str,
    repeat: bool = True,
    keep_profiles: bool = False,
    progress: Progress,
) -> Comparison:
    """How far simulation and reality are apart, from a calibration made just before. Its runs are left in `folder`.

    In a lab this holds and plays the lab's links.
    """
    ground = ground_here(experiment)
    calibrate(
        experiment,
        keep_profiles=keep_profiles,
        steady=None if ground is None else ground.hold,
        progress=named(progress, f"{name}: calibrating"),
    )
    simulate(experiment, folder / SIMULATED, replace=True, progress=named(progress, f"{name}: simulating"))
    run(experiment, folder / REAL, replace=True, ground=ground, progress=named(progress, f"{name}: running"))
    if repeat:
        again = named(progress, f"{name}: running again")
        run(experiment, folder / REPEAT, replace=True, ground=ground, progress=again)
    return compared(folder, repeat=repeat)


def compared(folder: Path, *, repeat: bool) -> Comparison:
    """What a validation left."""
    again = Run.load(folder / REPEAT) if repeat else None
    return compare(Run.load(folder / SIMULATED), Run.load(folder / REAL), again)


def named(progress: Progress, step: str) -> Progress:
    """Progress that says what of all it is."""
    return lambda done, total, text: progress(done, total, f"{step} ({text})")
