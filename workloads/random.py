"""Common random numbers: one independent stream per (seed, entity, purpose). Knows nothing else.

A draw belongs to what it is for, not to when it is asked for, so two policies meet the same arrivals and noise.
"""

from __future__ import annotations

import hashlib

import numpy as np

_MASK = 2**64 - 1


def stream(seed: int, *names: object) -> np.random.Generator:
    """The generator of one purpose; the same names give the same numbers in every process."""
    digest = _digest(names, 16)
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, *np.frombuffer(digest, dtype=np.uint32)])))


class Uniforms:
    """Uniform numbers in [0, 1), read by index in any order. Nothing is stored: each is a hash of key and index.

    SplitMix64 (Steele, Lea & Flood, Fast splittable pseudorandom number generators, OOPSLA 2014): as good as a
    sequence, and a hundred thousand of them take no room.
    """

    __slots__ = ("_key",)

    def __init__(self, seed: int, *names: object) -> None:
        self._key = int.from_bytes(_digest((seed, *names), 8), "little")

    def __getitem__(self, index: int) -> float:
        z = self._key + index * 0x9E3779B97F4A7C15 & _MASK
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        z = (z ^ z >> 27) * 0x94D049BB133111EB & _MASK
        return ((z ^ z >> 31) >> 11) * 2.0**-53


def _digest(names: tuple[object, ...], size: int) -> bytes:
    return hashlib.blake2b("\0".join(map(str, names)).encode(), digest_size=size).digest()
