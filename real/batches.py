"""What batches cost: the whole model on several requests at once, timed in turns with one request at a time.

Knows sessions and the clock. Must not know Ray, policies or who shows the progress. Like the profiler it can run in
any process.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from random import Random

import numpy as np

from isthmus.real.backend import Array
from isthmus.real.backend import backend as find_backend
from isthmus.real.session import PartSession, random_input
from isthmus.workloads.backend import DEFAULT, BackendSpec
from isthmus.workloads.errors import InputError, RunFailure, within
from isthmus.workloads.fit import session_means
from isthmus.workloads.model import Model, model_proto
from isthmus.workloads.profile import BatchCost
from isthmus.workloads.progress import Progress

_WARM_UP = 3  # runs after loading, not counted
_TOLERANCE = 1e-4  # of the largest number in an answer


def measure_batches(
    model: Model,
    sizes: Iterable[int],
    *,
    rounds: int = 14,
    pace_s: float = 0.02,
    backend: BackendSpec = DEFAULT,
    progress: Progress | None = None,
) -> tuple[BatchCost, ...]:
    """What batches of `sizes` cost on one thread of this machine, by the backend's clock; one of 1 needs no measuring.

    Each size is timed beside single requests, `rounds` runs of either in random turns, after the thread has idled for
    `pace_s` as in the profiler: the machine's drift falls on both alike and is divided out, and no more than two
    sessions are loaded. `progress(done, total, text)` counts runs.

    Raises InputError for numbers out of range, and for a model that cannot be batched: one without room for it, or
    whose answer to a batch is not, row by row, its answers to the same requests alone.
    """
    wanted = sorted(set(sizes) - {1})
    if rounds < 1 or pace_s < 0 or any(size < 1 for size in wanted):
        problem = f"cannot time batches of {', '.join(map(str, wanted))} in {rounds} rounds, {pace_s} s apart"
        raise InputError(problem, allowed="sizes >= 1, rounds >= 1, pace >= 0")
    if not wanted:
        return ()
    feeds = [random_input(model, number, seed=0) for number in range(wanted[-1])]
    runtime = find_backend(backend)
    single = PartSession(model, model.whole(), backend=runtime)
    answers = [single.run(feed) for feed in feeds]
    costs = []
    for done, size in enumerate(wanted):
        batch = {name: np.concatenate([feed[name] for feed in feeds[:size]]) for name in model.inputs}
        with within(f"{model.name} in batches of {size}"):
            session = PartSession(model, model.whole(), proto=model_proto(model, size), backend=runtime)
            _check_rows(_answer(session, batch), answers[:size])
        pair = ((single, feeds[0]), (session, batch))
        for either, feed in pair:
            for _ in range(_WARM_UP):
                either.run(feed)

        rng = Random(size)
        owners: list[int] = []
        samples_s: list[float] = []
        for turn in range(rounds):
            for k in rng.sample((0, 1), 2):
                time.sleep(pace_s)
                samples_s.append(pair[k][0].timed(pair[k][1])[1])
                owners.append(k)
            if progress is not None:
                progress(done * rounds + turn + 1, len(wanted) * rounds, f"{model.name} in batches of {size}")
        alone_s, together_s = session_means(owners, samples_s)
        kept = tuple(round(sample_s, 8) for k, sample_s in zip(owners, samples_s, strict=True) if k == 1)
        costs.append(BatchCost(size=size, ratio=float(together_s / alone_s), samples_s=kept))
    return tuple(costs)


def _answer(session: PartSession, batch: Mapping[str, Array]) -> dict[str, Array]:
    """InputError where the session, shaped for the batch, does not run: shapes can be wrong where nothing tells."""
    try:
        return session.run(batch)
    except RunFailure as error:
        raise InputError(str(error)) from None


def _check_rows(together: Mapping[str, Array], alone: list[dict[str, Array]]) -> None:
    """InputError unless each row of an answer to a batch is the answer to that request alone."""
    for name, rows in together.items():
        expected = np.concatenate([np.atleast_1d(answer[name]) for answer in alone]).astype(np.float64)
        scale = np.abs(expected[np.isfinite(expected)]).max(initial=0.0)
        if rows.shape != expected.shape:
            raise InputError(f"output {name!r} is {list(rows.shape)}, not {list(expected.shape)}: no row per request")
        if not np.allclose(rows, expected, rtol=0.0, atol=_TOLERANCE * scale, equal_nan=True):
            raise InputError(f"output {name!r} is another than that of the same requests alone")
