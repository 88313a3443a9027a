"""Measuring a model on this machine: telling parts, timed as real sessions, fitted into a profile.

Knows sessions, their clock and ONNX Runtime's profiler. Must not know Ray, policies or who shows the progress. It can
run in any process; for an emulated node it should run inside the node's own actor.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import re
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import psutil

from isthmus.real.backend import Array
from isthmus.real.backend import backend as find_backend
from isthmus.real.host_facts import processor
from isthmus.real.onnxruntime_backend import CPU, session_options
from isthmus.real.session import PartSession, random_input, random_tensors
from isthmus.workloads.backend import DEFAULT, BackendSpec
from isthmus.workloads.errors import InputError
from isthmus.workloads.fit import fit_blocks, fit_line, session_means
from isthmus.workloads.model import Model, members, model_proto
from isthmus.workloads.profile import BlockCost, CutCost, Machine, Profile, SessionCost
from isthmus.workloads.progress import Progress

Span = tuple[int, int]

_MEMORY_SHARE = 0.25  # of the free memory, for the weights of the sessions that stay loaded
_VISITS = 4  # at most, to a session that does not stay loaded
_WARM_UP = 3  # runs after loading, not counted: memory is laid out, caches fill
_PER_KIND = 40  # heads, tails, pairs ... at most: a model with more cuts is sampled evenly
_WINDOWS = (2, 5)  # blocks in the short inner sessions
_KERNEL_RUNS = 10  # of the whole model under ONNX Runtime's own profiler


def profile_model(
    model: Model,
    *,
    rounds: int = 14,
    runs: int = 1,
    pace_s: float = 0.02,
    quick: bool = False,
    label: str = "host",
    backend: BackendSpec = DEFAULT,
    progress: Progress | None = None,
) -> Profile:
    """Measure `model` on one thread of this machine: CPU time, or wall time where the backend computes elsewhere.

    The sessions of `profile_spans` are timed by `time_spans`, and costs fitted to them by `fit_profile`. With
    `quick` only the whole, its halves and its quarters are timed, and shared out among the blocks as ONNX
    Runtime's own profiler does it for the whole: seconds instead of a minute, and coarse, since a part is not
    compiled as it is inside the whole (and, with another `backend`, not as that one does it). `label` names the
    machine. `progress(done, total, text)` is called as it goes on. InputError if the backend is not there, or does not
    take a part.
    """
    proto = model_proto(model)
    spans = _pieces(len(model.blocks)) if quick else profile_spans(model)
    sessions = time_spans(
        model, spans, proto, rounds=rounds, runs=runs, pace_s=pace_s, backend=backend, progress=progress
    )
    if not quick:
        return fit_profile(model, sessions, pace_s=pace_s, label=label, backend=backend)
    kernels_s = _kernel_times(model, proto)
    of_spans_s = [float(kernels_s[first:last].sum()) for first, last in spans]
    session_s, scale = fit_line(of_spans_s, [session.mean_s for session in sessions])
    return _profile(
        model,
        sessions,
        pace_s=pace_s,
        label=label,
        backend=backend,
        provenance=f"kernel times of ONNX Runtime's profiler, scaled by {scale:.3f} to {len(spans)} sessions",
        session_s=session_s,
        blocks=tuple(BlockCost(seconds=scale * float(kernel_s), source="scaled") for kernel_s in kernels_s),
        cuts=(CutCost(),) * len(model.cuts),
    )


def profile_spans(model: Model) -> list[Span]:
    """The (first, last) of the sessions to time: the whole, every block, head, tail, pair and run of five.

    At most 40 of each kind but the blocks, evenly chosen. No session comes twice.
    """
    last = len(model.blocks)
    spans = [(0, last), *((block, block + 1) for block in range(last))]
    spans += [(0, cut) for cut in _evenly(1, last - 1)] + [(cut, last) for cut in _evenly(1, last - 1)]
    spans += [(first, first + size) for size in _WINDOWS for first in _evenly(0, last - size)]
    return list(dict.fromkeys(spans))


def _pieces(blocks: int) -> list[Span]:
    """The whole, its halves and its quarters."""
    edges = [np.linspace(0, blocks, count + 1).round().astype(int).tolist() for count in (1, 2, 4)]
    spans = [span for edge in edges for span in itertools.pairwise(edge) if span[0] < span[1]]
    return list(dict.fromkeys(spans))


def fit_profile(
    model: Model,
    sessions: Sequence[SessionCost],
    *,
    pace_s: float,
    label: str = "host",
    backend: BackendSpec = DEFAULT,
) -> Profile:
    """The profile that follows from timed sessions: see `workloads/fit.py`."""
    spans = [(session.first, session.last) for session in sessions]
    fit = fit_blocks(spans, [session.mean_s for session in sessions], len(model.blocks))
    return _profile(
        model,
        sessions,
        pace_s=pace_s,
        label=label,
        backend=backend,
        provenance=f"least squares over {len(sessions)} sessions of {len(sessions[0].samples_s)} runs",
        session_s=fit.session_s,
        blocks=tuple(BlockCost(seconds=float(cost_s), source="fitted") for cost_s in fit.block_s),
        cuts=tuple(
            CutCost(enter_s=float(enter_s), leave_s=float(leave_s))
            for enter_s, leave_s in zip(fit.enter_s, fit.leave_s, strict=True)
        ),
    )


def time_spans(
    model: Model,
    spans: Sequence[Span],
    proto: onnx.ModelProto,
    *,
    rounds: int,
    runs: int,
    pace_s: float,
    backend: BackendSpec = DEFAULT,
    progress: Progress | None = None,
) -> list[SessionCost]:
    """Time `model.span(first, last)` for each of `spans`: `rounds` visits of `runs` runs each.

    Every round visits all of them in a new random order, so that the machine's drift falls on all alike and
    can be told from their costs. The thread idles for `pace_s` before each run, as it does between requests:
    a run after idleness costs more than one in a tight loop. Sessions stay loaded while their weights fit in
    a quarter of the free memory; larger ones are loaded again for each of a few visits with more runs.
    `proto` is `model_proto(model)`. Raises InputError for numbers out of range.
    """
    if rounds < 1 or runs < 1 or pace_s < 0:
        problem = f"cannot time {rounds} rounds of {runs} runs, {pace_s} s apart"
        raise InputError(problem, allowed="rounds >= 1, runs >= 1, pace >= 0")
    weights_bytes = [model.weights_bytes(model.span(*span)) for span in spans]
    by_size = np.argsort(weights_bytes, kind="stable")
    fit = np.cumsum(np.take(weights_bytes, by_size)) <= _MEMORY_SHARE * psutil.virtual_memory().available
    stay = set(by_size[fit].tolist())
    pause = max(1, rounds // _VISITS)  # rounds from one visit to the next for those that do not stay
    visits = [[k for k in range(len(spans)) if k in stay or turn % pause == 0] for turn in range(rounds)]

    runtime = find_backend(backend)
    rng = Random(0)
    loaded: dict[int, PartSession] = {}
    feeds: dict[int, dict[str, Array]] = {}
    load_s = [0.0] * len(spans)
    owners: list[int] = []
    samples_s: list[float] = []
    done, total = 0, sum(map(len, visits))
    for turn, present in enumerate(visits):
        for k in rng.sample(present, len(present)):
            first, last = spans[k]
            session = loaded.get(k)
            if session is None:
                session = PartSession(model, model.span(first, last), proto=proto, backend=runtime)
                load_s[k] = session.load_s
                if first not in feeds:
                    feeds[first] = random_tensors(model, session.inputs, np.random.default_rng(first))
                for _ in range(_WARM_UP):
                    session.run(feeds[first])
            if k in stay:
                loaded[k] = session
            for _ in range(runs if k in stay else runs * pause):
                time.sleep(pace_s)
                samples_s.append(session.timed(feeds[first])[1])
                owners.append(k)
            done += 1
            if progress is not None:
                progress(done, total, f"{model.name}, round {turn + 1} of {rounds}")

    means_s = session_means(owners, samples_s)
    by_session: list[list[float]] = [[] for _ in spans]
    for k, sample_s in zip(owners, samples_s, strict=True):
        by_session[k].append(round(sample_s, 8))
    return [
        SessionCost(
            first=span[0],
            last=span[1],
            kind=_kind(span, len(model.blocks)),
            load_s=load_s[k],
            weights_bytes=weights_bytes[k],
            mean_s=float(means_s[k]),
            samples_s=tuple(by_session[k]),
        )
        for k, span in enumerate(spans)
    ]


def _evenly(first: int, last: int) -> list[int]:
    """The whole numbers from `first` to `last`, or `_PER_KIND` of them evenly spread."""
    count = max(0, last - first + 1)
    return [round(float(number)) for number in np.linspace(first, last, min(_PER_KIND, count))]


def _kind(span: Span, blocks: int) -> Literal["whole", "block", "head", "tail", "part"]:
    first, last = span
    if span == (0, blocks):
        return "whole"
    if last == first + 1:
        return "block"
    return "head" if first == 0 else "tail" if last == blocks else "part"


def _kernel_times(model: Model, proto: onnx.ModelProto) -> npt.NDArray[np.float64]:
    """Seconds per block [blocks] by ONNX Runtime's profiler: relative weights rather than costs.

    The optimised graph has other nodes than the model. A kernel is named after a node or after a tensor, with
    a suffix, and so belongs to a layer; one that is named after neither (a change of memory layout) to the
    layer that ran before it. A layer without a kernel was fused into one that follows: they share its time by
    their operations.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = session_options()
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "kernels")
        session = ort.InferenceSession(proto.SerializeToString(), options, [CPU])
        feeds = random_input(model, 0, seed=0)
        for _ in range(_KERNEL_RUNS):
            session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text())

    known = {name: layer.index for layer in model.layers for name in (layer.name, *layer.outputs)}
    kernels: dict[str, list[float]] = {}
    for event in events:
        name, is_kernel = re.subn("_kernel_time$", "", event["name"])
        if is_kernel:
            kernels.setdefault(name, []).append(1e-6 * event["dur"])
    kernel_s = np.zeros(len(model.layers))
    at = 0
    for name, taken_s in kernels.items():  # in the order of the first run
        stem = name
        while stem not in known and "_" in stem:
            stem = stem.rpartition("_")[0]
        at = known.get(stem, at)
        kernel_s[at] += np.median(taken_s) * len(taken_s) / _KERNEL_RUNS

    user: dict[str, int] = {}
    for layer in reversed(model.layers):
        user |= dict.fromkeys(layer.inputs, layer.index)
    owner = np.arange(len(model.layers))
    for layer in reversed(model.layers):
        if kernel_s[layer.index] == 0 and layer.outputs[0] in user:
            owner[layer.index] = owner[user[layer.outputs[0]]]
    flop = np.array([layer.flop + 1.0 for layer in model.layers])
    layer_s = kernel_s[owner] * flop / np.bincount(owner, flop, minlength=len(owner))[owner]
    return np.array([sum(layer_s[index] for index in members(block)) for block in model.blocks])


def _profile(
    model: Model,
    sessions: Sequence[SessionCost],
    *,
    pace_s: float,
    label: str,
    backend: BackendSpec,
    provenance: str,
    session_s: float,
    blocks: tuple[BlockCost, ...],
    cuts: tuple[CutCost, ...],
) -> Profile:
    runtime = find_backend(backend)
    return Profile(
        model=model.name,
        sha256=model.sha256,
        machine=this_machine(label),
        backend=backend.name,
        backend_version=runtime.version,
        backend_arguments=backend.arguments,
        provider=runtime.device,
        clock=runtime.clock(1),
        threads=1,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        pace_s=pace_s,
        provenance=provenance,
        session_s=session_s,
        blocks=blocks,
        cuts=cuts,
        sessions=tuple(sessions),
    )


def this_machine(label: str) -> Machine:
    """This machine, with the name of its processor or board."""
    return Machine(
        label=label,
        cpu=processor(),
        cores=os.cpu_count() or 1,
        platform=platform.platform(),
        python=platform.python_version(),
    )
