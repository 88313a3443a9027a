"""Codecs: as many bytes as they say, and as close as they can be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from isthmus.workloads.codecs import CODECS, codec
from isthmus.workloads.errors import InputError
from isthmus.workloads.model import Tensor

shapes = hnp.array_shapes(max_dims=4, max_side=6)
floats = st.floats(-6e4, 6e4, width=32)


def tensor_of(values: np.ndarray) -> Tensor:
    return Tensor("t", values.shape, values.dtype.name, values.nbytes)


arrays = st.one_of(
    hnp.arrays(np.float32, shapes, elements=floats),
    hnp.arrays(np.float64, shapes, elements=floats),
    hnp.arrays(np.int64, shapes),
    hnp.arrays(np.bool_, shapes),
)


@given(st.sampled_from(sorted(CODECS)), arrays)
def test_the_size_is_known_beforehand_and_shape_and_type_come_back(name, values):
    parts = codec(name).encode(values)
    assert sum(part.nbytes for part in parts) == codec(name).size_bytes(tensor_of(values))
    back = codec(name).decode(parts, values.dtype)
    assert (back.shape, back.dtype) == (values.shape, values.dtype)
    if name == "fp32" or values.dtype.kind != "f":
        assert (back == values).all()


@given(hnp.arrays(np.float32, shapes, elements=floats))
def test_fp16_keeps_eleven_bits(values):
    back = codec("fp16").decode(codec("fp16").encode(values), values.dtype)
    assert (np.abs(back - values) <= 2.0**-11 * np.abs(values) + 2.0**-25).all()


@given(hnp.arrays(np.float32, shapes, elements=floats))
def test_int8_is_off_by_half_a_step_at_most(values):
    back = codec("int8").decode(codec("int8").encode(values), values.dtype)
    step = (float(values.max()) - float(values.min())) / 255
    rounding = (
        4 * np.finfo(np.float32).eps * float(np.abs(values).max()) + 4e-43
    )  # the last: steps too small for a float32
    assert np.abs(back - values).max() <= step / 2 + rounding


def test_int8_of_the_smallest_numbers():
    values = np.array([4.022e-42, 0], np.float32)
    assert codec("int8").decode(codec("int8").encode(values), values.dtype) == pytest.approx(values, abs=1e-43)


def test_int8_of_a_constant_is_exact():
    for value in (0.0, -3.5, 1e30):
        values = np.full((2, 3), value, np.float32)
        assert (codec("int8").decode(codec("int8").encode(values), values.dtype) == values).all()


def test_an_unknown_codec_is_named_with_the_known_ones():
    with pytest.raises(InputError, match=r"unknown codec 'fp15'; did you mean fp16.*int8"):
        codec("fp15")
