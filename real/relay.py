"""The carrier of a lab: one process that makes its links behave, over time. `python -m isthmus.real.relay FOLDER`.

Knows links, devices and the clock; no node, no Ray and no experiment. Each direction of a link is a `Way`, of one of
two kinds: a `TunWay` takes packets from a TUN device in one host and hands them, in time, to one in the other; a
`TcWay` has the kernel do it (real/shaping.py) and only changes the rate when that is due.

A TUN way is what an emulation and a simulation make of a link (workloads/transmitter.py), applied to packets of IP:

- **Rate.** A FIFO transmitter; the rate is integrated exactly over the bytes of each packet, headers of IP and TCP
  included. Times chain, so a wake-up that comes late shifts one packet and nothing after it.
- **Queue.** What has not left yet may be `queue_bytes`; one packet more is dropped, as by a router. That is a quarter
  of a second at the mean rate, plus what is under way in a round trip: TCP needs the latter to keep a link busy after
  a loss, and the former lets it send a message of megabytes with few losses or none.
- **Latency and jitter.** In order. A burst shares one draw of the jitter: all that enters while the link is busy. The
  jitter of a testbed is that of a message, and a draw per packet would give a message the largest of hundreds.
- **Loss.** Each packet with that probability, on its own.

The kernel hands TCP over in pieces of up to some milliseconds (TSO: one read for many packets, whose headers are
counted one by one), so the cost in CPU grows with the time that a link is busy, not with its rate.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import logging
import math
import os
import pickle
import select
import signal
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from isthmus.real.shaping import Shaped, in_namespace
from isthmus.workloads.errors import InputError, IsthmusError, RunFailure
from isthmus.workloads.links import Link
from isthmus.workloads.random import Uniforms
from isthmus.workloads.routing import LinkId
from isthmus.workloads.transmitter import Transmitter

SOCKET = "relay.sock"
_READ_BYTES = 2**16 + 64
_BURST = 32  # packets that are read from one device before the others have their turn

# <linux/if_tun.h>, <linux/virtio_net.h>
_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
_TUN_F_CSUM, _TUN_F_TSO4 = 0x01, 0x02
_HEADER = struct.Struct("=BBHHHH")  # flags, kind of segmentation, header length, segment, checksum from, checksum at


class Way(Protocol):
    """One direction of a link."""

    link: Link

    def play(self, link: Link, epoch_s: float, now_s: float) -> None:
        """From now on it is like this; the rate's time 0 is at `epoch_s` of the monotonic clock, which has come."""

    def work(self, now_s: float) -> float:
        """Do what is due; when it wants to be asked again."""

    def totals(self) -> dict[str, float]: ...


def queue_bytes(link: Link) -> float:
    """How much may wait for a link: never less than forty full packets."""
    return max(64_000.0, link.rate.mean_bytes_per_s * (0.25 + 2 * link.latency_s))


def wire_bytes(packet: bytes) -> int:
    """The bytes of IP that a read stands for, headers included: those of each packet that TSO makes of it."""
    _, kind, _, segment, transport, _ = _HEADER.unpack_from(packet)
    size = len(packet) - _HEADER.size
    if not kind or not segment:
        return size
    headers = transport + (packet[_HEADER.size + transport + 12] >> 4) * 4
    return size + (math.ceil((size - headers) / segment) - 1) * headers


