"""How well a profile predicts parts that it has not seen. Knows the profiler; must not know policies.

The acceptance figure of profiling: the mean relative error over random interior parts (neither head, tail,
whole, block, nor otherwise among the profile's sessions) of what the profile says against what the part takes
as a session of its own. The parts are timed in the same rounds as the profile's sessions, so that the figure is
about the profile and not about how the machine has changed meanwhile.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from isthmus.workloads.model import load_model, model_proto
from isthmus.workloads.progress import Progress


def bench_profile(
    models: Sequence[str] = ("squeezenet", "shufflenet", "resnet50"),
    *,
    parts: int = 40,
    seed: int = 0,
    quick: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Profile each model, time `parts` random interior parts of it besides, and compare.

    Returns `rows`, one per model, with `mean_error` and `worst_error` over the parts, `bias` (the mean signed
    error), the number of `sessions` of the profile, and the `seconds` that all took; and `worst_mean_error`.
    Errors are relative to what was measured. `seed` chooses the parts. `quick` judges the quick profile.
    """
    rows = [_row(name, parts, seed, quick, progress) for name in models]
    return {"rows": rows, "worst_mean_error": max(row["mean_error"] for row in rows)}


def _row(name: str, parts: int, seed: int, quick: bool, progress: Progress | None) -> dict[str, Any]:
    from isthmus.real.profiler import fit_profile, profile_model, profile_spans, time_spans

    started_s = time.perf_counter()
    model = load_model(name)
    seen = profile_spans(model)
    blocks = len(model.blocks)
    unseen = [
        span for span in itertools.combinations(range(1, blocks), 2) if span[1] - span[0] > 1 and span not in seen
    ]
    picks = np.random.default_rng(seed).choice(len(unseen), min(parts, len(unseen)), replace=False)
    chosen = [unseen[pick] for pick in picks]
    spans = chosen if quick else [*seen, *chosen]
    pace_s = 0.02
    sessions = time_spans(model, spans, model_proto(model), rounds=14, runs=1, pace_s=pace_s, progress=progress)
    if quick:
        profile = profile_model(model, quick=True, pace_s=pace_s)
    else:
        profile = fit_profile(model, sessions[: len(seen)], pace_s=pace_s)
    taken_s = np.array([session.mean_s for session in sessions[-len(chosen) :]])
    errors = np.array([profile.span_s()[span] for span in chosen]) / taken_s - 1
    return {
        "model": name,
        "parts": len(chosen),
        "mean_error": float(np.abs(errors).mean()),
        "worst_error": float(np.abs(errors).max()),
        "bias": float(errors.mean()),
        "sessions": len(profile.sessions),
        "seconds": round(time.perf_counter() - started_s, 1),
    }
