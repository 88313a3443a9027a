"""Knocking at the head of a cluster: does it let this machine in, as it should and nobody else, and if not, why?

Ray itself tries for 20 s or more and then says that it timed out, whatever is wrong. Knows Ray's client of its control
store; its settings are in the environment already (`cluster.py`). Changes nothing.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import ssl
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from isthmus.workloads.cluster import HostFiles
from isthmus.workloads.errors import InputError, RunFailure

_PATIENCE_S = 5.0
# What a client of HTTP/2, and so of gRPC, says first: the preface and an empty frame of settings (RFC 9113, 3.4).
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0"
_SETTINGS = 4  # the type, at byte 3, of the frame that a server answers with


def reach(address: str, keys: HostFiles | None) -> None:
    """RunFailure unless a server of gRPC is at `host:port` and takes TLS with these keys; without keys, no TLS."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), _PATIENCE_S) as plain:
            if keys is None:
                _check_plain(plain, address)
            else:
                _check_tls(plain, host, address, keys)
    except ssl.SSLCertVerificationError as error:
        raise RunFailure(
            f"the head at {address} shows a certificate that is none of this cluster's: {error.verify_message} "
            f"(its machines need certificates made by the same `isthmus cluster certs`, with the addresses they have)"
        ) from None
    except ssl.SSLError as error:
        raise RunFailure(
            f"the head at {address} refuses TLS with the certificate {keys and keys.certificate}: "
            f"{(error.reason or str(error)).lower().replace('_', ' ')} (start it with RAY_USE_TLS=1 and certificates "
            f"made by the same `isthmus cluster certs`)"
        ) from None
    except TimeoutError:
        raise RunFailure(f"the head at {address} does not answer (is it up, and is its port open?)") from None
    except (OSError, ValueError, OverflowError) as error:
        said = getattr(error, "strerror", None) or error
        raise RunFailure(f"the head at {address} cannot be reached: {said} (is it up? `ray start --head`)") from None


def _check_plain(plain: socket.socket, address: str) -> None:
    plain.sendall(_PREFACE)
    answer = plain.recv(64)
    if len(answer) < 4 or answer[3] != _SETTINGS:
        raise RunFailure(
            f"at {address} there is no Ray without TLS (allowed: `certificates: FOLDER` in `cluster` if the head has "
            "them; the port that `ray start --head --port` was given)"
        )


def _check_tls(plain: socket.socket, host: str, address: str, keys: HostFiles) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["h2"])
    for path in keys:
        if not path.is_file():
            raise InputError("no such file", where=path, allowed="a folder that `isthmus cluster certs` made")
    try:
        context.load_verify_locations(keys.authority)
        context.load_cert_chain(keys.certificate, keys.key)
    except ssl.SSLError as error:
        raise InputError(f"not a certificate with its key: {error.reason}", where=keys.certificate) from None
    with context.wrap_socket(plain, server_hostname=host) as secured:
        secured.sendall(_PREFACE)
        if len(secured.recv(64)) < 4:  # a server of TLS 1.3 refuses a certificate only after the handshake
            raise RunFailure(f"the head at {address} hangs up on the certificate {keys.certificate}")


def ask(address: str) -> Mapping[str, list[str]]:
    """Identities and addresses of the machines that are in the cluster: {address: [node id, …]}.

    RunFailure where the token is refused, where one is not even asked for, and for another Ray or Python than ours.
    """
    import ray
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    try:
        with _quiet():
            store = GcsClient(address=address)
            said = json.loads(store.internal_kv_get(b"CLUSTER_METADATA", b"cluster", timeout=_PATIENCE_S) or b"{}")
            nodes = store.get_all_node_info(timeout=_PATIENCE_S).values()
    except ray.exceptions.AuthenticationError:
        raise RunFailure(
            f"the head at {address} refuses the token in {os.environ.get('RAY_AUTH_TOKEN_PATH')} "
            "(all machines need the same file: copy it from the head, and start Ray again where it was another)"
        ) from None
    except Exception as error:
        raise RunFailure(f"the head at {address} does not answer: {' '.join(str(error).split())}") from None
    ours = {"ray_version": ray.__version__, "python_version": platform.python_version()}
    for what, here in ours.items():
        if (there := said.get(what, here)) != here:
            name = what.partition("_")[0].capitalize()
            raise RunFailure(f"{name} is {here} here and {there} at the head {address}: they have to be the same")
    found: dict[str, list[str]] = {}
    for node in nodes:
        if node.state == 0:  # alive
            found.setdefault(node.node_manager_address, []).append(node.node_id.hex())
    return found


def is_open(address: str) -> bool:
    """Whether the head lets in who has no token. The environment has to be without one."""
    import ray
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    try:
        with _quiet():
            GcsClient(address=address)
    except ray.exceptions.AuthenticationError:
        return False
    except Exception as error:
        raise RunFailure(f"the head at {address} does not answer: {' '.join(str(error).split())}") from None
    return True


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the lines that Ray's logger writes to standard error before it is initialised, whatever its level."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
