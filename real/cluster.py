"""Ray: started once, quietly, on this host only; actors made from plain classes. Knows nothing of what they do."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from isthmus.workloads.errors import IsthmusError, RunFailure


class ActorGone(RunFailure):
    """An actor died."""


@contextmanager
def local_ray() -> Iterator[Any]:
    """Ray on this machine. One that already runs in this process is used, and left running.

    Raises RunFailure when Ray is not installed or does not start.
    """
    try:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        import ray
    except ImportError:
        raise RunFailure("real runs need Ray: pip install 'isthmus[real]'") from None
    if ray.is_initialized():
        yield ray
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Actors find what the driver finds: policies named as module:Class lie beside the experiment, say.
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(os.path.abspath(p) for p in dict.fromkeys(sys.path))
    try:
        ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=512 * 2**20,
            namespace="isthmus",
        )
    except Exception as error:
        raise RunFailure(f"Ray does not start: {error}") from error
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    try:
        yield ray
    finally:
        ray.shutdown()


def start_actor(ray: Any, kind: type, *arguments: Any, **where: Any) -> Any:
    """An actor of a plain class. It claims no CPU, since emulated nodes share the host's; calls may overlap.

    `where` are Ray's options of where it runs; without them it is where Ray likes.
    """
    return ray.remote(kind).options(num_cpus=0, max_concurrency=16, max_restarts=0, **where).remote(*arguments)


def on_this_machine(ray: Any) -> dict[str, Any]:
    """Options for actors that belong on the machine of the driver."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=False)}


def results(ray: Any, references: list[Any], timeout_s: float = 600) -> list[Any]:
    """What actors answer. An error of our own comes out as it was raised; any other as a RunFailure."""
    try:
        return list(ray.get(references, timeout=timeout_s))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, IsthmusError):
            raise error.cause from None
        raise RunFailure(f"an actor failed: {error.cause or error}") from error
    except ray.exceptions.RayActorError as error:
        raise ActorGone(f"an actor is gone: {error}") from error
    except ray.exceptions.GetTimeoutError:
        raise RunFailure(f"an actor has not answered for {timeout_s:g} s") from None
