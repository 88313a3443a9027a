"""What makes the links of a lab behave over time: a relay of packets, or the kernel, told when rates change.

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

import fcntl
import math
import os
import struct
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from isthmus.real.shaping import Shaped, in_namespace
from isthmus.workloads.links import Link
from isthmus.workloads.random import Uniforms
from isthmus.workloads.transmitter import Transmitter

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
    transport: int
    segment: int
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
