"""How a tensor is written for the wire: bytes exactly, and the way there and back in numpy. Knows no link.

A codec is a row of `CODECS`. Its size depends on the tensor's shape alone, so that a plan can be costed before it
runs; what encoding and decoding cost in time is measured (see calibration).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt

from isthmus.workloads.errors import unknown
from isthmus.workloads.model import Tensor

Array = npt.NDArray[np.generic]
Wire = tuple[np.dtype[np.generic], tuple[int, ...]]
"""Type and shape of an array on the wire."""


@dataclass(frozen=True)
class Codec:
    """`dtype` is that of values on the wire; None keeps the tensor as it is.

    Codecs that change values leave integer tensors alone. A header is of float32.
    """

    name: str
    dtype: str | None
    header_bytes: int
    pack: Callable[[Array], tuple[Array, ...]]
    unpack: Callable[[tuple[Array, ...], np.dtype[np.generic]], Array]

    @property
    def bytes_per_value(self) -> int | None:
        """None where the tensor stays as it is."""
        return None if self.dtype is None else np.dtype(self.dtype).itemsize

    @property
    def arrays(self) -> int:
        """How many arrays one tensor becomes: its values, and a header where the codec needs one."""
        return 2 if self.header_bytes else 1

    def encode(self, values: Array) -> tuple[Array, ...]:
        """What goes on the wire: `arrays` arrays, of `size_bytes` together."""
        if is_float(values.dtype.name):
            return self.pack(values)
        return (values, np.empty(0, np.float32))[: self.arrays]

    def wire(self, tensor: Tensor) -> tuple[Wire, ...]:
        """What `encode` makes of a tensor."""
        codes = is_float(tensor.dtype)
        values = np.dtype(self.dtype if codes and self.dtype else tensor.dtype), tensor.shape
        header = np.dtype(np.float32), (self.header_bytes // 4 if codes else 0,)
        return (values, header)[: self.arrays]

    def decode(self, parts: tuple[Array, ...], dtype: np.dtype[np.generic]) -> Array:
        """The tensor, of the dtype that it had."""
        return self.unpack(parts, dtype) if is_float(dtype.name) else parts[0]

    def size_bytes(self, tensor: Tensor) -> int:
        """Bytes on the wire for one tensor."""
        if self.bytes_per_value is None or not is_float(tensor.dtype):
            return tensor.bytes
        return prod(tensor.shape) * self.bytes_per_value + self.header_bytes


def is_float(dtype: str) -> bool:
    return np.issubdtype(np.dtype(dtype), np.floating)


def _encode_int8(values: Array) -> tuple[Array, ...]:
    """Affine, one scale and offset per tensor: q = round((x − min) / step) − 128."""
    wide = values.astype(np.float32, copy=False)
    low, high = np.min(wide), np.max(wide)
    step = (high - low) / np.float32(255) or np.float32(1)
    # The limit is for steps so small that they are rounded themselves.
    quantised = (np.minimum(np.rint((wide - low) / step), 255) - 128).astype(np.int8)
    return quantised, np.array([low, step], dtype=np.float32)


def _decode_int8(parts: tuple[Array, ...], dtype: np.dtype[np.generic]) -> Array:
    quantised, (low, step) = parts
    values: Array = ((quantised.astype(np.float32) + 128) * step + low).astype(dtype)
    return values


CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        Codec("fp32", None, 0, lambda x: (x,), lambda parts, dtype: parts[0]),
        Codec("fp16", "float16", 0, lambda x: (x.astype(np.float16),), lambda parts, dtype: parts[0].astype(dtype)),
        Codec("int8", "int8", 8, _encode_int8, _decode_int8),
    )
}


def codec(name: str) -> Codec:
    """The codec of that name; InputError with the known ones otherwise."""
    try:
        return CODECS[name]
    except KeyError:
        raise unknown("codec", name, CODECS) from None
