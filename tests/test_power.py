"""Power meters, on files and programs like those of the kernel and of a Jetson, in the units that those document."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from isthmus.real.power import Meter, PowerLog, meters, rails, unreadable
from isthmus.workloads.errors import RunFailure

ORIN_NX = (
    "01-02-2024 10:11:12 RAM 2448/15388MB (lfb 4x4MB) SWAP 0/7694MB (cached 0MB) CPU [3%@729,0%@729,off,off] "
    "EMC_FREQ 0%@2133 GR3D_FREQ 0%@305 cpu@45.5C soc2@44.2C VDD_IN 4940mW/4935mW VDD_CPU_GPU_CV 700mW/720mW "
    "VDD_SOC 1400mW/1380mW"
)
ORIN = "CPU [1%@729] VDD_GPU_SOC 3150mW/2971mW VDD_CPU_CV 1200mW/900mW NC 0mW/0mW VIN_SYS_5V0 4968mW/5048mW"
NANO = "RAM 1000/3964MB (lfb 2x4MB) CPU [5%@102,3%@102] PLL@36C POM_5V_IN 2532/2500 POM_5V_GPU 40/40 POM_5V_CPU 362/400"


def write(folder: Path, **files: str | int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name).write_text(f"{value}\n")
    return folder


def zone(root: Path, number: str, name: str, energy_uj: int, range_uj: int = 262_143_328_850) -> Path:
    folder = root / "sys/class/powercap" / number
    return write(folder, name=name, energy_uj=energy_uj, max_energy_range_uj=range_uj)


def sensor(root: Path, number: int, **files: str | int) -> Path:
    return write(root / "sys/class/hwmon" / f"hwmon{number}", **files)


def program(path: Path, *lines: str, then: str = "exec sleep 60") -> str:
    printed = "\n".join(f"echo '{line}'; sleep 0.05" for line in lines)
    path.write_text(f"#!/bin/sh\n{printed}\n{then}\n")
    path.chmod(0o755)
    return str(path)


def test_a_host_without_meters_has_no_measured_energy(tmp_path):
    assert meters(tmp_path, None) == []
    with PowerLog([]) as log:
        pass
    assert log.energy(0, 1) is None


def test_rapl_counts_packages_and_memory_once(tmp_path):
    zone(tmp_path, "intel-rapl:0", "package-0", 5_000_000)
    zone(tmp_path, "intel-rapl:0:0", "core", 1)
    zone(tmp_path, "intel-rapl:0:1", "dram", 2_000_000)
    zone(tmp_path, "intel-rapl:1", "psys", 3)
    zone(tmp_path, "intel-rapl-mmio:0", "package-0", 4)
    found = meters(tmp_path, None)
    assert [m.name for m in found] == ["package-0 (intel-rapl:0)", "dram (intel-rapl:0:1)"]
    assert [m.read() for m in found] == pytest.approx([5.0, 2.0])


def test_a_counter_that_begins_anew_loses_nothing(tmp_path):
    package = zone(tmp_path, "intel-rapl:0", "package-0", 9_500_000, range_uj=10_000_000)
    log = PowerLog(meters(tmp_path, None))
    for at_s, energy_uj in ((100, 9_500_000), (101, 9_900_000), (102, 300_000), (103, 1_300_000)):
        write(package, energy_uj=energy_uj)
        log.sample(at_s)
    energy = log.energy(100, 103)
    assert energy is not None
    assert (energy.joules, energy.source) == (pytest.approx(1.8), "measured: rapl")
    assert energy.meters == ("package-0 (intel-rapl:0)",)
    half = log.energy(102.5, 103)
    assert half is not None
    assert half.joules == pytest.approx(0.5)  # of the joule between two samples


def test_a_counter_that_may_not_be_read_is_told_of(tmp_path):
    package = zone(tmp_path, "intel-rapl:0", "package-0", 1)
    (package / "energy_uj").unlink()
    (package / "energy_uj").mkdir()  # refuses to be read, also to root
    assert meters(tmp_path, None) == []
    assert unreadable(tmp_path) == [str(package / "energy_uj")]


def test_ina_sensors_in_the_kernels_units(tmp_path):
    sensor(tmp_path, 0, name="coretemp", power1_input=1)
    sensor(tmp_path, 1, name="ina219", power1_input=2_500_000, in1_input=5000, curr1_input=500)
    three = sensor(tmp_path, 2, name="ina3221", in1_input=5000, curr1_input=600, in1_label="CPU", in2_input=12_000)
    (three / "curr2_input").mkdir()  # a channel that is not connected refuses
    write(three, in3_input=3300, curr3_input=100, in4_input=7, curr4_input=900)  # 4 is a shunt, and a sum
    found = meters(tmp_path, None)
    assert [(m.kind, m.name) for m in found] == [("ina", "ina219"), ("ina", "CPU"), ("ina", "ina3221 channel 3")]
    assert [m.read() for m in found] == pytest.approx([2.5, 3.0, 0.33])


def test_the_rail_that_feeds_the_others_stands_for_them(tmp_path):
    sensor(tmp_path, 0, name="ina3221", in1_input=5000, curr1_input=1000, in1_label="VDD_IN", in2_input=5000,
           curr2_input=400, in2_label="VDD_CPU_GPU_CV")  # fmt: skip
    zone(tmp_path, "intel-rapl:0", "package-0", 1)
    [meter] = meters(tmp_path, None)
    assert (meter.name, meter.read()) == ("VDD_IN", pytest.approx(5.0))


@pytest.mark.parametrize(
    ("line", "watts"),
    [
        (ORIN_NX, {"VDD_IN": 4.94, "VDD_CPU_GPU_CV": 0.7, "VDD_SOC": 1.4}),
        (ORIN, {"VDD_GPU_SOC": 3.15, "VDD_CPU_CV": 1.2, "VIN_SYS_5V0": 4.968}),
        (NANO, {"POM_5V_IN": 2.532, "POM_5V_GPU": 0.04, "POM_5V_CPU": 0.362}),
        ("RAM 2448/15388MB SWAP 0/7694MB CPU [3%@729]", {}),
    ],
)
def test_lines_of_tegrastats(line, watts):
    assert rails(line) == pytest.approx(watts)


def test_tegrastats_is_read_while_the_log_runs_and_ends_with_it(tmp_path):
    lines = [ORIN_NX.replace("4940mW/", "2000mW/"), *[ORIN_NX] * 8]
    [meter] = meters(tmp_path, program(tmp_path / "tegrastats", *lines))
    assert (meter.kind, meter.name) == ("tegrastats", "VDD_IN")
    with PowerLog([meter], every_s=0.02) as log:
        began = time.monotonic()
        time.sleep(0.6)
        end = time.monotonic()
    energy = log.energy(began, end)
    assert energy is not None
    assert energy.source == "measured: tegrastats"
    assert 1.999 * (end - began) < energy.joules < 4.941 * (end - began)
    assert not [t for t in threading.enumerate() if t.name in ("power", "tegrastats")]


def test_a_program_that_prints_no_rails_is_no_meter(tmp_path):
    assert meters(tmp_path, program(tmp_path / "tegrastats", "CPU [3%@729]", then="exit 0")) == []


def test_watts_are_integrated_over_time():
    watts = iter([1.0, 3.0, 3.0])
    log = PowerLog([Meter("ina", "board", lambda: next(watts))])
    for at_s in (10.0, 12.0, 13.0):
        log.sample(at_s)
    energy = log.energy(10, 13)
    assert energy is not None
    assert energy.joules == pytest.approx(2 * 2 + 3)


def test_a_log_does_not_speak_of_what_it_has_not_seen(tmp_path):
    package = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    log = PowerLog(meters(tmp_path, None))
    log.sample(1.0)
    log.sample(2.0)
    with pytest.raises(RunFailure, match="not logged"):
        log.energy(0.5, 2.0)
    (package / "energy_uj").unlink()
    log.sample(3.0)
    with pytest.raises(RunFailure, match="cannot be read any more"):
        log.energy(1.0, 3.0)
