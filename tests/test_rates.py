"""What people may write for a rate: files that exist and files that are wrong, processes with known statistics."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import re
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pydantic import BaseModel, ValidationError

from isthmus.experiments.compare import compare
from isthmus.experiments.execute import Experiment, simulate
from isthmus.experiments.run_folder import Run
from isthmus.workloads.errors import InputError
from isthmus.workloads.random import stream
from isthmus.workloads.rate import Rate
from isthmus.workloads.rates import GaussMarkov, Handover, MarkovRate, OnOff, RateSpec
from isthmus.workloads.testbed import Testbed, TestbedSpec
from isthmus.workloads.trace_file import TraceFile, format_of


class Holder(BaseModel):
    rate: RateSpec


def spec(value):
    return Holder(rate=value).rate


def read(path: Path, content: str | bytes, **options) -> Rate:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return TraceFile(file=path.name, **options).realise(path.parent)


def mbit(rate: Rate) -> list[float]:
    return pytest.approx([r * 8e-6 for r in rate.bytes_per_s])


# Files that are right


def test_mahimahi_counts_chances_in_windows(tmp_path):
    every_ms = read(tmp_path / "up", "".join(f"{i}\n" for i in range(1, 1001)))
    assert every_ms.period_s == 1.0
    assert mbit(every_ms) == [12.0] * 10  # 1500 bytes in a millisecond: the last chance belongs to the last window
    uneven = read(tmp_path / "uneven", "50\n50\n50\n250\n", step="100ms")
    assert uneven.starts_s == pytest.approx((0, 0.1, 0.2))
    assert uneven.bytes_per_s == pytest.approx((45_000, 0, 30_000))  # the last window is half as long
    assert uneven.period_s == 0.25
    assert read(tmp_path / "up", "0\n1000\n", step="1s", scale=2).bytes_per_s == (6000,)


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=200).filter(any), st.sampled_from([0.001, 0.03, 0.1, 7]))
def test_mahimahi_loses_no_chance(tmp_path_factory, stamps, step):
    path = tmp_path_factory.getbasetemp() / "chances"
    rate = read(path, "\n".join(map(str, sorted(stamps))), step=step)
    assert rate.mean_bytes_per_s * rate.period_s == pytest.approx(1500 * len(stamps))


def test_pairs(tmp_path):
    rate = read(tmp_path / "p", "# a log\n1600000000 8\n\n1600000000.5, 16  # fast\r\n1600000002 0\n")
    assert rate.starts_s == pytest.approx((0, 0.5, 2))
    assert mbit(rate) == [8, 16, 0]
    assert rate.period_s == pytest.approx(2 + (0.5 + 1.5) / 2)
    rate = read(tmp_path / "p", "0 8\n500 16\n", unit="kbit", time_unit="ms", scale=0.5, repeat=False)
    assert (rate.starts_s, rate.bytes_per_s, rate.period_s) == ((0, 0.5), (500, 1000), None)
    assert read(tmp_path / "p", "7 8\n").bytes_per_s == (1e6,)


CSV = "time, downlink, uplink, note\n10,1,8,\n11,2,16,a\n12,3,24,b # c\n"


def test_csv(tmp_path):
    rate = read(tmp_path / "l.csv", CSV, time="time", rate="uplink")
    assert rate.starts_s == (0, 1, 2)
    assert mbit(rate) == [8, 16, 24]
    assert rate.period_s == 3
    assert mbit(read(tmp_path / "l.csv", CSV, time="time", rate="downlink", unit="kB/s")) == [0.008, 0.016, 0.024]
    for separator in ";\t":
        again = read(tmp_path / "l.csv", CSV.replace(",", separator), time="time", rate="uplink")
        assert again == rate
    for named in ({"time": "t"}, {"rate": "r"}):
        assert mbit(read(tmp_path / "l.csv", "r,t\n8,1\n16,2\n", **named)) == [8, 16]
    two = read(tmp_path / "l.csv", "\ufeffms,kbit\n0,8\n500,16\n", time_unit="ms", unit="kbit")
    assert (two.starts_s, two.bytes_per_s) == ((0, 0.5), (1000, 2000))
    assert read(tmp_path / "l.csv", "a,b\n0,8,9,10\n1,8,9,10\n").bytes_per_s == (1e6, 1e6)


@pytest.mark.parametrize(
    ("content", "format_"),
    [("12\n", "mahimahi"), ("# c\n\n0.5 12\n", "pairs"), ("0,12\n", "pairs"), ("a,b\n0,1\n", "csv"), ("t\tr\n", "csv")],
)
def test_the_format_is_seen_in_the_first_line(tmp_path, content, format_):
    (tmp_path / "x").write_text(content)
    assert format_of(tmp_path / "x") == format_


@pytest.mark.parametrize("kind", ["pairs", "csv", "mahimahi"])
def test_a_million_entries(tmp_path, kind):
    times, rates = np.arange(1_000_000), np.random.default_rng(0).integers(1, 50, 1_000_000)
    if kind == "mahimahi":
        rate = read(tmp_path / "x", "\n".join(map(str, times.tolist())), step="1ms")
        assert rate.mean_bytes_per_s == pytest.approx(1.5e6, rel=1e-5)
    else:
        separator, header = (",", "t,r\n") if kind == "csv" else (" ", "")
        rows = (f"{t}{separator}{r}" for t, r in zip(times.tolist(), rates.tolist(), strict=True))
        rate = read(tmp_path / "x", header + "\n".join(rows))
        assert len(rate.starts_s) == 1_000_000
        assert rate.mean_bytes_per_s == pytest.approx(rates.mean() * 125_000)
    end = rate.finish_s(500_000.5, 1e9)
    assert rate.finish_all_s(500_000.5, 1e9) == end > 500_000.5


# Files that are wrong


@pytest.mark.parametrize(
    ("content", "options", "said"),
    [
        (b"", {}, [": is empty", "mahimahi"]),
        (b"# only\n\n", {}, [": is empty"]),
        (b"hello\nworld\n", {}, [":1:", "'hello'", "no trace", "csv"]),
        (b"\n1.5\n", {}, [":2:", "'1.5'"]),
        (b"1 2 3\n", {}, [":1:", "'1 2 3'"]),
        (b"\x89PNG\r\n\xff\xfe", {}, ["not a text file"]),
        (b"a\0b", {}, ["not a text file"]),
        (b"0 1\n1 fast\n", {}, [":2:", "'1 fast'", "a time and a rate"]),
        (b"0 1\n# c\n1 2 3\n", {}, [":3:", "'1 2 3'"]),
        (b"0 1 2\n1 1 2\n", {"format": "pairs"}, [":1:", "'0 1 2'"]),
        (b"0 1\n2 1\n# c\n1 1\n", {}, [":4:", "time 1", "on 2", "increase"]),
        (b"0 1\n0 1\n", {}, [":2:", "time 0"]),
        (b"0 1\n1 nan\n", {}, [":2:", "rate nan", ">= 0"]),
        (b"0 1\n1 inf\n", {}, [":2:", "rate inf"]),
        (b"0 1\nnan 1\n", {}, [":2:", "time nan"]),
        (b"0 1\n1 -3\n", {}, [":2:", "rate -3"]),
        (b"0 0\n1 0\n", {}, ["every rate is 0"]),
        (b"0 1\n1 0\n", {"repeat": False}, ["last rate is 0", "repeat"]),
        (b"0 1\n1 1e308\n", {}, ["not finite"]),
        (b"5\n7\n6\n", {}, [":3:", "time 6", "on 7", "not decrease"]),
        (b"5\n-6\n", {}, [":2:", "-6", "whole"]),
        (b"5\n6.5\n", {}, [":2:", "6.5"]),
        (b"5\nnan\n", {}, [":2:", "nan"]),
        (b"5\nx\n", {}, [":2:", "'x'", "timestamp"]),
        (b"0\n0\n", {}, ["last timestamp is 0"]),
        (b"1600000000000\n1600000000001\n", {}, ["windows", "step"]),
        (b"5\n", {"unit": "kbit"}, ["mahimahi", "`unit`", "pairs"]),
        (b"0 1\n", {"step": "1s"}, ["pairs", "`step`", "mahimahi"]),
        (CSV.encode(), {"rate": "uplink"}, [":1:", "4 columns", "`time`", "time, downlink, uplink"]),
        (CSV.encode(), {"time": "tme", "rate": "uplink"}, [":1:", "'tme'", "did you mean time", "uplink"]),
        (CSV.encode(), {"time": "time", "rate": "note"}, [":2:", "'note'", "is empty"]),
        (b"# c\nt,r\n0,1\n1,nan\n", {}, [":4:", "'r'", "'nan'", "finite"]),
        (b"t,r\n0,1\n1,fast\n", {}, [":3:", "'r'", "'fast'"]),
        (b"t,r\n0,1\n1,inf\n", {}, [":3:", "rate inf"]),
        (b"t,r\n0,1\n1,-1\n", {}, [":3:", "rate -1"]),
        (b"t,r\n1,1\n0,1\n", {}, [":3:", "time 0", "on 1"]),
        (b"t,r\n0,1\n1\n", {}, [":3:", "'r'", "is empty"]),
        (b"t,r\n", {}, ["no rows"]),
        (b"0,1\n1,1\n", {"format": "csv"}, [":1:", "no header"]),
        (b't,r\n0,"1\n', {}, ["not a csv"]),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path, content, options, said):
    with pytest.raises(InputError) as caught:
        read(tmp_path / "trace.x", content, **options)
    text = str(caught.value)
    assert text.startswith(str(tmp_path / "trace.x"))
    assert "\n" not in text
    for words in said:
        assert words in text, text


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        TraceFile(file="x").realise(tmp_path)


# What is drawn


def drawn(what, seed: int = 1) -> Rate:
    return what.draw(stream(seed, "a", "b", "rate"))


def sampled(rate: Rate, step: float) -> np.ndarray:
    return np.array([rate.at(t) for t in np.arange(step / 2, rate.period_s, step).tolist()])


LONG = 200_000.0
KINDS = [
    GaussMarkov(mean="20Mbit", deviation="4Mbit", correlation_time="5s", duration=LONG, step="500ms"),
    GaussMarkov(mean="20Mbit", deviation="15Mbit", correlation_time="2s", duration=LONG, lowest="10Mbit", step="1s"),
    MarkovRate(states=[["20Mbit", "10s"], ["4Mbit", "3s"], [0, "1s"]], duration=LONG),
    OnOff(rate="20Mbit", on="30s", off="4s", duration=LONG),
    Handover(rate="50Mbit", every="30s", outage="900ms", fade=0.3, duration=LONG),
    Handover(rate="50Mbit", every="3s", duration=LONG),
]


@pytest.mark.parametrize("what", KINDS, ids=lambda what: what.kind)
def test_the_mean_of_a_long_draw_is_that_of_the_definition(what):
    rate = drawn(what)
    assert rate.period_s == LONG
    assert rate.mean_bytes_per_s == pytest.approx(what.mean_bytes_per_s, rel=0.02)


def test_gauss_markov_is_normal_and_correlated():
    values = sampled(drawn(KINDS[0]), 0.5)
    assert values.std() == pytest.approx(0.5e6, rel=0.03)
    apart = values - values.mean()
    for lag in (1, 4, 10, 20):
        correlation = (apart[lag:] * apart[:-lag]).mean() / apart.var()
        assert correlation == pytest.approx(math.exp(-lag * 0.5 / 5), abs=0.03)
    assert min(drawn(KINDS[1]).bytes_per_s) == 1.25e6


def test_stays_in_markov_states_are_exponential():
    rate = drawn(KINDS[2])
    lengths = np.diff(rate.starts_s)
    values = np.array(rate.bytes_per_s[:-1])
    for value, mean_s in ((2.5e6, 10), (0.5e6, 3), (0, 1)):
        of = lengths[values == value]
        assert of.mean() == pytest.approx(mean_s, rel=0.05)
        assert of.std() == pytest.approx(mean_s, rel=0.06)
    after = np.array(rate.bytes_per_s[1:])[values == 0]
    assert (after == 2.5e6).mean() == pytest.approx(0.5, abs=0.02)


def test_what_alternates_begins_anywhere():
    what = OnOff(rate="20Mbit", on="3s", off="1s")
    begins = [drawn(what, seed).bytes_per_s[0] > 0 for seed in range(400)]
    assert np.mean(begins) == pytest.approx(0.75, abs=0.06)


def test_a_draw_always_carries_something():
    what = OnOff(rate="20Mbit", on="10ms", off="10s", duration="10.01s")
    assert all(any(drawn(what, seed).bytes_per_s) for seed in range(50))


def test_a_handover_fades_breaks_and_recovers():
    rate = drawn(Handover(rate=100.0, every="30s", outage="300ms", fade=0.2))
    values, lengths = np.array(rate.bytes_per_s), np.diff([*rate.starts_s, rate.period_s])
    assert values[:12].tolist() == pytest.approx([100, 80, 60, 40, 20, 0] * 2)
    assert lengths[5] == pytest.approx(0.3)
    assert lengths[1:5] == pytest.approx(np.full(4, lengths[0] / 16))  # a fifth of the stay, in four


@pytest.mark.parametrize("what", KINDS, ids=lambda what: what.kind)
def test_the_same_seed_draws_the_same_in_another_process(what, elsewhere):
    short = what.model_copy(update={"duration": 700.0})
    code = f"""
