"""Sharing a host's devices out."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.errors import ConfigError
from millrace.fleet.device_assignment import replica_environments, thread_limit, visible_gpus


@given(count=st.integers(1, 64), cores=st.integers(1, 256))
def test_cores_are_divided_and_never_oversubscribed(count: int, cores: int) -> None:
    shares = replica_environments(count, device="auto", gpus=[], cores=cores)
    threads = [int(share["OMP_NUM_THREADS"]) for share in shares]
    assert len(threads) == count
    assert min(threads) >= 1
    assert sum(threads) <= max(cores, count)


def test_a_limit_on_threads_holds_and_is_never_raised() -> None:
    for threads, expected in ((None, "4"), (2, "2"), (9, "4")):
        shares = replica_environments(2, device="cpu", gpus=[], cores=8, threads=threads)
        assert [share["OMP_NUM_THREADS"] for share in shares] == [expected] * 2


@pytest.mark.parametrize(("value", "limit"), [("3", 3), ("0", None), ("many", None), ("", None)])
def test_the_limit_is_read_from_the_environment(value: str, limit: int | None) -> None:
    assert thread_limit({"OMP_NUM_THREADS": value}) == limit


@given(count=st.integers(1, 8), each=st.integers(1, 4), spare=st.integers(0, 3))
def test_every_gpu_is_assigned_to_one_replica(count: int, each: int, spare: int) -> None:
    gpus = [str(i) for i in range(count * each + spare)]
    shares = replica_environments(count, device="auto", gpus=gpus, cores=1, gpus_per_replica=each)
    given_out = [gpu for share in shares for gpu in share["CUDA_VISIBLE_DEVICES"].split(",")]
    assert given_out == gpus[: count * each]


def test_too_few_gpus_name_the_count_that_fits() -> None:
    with pytest.raises(ConfigError, match=r"--replicas 3 .* 5 are visible; at most --replicas 2"):
        replica_environments(3, device="cuda", gpus=list("01234"), cores=8, gpus_per_replica=2)


def test_cpu_hides_the_gpus_that_are_there() -> None:
    shares = replica_environments(2, device="cpu", gpus=["0", "1"], cores=8)
    assert [s["CUDA_VISIBLE_DEVICES"] for s in shares] == ["", ""]


@pytest.mark.parametrize(
    ("value", "names"),
    [("2,3", ["2", "3"]), ("", []), ("-1", []), ("GPU-ab, GPU-cd", ["GPU-ab", "GPU-cd"])],
)
def test_chosen_gpus_are_the_visible_ones(value: str, names: list[str]) -> None:
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": value}) == names


def test_gpus_are_counted_by_their_device_files(tmp_path: Path) -> None:
    assert visible_gpus({}, tmp_path) == []
    for name in ("nvidia3", "nvidia11", "nvidiactl", "nvidia-uvm", "nvme0"):
        (tmp_path / name).touch()
    assert visible_gpus({}, tmp_path) == ["0", "1"]
