"""What tests of the lab run in its hosts: `receive`, `send ADDRESS [[bytes, at_s], …]` over one connection, `ping`.

Times are readings of the monotonic clock, which all hosts of a lab share.
"""

from __future__ import annotations

import json
import socket
import struct
import sys
import time

PORT = 5001
_HEADER = struct.Struct("!Qd")  # bytes of the message with this, and when it was sent


def _exactly(connection: socket.socket, size: int) -> bytes:
    found = bytearray()
    while len(found) < size:
        part = connection.recv(size - len(found))
        if not part:
            sys.exit()
        found += part
    return bytes(found)


def receive() -> None:
    """Prints of every message its bytes, and when it was sent and had come."""
    listener = socket.create_server(("", PORT))
    print("ready", flush=True)  # noqa: T201
    with listener.accept()[0] as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while True:
            size, sent_s = _HEADER.unpack(_exactly(connection, _HEADER.size))
            _exactly(connection, size - _HEADER.size)
            print(json.dumps([size, sent_s, time.monotonic()]), flush=True)  # noqa: T201
            connection.sendall(b"k")


def send(address: str, plan: str) -> None:
    """One message after the other, each when the last one has come, and not before its time."""
    with socket.create_connection((address, PORT), timeout=30) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for size, at_s in json.loads(plan):
            time.sleep(max(at_s - time.monotonic(), 0.0))
            connection.sendall(_HEADER.pack(size, time.monotonic()) + bytes(size - _HEADER.size))
            connection.recv(1)


def ping(address: str, count: str) -> None:
    """Prints round-trip times of ICMP echoes, in seconds."""
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as icmp:
        icmp.settimeout(5)
        for number in range(int(count)):
            checksum = ~(0x0800 + number) & 0xFFFF
            sent_s = time.monotonic()
            icmp.sendto(struct.pack("!BBHHH", 8, 0, checksum, 0, number), (address, 0))
            while icmp.recv(2000)[20] != 0:  # until it is a reply
                pass
            print(time.monotonic() - sent_s, flush=True)  # noqa: T201


if __name__ == "__main__":
    {"receive": receive, "send": send, "ping": ping}[sys.argv[1]](*sys.argv[2:])