class TunWay:
    """From a TUN device to another one. Both are non-blocking, with virtio headers, which pass as they are."""

    def __init__(self, link: Link, source: int, sink: int) -> None:
        self.source, self._sink = source, sink
        self._under_way: deque[tuple[float, float, int, bytes]] = deque()  # leaves, arrives, bytes on the wire, packet
        self._waiting: deque[tuple[float, int]] = deque()  # leaves, bytes on the wire
        self._waiting_bytes = 0
        self._packets = self._bytes = self._dropped = self._lost = 0
        self._latest_s = 0.0
        self._arrived_s = self._jitter_s = 0.0
        self._numbers = 0
        self.play(link, time.monotonic(), time.monotonic())

    def play(self, link: Link, epoch_s: float, now_s: float) -> None:
        self.link, self._epoch_s, self._transmitter = link, epoch_s, Transmitter(link)
        self._room = queue_bytes(link)
        self._luck = Uniforms(0, *link.id, "relay")
        # A loss is of one packet, so nothing may stand for several.
        offload = _TUN_F_CSUM | (0 if link.loss else _TUN_F_TSO4)
        fcntl.ioctl(self.source, _TUNSETOFFLOAD, offload)
        again = [entry for entry in self._under_way if entry[0] > now_s]
        for _ in again:
            self._under_way.pop()
        self._waiting.clear()
        self._waiting_bytes, self._arrived_s = 0, self._under_way[-1][1] if self._under_way else 0.0
        for _, _, size, packet in again:
            self._send(packet, size, now_s)

    def read(self, clock: Callable[[], float]) -> None:
        """Take what has come."""
        for _ in range(_BURST):
            try:
                packet = os.read(self.source, _READ_BYTES)
            except BlockingIOError:
                return
            now_s, size = clock(), wire_bytes(packet)
            waiting = self._waiting
            while waiting and waiting[0][0] <= now_s:
                self._waiting_bytes -= waiting.popleft()[1]
            if self._waiting_bytes and self._waiting_bytes + size > self._room:
                self._dropped += 1
            elif self.link.loss and self._uniform() < self.link.loss:
                self._lost += 1
            else:
                self._send(packet, size, now_s)

    def _send(self, packet: bytes, size: int, now_s: float) -> None:
        # A packet that was read before time 0 is sent then: the link has been made anew in between.
        _, left_s, arrives_s = self._transmitter.send(max(now_s - self._epoch_s, 0.0), size)
        if self.link.jitter is not None:
            if not self._waiting:
                self._jitter_s = self.link.jitter.quantile_s(self._uniform())
            arrives_s += self._jitter_s
        left_s, arrives_s = left_s + self._epoch_s, max(arrives_s + self._epoch_s, self._arrived_s)
        self._arrived_s = arrives_s
        self._under_way.append((left_s, arrives_s, size, packet))
        self._waiting.append((left_s, size))
        self._waiting_bytes += size

    def _uniform(self) -> float:
        self._numbers += 1
        return self._luck[self._numbers]

    def work(self, now_s: float) -> float:
        under_way = self._under_way
        while under_way:
            _, arrives_s, size, packet = under_way[0]
            if arrives_s > now_s:
                return arrives_s
            under_way.popleft()
            self._latest_s = max(self._latest_s, now_s - arrives_s)
            self._packets += 1
            self._bytes += size
            try:
                os.write(self._sink, packet)
            except OSError:  # the device is down, or its host gone
                self._dropped += 1
        return math.inf

    def totals(self) -> dict[str, float]:
        """What was carried, in reads that may be several packets; `latest_s`: the largest delay that it was late."""
        return {
            "packets": self._packets,
            "bytes": self._bytes,
            "dropped": self._dropped,
            "lost": self._lost,
            "latest_s": self._latest_s,
        }


class TcWay:
    """The kernel carries it. A latency comes before the rate there, so rates change later by as much."""

    def __init__(self, link: Link, device: Shaped) -> None:
        self._device = device
        self.play(link, time.monotonic(), time.monotonic())

    def play(self, link: Link, epoch_s: float, now_s: float) -> None:
        self.link, self._from_s = link, epoch_s + link.latency_s
        self._next_s = now_s
        self.work(now_s)

    def work(self, now_s: float) -> float:
        if now_s >= self._next_s:
            # Just after a change the time may be a rounding before it.
            time_s = max(now_s - self._from_s, 0.0) + 1e-6
            self._device.shape(self.link, self.link.rate.at(time_s), queue_bytes(self.link))
            self._next_s = self._from_s + self.link.rate.change_after_s(time_s)
        return self._next_s

    def totals(self) -> dict[str, float]:
        return self._device.totals()


def open_tun(pid: int, device: str) -> int:
    """A TUN device in the network namespace of a process, and what reads and writes it. It goes when that is closed."""
    with in_namespace(pid):
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", device.encode(), _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR))
    return fd


