"""The yardstick: one workload as a SimPy user writes it first, with a generator process per request and `Resource`s.

Knows nothing of Isthmus. It records nothing but a sum.
"""

from __future__ import annotations

import random
from collections.abc import Generator
from typing import Any

import simpy


def plain_simpy(
    *,
    devices: int,
    rate_per_s: float,
    requests: int,
    up_s: float,
    service_s: float,
    back_s: float | None = None,
    seed: int = 1,
) -> float:
    """Mean seconds of requests that queue at their device's uplink, at one server, and on the downlink.

    `requests` are per device. Without `back_s` there is no way back: less work than a simulation that has one.
    """
    env, draw = simpy.Environment(), random.Random(seed)
    server = simpy.Resource(env)
    total_s = 0.0

    def request(up: Any, down: Any) -> Generator[Any, Any, None]:
        nonlocal total_s
        arrival_s = env.now
        with up.request() as turn:
            yield turn
            yield env.timeout(up_s)
        with server.request() as turn:
            yield turn
            yield env.timeout(service_s)
        if back_s is not None:
            with down.request() as turn:
                yield turn
                yield env.timeout(back_s)
        total_s += env.now - arrival_s

    def device() -> Generator[Any, Any, None]:
        up, down = simpy.Resource(env), simpy.Resource(env)
        for _ in range(requests):
            yield env.timeout(draw.expovariate(rate_per_s))
            env.process(request(up, down))

    for _ in range(devices):
        env.process(device())
    env.run()
    return total_s / (devices * requests)
