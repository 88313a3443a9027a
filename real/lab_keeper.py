"""The keeper of a lab, what of it is outside of its hosts: `python -m isthmus.real.lab_keeper FOLDER`.

Two processes, each with a socket in the lab's folder on which it answers whoever asks, from inside as well: one makes
links behave (real/relay.py), and is told to `play` what they are from now on, and to say the `totals` of what they have
carried; the other one, so that no packet waits for it, can `kill` all that runs in a host, and `restart` its Ray.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from isthmus.real.lab import LINKS, PLUGS, Lab
from isthmus.real.relay import TcWay, TunWay, Way, open_tun
from isthmus.real.shaping import Shaped
from isthmus.workloads.errors import InputError, IsthmusError, RunFailure
from isthmus.workloads.links import Link
from isthmus.workloads.routing import LinkId

Answers = Mapping[str, Callable[..., Any]]


class Links:
    """What makes the links behave."""

    def __init__(self, ways: Mapping[LinkId, Way]) -> None:
        self._ways = ways
        self._coming: tuple[float, Mapping[LinkId, Link]] = (math.inf, {})
        self.answers: Answers = {"play": self._play, "totals": self._totals}

    def carry(self, listener: socket.socket) -> None:
        """Until this process is ended."""
        clock, ways = time.monotonic, list(self._ways.values())
        sources = {way.source: way for way in ways if isinstance(way, TunWay)}
        watched = [listener.fileno(), *sources]
        while True:
            now_s = clock()
            if self._coming[0] <= now_s:
                epoch_s, links = self._coming
                self._coming = (math.inf, {})
                for link, described in links.items():
                    self._ways[link].play(described, epoch_s, now_s)
            due_s = min([self._coming[0], *(way.work(now_s) for way in ways)])
            # Not epoll, whose time-outs are whole milliseconds.
            wait_s = None if due_s == math.inf else min(max(due_s - clock(), 0.0), 3600.0)
            for fd in select.select(watched, (), (), wait_s)[0]:
                if fd in sources:
                    try:
                        sources[fd].read(clock)
                    except OSError as error:  # its host is gone; the others' links go on
                        print(f"link {sources[fd].link.id}: {error}", file=sys.stderr, flush=True)  # noqa: T201
                        watched.remove(fd)
                else:
                    answer(listener, self.answers)

    def _play(self, epoch_s: float, links: Mapping[LinkId, Link]) -> None:
        for link in links.values():
            check(link, self._ways)
        self._coming = epoch_s, links

    def _totals(self) -> dict[LinkId, dict[str, float]]:
        return {
            link: {**way.totals(), "mean_bytes_per_s": way.link.rate.mean_bytes_per_s}
            for link, way in self._ways.items()
        }


class Plugs:
    """What pulls the plugs of hosts, and puts them in again."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._started: list[subprocess.Popen[bytes]] = []
        self.answers: Answers = {"kill": lab.empty, "restart": self._restart}

    def _restart(self, host: str) -> None:
        self._started = [process for process in self._started if process.poll() is None]
        command = [sys.executable, "-P", "-m", "isthmus.real.lab_ray", str(self._lab.folder), host]
        with (self._lab.folder / host / "restart.log").open("w") as log:
            self._started.append(
                subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
            )


def answer(listener: socket.socket, answers: Answers) -> None:
    """One question."""
    with listener.accept()[0] as client, suppress(OSError):
        client.settimeout(5)
        with client.makefile("rwb") as stream:
            found: Any
            try:
                what, *said = pickle.load(stream)
                found = answers[what](*said)
            except IsthmusError as error:
                found = error
            except Exception as error:
                found = RunFailure(f"the keeper of the lab: {error!r}")
            pickle.dump(found, stream)


def listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))  # in a folder that is root's alone
    listener.listen()
    return listener


def check(link: Link, known: Mapping[LinkId, object]) -> None:
    """InputError when a link is none of the lab's, or is what a lab cannot make."""
    where = f"link {link.id[0]}>{link.id[1]}"
    if link.id not in known:
        raise InputError("is not in this lab", where=where, allowed=", ".join(f"{a}>{b}" for a, b in known))
    if link.medium is not None:
        raise InputError("is on a medium, which the lab does not have so far", where=where, allowed="a `rate`")


def main(folder: Path) -> None:
    """Make the links of the lab in a folder, then carry them. Says so on standard output when it can begin."""
    lab = Lab.load(folder)
    links: dict[LinkId, Link] = pickle.load(sys.stdin.buffer)
    pids = {host.name: host.pid for host in lab.hosts}
    ways: dict[LinkId, Way] = {}
    for wire in lab.wires:
        (a, b), device = wire["between"], wire["device"]
        if wire["made_by"] == "tc":
            ways[a, b] = TcWay(links[a, b], Shaped(pids[a], device))
            ways[b, a] = TcWay(links[b, a], Shaped(pids[b], device))
        else:
            mine, other = open_tun(pids[a], device), open_tun(pids[b], device)
            ways[a, b], ways[b, a] = TunWay(links[a, b], mine, other), TunWay(links[b, a], other, mine)
    carrying, plugging = listen(folder / LINKS), listen(folder / PLUGS)
    if os.fork() == 0:
        _end_with_parent()
        plugs = Plugs(lab)
        while True:
            answer(plugging, plugs.answers)
    _hurry()
    print("ready", flush=True)  # noqa: T201
    Links(ways).carry(carrying)


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG


def _hurry() -> None:
    """Before all that computes: it wakes up often, for microseconds. What it starts is as anything else."""
    gc.freeze()
    gc.disable()  # nothing here goes in circles
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    except OSError:  # a container may forbid it
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, -20)
    ctypes.CDLL(None).prctl(29, 1, 0, 0, 0)  # PR_SET_TIMERSLACK: 1 ns


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is for whoever uses the lab
    main(Path(sys.argv[1]))