def carry(ways: Mapping[LinkId, Way], listener: socket.socket) -> None:
    """Until the process is ended."""
    clock = time.monotonic
    sources = {way.source: way for way in ways.values() if isinstance(way, TunWay)}
    watched = [listener.fileno(), *sources]
    coming: list[tuple[float, dict[LinkId, Link]]] = []
    while True:
        now_s = clock()
        while coming and coming[0][0] <= now_s:
            epoch_s, links = coming.pop(0)
            for link, described in links.items():
                ways[link].play(described, epoch_s, now_s)
        due_s = coming[0][0] if coming else math.inf
        for way in ways.values():
            due_s = min(due_s, way.work(now_s))
        # Not epoll, whose time-outs are whole milliseconds.
        wait_s = None if due_s == math.inf else min(max(due_s - clock(), 0.0), 3600.0)
        for fd in select.select(watched, (), (), wait_s)[0]:
            if fd in sources:
                sources[fd].read(clock)
            else:
                _answer(listener, ways, coming)


def _answer(listener: socket.socket, ways: Mapping[LinkId, Way], coming: list[tuple[float, dict[LinkId, Link]]]) -> None:
    """One question of a client: what to play, or (None) what was carried. Packets wait meanwhile: it is short."""
    with listener.accept()[0] as client, client.makefile("rwb") as stream, suppress(OSError):
        client.settimeout(5)
        answer: Any = None
        try:
            asked = pickle.load(stream)
            if asked is None:
                answer = {
                    link: {**way.totals(), "mean_bytes_per_s": way.link.rate.mean_bytes_per_s}
                    for link, way in ways.items()
                }
            else:
                _, links = asked
                for link in links.values():
                    check(link, ways)
                # What was to come is replaced by what is asked for now.
                coming[:] = [asked]
        except IsthmusError as error:
            answer = error
        except Exception as error:
            answer = RunFailure(f"the relay of the lab: {error!r}")
        pickle.dump(answer, stream)
        stream.flush()


def check(link: Link, known: Mapping[LinkId, object]) -> None:
    """InputError when a link is none of the lab's, or is what a lab cannot make."""
    where = f"link {link.id[0]}>{link.id[1]}"
    if link.id not in known:
        raise InputError("is not in this lab", where=where, allowed=", ".join(f"{a}>{b}" for a, b in known))
    if link.medium is not None:
        raise InputError("is on a medium, which the lab does not have so far", where=where, allowed="a `rate`")


def ask(folder: Path, question: Any) -> Any:
    """What the relay of a lab answers. RunFailure when there is none."""
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(30)
            client.connect(str(folder / SOCKET))
            with client.makefile("rwb") as stream:
                pickle.dump(question, stream)
                stream.flush()
                answer = pickle.load(stream)
    except (OSError, EOFError) as error:
        raise RunFailure(f"the lab in {folder} does not answer: {error}") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def main(folder: Path) -> None:
    """Make the links of the lab in a folder, then carry them. Says so on standard output when it can begin."""
    described = json.loads((folder / "lab.json").read_text())
    links: dict[LinkId, Link] = pickle.load(sys.stdin.buffer)
    pids = {host["name"]: host["pid"] for host in described["hosts"]}
    ways: dict[LinkId, Way] = {}
    for wire in described["wires"]:
        (a, b), device = wire["between"], wire["device"]
        if wire["made_by"] == "tc":
            ways[a, b] = TcWay(links[a, b], Shaped(pids[a], device))
            ways[b, a] = TcWay(links[b, a], Shaped(pids[b], device))
        else:
            mine, other = open_tun(pids[a], device), open_tun(pids[b], device)
            ways[a, b], ways[b, a] = TunWay(links[a, b], mine, other), TunWay(links[b, a], other, mine)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / SOCKET))
        os.chmod(folder / SOCKET, 0o600)
        listener.listen()
        _hurry()
        print("ready", flush=True)  # noqa: T201
        carry(ways, listener)


def _hurry() -> None:
    """Before all that computes: it wakes up often, for microseconds."""
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except OSError:  # a container may forbid it
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, -20)
    ctypes.CDLL(None).prctl(29, 1, 0, 0, 0)  # PR_SET_TIMERSLACK: 1 ns


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever uses the lab; it ends the relay in the end
    logging.disable()
    main(Path(sys.argv[1]))
