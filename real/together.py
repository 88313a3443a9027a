"""Several requests through one session: their tensors joined along the batch, its outputs split again.

Knows sessions and shapes. Must not know nodes, time or Ray.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from isthmus.real.letters import Tensors
from isthmus.real.session import Array, PartSession
from isthmus.workloads.errors import InputError
from isthmus.workloads.model import Model, Tensor


def run_together(session: PartSession, model: Model, feeds: Sequence[Tensors], size: int) -> list[dict[str, Array]]:
    """The outputs for each of `feeds`, from one run of a session that is shaped for `size` requests.

    Where there are fewer, the last one fills the room that is left. InputError where a tensor has no room for several.
    """
    if size == 1:
        return [session.run(feed) for feed in feeds]
    padded = [*feeds, *[feeds[-1]] * (size - len(feeds))]
    joined = {}
    for name, shaped in session.takes.items():
        axis = _batch_axis(model.tensors[name], shaped, size)
        values = [feed[name] for feed in padded]
        joined[name] = values[0] if axis is None else np.concatenate(values, axis)
    each: list[dict[str, Array]] = [{} for _ in feeds]
    for name, value in session.run(joined).items():
        axis = _batch_axis(model.tensors[name], session.gives[name], size)
        rows = [value] * size if axis is None else np.split(value, size, axis)
        for outputs, row in zip(each, rows, strict=False):
            outputs[name] = row
    return each


def _batch_axis(alone: Tensor, together: Tensor, size: int) -> int | None:
    """Along which a tensor grows with the batch; None for one that all requests share."""
    if alone.shape == together.shape:
        return None
    if len(alone.shape) == len(together.shape):
        grown = [i for i, (one, all_) in enumerate(zip(alone.shape, together.shape, strict=True)) if one != all_]
        if len(grown) == 1 and together.shape[grown[0]] == size * alone.shape[grown[0]]:
            return grown[0]
    raise InputError(f"{alone.name!r} is {list(together.shape)} in a batch of {size}, and {list(alone.shape)} alone")
