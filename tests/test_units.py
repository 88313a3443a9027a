"""Quantities as people type and read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.workloads import units
from isthmus.workloads.errors import InputError


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (units.parse_time, "15ms", 0.015),
        (units.parse_time, " 2 min ", 120),
        (units.parse_time, ".5s", 0.5),
        (units.parse_time, "1e3us", 1e-3),
        (units.parse_time, 0, 0),
        (units.parse_bytes, "100kB", 1e5),
        (units.parse_bytes, "1KiB", 1024),
        (units.parse_rate, "20Mbit", 2.5e6),
        (units.parse_rate, "20Mbit/s", 2.5e6),
        (units.parse_rate, "3MB/s", 3e6),
        (units.parse_frequency, "30/min", 0.5),
        (units.parse_frequency, "2Hz", 2),
        (units.parse_power, "800mW", 0.8),
    ],
)
def test_what_is_typed_arrives_in_si(parse, text, value):
    assert parse(text) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    ("parse", "text", "said"),
    [
        (units.parse_rate, "20 Mbps", "unknown unit 'Mbps'"),
        (units.parse_rate, "20", "no unit"),
        (units.parse_rate, 0, "out of range"),
        (units.parse_rate, "-1Mbit", "out of range"),
        (units.parse_rate, "1e400Mbit", "out of range"),
        (units.parse_time, "-1ms", "out of range"),
        (units.parse_time, float("nan"), "out of range"),
        (units.parse_time, float("inf"), "out of range"),
        (units.parse_time, "15 ms ms", "is not a time"),
        (units.parse_time, "", "is not a time"),
        (units.parse_time, None, "is not a time"),
        (units.parse_time, True, "is not a time"),
        (units.parse_bytes, "100kb", "unknown unit 'kb'"),
        (units.parse_bytes, [1], "is not a size"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_what_can(parse, text, said):
    with pytest.raises(InputError, match=said) as caught:
        parse(text)
    assert "allowed" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("show", "value", "text"),
    [
        (units.show_time, 0.0153, "15.3 ms"),
        (units.show_time, 0.0, "0 µs"),
        (units.show_time, 0.99996, "1 s"),
        (units.show_time, 0.9994, "999 ms"),
        (units.show_time, 4321.0, "4321 s"),
        (units.show_bytes, 1e5, "100 kB"),
        (units.show_rate, 2.5e6, "20 Mbit/s"),
    ],
)
def test_what_is_shown(show, value, text):
    assert show(value) == text


@given(st.floats(1e-6, 1e12))
def test_nothing_is_shown_in_powers_of_ten_and_all_within_half_a_percent(value):
    text = units.show_bytes(value)
    assert "e+" not in text
    if value >= 1:
        assert units.parse_bytes(text) == pytest.approx(value, rel=5.1e-3)
