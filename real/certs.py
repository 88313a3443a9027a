"""Keys of a cluster: a certificate authority with a certificate for each of its machines, and the token they share.

Knows files and X.509. Knows no Ray: `cluster.py` says with which settings Ray takes these files.

Ray checks certificates both ways: a server lets in whoever has one of its authority, and a client takes a server for
who it is if the address that it called is in the server's certificate.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from isthmus.workloads.cluster import host_files
from isthmus.workloads.errors import InputError, RunFailure

_AUTHORITY = "ca"
_VALID = timedelta(days=825)  # the most that common checkers of certificates put up with
_LOOPBACK = ("localhost", "127.0.0.1", "::1")  # Ray's processes on one machine call each other there
_SIGNS = x509.KeyUsage(
    digital_signature=False, content_commitment=False, key_encipherment=False, data_encipherment=False,
    key_agreement=False, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False,
)  # fmt: skip
_FILE_NAME = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.")

Signer = tuple[x509.Certificate, ec.EllipticCurvePrivateKey]


def make_certs(folder: Path, hosts: Mapping[str, Iterable[str]], *, replace: bool = False) -> list[Path]:
    """A certificate for each host, for all its addresses (IP addresses or names); returns the files written.

    The authority is made with the first; later calls sign with its key, so that machines can be added. `replace`
    makes new keys for these hosts; nothing revokes the old ones.

    InputError where a key is there already, and for what is no address; RunFailure where nothing can be written.
    """
    if not hosts:
        raise InputError("no host to make a certificate for", allowed="NAME=ADDRESS[,ADDRESS…]")
    named = {host: [_address(text, host) for text in (*given, *_LOOPBACK)] for host, given in hosts.items()}
    for host, addresses in named.items():
        if not host or not set(host) <= _FILE_NAME or host.startswith(".") or host == _AUTHORITY:
            raise InputError(f"{host!r} is no name of a host", allowed=f"letters, digits, -, _ and .; not {_AUTHORITY}")
        if len(addresses) == len(_LOOPBACK):
            raise InputError(f"host {host!r} has no address", allowed="NAME=ADDRESS[,ADDRESS…]")
        if not replace and (key := host_files(folder, host).key).exists():
            raise InputError("is there already, and would be lost", where=key, allowed="--replace, or another folder")
    written: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        authority = _authority(folder, written)
        for host, addresses in named.items():
            files = host_files(folder, host)
            _write(files.key, files.certificate, _signed(host, addresses, authority), written)
    except OSError as error:
        raise RunFailure(f"{error.filename or folder}: cannot be written: {error.strerror}") from None
    return written


def make_token(path: Path, *, replace: bool = False) -> Path:
    """A new token in a file that only its owner reads. InputError where there is one already."""
    if path.exists() and not replace:
        raise InputError("is there already, and would be lost", where=path, allowed="--replace, or another file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _write_secret(path, secrets.token_hex(32).encode())
    except OSError as error:
        raise RunFailure(f"{path}: cannot be written: {error.strerror}") from None
    return path


def _address(text: str, host: str) -> x509.GeneralName:
    with suppress(ValueError):
        return x509.IPAddress(ip_address(text))
    if not text or not set(text) <= _FILE_NAME or text.replace(".", "").isdecimal():
        raise InputError(f"{text!r} of host {host!r} is no address", allowed="an IP address, or a machine's name")
    return x509.DNSName(text)


def _authority(folder: Path, written: list[Path]) -> Signer:
    """The one that is there, or a new one."""
    public, private = folder / f"{_AUTHORITY}.pem", folder / f"{_AUTHORITY}.key"
    if not public.exists():
        made = _signed(f"isthmus {secrets.token_hex(4)}", None, None)
        _write(private, public, made, written)
        return made
    if not private.exists():
        raise InputError("is missing, and nothing can be signed without", where=private, allowed="a new folder")
    try:
        certificate, key = x509.load_pem_x509_certificate(public.read_bytes()), private.read_bytes()
        signer = load_pem_private_key(key, None)
    except (ValueError, TypeError):
        raise InputError("is no key of an authority that was made here", where=private) from None
    if not isinstance(signer, ec.EllipticCurvePrivateKey) or signer.public_key() != certificate.public_key():
        raise InputError(f"is not the key of {public.name}", where=private)
    return certificate, signer


def _signed(name: str, addresses: list[x509.GeneralName] | None, authority: Signer | None) -> Signer:
    """A certificate with its key: of a host, or without `authority` of an authority itself."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])
    issuer, signer = (subject, key) if authority is None else (authority[0].subject, authority[1])
    builder = x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(hours=1)).not_valid_after(now + _VALID)  # clocks may be behind
    builder = builder.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), False)
    if authority is None:
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        builder = builder.add_extension(_SIGNS, critical=True)
    else:
        both = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(x509.SubjectAlternativeName(addresses or []), critical=False)
        builder = builder.add_extension(both, critical=False)
    return builder.sign(signer, hashes.SHA256()), key


def _write(private: Path, public: Path, made: Signer, written: list[Path]) -> None:
    certificate, key = made
    _write_secret(private, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(certificate.public_bytes(Encoding.PEM))
    written += [public, private]


def _write_secret(path: Path, content: bytes) -> None:
    """Whole or not at all, and at no moment readable by anybody but its owner."""
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
    os.replace(partial, path)
