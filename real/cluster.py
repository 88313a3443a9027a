"""Ray: on this machine only, or on a cluster that lets this machine in; actors made from plain classes.

Knows nothing of what they do.
"""

from __future__ import annotations

import logging
import os
import secrets
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from isthmus.real import knock
from isthmus.workloads.cluster import ClusterSpec, HostFiles, host_files
from isthmus.workloads.errors import InputError, IsthmusError, RunFailure


class ActorGone(RunFailure):
    """An actor died."""


@contextmanager
def connect(spec: ClusterSpec | None, folder: Path) -> Iterator[Any]:
    """Ray on the cluster of a testbed; on this machine, as `local_ray`, where it has none.

    `folder` is what the paths in `spec` start from. This machine has to be one of the cluster's. InputError for a token
    or a certificate that is missing or that others can read; RunFailure where the head cannot be reached or refuses,
    lets in who has no token, or runs another Ray or Python, and where this machine has not joined.
    """
    if spec is None:
        with local_ray() as ray:
            yield ray
        return
    token, keys = _token(spec, folder), _keys(spec, folder)
    knock.reach(spec.address, keys)
    open_door = {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": None, "RAY_AUTH_TOKEN_PATH": None} | _tls(keys)
    closed = open_door | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    with _settings(closed) as ray:
        if ray.is_initialized():
            raise RunFailure("Ray runs in this process already (allowed: one cluster at a time)")
        _check_joined(spec, token, keys, knock.ask(spec.address))
    with _settings(open_door):
        if knock.is_open(spec.address):
            said = "lets in whoever knocks: stop it, and start it on all machines with RAY_AUTH_MODE=token"
            raise RunFailure(f"the head at {spec.address} {said}")
    with _settings(closed) as ray, _running(ray, address=spec.address, _node_ip_address=spec.driver):
        yield ray


@contextmanager
def local_ray() -> Iterator[Any]:
    """Ray on this machine, which listens on its loopback only. One that already runs in this process is used.

    Raises RunFailure when Ray is not installed or does not start.
    """
    # Others who work on this machine reach the loopback as well: so a token here too, that nobody else ever knows.
    # Actors find what the driver finds: policies named as module:Class lie beside the experiment, say.
    ours = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USE_TLS": "0",
        "PYTHONPATH": os.pathsep.join(os.path.abspath(p) for p in dict.fromkeys(sys.path)),
    }
    if (running := sys.modules.get("ray")) is not None and running.is_initialized():
        yield running
        return
    with _settings(ours) as ray, _loopback(), _running(
        ray, address="local", include_dashboard=False, object_store_memory=512 * 2**20
    ):  # fmt: skip
        yield ray


def tls_settings(keys: HostFiles) -> dict[str, str]:
    """What to set for Ray so that a machine proves itself with these, and asks all others to."""
    return {
        "RAY_USE_TLS": "1",
        "RAY_TLS_SERVER_CERT": str(keys.certificate),
        "RAY_TLS_SERVER_KEY": str(keys.key),
        "RAY_TLS_CA_CERT": str(keys.authority),
    }


def _tls(keys: HostFiles | None) -> dict[str, str | None]:
    return {"RAY_USE_TLS": "0"} if keys is None else {**tls_settings(keys)}


def _token(spec: ClusterSpec, folder: Path) -> Path:
    path = spec.token_file(folder).absolute()
    if not path.is_file():
        raise InputError(
            "no such token",
            where=path,
            allowed=f"`isthmus cluster token {path}`, and a copy on every machine before Ray is started there",
        )
    _check_private(path)
    try:
        if not path.read_text(encoding="ascii").strip():
            raise InputError("is empty", where=path, allowed="a token: `isthmus cluster token --replace`")
    except (OSError, UnicodeDecodeError):
        raise InputError("is no token", where=path, allowed="a readable line of letters and digits") from None
    return path


def _keys(spec: ClusterSpec, folder: Path) -> HostFiles | None:
    kept = spec.key_folder(folder)
    if kept is None:
        return None
    keys = host_files(kept.absolute(), spec.this_machine)
    for path in keys:
        if not path.is_file():
            made = f"`isthmus cluster certs {kept} --testbed FILE`, or copies of what it has made elsewhere"
            raise InputError("no such file", where=path, allowed=made)
    _check_private(keys.key)
    return keys


def _check_private(path: Path) -> None:
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise InputError(f"others than its owner may use it (mode {mode:o})", where=path, allowed=f"chmod 600 {path}")


def _check_joined(spec: ClusterSpec, token: Path, keys: HostFiles | None, nodes: Mapping[str, list[str]]) -> None:
    """RunFailure unless exactly one of the cluster's Ray nodes is for a driver here to attach to."""
    from ray._private.services import find_node_ids

    here = find_node_ids()  # of all that run on this machine
    found = [at for at, ids in nodes.items() if not here.isdisjoint(ids) and spec.driver in (None, at)]
    if len(found) > 1:
        several = ", ".join(sorted(found))
        raise RunFailure(f"this machine is in the cluster as {several} (allowed: `driver: ADDRESS` says which to use)")
    if not found:
        settings = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)} | (tls_settings(keys) if keys else {})
        said = " ".join(f"{name}={value}" for name, value in settings.items())
        address = "" if spec.driver is None else f" --node-ip-address={spec.driver}"
        raise RunFailure(
            f"this machine{(spec.driver and f' ({spec.driver})') or ''} has not joined the cluster at {spec.address}: "
            f"{said} ray start --address={spec.address}{address}"
        )


@contextmanager
def _running(ray: Any, **options: Any) -> Iterator[None]:
    try:
        ray.init(namespace="isthmus", log_to_driver=False, logging_level=logging.ERROR, **options)
    except Exception as error:
        raise RunFailure(f"Ray does not start: {' '.join(str(error).split())}") from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _settings(settings: Mapping[str, str | None]) -> Iterator[Any]:
    """Ray, imported with these in the environment; None is to be unset. It is left as it was."""
    quiet = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    wanted: dict[str, str | None] = {**quiet, **settings}
    before = {name: os.environ.get(name) for name in wanted}
    _set(wanted)
    try:
        try:
            import ray
            from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]
        except ImportError:
            raise RunFailure("real runs need Ray: pip install 'isthmus[real]'") from None

        def read_again() -> None:
            """Ray reads its settings and its token once per process."""
            Config.initialize("")
            AuthenticationTokenLoader.instance().reset_cache()

        read_again()
        try:
            yield ray
        finally:
            _set(before)
            read_again()
    finally:
        _set(before)


def _set(settings: Mapping[str, str | None]) -> None:
    for name, value in settings.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextmanager
def _loopback() -> Iterator[None]:
    """Ray listens on all addresses of a machine, except where it takes the loopback for the machine's own.

    Which it does where it is told that no other machines will join (`RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0`, read once).
    """
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


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


def own_address() -> str:
    """Of this machine, in the network of the cluster."""
    import ray

    return str(ray.util.get_node_ip_address())


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
    except ray.exceptions.RayError as error:  # such as an answer that went with the machine that had it
        raise ActorGone(f"the answer of an actor is gone: {error}") from error
