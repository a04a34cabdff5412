"""Each fault of a host, planted in a tree of /proc and /sys and in programs on PATH: it is found,
and what is said mends it."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from millrace.doctor import machine
from millrace.doctor.finding import Finding
from millrace.doctor.host import containers, listener, memory_nodes, outgoing
from millrace.doctor.network import network, rdma_ports

GPU = "0000:3b:00.0"
Host = Callable[..., Path]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host with a GPU on the second of two memory nodes, and a RoCE device, all in order."""
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    found = tmp_path / "root"
    put(found, f"proc/driver/nvidia/gpus/{GPU}/information", "")
    put(found, f"sys/bus/pci/devices/{GPU}/numa_node", "1\n")
    put(found, "sys/devices/system/node/node0/cpulist", "0-3\n")
    put(found, "sys/devices/system/node/node1/cpulist", "4-6,7\n")
    put(found, "proc/sys/kernel/numa_balancing", "0\n")
    put(found, "proc/sys/net/ipv4/ip_local_port_range", "32768\t60999\n")
    put(found, "proc/sys/net/ipv4/ip_local_reserved_ports", "\n")
    put(found, "proc/modules", "nvidia_peermem 16384 0 - Live 0x0\n")
    put(found, "sys/class/net/eth1/mtu", "9000\n")
    put(found, "sys/class/net/lo/mtu", "65536\n")
    port = "sys/class/infiniband/mlx5_0/ports/1"
    put(found, f"{port}/state", "4: ACTIVE\n")
    put(found, f"{port}/link_layer", "Ethernet\n")
    put(found, f"{port}/rate", "200 Gb/sec (2X NDR)\n")
    gids = {
        0: ("fe80:0000:0000:0000:0e42:a1ff:fe00:0001", "IB/RoCE v1"),
        2: ("0000:0000:0000:0000:0000:ffff:0a00:0007", "IB/RoCE v1"),
        3: ("0000:0000:0000:0000:0000:ffff:0a00:0007", "RoCE v2"),
        4: ("0000:0000:0000:0000:0000:0000:0000:0000", ""),
    }
    for index, (gid, kind) in gids.items():
        put(found, f"{port}/gids/{index}", gid)
        put(found, f"{port}/gid_attrs/types/{index}", kind)
        put(found, f"{port}/gid_attrs/ndevs/{index}", "eth1\n")
    return found


