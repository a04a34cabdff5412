"""The choice of the all-reduce algorithm: the fastest one that gives right sums."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from millrace.runtime.ranks import allreduce
from millrace.runtime.ranks.allreduce import AllReduce, Timing, table
from millrace.runtime.ranks.allreduce_algorithms import GatherAllReduce, GroupAllReduce
from millrace.runtime.ranks.allreduce_algorithms import set_up as set_up_algorithm

CPU = torch.device("cpu")


class ThreadExchange:
    """Exchanges values between ranks that are threads of one process."""

    def __init__(self, size: int) -> None:
        self.parts: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=60)

    def swap(self, rank: int, part: Any) -> list[Any]:
        self.parts[rank] = part
        self.barrier.wait()
        parts = list(self.parts)
        self.barrier.wait()
        return parts


@dataclass
class ThreadRanks:
    """What `AllReduce` needs of ranks."""

    rank: int
    exchange: ThreadExchange

    @property
    def size(self) -> int:
        return len(self.exchange.parts)

    def all_gather_parts(self, x: Tensor) -> list[Tensor]:
        return [part.clone() for part in self.exchange.swap(self.rank, x.clone())]

    def all_reduce(self, x: Tensor) -> Tensor:
        return x.copy_(torch.stack(self.all_gather_parts(x)).sum(0))

    def min_over_ranks(self, value: int) -> int:
        return int(min(self.exchange.swap(self.rank, value)))

    def max_over_ranks(self, values: list[float]) -> list[float]:
        return [max(column) for column in zip(*self.exchange.swap(self.rank, values), strict=True)]

    def limited(self, *_: object) -> AbstractContextManager[None]:
        return nullcontext()

    def check(self) -> None:
        """None of these ever fails."""


@dataclass
class FakeAlgorithm:
    """An all-reduce algorithm that calls `run`."""

    name: str
    ranks: Any
    run: Callable[[Tensor], Tensor]

    def supports(self, x: Tensor) -> bool:
        return len(x) <= 8

    def __call__(self, x: Tensor) -> Tensor:
        return self.run(x)


def chosen_on_both(
    monkeypatch: pytest.MonkeyPatch,
    algorithms: Callable[[Any], list[FakeAlgorithm]],
    costs: dict[str, float],
) -> list[AllReduce]:
    """Both ranks' choices for messages of 1 and 4 tokens; costs: the time of each algorithm
    in microseconds."""
    monkeypatch.setattr(
        allreduce,
        "candidates",
        lambda ranks, *_: [GroupAllReduce(ranks, "group"), *algorithms(ranks)],
    )

    def clock(call: Callable[[], object]) -> float:
        algorithm = call.__closure__[0].cell_contents  # type: ignore[attr-defined, index]
        return costs[algorithm.name]

    monkeypatch.setattr(allreduce, "host_us", clock)
    exchange = ThreadExchange(2)

    def one(rank: int) -> AllReduce:
        found = AllReduce.build(ThreadRanks(rank, exchange), 64, torch.float32, CPU)  # type: ignore[arg-type]
        found.choose([1, 4])
        return found

    with ThreadPoolExecutor(2) as pool:
        return [run.result(60) for run in [pool.submit(one, rank) for rank in range(2)]]


def names(found: AllReduce) -> list[str]:
    return [timing.algorithm for timing in found.timings if timing.chosen]


def test_the_fastest_is_chosen_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    both = chosen_on_both(
        monkeypatch,
        lambda ranks: [FakeAlgorithm("fast", ranks, ranks.all_reduce)],
        {"group": 9, "fast": 3},
    )
    assert [names(found) for found in both] == [["fast", "fast"]] * 2
    assert both[0].summary() == "fast to 0.25 KiB (3 us), fast to 1 KiB (3 us)"
    assert both[0].algorithm_for(torch.zeros(4, 64)).name == "fast"
    assert both[0].algorithm_for(torch.zeros(5, 64)).name == "group", (
        "longer messages are not measured"
    )


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda ranks, x: x * 1.001, "its sums are wrong"),
        (lambda ranks, x: torch.nextafter(x, x + ranks.rank), "differ from rank to rank"),
        (lambda ranks, x: x.view(3, -1), "RuntimeError: shape"),
    ],
)
def test_a_wrong_algorithm_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    spoil: Callable[[Any, Tensor], Tensor],
    problem: str,
) -> None:
    def algorithms(ranks: Any) -> list[FakeAlgorithm]:
        return [FakeAlgorithm("quick", ranks, lambda x: spoil(ranks, ranks.all_reduce(x)))]

    with caplog.at_level(logging.WARNING):
        both = chosen_on_both(monkeypatch, algorithms, {"group": 9, "quick": 1})
    assert [names(found) for found in both] == [["group", "group"]] * 2
    for found in both:
        reasons = [timing.problem or "" for timing in found.timings if timing.algorithm == "quick"]
        assert all(problem in reason for reason in reasons)
    assert "quick is not used for 0.25 KiB" in caplog.text


def test_an_algorithm_that_fails_on_one_rank_is_left_out_on_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def algorithms(ranks: Any) -> list[FakeAlgorithm]:
        return [FakeAlgorithm("quick", ranks, lambda x: ranks.all_reduce(x) * (1 + ranks.rank))]

    both = chosen_on_both(monkeypatch, algorithms, {"group": 9, "quick": 1})
    assert [names(found) for found in both] == [["group", "group"]] * 2

    def raising(ranks: Any) -> list[FakeAlgorithm]:
        def run(x: Tensor) -> Tensor:
            total: Tensor = ranks.all_reduce(x)
            return total if ranks.rank else total.view(3, -1)

        return [FakeAlgorithm("quick", ranks, run)]

    both = chosen_on_both(monkeypatch, raising, {"group": 9, "quick": 1})
    assert [names(found) for found in both] == [["group", "group"]] * 2


def test_an_algorithm_that_cannot_be_set_up_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    exchange = ThreadExchange(2)

    def set_up(rank: int) -> object:
        def make(name: str) -> str:
            if rank:
                raise OSError("no such device\nmore")
            return name

        return set_up_algorithm(ThreadRanks(rank, exchange), "peers", make)  # type: ignore[arg-type]

    with ThreadPoolExecutor(2) as pool, caplog.at_level(logging.WARNING):
        assert list(pool.map(set_up, range(2))) == [None, None]
    assert "all-reduce by peers is left out: OSError: no such device\n" in caplog.text + "\n"


def test_every_cpu_algorithm_returns_the_sum() -> None:
    exchange = ThreadExchange(3)

    def sums(rank: int) -> list[Tensor]:
        ranks: Any = ThreadRanks(rank, exchange)
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(rank))
        return [
            algorithm(x.clone())
            for algorithm in (GroupAllReduce(ranks, "a"), GatherAllReduce(ranks, "b"))
        ] + [x]

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(sums, range(3)))
    expected = torch.stack([result[2] for result in results]).sum(0)
    for result in results:
        torch.testing.assert_close(result[0], expected)
        torch.testing.assert_close(result[1], expected)
        assert torch.equal(result[1], results[0][1])


def test_table() -> None:
    rows = [
        Timing(4096, "nccl", 18.2, 9.25, 11.0),
        Timing(4096, "one-shot", 12.0, 4.0, 5.5, chosen=True),
        Timing(4 << 20, "one-shot", problem="its sums are wrong"),
    ]
    lines = table(rows).splitlines()
    assert lines[2] == "| 4 KiB | nccl | 18.2 | 9.2 | 11.0 |  |"
    assert lines[3] == "| 4 KiB | one-shot | 12.0 | 4.0 | 5.5 | chosen |"
    assert lines[4] == "| 4 MiB | one-shot |  |  |  | its sums are wrong |"
