"""How backends compare on this machine: how far their answers are from ONNX Runtime's, and what they take.

Knows sessions. Prints nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from isthmus.workloads.backend import DEFAULT, BackendSpec
from isthmus.workloads.errors import InputError
from isthmus.workloads.model import Model, load_model, model_proto
from isthmus.workloads.progress import Progress

_RUNS = 12


def bench_backends(
    models: Sequence[str], backends: Sequence[BackendSpec], *, cuts: int = 3, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """A row per model and backend.

    `error` is the largest difference from ONNX Runtime's answer of the whole model, relative to its largest number:
    of the whole and of two parts joined at each of so many cuts. `run_s` and `load_s` are of the whole, medians of runs
    in turns with ONNX Runtime, whose time is the unit of `relative`. A row has a `problem` where a part is refused.
    """
    rows = []
    for number, (name, spec) in enumerate(itertools.product(models, backends)):
        if progress is not None:
            progress(number, len(models) * len(backends), f"{name} in {spec.name}")
        model = load_model(name)
        row = {"model": model.name, "backend": str(spec)}
        try:
            rows.append({**row, **_measure(model, spec, cuts), "problem": None})
        except InputError as error:
            rows.append({**row, "problem": str(error)})
    return rows


def _measure(model: Model, spec: BackendSpec, cuts: int) -> dict[str, Any]:
    from isthmus.real.backend import backend, difference
    from isthmus.real.session import PartSession, random_input

    runtime, proto = backend(spec), model_proto(model)
    given = random_input(model, 0, seed=1)
    reference = PartSession(model, model.whole(), proto=proto, backend=backend(DEFAULT))
    expected = reference.run(given)

    def joined(edges: Sequence[int]) -> float:
        tensors = dict(given)
        for first, last in itertools.pairwise(edges):
            session = PartSession(model, model.span(first, last), proto=proto, backend=runtime)
            tensors |= session.run({name: tensors[name] for name in session.inputs})
            session.close()
        return max(difference(tensors[name], right) for name, right in expected.items())

    last = len(model.blocks)
    inner = np.linspace(0, last, cuts + 2).round().astype(int).tolist()[1:-1]
    errors = [joined([0, last]), *(joined([0, cut, last]) for cut in inner if 0 < cut < last)]
    session = PartSession(model, model.whole(), proto=proto, backend=runtime)
    pairs = [(session.timed(given)[1], reference.timed(given)[1]) for _ in range(_RUNS)]
    own_s, reference_s = np.median(pairs[2:], axis=0)
    return {
        "version": runtime.version,
        "clock": session.clock,
        "error": max(errors),
        "tolerance": runtime.tolerance,
        "load_s": session.load_s,
        "run_s": float(own_s),
        "relative": float(own_s / reference_s),
    }