def put(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Programs on PATH, which print a text; an empty one fails. There are no others."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def add(name: str, text: str) -> None:
        path = folder / name
        path.write_text(f"#!/bin/sh\necho '{text}'\n" if text else "#!/bin/sh\nexit 1\n")
        path.chmod(0o755)

    return add


def bad(found: list[Finding]) -> list[Finding]:
    return [one for one in found if one.verdict != "ok"]


# --- containers --------------------------------------------------------------------------------

TOOLKIT = "NVIDIA Container Toolkit CLI version 1.17.4"
CONFIGURE = "nvidia-ctk runtime configure --runtime=docker"


def test_containers_get_gpus_by_the_toolkit(
    root: Path, program: Callable[[str, str], None]
) -> None:
    assert list(containers(root)) == [], "without Docker nothing is asked"
    program("docker", '{"nvidia":{},"runc":{}}')
    (missing,) = bad(list(containers(root)))
    assert missing.advice.startswith("apt-get install -y nvidia-container-toolkit")
    program("nvidia-ctk", TOOLKIT)
    found = list(containers(root))
    assert bad(found) == []
    assert found[0].value == "1.17.4"


def test_docker_without_the_runtime_is_told_how_to_get_it(
    root: Path, program: Callable[[str, str], None]
) -> None:
    program("nvidia-ctk", TOOLKIT)
    program("docker", '{"runc":{}}')
    (found,) = bad(list(containers(root)))
    assert "no nvidia runtime" in found.value
    assert CONFIGURE in found.advice
    put(root, "etc/cdi/nvidia.yaml", "")
    assert bad(list(containers(root))) == [], "the device interface serves as well"
    program("docker", "")
    (found,) = bad(list(containers(root)))
    assert found.advice == "systemctl start docker"


def test_within_a_container_nobody_asks_for_docker(
    root: Path, program: Callable[[str, str], None]
) -> None:
    program("docker", "")
    put(root, ".dockerenv", "")
    assert list(containers(root)) == []


def test_little_shared_memory_says_how_to_get_more(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = (64 << 20, 0, 64 << 20)
    kind = type("Usage", (), dict(zip(("total", "used", "free"), usage, strict=True)))
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: kind)
    monkeypatch.setattr(machine, "in_container", lambda: False)
    assert machine.shared_memory().advice == "mount -o remount,size=8G /dev/shm"
    monkeypatch.setattr(machine, "in_container", lambda: True)
    assert "--shm-size 8g" in machine.shared_memory().advice


# --- memory nodes and ports --------------------------------------------------------------------


def test_a_gpu_on_another_memory_node_is_named(root: Path) -> None:
    everywhere = frozenset(range(8))
    assert bad(list(memory_nodes(root, everywhere))) == []
    (far,) = bad(list(memory_nodes(root, frozenset({0, 1}))))
    assert far.name == f"gpu {GPU}"
    assert far.advice.startswith("numactl --cpunodebind=1 --membind=1")
    put(root, f"sys/bus/pci/devices/{GPU}/numa_node", "-1\n")
    (unknown,) = bad(list(memory_nodes(root, everywhere)))
    assert f"> /sys/bus/pci/devices/{GPU}/numa_node" in unknown.advice


def test_memory_that_moves_is_named(root: Path) -> None:
    put(root, "proc/sys/kernel/numa_balancing", "1\n")
    (found,) = bad(list(memory_nodes(root, frozenset(range(8)))))
    assert found.advice == "sysctl -w kernel.numa_balancing=0"


def test_one_memory_node_is_no_matter(tmp_path: Path) -> None:
    put(tmp_path, "sys/devices/system/node/node0/cpulist", "0-3\n")
    assert bad(list(memory_nodes(tmp_path, frozenset({0})))) == []


def test_a_port_that_outgoing_connections_may_take(root: Path) -> None:
    assert list(outgoing(8000, root)) == []
    (found,) = outgoing(40000, root)
    assert found.advice == "sysctl -w net.ipv4.ip_local_reserved_ports=40000"
    put(root, "proc/sys/net/ipv4/ip_local_reserved_ports", "29500,39000-41000\n")
    assert list(outgoing(40000, root)) == []


def test_who_listens_on_a_port_is_named() -> None:
    """On this very host: this process."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert listener(port).endswith(f"process {os.getpid()}")
        (found,) = [one for one in machine.limits("127.0.0.1", port) if one.name == "port"]
    assert found.verdict == "fail"
    assert found.advice.startswith(f"kill {os.getpid()}, or choose another --port")
    assert listener(port) == ""


# --- RDMA --------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def unlimited(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda _: whole)


PORT = "sys/class/infiniband/mlx5_0/ports/1"


def test_a_sound_device_says_its_gid(root: Path) -> None:
    found = list(network(root, {}))
    assert bad(found) == []
    assert found[0].value == "RoCE, 200 Gb/s, GID 3 of RoCE v2 is 10.0.0.7, MTU 9000"
    assert rdma_ports(root)[0].gids == {3: "10.0.0.7"}, "neither v1 nor an empty one"


FAULTS: list[tuple[str, dict[str, str], dict[str, str], str]] = [
    ("down", {f"{PORT}/state": "1: DOWN\n"}, {}, "ip link set eth1 up"),
    ("no address", {f"{PORT}/gid_attrs/types/3": "IB/RoCE v1"}, {},
     "ip addr add ADDRESS/24 dev eth1"),
    ("GID", {}, {"NCCL_IB_GID_INDEX": "2"}, "export NCCL_IB_GID_INDEX=3"),
    ("MTU", {"sys/class/net/eth1/mtu": "1500\n"}, {}, "ip link set eth1 mtu 9000"),
    ("socket", {}, {"NCCL_SOCKET_IFNAME": "eth0"}, "export NCCL_SOCKET_IFNAME=eth1"),
    ("device", {}, {"NCCL_IB_HCA": "=mlx5_1:1"}, "export NCCL_IB_HCA=mlx5_0"),
    ("off", {}, {"NCCL_IB_DISABLE": "1"}, "unset NCCL_IB_DISABLE"),
    ("module", {"proc/modules": "nvidia 1 0 - Live 0x0\n"}, {}, "modprobe nvidia_peermem"),
    ("subnet", {f"{PORT}/state": "2: INIT\n", f"{PORT}/link_layer": "InfiniBand\n"}, {},
     "systemctl start opensm"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("files", "variables", "advice"), [one[1:] for one in FAULTS], ids=[one[0] for one in FAULTS]
)
def test_each_fault_of_the_network(
    files: dict[str, str], variables: dict[str, str], advice: str, root: Path
) -> None:
    for name, text in files.items():
        put(root, name, text)
    (found,) = bad(list(network(root, variables)))
    assert found.advice == advice


@pytest.mark.parametrize("names", ["eth", "eth1", "=eth1", "^docker,lo", "eth0,eth1"])
def test_names_that_nccl_takes_are_no_faults(names: str, root: Path) -> None:
    assert bad(list(network(root, {"NCCL_SOCKET_IFNAME": names}))) == []


def test_little_memory_to_lock_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (8 << 20, 8 << 20))
    (found,) = bad(list(network(root, {})))
    assert found.advice == "ulimit -l unlimited"
    put(root, ".dockerenv", "")
    (found,) = bad(list(network(root, {})))
    assert found.advice.startswith("docker run --ulimit memlock=-1")


def test_a_host_without_rdma_is_no_fault(tmp_path: Path) -> None:
    assert bad(list(network(tmp_path, {}))) == []