import hashlib, pickle
from isthmus.workloads.random import stream
from isthmus.workloads import rates
what = rates.{type(what).__name__}.model_validate_json({short.model_dump_json()!r})
rate = what.draw(stream(3, "a", "b", "rate"))
print(hashlib.sha256(repr(rate).encode()).hexdigest())
"""
    assert elsewhere(code).decode().strip() == hashlib.sha256(repr(drawn(short, 3)).encode()).hexdigest()
    assert drawn(short, 3) != drawn(short, 4)


# What people write


@pytest.mark.parametrize(
    "written",
    [
        "20Mbit",
        2.5e6,
        [["0s", "20Mbit"], ["5s", 0]],
        {"kind": "constant", "rate": "20Mbit"},
        {"file": "lte.csv", "format": "csv", "time": "t_s", "rate": "uplink", "unit": "Mbit"},
        {"kind": "gauss-markov", "mean": "20Mbit", "deviation": "8Mbit", "correlation_time": "5s", "lowest": "1kbit"},
        {"kind": "markov", "states": [["20Mbit", "10s"], [0, "3s"]]},
        {"kind": "on-off", "rate": "20Mbit", "on": "30s", "off": "2s", "duration": "1h"},
        {"kind": "handover", "rate": "50Mbit", "every": "30s", "outage": "300ms", "fade": 0.3},
    ],
)
def test_what_is_written_is_read_back_and_fits_the_schema(written):
    read_ = spec(written)
    assert spec(json.loads(read_.model_dump_json())) == spec(read_.model_dump()) == spec(read_) == read_
    Draft202012Validator(Holder.model_json_schema()).validate({"rate": written})
    Draft202012Validator(Holder.model_json_schema()).validate({"rate": json.loads(read_.model_dump_json())})
    hash(read_)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ({"kind": "gaus-markov"}, "did you mean gauss-markov"),
        ({"mean": "20Mbit"}, "neither `file` nor `kind`"),
        ({"file": "x", "format": "cvs"}, "'mahimahi', 'pairs' or 'csv'"),
        ({"file": "x", "unit": "Mbps"}, "'Mbps' is no unit here.*Mbit"),
        ({"file": "x", "scale": 0}, "greater than 0"),
        ({"file": "x", "scale": math.inf}, "finite"),
        ({"file": "x", "column": "x"}, "not permitted"),
        ({"kind": "on-off", "rate": "20Mbit", "on": "30s", "off": 0}, "greater than 0"),
        ({"kind": "on-off", "rate": "20Mbit", "on": "30min", "off": "2s"}, "duration of 600 s.*1802 s"),
        ({"kind": "markov", "states": [["20Mbit", "10s"]]}, "at least 2"),
        ({"kind": "markov", "states": [[0, "10s"], [0, "1s"]]}, "carries nothing"),
        ({"kind": "handover", "rate": "5Mbit", "every": "1us"}, "more than 1000000 changes"),
        ({"kind": "handover", "rate": "5Mbit", "every": "1s", "fade": 1.5}, "less than or equal to 1"),
        (
            {"kind": "gauss-markov", "mean": 5, "deviation": 1, "correlation_time": 1, "lowest": "1Mbit"},
            "`lowest` of 125000 .*above its mean of 5",
        ),
        ([["0s", "20Mbit", 1]], "not a pair"),
        ([], "at least 1"),
        ([["0s", "fast"]], "'fast' is not a rate"),
        ("fast", "'fast' is not a rate"),
        (0, "out of range"),
    ],
)
def test_what_is_wrong_is_refused(written, said):
    with pytest.raises(ValidationError) as caught:
        spec(written)
    assert re.search(said, str(caught.value)), caught.value


# In a testbed

BED = """
models: {{m: {model}}}
nodes:
  device: {{service: {{mean: 100ms}}}}
  edge: {{service: {{mean: 50ms}}}}
  cloud: {{service: {{mean: 10ms}}}}
