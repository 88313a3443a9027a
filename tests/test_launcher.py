"""The file for Ray's launcher: Ray's own checks of it, its commands in a shell, and `ray up` over SSH to two hosts."""

from __future__ import annotations

import getpass
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from isthmus.real.certs import make_certs, make_token
from isthmus.real.launcher import join_command, launcher, launcher_file
from isthmus.workloads.cluster import ClusterSpec
from isthmus.workloads.errors import InputError
from isthmus.workloads.testbed import TestbedSpec

SOURCE = Path(__file__).parents[1] / ".src"


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="isthmus-"))
    make_token(made / "token")
    yield made
    shutil.rmtree(made, ignore_errors=True)


def cluster(**more: Any) -> ClusterSpec:
    hosts = {"cam-1": {"address": "10.77.0.2"}, "edge": {"address": "edge.local"}}
    return ClusterSpec.model_validate({"address": "10.77.0.1:6379", "token": "token", "hosts": hosts, **more})


def test_the_cluster_of_the_documentation():
    text = (SOURCE.parent / "docs/cluster.md").read_text()
    [block] = re.findall(r"```yaml\n(cluster:.*?)```", text, re.DOTALL)
    described = yaml.safe_load(block) | {"models": {"net": "squeezenet"}}
    spec = TestbedSpec.model_validate(described)
    assert spec.cluster is not None
    assert {node.host for node in spec.nodes.values()} == set(spec.cluster.hosts)


# Ray's own checks


