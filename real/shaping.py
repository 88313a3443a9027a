"""The network of a lab: devices between network namespaces, and the kernel's shaping of them, through pyroute2.

Knows namespaces by the process that lives in them, and links; no Ray, no experiment. A link of a testbed is a device in
each of two hosts: a pair of virtual Ethernets whose sending side has a `tbf` (rate) with a `netem` in it (latency,
loss), or, where the kernel has no netem, two TUN devices that real/relay.py joins.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from pyroute2 import IPRoute, NetlinkError, netns

from isthmus.real.lab import MadeBy
from isthmus.workloads.errors import InputError
from isthmus.workloads.links import Link

MTU = 1500
_STILL_BYTES_PER_S = 16.0
"""What tbf makes of a rate of 0: nothing in between is possible, and one packet takes a minute and a half."""
_PIECE_S = 0.002
"""How long a link takes for the largest piece that TCP hands to it (TSO): what store and forward costs at a hop."""


@contextmanager
def in_namespace(pid: int) -> Iterator[None]:
    """This thread in the network namespace of a process: what it opens stays there."""
    netns.pushns(f"/proc/{pid}/ns/net")
    try:
        yield
    finally:
        netns.popns()


@contextmanager
def network(pid: int) -> Iterator[IPRoute]:
    """The network namespace of a process. Not `IPRoute(netns=…)`, which forks, signal handlers and all."""
    with in_namespace(pid), IPRoute() as ns:
        yield ns


def has_netem(pid: int) -> bool:
    """Whether the kernel has netem; asked in the namespace of a process."""
    with network(pid) as ns:
        try:
            ns.tc("add", "netem", index=1, delay=1)
        except NetlinkError:
            return False
        ns.tc("del", "netem", index=1)
    return True


def made_by(there: Link, back: Link, *, netem: bool, asked: MadeBy | None = None) -> MadeBy:
    """What makes a link: the kernel where it can, or else the relay; what was asked for, if it can.

    Jitter is the relay's: what netem draws for every packet changes their order, which TCP takes for losses.
    """
    beyond = next((name for way in (there, back) for name in _beyond_tc(way, netem=netem)), None)
    if asked == "tc" and beyond is not None:
        raise InputError(
            f"the kernel cannot make its {beyond}",
            where=f"link {there.id[0]}>{there.id[1]}",
            allowed="--shaper relay" if netem or beyond == "jitter" else "a kernel with netem, or --shaper relay",
        )
    return asked or ("tc" if netem and beyond is None else "relay")


def _beyond_tc(way: Link, *, netem: bool) -> Iterator[str]:
    if way.jitter is not None:
        yield "jitter"
    if not netem:
        yield from (name for name in ("latency", "loss") if getattr(way, {"latency": "latency_s"}.get(name, name)))


def begin(pid: int, address: str) -> None:
    """A host's loopback, which has its address: links come and go, and none of them is the host."""
    with network(pid) as ns:
        ns.link("set", index=1, state="up")
        ns.addr("add", index=1, address=address, prefixlen=32)


def join(pid: int, device: str, other_pid: int, other_device: str) -> None:
    """A pair of virtual Ethernets between two namespaces."""
    with network(pid) as ns:
        ns.link(
            "add", kind="veth", ifname=device, mtu=MTU, peer={"ifname": other_device, "net_ns_pid": other_pid}
        )  # fmt: skip


def raise_device(pid: int, device: str, *, piece_bytes: float | None = None) -> None:
    """A device is up. TCP hands it pieces of at most so many bytes."""
    with network(pid) as ns:
        [index] = ns.link_lookup(ifname=device)
        ns.link("set", index=index, state="up", mtu=MTU)
        if piece_bytes is not None:
            ns.link("set", index=index, gso_max_size=round(min(max(piece_bytes, 2 * MTU), 65536)))


def piece_bytes(link: Link) -> float:
    """The largest piece that TCP should hand to a link."""
    return link.rate.mean_bytes_per_s * _PIECE_S


def route(pid: int, address: str, device: str, source: str, by_way_of: str | None = None) -> None:
    """What a host sends to an address goes into a device, to the address of who forwards it.

    With TCP's usual congestion control, whatever the machine's own is: a namespace may not choose for itself what the
    machine does not, but a route may.
    """
    with network(pid) as ns:
        [index] = ns.link_lookup(ifname=device)
        said = {"dst": f"{address}/32", "oif": index, "prefsrc": source, "scope": "link"}
        if by_way_of is not None:
            said |= {"gateway": by_way_of, "scope": "universe", "flags": ["onlink"]}
        try:
            ns.route("replace", **said, metrics={"cc_algo": "cubic"})
        except NetlinkError:  # a kernel without it
            ns.route("replace", **said)


class Shaped:
    """What one host sends into a device, as slow as a link."""

    def __init__(self, pid: int, device: str) -> None:
        self._latency: tuple[float, float] | None = None
        with in_namespace(pid):  # sockets stay where they were opened
            self._ns = IPRoute()
            [self._index] = self._ns.link_lookup(ifname=device)
            self._kick = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
            self._kick.bind((device, 0))

    def shape(self, link: Link, rate_bytes_per_s: float, room_bytes: float) -> None:
        """From now on at this rate, with the link's latency and loss. Little may wait: a burst is one packet."""
        # tbf counts the Ethernet header as well: as it is of full packets, it is made up for.
        rate = max(rate_bytes_per_s * (MTU + 14) / MTU, _STILL_BYTES_PER_S)
        burst = 2000  # a packet; a piece of TSO that is larger is cut up
        self._ns.tc("replace", "tbf", index=self._index, handle="1:", rate=rate, burst=burst, limit=int(room_bytes))
        wanted = link.latency_s, link.loss
        if wanted != (0.0, 0.0) and wanted != self._latency:
            under_way = link.rate.mean_bytes_per_s * link.latency_s
            self._ns.tc(
                "replace", "netem", index=self._index, parent="1:", handle="10:", delay=round(1e6 * link.latency_s),
                loss=100 * link.loss, limit=max(int((room_bytes + under_way) / MTU), 1),
            )  # fmt: skip
        self._latency = wanted
        # tbf sleeps for as long as its next packet would have taken; a packet wakes it up.
        with suppress(OSError):
            self._kick.send(bytes(12) + b"\x88\xb5" + bytes(46))  # IEEE's EtherType for experiments: nobody listens

    def totals(self) -> dict[str, float]:
        for disc in self._ns.get_qdiscs(index=self._index):
            if disc.get("handle") == 0x10000:
                basic, queue = (disc.get_nested("TCA_STATS2", f"TCA_STATS_{what}") for what in ("BASIC", "QUEUE"))
                return {
                    "packets": float(basic["packets"]),
                    "bytes": float(basic["bytes"]),
                    "dropped": float(queue["drops"]),
                }
        return {}
