"""From timed sessions to the cost of each block. Knows numbers only: no models, files, clocks or runtimes.

Why a fit: the sum of separately timed blocks is too large, because every session pays for entering and leaving
(a call, a change of memory layout, an operator that would have been fused with its neighbour), and a difference
of two long sessions drowns in noise. So a session of blocks i to j-1 is modelled as

    session_s + enter_s[i] + block_s[i] + ... + block_s[j-1] + leave_s[j]

and all is fitted at once to heads, tails and short runs of blocks. Single blocks are left out: a lone operator
is often compiled in another way, and such points bend the fit for everything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.ndimage import median_filter
from scipy.optimize import lsq_linear, nnls
from scipy.stats import trim_mean

Floats = npt.NDArray[np.float64]

HICCUP = 3.0  # times the median: beyond it a sample tells about the host, not about the part
_NEIGHBOURS = 25  # samples over which the machine's speed is taken as constant
_TRIM = 0.2  # of the samples at either end
_SHRINKAGE = 0.1  # relative error that weighs as much as entering or leaving at the cost of a whole block


@dataclass(frozen=True, slots=True)
class Fit:
    """Seconds: per block [blocks], for entering and leaving at each cut [blocks + 1], and for any session."""

    block_s: Floats
    enter_s: Floats
    leave_s: Floats
    session_s: float


def typical(samples_s: Sequence[float] | Floats) -> Floats:
    """The samples without the host's hiccups (more than `HICCUP` times the median), in their order.

    What is left keeps the ordinary spread, which a simulation needs and a median would drop. Empty in, empty
    out.
    """
    samples = np.asarray(samples_s, dtype=np.float64)
    return samples if samples.size == 0 else samples[samples <= HICCUP * np.median(samples)]


def session_means(sessions: Sequence[int], samples_s: Sequence[float]) -> Floats:
    """Mean seconds of each session [max(sessions) + 1], given samples of all in the order they were taken.

    `sessions[k]` says whose sample k is; every session needs one. A machine drifts, by a tenth within seconds
    on a shared host: its speed at each moment is the running median, over all sessions, of samples relative
    to their session, and is divided out. Then a trimmed mean per session, which is steady, times the ratio of
    mean to trimmed mean over all samples (without hiccups), because it is the mean that a queue feels.
    """
    owner = np.asarray(sessions)
    logs = np.log(np.asarray(samples_s, dtype=np.float64).clip(min=1e-9))
    groups = [np.flatnonzero(owner == session) for session in range(int(owner.max()) + 1)]
    drift = np.zeros_like(logs)
    for _ in range(4):  # drift and centres in turn: settled after two or three
        centres = np.array([np.median((logs - drift)[group]) for group in groups])
        drift = median_filter(logs - centres[owner], size=min(_NEIGHBOURS, len(logs)), mode="nearest")
        drift -= np.log(np.exp(drift).mean())
    steady = np.exp(logs - drift)
    trimmed = np.array([trim_mean(steady[group], _TRIM) for group in groups])
    ratios = steady / trimmed[owner]
    return np.asarray(trimmed * ratios[ratios <= HICCUP].mean())


def fit_blocks(spans: Sequence[tuple[int, int]], means_s: Sequence[float], blocks: int) -> Fit:
    """Fit the model above to sessions: number k took `means_s[k]` for blocks `spans[k] = (first, last)`.

    Weighted least squares with weights 1/mean², so that relative errors count alike. Blocks and `session_s`
    are not negative. Entering and leaving may be, and are drawn towards nothing, which also settles what the
    data leave open. Single blocks are not used unless the model has no more.
    """
    used = [k for k, (first, last) in enumerate(spans) if last - first > 1] or list(range(len(spans)))
    means = np.array([means_s[k] for k in used], dtype=np.float64)
    enter, leave, session = blocks, 2 * blocks + 1, 3 * blocks + 2  # where each kind of unknown begins
    design = np.zeros((len(used), session + 1))
    for row, k in enumerate(used):
        first, last = spans[k]
        design[row, first:last] = 1.0
        design[row, [enter + first, leave + last, session]] = 1.0
    lengths = np.array([spans[k][1] - spans[k][0] for k in used])
    prior = np.zeros((session - enter, session + 1))
    prior[:, enter:session] = _SHRINKAGE / np.median(means / lengths) * np.eye(session - enter)
    lowest = np.zeros(session + 1)
    lowest[enter:session] = -np.inf
    known = np.vstack([design / means[:, None], prior])
    target = np.concatenate([np.ones(len(used)), np.zeros(len(prior))])
    costs = np.asarray(lsq_linear(known, target, bounds=(lowest, np.inf)).x, dtype=np.float64)
    return Fit(costs[:enter], costs[enter:leave], costs[leave:session], float(costs[session]))


def fit_rhythm(looped_s: Sequence[float], run_s: Sequence[float], counts: Sequence[int]) -> tuple[float, float]:
    """Scale and shift, neither negative, that turn times in a loop into times in a run; (1, 0) without times.

    Least squares of relative errors, each time with the weight of its number of samples. A scale needs times that
    differ by half at least; else all is scale.
    """
    if not looped_s:
        return 1.0, 0.0
    loop, run, weight = np.asarray(looped_s), np.asarray(run_s), np.sqrt(np.asarray(counts))
    if loop.max() < 1.5 * loop.min():
        return float(np.average(run / loop, weights=weight**2)), 0.0
    design = np.column_stack([loop, np.full(len(loop), loop.mean())]) / run[:, None]
    (scale, shift), _ = nnls(design * weight[:, None], weight)
    return float(scale), float(shift * loop.mean())


def fit_line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Constant and slope, neither negative, of least squared error; (0, 0) without points."""
    if not x:
        return 0.0, 0.0
    design = np.column_stack([np.ones(len(x)), np.asarray(x, dtype=np.float64)])
    scale = design.max(axis=0).clip(min=1e-300)
    solution, _ = nnls(design / scale, np.asarray(y, dtype=np.float64))
    return float(solution[0] / scale[0]), float(solution[1] / scale[1])
