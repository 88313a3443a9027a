"""What a host tells of itself: versions, resources, and what commonly goes wrong. Judges nothing, knows no testbed.

It is sent to hosts as code, so that it also works where Isthmus is missing: only what is found is reported.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import platform
import re
import shutil
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import psutil

from isthmus.real.clocks import Reading, reading
from isthmus.real.power import meters, unreadable
from isthmus.real.pressure import cores, stalled_share

_RAY_SETS = re.compile(
    r"RAY_(CLIENT_MODE|RAYLET_PID|LD_PRELOAD_ON_WORKERS|JOB_ID|USAGE_STATS_\w+|ACCEL_ENV_VAR_\w+|AUTH_\w+|USE_TLS|TLS_\w+"
    r"|HEAD_IP|NODE_\w+|WORKER_\w+|SESSION_\w+|RAYLET_\w+|CLOUD_INSTANCE_ID|enable_autoscaler_v2)"
)
"""What Ray tells its workers, and what Isthmus sets."""


@dataclass(frozen=True)
class Facts:
    """Of one host. None, or an empty text, is what it cannot tell."""

    name: str
    python: str
    packages: dict[str, str | None]
    """Versions, of `isthmus` too; None for what cannot be imported."""
    missing: str
    """Why `isthmus` cannot be imported."""
    code: str
    """A digest of the code of Isthmus that both ends of a call must share."""
    machine: str
    cpu: str
    cores: int
    governors: tuple[str, ...]
    load_1: float
    stalled_share: float | None
    memory_bytes: int
    memory_free_bytes: int
    swap_bytes: int
    temp: str
    disk_bytes: int
    disk_free_bytes: int
    shm_bytes: int | None
    resolve_s: float | None
    """How long it took to find the host's own name; None when it was not found."""
    up_s: float
    throttled: int | None
    """Of a Raspberry Pi: `vcgencmd get_throttled`."""
    auth_mode: str
    token_file: str
    token_mode: int | None
    """Permissions of the token's file; None where there is none."""
    environment: dict[str, str]
    """Variables RAY_… that neither Ray nor Isthmus has set."""
    meters: tuple[str, ...]
    unreadable_meters: tuple[str, ...]


class Inspector:
    """What an actor on each host answers with. A plain class."""

    def facts(self, temp: str) -> dict[str, Any]:
        return facts(temp)

    def has(self, files: dict[str, str]) -> list[str]:
        """Which of these models in files, and their hashes, are there."""
        read = importlib.import_module("isthmus.workloads.onnx_file").read
        return [file for file, sha256 in files.items() if Path(file).is_file() and read(Path(file))[1] == sha256]

    def clock(self) -> Reading:
        return reading()


def facts(temp: str) -> dict[str, Any]:
    """The fields of `Facts`, as plain data. `temp` is the folder in which Ray keeps its files."""
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(_existing(Path(temp)))
    token = os.environ.get("RAY_AUTH_TOKEN_PATH") or str(Path.home() / ".ray" / "auth_token")
    isthmus, code, missing = _isthmus()
    brought = packages_distributions()  # ONNX Runtime comes in one of several packages
    return {
        "name": socket.gethostname(),
        "python": platform.python_version(),
        "packages": {"isthmus": isthmus}
        | {
            name: version(brought[name][0]) if name in brought else None
            for name in ("ray", "onnxruntime", "onnx", "zmq")
        },
        "missing": missing,
        "code": code,
        "machine": platform.machine(),
        "cpu": processor(),
        "cores": cores(),
        "governors": tuple(sorted(set(_governors()))),
        "load_1": os.getloadavg()[0],
        "stalled_share": stalled_share(),
        "memory_bytes": memory.total,
        "memory_free_bytes": memory.available,
        "swap_bytes": psutil.swap_memory().total,
        "temp": temp,
        "disk_bytes": disk.total,
        "disk_free_bytes": disk.free,
        "shm_bytes": shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else None,
        "resolve_s": _resolve_s(),
        "up_s": time.time() - psutil.boot_time(),
        "throttled": _throttled(),
        "auth_mode": os.environ.get("RAY_AUTH_MODE", ""),
        "token_file": token,
        "token_mode": permissions(Path(token)),
        "environment": strays(),
        "meters": tuple(f"{meter.kind}: {meter.name}" for meter in meters()),
        "unreadable_meters": tuple(unreadable()),
    }


def processor() -> str:
    """The name of the processor; of the board where the processor has none, as on a Raspberry Pi or a Jetson."""
    with suppress(OSError):
        if found := re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return found[1]
    with suppress(OSError):
        return Path("/proc/device-tree/model").read_text().strip("\0\n ")
    return platform.processor() or platform.machine()


def permissions(file: Path) -> int | None:
    """Who may read a file, as in `chmod`; None where there is none."""
    with suppress(OSError):
        return stat.S_IMODE(file.stat().st_mode)
    return None


def strays() -> dict[str, str]:
    """Variables RAY_… in this process that people have set."""
    return {
        name: value for name, value in os.environ.items() if name.startswith("RAY_") and not _RAY_SETS.fullmatch(name)
    }


def _existing(folder: Path) -> Path:
    return next((path for path in (folder, *folder.parents) if path.exists()), Path("/"))


def _isthmus() -> tuple[str | None, str, str]:
    """Its version, a digest of what actors and drivers exchange objects of, and why there is none."""
    try:
        package = importlib.import_module("isthmus")
    except ImportError as error:
        return None, "", str(error)
    digest, root = hashlib.sha256(), Path(str(package.__file__)).parent
    for file in sorted(path for room in ("workloads", "policies", "real") for path in (root / room).glob("*.py")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return str(package.__version__), digest.hexdigest()[:12], ""


def _governors() -> Iterator[str]:
    for file in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_governor"):
        with suppress(OSError):
            yield file.read_text().strip()


def _resolve_s() -> float | None:
    began = time.monotonic()
    with suppress(OSError):
        socket.getaddrinfo(socket.gethostname(), None)
        return time.monotonic() - began
    return None


def _throttled() -> int | None:
    with suppress(OSError, subprocess.SubprocessError, IndexError, ValueError):
        said = subprocess.run(["vcgencmd", "get_throttled"], capture_output=True, text=True, timeout=5, check=True)
        return int(said.stdout.strip().split("=")[1], 16)
    return None
