"""A version of a model on its way to the nodes: its files, and the answers by which each can tell that it works there.

Knows sessions and files. Must not know Ray, nodes or requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from isthmus.real.letters import Tensors
from isthmus.real.model_files import Files, packed
from isthmus.real.session import Array, PartSession, inside, random_input
from isthmus.workloads.errors import RunFailure
from isthmus.workloads.model import Model, Part

Probe = tuple[Tensors, Tensors]
"""What a part is given inside the whole model, and what it makes of that there."""


@dataclass(frozen=True)
class Release:
    model: Model
    files: Files
    probes: Mapping[Part, Probe]


def release(model: Model, parts: Iterable[Part]) -> Release:
    """A version with probes of these parts. InputError when its file has changed since it was loaded."""
    ends = {part: (model.part_inputs(part), model.part_outputs(part)) for part in parts}
    names = {name for end in ends.values() for side in end for name in side}
    values = inside(model, names, random_input(model, 0, 0)) if names else {}
    probes = {
        part: ({name: values[name] for name in given}, {name: values[name] for name in made})
        for part, (given, made) in ends.items()
    }
    return Release(model, packed(model), probes)


def check(session: PartSession, probe: Probe, tolerance: float) -> None:
    """RunFailure unless a part makes of its probe what the whole model does, in numbers."""
    given, expected = probe
    made = session.run(given)
    check_finite(made, str(session.part))
    for name, value in expected.items():
        wide = value.astype(np.float64)
        error = float(np.max(np.abs(made[name].astype(np.float64) - wide)) / (np.max(np.abs(wide)) or 1.0))
        if not error <= tolerance:
            raise RunFailure(f"{session.part} makes another {name!r} than in the whole model: {error:.2g} off")


def check_finite(tensors: Mapping[str, Array], where: str) -> None:
    """RunFailure where a tensor holds what is no number."""
    for name, value in tensors.items():
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise RunFailure(f"{where}: {name!r} holds what is not a number")
