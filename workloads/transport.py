"""What a message meets on a link besides the rate: lost packets, a window that opens slowly, jitter. Has no clock.

TCP in three formulas, not in packets:

- **Loss.** A message of n packets loses Binomial(n, p) of them; these are sent again a round-trip time after the rest
  has left (fast retransmit: the acknowledgements that tell of it take so long), and so on until none is lost. So a
  message sends n·p/(1 − p) packets more on average. Left out: timeouts, and that a loss makes the window smaller; the
  throughput of a long transfer is then lower than here (Padhye, Firoiu, Towsley & Kurose, SIGCOMM 1998).
- **Slow start** (RFC 5681, §3.1). A connection that is new sends a window per round-trip time; the window grows by what
  was acknowledged, so it doubles with every full round. When a window takes a round-trip time to send, acknowledgements
  come as fast as bytes leave, and the rate alone is the limit. While nothing is sent it shrinks again (RFC 2861).
- **Jitter** delays what has left.

Every draw belongs to a message of a request, an attempt and a link: two policies that send it meet the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from scipy import special

from isthmus.workloads.random import Uniforms

MSS_BYTES = 1460
"""What a packet carries: an Ethernet frame without the headers of IP and TCP."""

Finish = Callable[[float, float], float]
"""When a transfer that begins at a time has moved so many bytes."""


class Passage(NamedTuple):
    """One message on one link: of whose request, of which attempt, and the how-manieth of the attempt on this link."""

    source: str
    number: int
    attempt: int
    nth: int


class Luck:
    """The draws of one direction of a link."""

    def __init__(self, seed: int, place: str) -> None:
        self._seed, self._place = seed, place
        self._streams: dict[tuple[str, str], Uniforms] = {}

    def __call__(self, purpose: str, passage: Passage, turn: int = 0) -> float:
        """A uniform number in [0, 1): always the same one, whenever it is asked for."""
        source, number, attempt, nth = passage
        stream = self._streams.get((purpose, source))
        if stream is None:
            stream = self._streams[purpose, source] = Uniforms(self._seed, self._place, purpose, source)
        return stream[number << 32 | attempt << 28 | nth << 16 | turn]


def packets(size_bytes: float) -> int:
    """In how many packets a message is sent."""
    return math.ceil(size_bytes / MSS_BYTES)


def losses(count: int, loss: float, luck: Luck, passage: Passage) -> list[int]:
    """How many of `count` packets are lost, how many of those when they are sent again, and so on, down to none."""
    lost: list[int] = []
    while count:
        count = binomial(count, loss, luck("loss", passage, len(lost)))
        if count:
            lost.append(count)
    return lost


def binomial(n: int, p: float, u: float) -> int:
    """The quantile `u`, in [0, 1), of the number of successes in `n` trials: the least k with P(K ≤ k) > u."""
    if u < (1 - p) ** n:
        return 0
    k = min(max(math.ceil(special.bdtrik(u, n, p)), 0), n)  # where the continuous extension has it: off by one at most
    while k > 0 and special.bdtr(k - 1, n, p) > u:
        k -= 1
    while k < n and special.bdtr(k, n, p) <= u:
        k += 1
    return k


def slow_start(finish: Finish, start_s: float, size_bytes: float, window: float, rtt_s: float) -> tuple[float, float]:
    """When the last byte of a message leaves that starts with a window, in bytes, and the window after it.

    A window that takes a round-trip time to send is large enough, and stays.
    """
    while window < math.inf and finish(start_s, window) < start_s + rtt_s:
        if size_bytes <= window:
            return finish(start_s, size_bytes), grown(window, size_bytes)
        start_s, size_bytes, window = start_s + rtt_s, size_bytes - window, 2 * window
    return finish(start_s, size_bytes), window


def grown(window: float, sent_bytes: float) -> float:
    """A window after a round in which so much was sent: by that, if it was more than half of the window.

    As Linux has it (`tcp_is_cwnd_limited`): otherwise the window is not what limits.
    """
    return window + sent_bytes if 2 * sent_bytes > window else window


def rested(window: float, first: float, idle_s: float, timeout_s: float) -> float:
    """A window after some time without traffic: half of it for every retransmission timeout, down to the first one.

    Congestion window validation, RFC 2861, §2.1, and Linux's `tcp_cwnd_restart`.
    """
    if not idle_s >= timeout_s:  # or it is not a number, where a link is cut for ever
        return window
    return max(first, math.ldexp(window, -int(min(idle_s / timeout_s, 1000.0))))


def timeout_s(rtt_s: float) -> float:
    """The retransmission timeout of a steady connection in Linux: a round-trip time and at least 200 ms."""
    return rtt_s + 0.2
