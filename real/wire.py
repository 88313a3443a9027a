"""The wire between nodes: letters and their tensors over TCP, one connection per direction, in order.

ZeroMQ carries them: a call from actor to actor costs one to three milliseconds, a message over a socket a few tenths,
and large arguments of calls are fetched by the receiver, which costs round trips. It is as safe as Ray's own traffic:
where that is encrypted, CURVE encrypts, and lets in who is known; else each node has a password of its own. Keys and
passwords go around over the cluster's own channel. Letters are data, never pickles.

Knows sockets and letters. Must not know Ray, nor what becomes of a letter.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import zmq
from zmq.auth.thread import ThreadAuthenticator

from isthmus.real.letters import Letter, letter_from, letter_to
from isthmus.real.session import Array
from isthmus.workloads.errors import InputError

_LARGEST_BYTES = 2**31
_LARGEST_LETTER_BYTES = 2**20  # without its tensors
_PORTS = 49_200, 65_500, 1000
"""From, to, and how many to try: what docs/cluster.md opens in firewalls."""
_DOMAIN = "isthmus"
_LETTER, _NOTE = b"letter", b"note"


class Address(NamedTuple):
    """Where a node is reached, and its public key, or without encryption its password."""

    endpoint: str
    key: bytes


class Wire:
    """One node's end of all its links. `deliver` takes what comes; `told` small notes: who, and what.

    Both are called on one thread of the wire's. `refused` is told why something that came was not taken. Encryption
    costs some 1.5 ms per megabyte.
    """

    def __init__(
        self,
        host: str,
        deliver: Callable[[Letter, Sequence[Array]], None],
        told: Callable[[Any], None],
        refused: Callable[[str], None],
        *,
        encrypted: bool = True,
    ) -> None:
        self._deliver, self._told, self._refused, self._encrypted = deliver, told, refused, encrypted
        self._context = zmq.Context()
        self._public, self._secret = zmq.curve_keypair()
        self._known: set[bytes] = set()
        self._guard = ThreadAuthenticator(self._context)
        self._guard.start()
        self._inbox = self._context.socket(zmq.PULL)
        if encrypted:
            self._guard.configure_curve_callback(domain=_DOMAIN, credentials_provider=self)
            self._inbox.curve_secretkey, self._inbox.curve_publickey = self._secret, self._public
            self._inbox.curve_server = True
        else:
            self._guard.configure_plain(domain=_DOMAIN, passwords={_DOMAIN: self._secret.decode()})
            self._inbox.plain_server = True
        self._inbox.zap_domain = _DOMAIN.encode()
        self._inbox.maxmsgsize = _LARGEST_BYTES
        self._inbox.rcvhwm = 0
        port = self._inbox.bind_to_random_port(f"tcp://{host}", *_PORTS)
        self.address = Address(f"tcp://{host}:{port}", self._public if encrypted else self._secret)
        self._peers: dict[str, Address] = {}
        self._sockets: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._receive, name="wire", daemon=True)
        self._thread.start()

    def callback(self, domain: str, key: bytes) -> bool:
        """For the guard: whether who knocks is known."""
        return key in self._known

    def connect(self, peers: Mapping[str, Address]) -> None:
        """Know these nodes and no others. Connections to those that are where they were stay open."""
        self._known = {address.key for address in peers.values()}
        with self._lock:
            for node, address in self._peers.items():
                if peers.get(node) != address and node in self._sockets:
                    self._sockets.pop(node).close(linger=0)
            self._peers = dict(peers)

    def send(self, node: str, letter: Letter, arrays: Sequence[Array]) -> None:
        """Pass a letter on. One to a node that is gone is lost."""
        shapes = [(array.dtype.str, array.shape) for array in arrays]
        self._put(node, [_LETTER, letter_to(letter, shapes), *map(np.ascontiguousarray, arrays)])

    def tell(self, node: str, note: bytes) -> None:
        """Pass a small note on."""
        self._put(node, [_NOTE, note])

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        with self._lock:
            for socket in self._sockets.values():
                socket.close(linger=0)
        self._inbox.close(linger=0)
        self._guard.stop()
        self._context.term()

    def _put(self, node: str, frames: list[Any]) -> None:
        with self._lock:
            if node not in self._peers:
                return
            socket = self._sockets.get(node)
            if socket is None:
                socket = self._sockets[node] = self._connected(self._peers[node])
            # One by one: pyzmq's own loop costs half as much again.
            for frame in frames[:-1]:
                socket.send(frame, zmq.SNDMORE, copy=False)
            socket.send(frames[-1], copy=False)

    def _connected(self, peer: Address) -> Any:
        socket = self._context.socket(zmq.PUSH)
        if self._encrypted:
            socket.curve_serverkey, socket.curve_publickey, socket.curve_secretkey = (
                peer.key,
                self._public,
                self._secret,
            )
        else:
            socket.plain_username, socket.plain_password = _DOMAIN.encode(), peer.key
        socket.sndhwm = 0  # what a link is too slow for waits at its sender, as in the simulator
        socket.linger = 0
        socket.connect(peer.endpoint)
        return socket

    def _receive(self) -> None:
        while not self._closed.is_set():
            if not self._inbox.poll(timeout=100):
                continue
            frames = self._inbox.recv_multipart(copy=False)
            try:
                if any(len(frame.buffer) > _LARGEST_LETTER_BYTES for frame in frames[:2]):
                    raise InputError("a letter that is too long", allowed=f"{_LARGEST_LETTER_BYTES} bytes")
                if len(frames) > 1 and frames[0].bytes == _LETTER:
                    letter, shapes = letter_from(frames[1].bytes)
                    self._deliver(letter, _arrays(shapes, frames[2:]))
                elif len(frames) == 2 and frames[0].bytes == _NOTE:
                    self._told(frames[1].bytes)
                else:
                    raise InputError(f"a message of {len(frames)} frames", allowed="a letter with its tensors")
            except Exception as error:  # whatever it is made of, this thread has to go on
                self._refused(str(error) if isinstance(error, InputError) else repr(error))


def _arrays(shapes: Sequence[tuple[np.dtype[Any], tuple[int, ...]]], frames: Sequence[Any]) -> list[Array]:
    """The tensors of a letter, as views on what came. InputError unless each frame is of the size that is said."""
    if len(shapes) != len(frames):
        raise InputError(f"a letter with {len(frames)} tensors", allowed=f"{len(shapes)}, as it says itself")
    arrays = []
    for (dtype, shape), frame in zip(shapes, frames, strict=True):
        said = math.prod(shape) * dtype.itemsize
        if len(frame.buffer) != said:
            raise InputError(f"a tensor of {len(frame.buffer)} bytes", allowed=f"{said} for {dtype} {list(shape)}")
        arrays.append(np.frombuffer(frame.buffer, dtype=dtype).reshape(shape))
    return arrays