links:
  - {{between: [device, edge], rate: {{kind: on-off, rate: 20Mbit, on: 3s, off: 1s}}, latency: 5ms}}
  - {{between: [edge, cloud], rate: {{file: traces/log.txt, scale: 2}}, back: {{rate: 40Mbit}}}}
"""
UP, DOWN = ("device", "edge"), ("edge", "device")


@pytest.fixture
def bed(tmp_path, chain) -> Path:
    folder = tmp_path / "lab"
    (folder / "traces").mkdir(parents=True)
    (folder / "traces/log.txt").write_text("0 10\n1 0\n2 30\n")
    (folder / "bed.yaml").write_text(BED.format(model=chain))
    return folder / "bed.yaml"


def test_each_direction_and_seed_has_a_draw_of_its_own(bed):
    testbed = Testbed.load(bed)
    up, down = testbed.links[UP].rate, testbed.links[DOWN].rate
    assert up != down
    assert up == testbed.spec.links[0].rate.draw(stream(1, *UP, "rate"))
    other = testbed.at_seed(2)
    assert other.links[UP].rate != up
    assert other.at_seed(1).links == testbed.links
    assert other.links["edge", "cloud"] is testbed.links["edge", "cloud"]
    assert other.links[UP].latency_s == 0.005
    assert testbed.links["edge", "cloud"].rate.bytes_per_s == (2.5e6, 0, 7.5e6)
    assert testbed.links["cloud", "edge"].rate.is_constant
    assert testbed.nominal.at_seed(2) is testbed.nominal


def test_every_member_of_a_group_has_a_draw_of_its_own(bed):
    bed.write_text(bed.read_text().replace("device: {", "device: {count: 3, ").replace("back: {rate: 40Mbit}", ""))
    testbed = Testbed.load(bed)
    for seed in (1, 2):
        rates = [testbed.at_seed(seed).links[f"device-{i}", "edge"].rate for i in range(3)]
        assert rates == [testbed.spec.links[0].rate.draw(stream(seed, f"device-{i}", "edge", "rate")) for i in range(3)]
        assert len(set(rates)) == 3
    assert testbed.links["edge", "cloud"].rate is testbed.links["cloud", "edge"].rate  # a file is read once


def test_a_controller_is_not_told_what_a_rate_comes_from(bed):
    nominal = Testbed.load(bed).nominal
    for secret in ("on-off", "log.txt", "traces", "2500000.0,", "7500000"):
        assert secret not in repr(vars(nominal))
    assert Testbed.build(nominal.spec).links == nominal.links


def test_a_controller_is_told_nothing_of_luck_and_of_the_future(synthetic):
    moves = {"kind": "waypoints", "points": [[0, 0, 0], [77, 7777, 0]], "repeat": True, "handover": "33ms"}
    cells = {f"cell-{x}": {"service": {"mean": 1}, "position": [x, 0]} for x in (0, 8000)}
    nodes = {"bus": {"count": 2, "serves": False, "service": {"mean": 1}, "mobility": moves}, **cells}
    lucky = {"jitter": {"mean": "55us", "distribution": "gamma"}, "loss": 0.44, "slow_start": {"window": "2222B"}}
    said = {"rate": 8.0, "latency": 1, "overhead": "60B", **lucky}
    links = [{"between": ["bus", cell], **said, "back": {"latency": 2, **lucky}} for cell in cells]
    testbed = synthetic(nodes, links)
    nominal = testbed.nominal
    for known in (nominal, pickle.loads(pickle.dumps(nominal)), nominal.without(frozenset({("bus-0", "cell-0")}))):
        told = repr(vars(known)) + known.spec.model_dump_json()
        for secret in ("7777", "0.033", "gamma", "5.5e-05", "0.44", "2222"):
            assert secret not in told
        assert len(list(known.handovers("bus-0", 1))) == 1 < len(list(islice(testbed.handovers("bus-0", 1), 9)))
        with pytest.raises(InputError, match="no route"):  # what moves forwards nothing
            known.route("cell-0", "cell-8000")
        link = known.links["bus-1", "cell-8000"]
        assert (link.rate, link.latency_s, link.features) == (Rate.constant(8.0), 1.0, ["overhead"])
    assert Testbed.build(nominal.spec).links == nominal.links


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("on: 3s, ", "", ["links[0].rate.on", "missing"]),
        ("on: 3s", "on: 3s, onn: 3s", ["links[0].rate.onn", "unknown field", "allowed: duration, kind, off, on, rate"]),
        ("on: 3s", "on: soon", ["links[0].rate.on", "'soon'"]),
        ("kind: on-off", "kind: onoff", ["links[0].rate", "'onoff'", "did you mean on-off"]),
        ("log.txt", "lag.txt", ["bed.yaml: links[1].rate", "lag.txt", "no such file"]),
        ("scale: 2", "step: 2s", ["links[1].rate", "log.txt", "`step`", "mahimahi"]),
        ("scale: 2", "format: pair", ["links[1].rate.format", "pairs"]),
        ("scale: 2}}", "scale: 2}}, period: 3s", ["links[1]", "`period`", "trace", "schedule"]),
        ("rate: 40Mbit", "period: 3s", ["links[1]", "`period`"]),
    ],
)
def test_what_is_wrong_in_a_testbed_is_named(bed, old, new, said):
    text = bed.read_text()
    new = new.replace("}}", "}")
    old = old.replace("}}", "}")
    assert old in text
    bed.write_text(text.replace(old, new))
    with pytest.raises(InputError) as caught:
        Testbed.load(bed)
    assert "\n" not in str(caught.value)
    for words in said:
        assert words in str(caught.value), str(caught.value)


def test_a_line_in_a_trace_is_named_with_the_link(bed):
    (bed.parent / "traces/log.txt").write_text("0 10\n1 x\n")
    with pytest.raises(InputError, match=r"bed.yaml: links\[1\].rate: .*log.txt:2: '1 x' is not a time and a rate"):
        Testbed.load(bed)


EXPERIMENT = {
    "testbed": "lab/bed.yaml",
    "workload": [
        {"node": "device", "model": "m", "arrivals": {"kind": "poisson", "rate": "5/s"}, "requests": 40},
    ],
    "policies": ["remote"],
    "seeds": [1, 2],
}


def test_a_run_keeps_its_traces_and_every_seed_its_rates(bed, tmp_path):
    """The testbed lies in another folder than the experiment, and its trace is gone when the run is read."""
    experiment = Experiment.of(EXPERIMENT, tmp_path)
    made = simulate(experiment, tmp_path / "run")
    assert simulate(experiment, tmp_path / "again").requests.equals(made.requests)
    (bed.parent / "traces/log.txt").unlink()
    [kept] = (made.folder / "traces").iterdir()
    assert kept.read_text().startswith("0 10")
    [about] = made.facts["traces"].values()
    assert about["sha256"].startswith(kept.stem.removeprefix("log-"))
    testbed = Run.load(made.folder).testbed
    assert testbed.links == experiment.testbed.links

    sent = made.spans.query("kind == 'send' and place == 'device>edge'")
    for seed, of in sent.groupby("seed"):
        rate = testbed.at_seed(seed).links[UP].rate
        ends = rate.finish_all_s(of["start_s"], of["bytes"])
        assert (ends + 0.005).tolist() == pytest.approx(of["end_s"].tolist())


def test_a_run_without_links_has_an_empty_table_of_them(chain, tmp_path):
    described = {
        "name": "alone",
        "testbed": {"models": {"chain": str(chain)}, "nodes": {"device": {"service": {"mean": "1ms"}}}},
        "workload": [
            {"node": "device", "model": "chain", "arrivals": {"kind": "poisson", "rate": "5/s"}, "requests": 3}
        ],
        "policies": ["local"],
    }
    made = simulate(Experiment.of(described, tmp_path), tmp_path / "run")
    assert made.nodes["node"].tolist() == ["device"]
    assert made.links.empty
    assert {"policy", "seed", "link", "messages"} <= set(made.links.columns)


def test_a_replay_meets_the_rates_of_its_seed(bed, tmp_path):
    experiment = Experiment.of(EXPERIMENT, tmp_path)
    simulated, again = (simulate(experiment, tmp_path / name) for name in ("one", "two"))
    real = Run(again.folder, {**again.facts, "world": "emulated"})
    assert compare(simulated, real, resamples=0).rows["structural_error_s"].max() < 1e-9
    (bed.parent / "traces/log.txt").write_text("0 10\n1 0\n2 31\n")
    other = simulate(Experiment.of(EXPERIMENT, tmp_path), tmp_path / "other")
    with pytest.raises(InputError, match=r"testbed\.links differ"):
        compare(other, real)


def test_a_large_trace_stays_where_it_is(bed, tmp_path, monkeypatch):
    monkeypatch.setattr("isthmus.experiments.run_folder._COPIED_BYTES", 3)
    made = simulate(Experiment.of(EXPERIMENT, tmp_path), tmp_path / "run")
    assert list(made.facts["traces"]) == [str(bed.parent / "traces/log.txt")]
    assert not (made.folder / "traces").exists()
    assert Run.load(made.folder).testbed.links["edge", "cloud"].rate.bytes_per_s == (2.5e6, 0, 7.5e6)


def test_models_of_a_testbed_elsewhere_are_found_there(bed, tmp_path, chain):
    (bed.parent / "net.onnx").write_bytes(chain.read_bytes())
    bed.write_text(BED.format(model="net.onnx"))
    assert Experiment.of(EXPERIMENT, tmp_path).testbed.models["m"].layers


def test_a_rate_is_a_testbed_specs(bed):
    assert TestbedSpec.model_validate_json(Testbed.load(bed).spec.model_dump_json()) == Testbed.load(bed).spec
