"""Electrical power where a host measures it: meters, and a log of what they read. Knows files, and no Ray.

    rapl        energy counters of x86 processors: packages and memory (/sys/class/powercap, powercap.rst)
    ina         INA2xx and INA3221 sensors on the rails of a board (/sys/class/hwmon, ina2xx.rst, ina3221.rst)
    tegrastats  the rails that NVIDIA's program prints, on a Jetson whose kernel has no INA driver in hwmon

A host without any has no energy to measure: what is said of it is modelled, from the power that its testbed gives.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from isthmus.workloads.errors import RunFailure

Kind = Literal["rapl", "ina", "tegrastats"]

_WHOLE_BOARD = ("VDD_IN", "POM_5V_IN", "VIN")
"""Rails that feed all the others (Jetson Orin NX and Xavier NX; Nano and TX2; Thor)."""
_EVERY_MS = 100
_RAIL = re.compile(r"\b([A-Z]\w*) (\d+)mW/\d+mW|\b((?:VDD|POM|VIN)_\w+) (\d+)/\d+\b")
"""Of tegrastats: `VDD_IN 4940mW/4940mW`, now and on average; before JetPack 5 without the unit."""


@dataclass(frozen=True)
class Meter:
    """Something that measures power at one place of this host.

    `read` gives watts, or, where there is a `range_j`, a count of joules that begins anew after so many. `close` frees
    what reading needs; the next one takes it again.
    """

    kind: Kind
    name: str
    read: Callable[[], float]
    range_j: float | None = None
    close: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Energy:
    """Joules of one host over some time, and where the number comes from: `measured: rapl`, say, or `modelled`."""

    joules: float
    source: str
    meters: tuple[str, ...] = ()


def meters(root: Path = Path("/"), tegrastats: str | None = "tegrastats") -> list[Meter]:
    """The meters of this host that together say what it takes, none of them twice; empty where there are none.

    Sensors of the board, where there are any, cover more than the processor's counters. `root` is where /sys lies.
    """
    if found := whole(list(_ina(root))):
        return found
    if tegrastats is not None and (program := shutil.which(tegrastats)):
        return whole(_tegrastats(program))
    return list(_rapl(root))


def whole(found: list[Meter]) -> list[Meter]:
    """The one that measures the whole board, if there is one; else all."""
    return [meter for meter in found if meter.name in _WHOLE_BOARD][:1] or found


def unreadable(root: Path = Path("/")) -> list[str]:
    """Energy counters that are there, and that this user may not read."""
    return [str(zone / "energy_uj") for zone in _zones(root) if _number(zone / "energy_uj") is None]


def _zones(root: Path) -> Iterator[Path]:
    """Packages, and memory, which they do not include; not intel-rapl-mmio, which counts the packages again."""
    for zone in sorted((root / "sys/class/powercap").glob("intel-rapl:*")):
        if (name := _text(zone / "name")).startswith("package") or name == "dram":
            yield zone


def _rapl(root: Path) -> Iterator[Meter]:
    for zone in _zones(root):
        range_uj = _number(zone / "max_energy_range_uj")
        if range_uj and _number(zone / "energy_uj") is not None:
            name = f"{_text(zone / 'name')} ({zone.name})"
            yield Meter("rapl", name, partial(_product, 1e-6, zone / "energy_uj"), range_uj * 1e-6)


def _ina(root: Path) -> Iterator[Meter]:
    """Of each sensor the channels that work: microwatts, or millivolts times milliamperes."""
    for sensor in sorted((root / "sys/class/hwmon").glob("hwmon*")):
        if not (chip := _text(sensor / "name")).startswith("ina"):
            continue
        if _number(sensor / "power1_input") is not None:
            name = _text(sensor / "power1_label") or _text(sensor / "in1_label") or chip
            yield Meter("ina", name, partial(_product, 1e-6, sensor / "power1_input"))
            continue
        for channel in (1, 2, 3):
            volts, amperes = sensor / f"in{channel}_input", sensor / f"curr{channel}_input"
            if _number(volts) is not None and _number(amperes) is not None:  # a channel without a rail refuses
                name = _text(sensor / f"in{channel}_label") or f"{chip} channel {channel}"
                yield Meter("ina", name, partial(_product, 1e-6, volts, amperes))


def _tegrastats(program: str) -> list[Meter]:
    """One meter per rail; all read the newest line, which one process prints for them."""
    stats = _Tegrastats(program)
    try:
        stats.start()
    except RunFailure:
        return []
    finally:
        stats.stop()
    return [Meter("tegrastats", rail, partial(stats.watts, rail), close=stats.stop) for rail in stats.newest]


class _Tegrastats:
    """The program, which runs from the first reading until it is stopped."""

    def __init__(self, program: str) -> None:
        self._program = program
        self._process: subprocess.Popen[str] | None = None
        self._printed = threading.Event()
        self.newest: dict[str, float] = {}

    def watts(self, rail: str) -> float:
        if self._process is None:
            self.start()
        if self._process is None or self._process.poll() is not None:
            raise RunFailure(f"{self._program} has ended")
        return self.newest[rail]

    def start(self) -> None:
        """Until it has printed something; RunFailure when that takes too long."""
        command = [self._program, "--interval", str(_EVERY_MS)]
        self._printed.clear()
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self._listener = threading.Thread(target=self._listen, args=(self._process,), daemon=True, name="tegrastats")
        self._listener.start()
        if not self._printed.wait(5) or not self.newest:
            raise RunFailure(f"{self._program} prints no rails")

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                if found := rails(line):
                    self.newest = found
                    self._printed.set()
        self._printed.set()  # or never will

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._listener.join()
            self._process = None


def rails(line: str) -> dict[str, float]:
    """The rails of a line of tegrastats, in watts as they are at that time."""
    found = (match.groups() for match in _RAIL.finditer(line))
    return {(name or bare): float(now or bare_now) * 1e-3 for name, now, bare, bare_now in found if name != "NC"}


class PowerLog:
    """What meters read from `start` to `stop`, sampled by a thread, as joules over the monotonic clock.

    Counters are exact at each sample; of watts the mean of two samples counts for the time between them. A meter that
    cannot be read any more ends the log: `energy` says why.
    """

    def __init__(self, found: Sequence[Meter] | None = None, every_s: float = 0.05) -> None:
        self.meters = tuple(meters() if found is None else found)
        self._every_s = every_s
        self._times: list[float] = []
        self._joules: list[float] = []
        self._last: tuple[float, list[float]] | None = None
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None
        self._failure: str | None = None

    def __enter__(self) -> PowerLog:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Begin to sample; nothing without meters. Begins anew after `stop`."""
        self._times, self._joules, self._last, self._failure = [], [], None, None
        self._stop.clear()
        if self.meters:
            self.sample(time.monotonic())
            self._thread = threading.Thread(target=self._run, daemon=True, name="power")
            self._thread.start()

    def stop(self) -> None:
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None
            self.sample(time.monotonic())
            for meter in self.meters:
                meter.close()

    def _run(self) -> None:
        while not self._stop.wait(self._every_s) and self._failure is None:
            self.sample(time.monotonic())

    def sample(self, now_s: float) -> None:
        """Read every meter once, at that time."""
        if self._failure is not None:
            return
        try:
            readings = [meter.read() for meter in self.meters]
        except (OSError, ValueError, KeyError, RunFailure) as error:
            self._failure = f"a power meter cannot be read any more: {error}"
            return
        with self._lock:
            before_s, before = self._last or (now_s, readings)
            took = sum(
                (now - then) % meter.range_j if meter.range_j else (now + then) / 2 * (now_s - before_s)
                for meter, then, now in zip(self.meters, before, readings, strict=True)
            )
            self._times.append(now_s)
            self._joules.append(took + (self._joules[-1] if self._joules else 0.0))
            self._last = now_s, readings

    def energy(self, begin_s: float, end_s: float) -> Energy | None:
        """Joules between two times of this host's monotonic clock; None without meters, for it to be modelled.

        RunFailure when the log does not reach from one to the other.
        """
        if not self.meters:
            return None
        with self._lock:
            times, joules = np.array(self._times), np.array(self._joules)
        if not len(times) or begin_s < times[0] or end_s > times[-1]:
            raise RunFailure(self._failure or "the power was not logged at all of that time")
        begin_j, end_j = np.interp([begin_s, end_s], times, joules)
        kinds = dict.fromkeys(meter.kind for meter in self.meters)
        return Energy(float(end_j - begin_j), f"measured: {', '.join(kinds)}", tuple(m.name for m in self.meters))


def by_machine(
    energy: Mapping[str, Energy], hosts: Mapping[str, str]
) -> tuple[dict[str, Energy], list[tuple[str, ...]]]:
    """The energies of nodes that have their machine to themselves, and which share a machine that measures itself.

    Meters know machines: nobody knows what each of several nodes took, emulated ones among them.
    """
    there: dict[str, tuple[str, ...]] = {}
    for node, host in hosts.items():
        there[host] = (*there.get(host, ()), node)
    alone = {node: of for node, of in energy.items() if there[hosts[node]] == (node,)}
    return alone, [nodes for nodes in there.values() if len(nodes) > 1 and not energy.keys().isdisjoint(nodes)]


def _text(file: Path) -> str:
    with suppress(OSError):
        return file.read_text().strip()
    return ""


def _number(file: Path) -> float | None:
    with suppress(OSError, ValueError):
        return float(file.read_text())
    return None


def _product(scale: float, *files: Path) -> float:
    """Of what files hold, in other units."""
    for file in files:
        scale *= float(file.read_text())
    return scale
