"""Common random numbers: one independent stream per (seed, entity, purpose). Knows nothing else.

A draw belongs to what it is for, not to when it is asked for, so two policies meet the same arrivals and noise.
"""

from __future__ import annotations

import hashlib

import numpy as np


def stream(seed: int, *names: object) -> np.random.Generator:
    """The generator of one purpose; the same names give the same numbers in every process."""
    digest = hashlib.blake2b("\0".join(map(str, names)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, *np.frombuffer(digest, dtype=np.uint32)])))


class Uniforms:
    """An endless sequence of uniform numbers in [0, 1), read by index in any order."""

    _CHUNK = 1024

    def __init__(self, seed: int, *names: object) -> None:
        self._generator = stream(seed, *names)
        self._values: list[float] = []

    def __getitem__(self, index: int) -> float:
        while index >= len(self._values):
            self._values.extend(self._generator.random(self._CHUNK).tolist())
        return self._values[index]
