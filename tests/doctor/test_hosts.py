"""What differs between hosts, and two real ranks that measure."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from millrace.cli import run
from millrace.doctor.finding import Finding
from millrace.doctor.hosts import AllReduce, HostFacts, clocks, compare, speed

ONE = HostFacts(host="a", millrace="1", torch="2.13.0", nccl="2.27.7", driver="580.1",
                gids={"mlx5_0": 3}, mtus={"eth1": 9000}, gbits=200.0)  # fmt: skip


def other(**changes: Any) -> list[HostFacts]:
    return [ONE, msgspec.structs.replace(ONE, host="b", **changes)]


FAULTS: list[tuple[dict[str, Any], str, str, str]] = [
    ({"millrace": "0"}, "millrace", "fail", "pip install millrace==1 on every host"),
    ({"torch": "2.12.0"}, "torch", "fail", "pip install torch==2.13.0"),
    ({"nccl": "2.26.2"}, "nccl", "fail", "pip install nvidia-nccl"),
    ({"driver": "570.1"}, "driver", "warn", "nvidia-driver"),
    ({"gids": {"mlx5_0": 5}}, "GID indices", "warn", "NCCL_IB_ROCE_VERSION_NUM=2"),
    ({"mtus": {"eth1": 1500}}, "MTU", "warn", "ip link set DEVICE mtu 9000"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=[fault[1] for fault in FAULTS])
def test_what_differs_is_named(fault: tuple[dict[str, Any], str, str, str]) -> None:
    changes, name, verdict, advice = fault
    (found,) = compare(other(**changes))
    assert (found.name, found.verdict) == (name, verdict)
    assert advice in found.advice
    assert "a: " in found.value
    assert "b: " in found.value


def test_equal_hosts_have_no_fault_whatever_their_devices_are_called() -> None:
    assert list(compare(other(gids={"rocep1": 3}, mtus={"ens2": 9000}))) == []


def test_a_clock_that_is_off_is_named_once_for_a_host() -> None:
    facts = [*other(), other()[1]]
    (found,) = clocks(facts, [0.0, 0.3, 0.4])
    assert found == Finding("hosts", "clock of b", "+300.0 ms against a", "warn",
                            "chronyc makestep, on every host")  # fmt: skip
    (found,) = clocks(facts, [0.0, -0.01, 0.0])
    assert found.verdict == "ok"


def test_an_all_reduce_below_half_of_the_link_is_slow() -> None:
    def last(bus: float, device: str = "cuda") -> Finding:
        timings = [AllReduce(1 << 16, 1e-4, 1e8), AllReduce(1 << 26, 0.01, bus)]
        return list(speed(other(), timings, device))[-1]

    assert last(20e9).verdict == "ok"
    slow = last(1e9)
    assert slow.verdict == "warn"
    assert "1.00 GB/s, of 25 that the link has" in slow.value
    assert slow.advice.startswith("NCCL_DEBUG=INFO")
    assert last(1e9, "cpu").verdict == "ok", "processors are slower than links"


def test_two_ranks_measure(tmp_path: Path) -> None:
    """Real ones over loopback: one of them reports."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    report = tmp_path / "report.json"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "millrace", "doctor", "--hosts", "--json", str(report)],
            env={"PATH": "/usr/bin:/bin", "RANK": str(rank), "WORLD_SIZE": "2",
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
                 "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        texts = [one.communicate(timeout=120)[0] for one in ranks]
    finally:
        for one in ranks:
            one.kill()
            one.wait(timeout=10)
    assert [one.returncode for one in ranks] == [0, 0]
    assert "all-reduce of 64 MiB" in texts[0]
    assert texts[1] == ""
    found = json.loads(report.read_text())
    values = [one["value"] for one in found["findings"] if one["name"].startswith("all-reduce")]
    assert len(values) == 3
    assert all(float(value.split()[2]) > 0 for value in values)


def test_without_torchrun_it_says_how_to_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert run(["doctor", "--hosts"]) == 2
    assert "torchrun --nnodes 2 --nproc-per-node 1 --node-rank 0" in capsys.readouterr().err