def test_ray_takes_the_file(folder):
    """Its schema, and what it makes of the file for its on-premise provider."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    make_certs(folder / "certs", {name: ["10.77.0.1"] for name in ("head", "cam-1", "edge")})
    (folder / "key").touch()
    (folder / "isthmus-1-py3-none-any.whl").touch()
    spec = cluster(certificates="certs", key="key", user="pi")
    text = launcher_file(spec, folder, name="my bed", file="c.yaml", wheel=folder / "isthmus-1-py3-none-any.whl")
    assert "ray up c.yaml" in text
    data = yaml.safe_load(text)
    prepared = prepare_config(data)
    validate_config(prepared)
    assert data["cluster_name"] == "isthmus-my-bed"
    assert data["auth"] == {"ssh_user": "pi", "ssh_private_key": str(folder / "key")}
    assert data["provider"] == {"type": "local", "head_ip": "10.77.0.1", "worker_ips": ["10.77.0.2", "edge.local"]}
    assert prepared["available_node_types"]["local.cluster.node"]["min_workers"] == 2
    copied = set(data["file_mounts"])
    assert {"~/.isthmus/token", "~/.isthmus/certificates/ca.pem", "~/.isthmus/certificates/cam-1.key"} <= copied
    assert not any(name.endswith(("ca.key", "driver.key")) for name in copied)  # with which others could be let in
    import ray

    assert any(f"ray=={ray.__version__} " in command for command in data["setup_commands"])


def test_a_head_that_is_a_host_is_no_worker(folder):
    data = launcher(
        cluster(hosts={"edge": {"address": "10.77.0.1"}, "cam": {"address": "10.77.0.2"}}), folder, name="x"
    )
    assert data["provider"]["worker_ips"] == ["10.77.0.2"]
    assert data["auth"]["ssh_user"] == getpass.getuser()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"hosts": {}}, ["cluster.hosts", "names no machines"]),
        ({"hosts": {"a": {"address": "1.1.1.1", "user": "pi"}, "b": {"address": "1.1.1.2", "user": "nv"}}}, ["nv, pi"]),
        ({"hosts": {"a": {"address": "1.1.1.1"}, "b": {"address": "1.1.1.1"}}}, ["two machines", "1.1.1.1"]),
        ({"token": "none"}, ["cluster.token", "none", "no such file"]),
        ({"key": "none"}, ["cluster.key", "no such file"]),
        ({"certificates": "none"}, ["cluster.certificates", "head.pem"]),
    ],
)
def test_what_ray_cannot_launch_is_refused(folder, more, said):
    with pytest.raises(InputError) as caught:
        launcher(cluster(**more), folder, name="x")
    for part in said:
        assert part in str(caught.value)


# The commands, in a shell whose `ray` writes down how it was called


RAY = """#!/bin/sh
echo "$@" >> $HOME/called
env | grep ^RAY_ > $HOME/environment
"""


def run_start(folder: Path, commands: list[str], ssh: str) -> subprocess.CompletedProcess[str]:
    ray = folder / ".isthmus/venv/bin/ray"
    ray.parent.mkdir(parents=True, exist_ok=True)
    ray.write_text(RAY)
    ray.chmod(0o755)
    environment = {"HOME": str(folder), "PATH": os.environ["PATH"], "SSH_CONNECTION": ssh}
    return subprocess.run(
        ["bash", "-c", f"true && ({'; '.join(commands)})"], env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("address", "resource", "host"),
    [("10.77.0.2", '{"isthmus:cam-1":1}', "cam-1"), ("10.77.0.1", None, "head"), ("10.77.0.3", None, None)],
)
def test_a_machine_is_known_by_the_address_at_which_it_is_reached(folder, address, resource, host):
    make_certs(folder / "certs", {name: ["10.77.0.1"] for name in ("head", "cam-1", "edge")})
    commands = launcher(cluster(certificates="certs"), folder, name="x")["worker_start_ray_commands"]
    done = run_start(folder, commands, f"10.77.0.1 4711 {address} 22")
    if host is None:
        assert done.returncode == 1
        assert "none of the addresses" in done.stderr
        assert not (folder / "called").exists()
        return
    assert done.returncode == 0, done.stderr
    stop, start = (folder / "called").read_text().splitlines()
    assert stop == "stop"
    said = start.split()
    assert said[:2] == ["start", "--address=10.77.0.1:6379"]
    assert f"--node-ip-address={address}" in said
    assert [option for option in said if "resources" in option] == ([f"--resources={resource}"] if resource else [])
    environment = dict(line.split("=", 1) for line in (folder / "environment").read_text().splitlines())
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_AUTH_TOKEN_PATH"] == f"{folder}/.isthmus/token"
    assert environment["RAY_TLS_SERVER_KEY"] == f"{folder}/.isthmus/certificates/{host}.key"


def test_a_machine_is_known_by_its_own_name_too(folder):
    name = socket.gethostname()
    spec = cluster(hosts={"edge": {"address": f"{name}.local"}})
    done = run_start(folder, launcher(spec, folder, name="x")["worker_start_ray_commands"], "")
    assert done.returncode == 0, done.stderr
    start = (folder / "called").read_text()
    assert '--resources={"isthmus:edge":1}' in start
    assert "--node-ip-address" not in start  # what a name stands for is for Ray to find out there


def test_joining_by_hand_says_the_same_to_ray(folder):
    run_start(folder, [f"PATH=$HOME/.isthmus/venv/bin:$PATH; {join_command(cluster(), 'cam-1')}"], "")
    said = (folder / "called").read_text().split()
    assert said == [
        *("start", "--address=10.77.0.1:6379", '--resources={"isthmus:cam-1":1}', "--node-ip-address=10.77.0.2")
    ]


# `ray up` for real: SSH, two hosts in namespaces of their own, TLS and a token


HOST = """
set -e
mount -t proc proc /proc
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir -p /tmp/ray /run/sshd
mount --bind $FOLDER/$1/ray /tmp/ray
echo "127.0.0.1 localhost" > $FOLDER/$1/hosts; echo "$2 $1" >> $FOLDER/$1/hosts
mount --bind $FOLDER/$1/hosts /etc/hosts
sed "s,^root:.*,root:x:0:0:root:$FOLDER/$1/home:/bin/bash," /etc/passwd > $FOLDER/$1/passwd
mount --bind $FOLDER/$1/passwd /etc/passwd
: > $FOLDER/$1/resolv.conf; mount --bind $FOLDER/$1/resolv.conf /etc/resolv.conf
hostname $1
ip link set lo up
until ip link show eth0 > /dev/null 2>&1; do sleep 0.05; done
ip addr add $2/24 dev eth0; ip link set eth0 up
exec $SSHD -D -f $FOLDER/sshd_config -E $FOLDER/$1/sshd.log
"""
BOX = """
set -e
ip link set lo up
ip link add br0 type bridge; ip addr add 10.77.0.9/24 dev br0; ip link set br0 up
mkdir -p /tmp/ray; mount --bind $FOLDER/driver/ray /tmp/ray
echo "127.0.0.1 localhost" > $FOLDER/driver/hosts; echo "10.77.0.9 driver" >> $FOLDER/driver/hosts
mount --bind $FOLDER/driver/hosts /etc/hosts; hostname driver
for pair in head:10.77.0.1 cam-1:10.77.0.2; do
  name=${pair%%:*}; address=${pair##*:}
  unshare --net --pid --fork --mount --uts --kill-child bash $FOLDER/host.sh $name $address &
  unshared=$!
  until host=$(pgrep -P $unshared); do sleep 0.05; done
  ip link add v-$name type veth peer name eth0 netns $host
  ip link set v-$name master br0; ip link set v-$name up
  until (exec 3<> /dev/tcp/$address/22) 2> /dev/null; do sleep 0.1; done
done
"$@"
"""
SSHD = """
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
PidFile none
StrictModes no
SetEnv PYTHONPATH={source}
"""
DRIVE = """
set -e
python=$1; export PATH=$(dirname $python):$PATH PYTHONPATH=$2 HOME=$FOLDER/driver/home
isthmus() { $python -c "from isthmus.experiments.cli import main; main()" "$@"; }
cd $FOLDER
isthmus cluster token token > /dev/null
isthmus cluster certs certs --testbed bed.yaml > /dev/null
isthmus cluster file bed.yaml --out cluster.yaml
ray up --yes --no-config-cache cluster.yaml > up.log 2>&1
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$FOLDER/token RAY_USE_TLS=1 RAY_TLS_CA_CERT=$FOLDER/certs/ca.pem
export RAY_TLS_SERVER_CERT=$FOLDER/certs/driver.pem RAY_TLS_SERVER_KEY=$FOLDER/certs/driver.key
ray start --address=10.77.0.1:6379 --node-ip-address=10.77.0.9 > join.log 2>&1
for i in $(seq 60); do ray status 2> /dev/null | grep -q isthmus:cam-1 && break; sleep 1; done
unset ${!RAY_*}
on() { ssh -q -i key -o StrictHostKeyChecking=no root@$1 "$2"; }
isthmus cluster check bed.yaml --json > checked.json || true
on 10.77.0.2 'stat -c %a ~/.isthmus/token; ls ~/.isthmus/certificates' > there
ray down --yes cluster.yaml > down.log 2>&1
on 10.77.0.1 'pgrep -c raylet || true' > left
"""


@pytest.mark.slow
def test_ray_up_over_ssh(folder):
    """A driver's machine, a head and a host: what `isthmus cluster` writes starts a cluster that it then finds well."""
    programs = {name: shutil.which(name) for name in ("sshd", "ssh", "ssh-keygen", "rsync", "ip", "unshare", "pgrep")}
    programs["sshd"] = programs["sshd"] or shutil.which("/usr/sbin/sshd")
    if missing := [name for name, found in programs.items() if found is None]:
        pytest.skip(f"needs {', '.join(missing)}")
    try_it = "mount -t tmpfs tmpfs /mnt && ip link add br0 type bridge"
    if os.geteuid() or subprocess.run(["unshare", "--net", "--mount", "bash", "-c", try_it]).returncode:
        pytest.skip("needs root, and a kernel with network namespaces and bridges")
    for name in ("host_key", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    (folder / "sshd_config").write_text(SSHD.format(folder=folder, source=SOURCE))
    for name, script in {"host.sh": HOST, "box.sh": BOX, "drive.sh": DRIVE}.items():
        (folder / name).write_text(script)
    for name in ("head", "cam-1", "driver"):
        (folder / name / "ray").mkdir(parents=True)
        (folder / name / "home" / ".isthmus").mkdir(parents=True)
        (folder / name / "home" / ".isthmus" / "venv").symlink_to(sys.prefix)
    (folder / "token").unlink()
    described = {
        "name": "box",
        "models": {"net": "squeezenet"},
        "nodes": {"cam": {"host": "cam-1"}, "far": {"slowdown": 3}},
        "links": [{"between": ["cam", "far"], "rate": "20Mbit", "latency": "5ms"}],
        "cluster": {"address": "10.77.0.1:6379", "driver": "10.77.0.9", "token": "token", "certificates": "certs",
                    "user": "root", "key": "key", "hosts": {"cam-1": {"address": "10.77.0.2"}}},
    }  # fmt: skip
    (folder / "bed.yaml").write_text(yaml.safe_dump(described))
    sandbox = ["unshare", "--net", "--pid", "--fork", "--mount", "--mount-proc", "--uts", "--kill-child"]
    done = subprocess.run(
        [*sandbox, "bash", folder / "box.sh", "bash", folder / "drive.sh", sys.executable, SOURCE],
        env={"PATH": os.environ["PATH"], "FOLDER": str(folder), "SSHD": str(programs["sshd"])},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    logs = "".join(f"== {log.name}\n{log.read_text()}" for log in folder.glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    found = json.loads((folder / "checked.json").read_text())
    assert [p for p in found["problems"] if p["level"] == "error"] == [], logs
    hosts = {host["name"]: host for host in found["hosts"]}
    assert hosts.keys() == {"driver", "head", "cam-1"}
    assert hosts["cam-1"]["address"] == "10.77.0.2"
    assert all(host["facts"]["auth_mode"] == "token" for host in hosts.values())
    assert all(host["facts"]["environment"] == {} for host in hosts.values())
    mode, *keys = (folder / "there").read_text().split()
    assert mode == "600"
    assert sorted(keys) == ["ca.pem", "cam-1.key", "cam-1.pem", "head.key", "head.pem"]
    assert (folder / "left").read_text().strip() == "0"  # `ray down` stops the head
