"""Certificates and tokens: what they are good for, in real TLS handshakes, and that none is lost or readable."""

from __future__ import annotations

import ssl
import stat
from pathlib import Path

import pytest

from isthmus.experiments.cluster_cli import cluster_of
from isthmus.real.certs import make_certs, make_token
from isthmus.workloads.cluster import ClusterSpec, host_files
from isthmus.workloads.errors import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("certs")
    make_certs(made, {"cam": ["10.0.0.5", "cam.lan"], "edge": ["10.0.0.6"]})
    return made


def _context(folder: Path, host: str | None, *, server: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.verify_mode = ssl.CERT_REQUIRED  # as Ray does, on both sides
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.load_verify_locations(folder / "ca.pem")
    if host is not None:
        files = host_files(folder, host)
        context.load_cert_chain(files.certificate, files.key)
    return context


def _shake(client: ssl.SSLContext, server: ssl.SSLContext, address: str) -> None:
    """A handshake in memory, with the first bytes from server to client; SSLError where either refuses."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = client.wrap_bio(down, up, server_hostname=address)
    theirs = server.wrap_bio(up, down, server_side=True)
    for step in (ours.do_handshake, theirs.do_handshake, ours.do_handshake, theirs.do_handshake):
        try:
            step()
        except ssl.SSLWantReadError:
            continue
    theirs.write(b"hello")
    assert ours.read(5) == b"hello"


@pytest.mark.parametrize("address", ["10.0.0.5", "cam.lan", "127.0.0.1", "localhost"])
def test_machines_of_one_authority_know_each_other(folder, address):
    _shake(_context(folder, "edge", server=False), _context(folder, "cam", server=True), address)


def test_who_is_not_called_so_is_refused(folder):
    with pytest.raises(ssl.SSLCertVerificationError, match="IP address mismatch"):
        _shake(_context(folder, "edge", server=False), _context(folder, "cam", server=True), "10.0.0.6")


def test_who_has_no_certificate_is_refused(folder):
    with pytest.raises(ssl.SSLError, match="PEER_DID_NOT_RETURN_A_CERTIFICATE"):
        _shake(_context(folder, None, server=False), _context(folder, "cam", server=True), "10.0.0.5")


@pytest.mark.parametrize("stranger", ["client", "server"])
def test_who_has_one_of_another_authority_is_refused(folder, tmp_path, stranger):
    make_certs(tmp_path, {"cam": ["10.0.0.5"]})
    of = {"client": folder, "server": folder} | {stranger: tmp_path}
    client, server = (_context(of[side], "cam", server=side == "server") for side in ("client", "server"))
    with pytest.raises(ssl.SSLCertVerificationError):
        _shake(client, server, "10.0.0.5")


def test_a_machine_is_added_and_no_key_is_lost(folder):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(InputError, match="would be lost"):
        make_certs(folder, {"new": ["10.0.0.8"], "cam": ["10.0.0.5"]})
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    make_certs(folder, {"fog": ["10.0.0.7"]})
    assert {path: path.read_bytes() for path in before} == before
    _shake(_context(folder, "fog", server=False), _context(folder, "cam", server=True), "10.0.0.5")


def test_keys_and_tokens_are_for_their_owner_only(folder, tmp_path):
    token = make_token(tmp_path / "deep/token")
    assert len(token.read_text()) == 64
    for path in [*folder.glob("*.key"), token]:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    said = token.read_text()
    with pytest.raises(InputError, match="would be lost"):
        make_token(token)
    assert make_token(token, replace=True).read_text() != said


@pytest.mark.parametrize(
    ("hosts", "said"),
    [
        ({}, "no host"),
        ({"../x": ["10.0.0.1"]}, "is no name of a host"),
        ({"ca": ["10.0.0.1"]}, "is no name of a host"),
        ({"x": []}, "has no address"),
        ({"x": ["10.0.0.700"]}, "is no address"),
        ({"x": ["a b"]}, "is no address"),
    ],
)
def test_what_cannot_be_certified_is_refused(hosts, said, tmp_path):
    with pytest.raises(InputError, match=said):
        make_certs(tmp_path / "new", hosts)
    assert not (tmp_path / "new").exists()


def test_an_authority_without_its_key_signs_nothing(folder, tmp_path):
    (tmp_path / "ca.pem").write_bytes((folder / "ca.pem").read_bytes())
    with pytest.raises(InputError, match="nothing can be signed"):
        make_certs(tmp_path, {"x": ["10.0.0.1"]})
    for key in (b"", b"nonsense", (folder / "cam.key").read_bytes()):
        (tmp_path / "ca.key").write_bytes(key)
        with pytest.raises(InputError, match="key of"):
            make_certs(tmp_path, {"x": ["10.0.0.1"]})


def test_a_cluster_names_the_machines_that_need_a_certificate():
    hosts = {"cam": {"address": "10.0.0.5"}, "edge": {"address": "10.0.0.6"}}
    spec = ClusterSpec.model_validate({"address": "10.0.0.1:6379", "driver": "10.0.0.9", "hosts": hosts})
    assert spec.machines == {"cam": "10.0.0.5", "edge": "10.0.0.6", "head": "10.0.0.1", "driver": "10.0.0.9"}
    assert spec.this_machine == "driver"
    among = spec.model_copy(update={"address": "10.0.0.6:6379", "driver": "10.0.0.6"})
    assert among.machines == {"cam": "10.0.0.5", "edge": "10.0.0.6"}
    assert among.this_machine == "edge"


def test_keys_are_found_beside_the_testbed_that_names_them(tmp_path):
    cluster = "cluster: {address: '10.0.0.1:6379', certificates: certs, token: secrets/token}"
    node = "models: {net: squeezenet}\nnodes: {cam: {service: {mean: 1ms}}}"
    (tmp_path / "beds").mkdir()
    (tmp_path / "beds/testbed.yaml").write_text(f"{node}\n{cluster}\n")
    arrivals = "{kind: periodic, rate: 1/s}"
    (tmp_path / "experiment.yaml").write_text(
        "testbed: beds/testbed.yaml\npolicies: [local]\n"
        f"workload: [{{node: cam, model: net, arrivals: {arrivals}, requests: 1}}]\n"
    )
    for file, folder in (("beds/testbed.yaml", tmp_path / "beds"), ("experiment.yaml", tmp_path)):
        spec = cluster_of(tmp_path / file)
        assert spec.key_folder(folder) == tmp_path / "beds/certs"
        assert spec.token_file(folder) == tmp_path / "beds/secrets/token"
    home = ClusterSpec(address="10.0.0.1:6379")
    assert home.moved(Path("beds")).token_file(tmp_path) == Path("~/.isthmus/token").expanduser()
