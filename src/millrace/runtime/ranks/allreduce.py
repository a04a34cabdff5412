"""The all-reduce algorithm for each message size: measured at the start, the fastest right one
wins.

Which algorithm is fastest depends on the link, the driver and the message size, so nothing is
assumed. Each candidate runs at the model's own sizes; its results are compared with a reference
and, bit for bit, between the ranks; then every rank makes the same choice. A candidate that cannot
be set up, or is wrong, is left out with a line in the log.
"""

from __future__ import annotations

import logging
import time
import zlib
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from millrace.errors import RankError
from millrace.kernels.norm import add_rms_norm
from millrace.model.config import ModelConfig
from millrace.model.parallel import NormResult, TensorParallel
from millrace.runtime.ranks.allreduce_algorithms import (
    Algorithm,
    PeerAllReduce,
    advice,
    candidates,
    first_line,
)
from millrace.runtime.ranks.ranks import Ranks

log = logging.getLogger("millrace.ranks")

_CALLS = 20  # calls in one measurement
_REPEATS = 5
_hung: list[Algorithm] = []  # algorithms that hung; their memory may still be in use
TRIAL_LIMIT = 40.0  # seconds for one algorithm at one size, compilation included
_CHECKS = 2  # inputs that a candidate is checked with


# --- measuring ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Timing:
    """One algorithm at one message size; microseconds per call on the slowest rank.

    raw: called by the host. graph: in a CUDA graph. normed: in a graph with the residual add and
    the norm that follow; None without graphs. problem: why it is not used.
    """

    bytes: int
    algorithm: str
    raw_us: float | None = None
    graph_us: float | None = None
    normed_us: float | None = None
    problem: str | None = None
    chosen: bool = False

    @property
    def cost(self) -> float:
        """What is minimised: the time in a graph with the norm that follows, if it is known."""
        return self.normed_us or self.graph_us or self.raw_us or float("inf")


@dataclass(slots=True)
class AllReduce:
    """The all-reduce of one model's ranks. Messages are [T, width] of one dtype."""

    ranks: Ranks
    width: int
    dtype: torch.dtype
    device: torch.device
    timings: list[Timing] = field(default_factory=list)
    calls: int = 0  # calls by the host so far; replays of graphs do not count
    _candidates: list[Algorithm] = field(default_factory=list)
    _bounds: list[int] = field(default_factory=list)
    _chosen: list[Algorithm] = field(default_factory=list)

    @classmethod
    def build(cls, ranks: Ranks, width: int, dtype: torch.dtype, device: torch.device) -> AllReduce:
        """Set up all candidates that work here. Every rank must call it."""
        found = cls(ranks, width, dtype, device)
        if ranks.size > 1:
            found._candidates = candidates(ranks, width, dtype, device)
        return found

    def parallel(self) -> TensorParallel:
        """The tensor parallelism of this rank, with the chosen algorithms."""
        ranks = self.ranks
        if ranks.size == 1:
            return TensorParallel()
        return TensorParallel(
            *(ranks.rank, ranks.size, self.all_reduce),
            *(ranks.all_gather, ranks.all_reduce_max, self.all_reduce_norm),
        )

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks; the same bits on every rank. x may be overwritten."""
        self.calls += 1
        return self.algorithm_for(x)(x)

    def all_reduce_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, keep: bool, quantized: bool
    ) -> NormResult | None:
        """The sum over ranks plus residual and its norm in one kernel; None if that is slower."""
        algorithm = self.algorithm_for(x)
        if not isinstance(algorithm, PeerAllReduce):
            return None
        self.calls += 1
        return algorithm.all_reduce_norm(x, residual, weight, eps, keep, quantized)

    def algorithm_for(self, x: Tensor) -> Algorithm:
        place = bisect_left(self._bounds, x.nbytes)
        if place < len(self._bounds) and self._chosen[place].supports(x):
            return self._chosen[place]
        return self._candidates[0]

    def choose(self, rows: Sequence[int]) -> None:
        """Measure messages of so many rows and choose. Every rank must call it."""
        if self.ranks.size == 1:
            return
        self.timings = self.measure(rows)
        self._bounds, self._chosen = [], []
        names = {algorithm.name: algorithm for algorithm in self._candidates}
        for timing in self.timings:
            if timing.chosen:
                self._bounds.append(timing.bytes)
                self._chosen.append(names[timing.algorithm])
        for algorithm in self._candidates:
            if isinstance(algorithm, PeerAllReduce):
                algorithm.wait_without_limit()
        if self.ranks.rank == 0:
            log.info("all-reduce over %d ranks: %s", self.ranks.size, self.summary())

    def cost_us(self, rows: int) -> float:
        """Measured microseconds of the chosen algorithm for a message of so many rows."""
        size = rows * self.width * self.dtype.itemsize
        chosen = [timing for timing in self.timings if timing.chosen]
        return next((t.cost for t in chosen if t.bytes >= size), chosen[-1].cost)

    def summary(self) -> str:
        """The choice by message size, in one line."""
        chosen = [t for t in self.timings if t.chosen]
        return ", ".join(f"{t.algorithm} to {_size(t.bytes)} ({t.cost:.0f} us)" for t in chosen)

    def measure(self, rows: Sequence[int]) -> list[Timing]:
        """Every candidate at every size; the fastest right one of each size is marked as chosen."""
        timings = []
        for count in sorted(set(rows)):
            tried = [self._timing(algorithm, count) for algorithm in self._candidates]
            best = min(tried, key=lambda timing: timing.cost)
            timings += [replace(timing, chosen=timing is best) for timing in tried]
            if self.device.type == "cuda":
                timings.append(self._time_between_graphs(count))
        return timings

    def _time_between_graphs(self, rows: int) -> Timing:
        """The library's own all-reduce called by the host between two graphs. For comparison only:
        a step is one graph."""
        library = self._candidates[0]
        x = torch.zeros(rows, self.width, dtype=self.dtype, device=self.device)
        with self.ranks.limited(f"calling {library.name} between graphs", TRIAL_LIMIT):
            mine = _between_us(library, x, self.ranks.wait)
            (found,) = self.ranks.max_over_ranks([mine])
        name = f"{library.name} between graphs"
        return Timing(x.nbytes, name, normed_us=found, problem="to compare; a step is one graph")

    def _timing(self, algorithm: Algorithm, rows: int) -> Timing:
        """Measure one algorithm at one size. What hangs on a GPU cannot be cancelled, so after a
        time limit the group fails with a line that names the algorithm."""
        name, size = algorithm.name, _size(rows * self.width * self.dtype.itemsize)
        helps = "" if algorithm is self._candidates[0] else advice(name)
        try:
            with self.ranks.limited(f"trying all-reduce by {name} of {size}", TRIAL_LIMIT, helps):
                return self._try(algorithm, rows)
        except RankError:
            _hung.append(algorithm)
            raise

    def _try(self, algorithm: Algorithm, rows: int) -> Timing:
        x = torch.zeros(rows, self.width, dtype=self.dtype, device=self.device)
        timing = Timing(x.nbytes, algorithm.name)
        if not algorithm.supports(x):
            return replace(timing, problem="it does not support messages of this size")
        problem = self._find_error(algorithm, rows)
        if problem is not None:
            log.warning("%s is not used for %s: %s", algorithm.name, _size(x.nbytes), problem)
            return replace(timing, problem=problem)
        if not x.is_cuda:
            (raw,) = self.ranks.max_over_ranks([host_us(lambda: algorithm(x))])
            return replace(timing, raw_us=raw)
        try:
            mine = cuda_us(algorithm, x, self.ranks.wait)
        except RankError:
            raise
        except Exception as error:
            log.warning("%s is not used for %s: %s", algorithm.name, _size(x.nbytes), error)
            mine = [float("inf")] * 3
        raw, graph, normed = self.ranks.max_over_ranks(mine)
        if normed == float("inf"):
            return replace(timing, problem="it cannot be timed")
        return replace(timing, raw_us=raw, graph_us=graph, normed_us=normed)

    # --- checking ---------------------------------------------------------------------------

    def _find_error(self, algorithm: Algorithm, rows: int) -> str | None:
        """Why an algorithm's results are wrong; None if they are right. The same on every rank."""
        calls: list[Callable[[Tensor], Tensor]] = [algorithm]
        if self.device.type == "cuda":
            calls.append(_InGraph(algorithm, self.ranks))
        problem = None
        for seed in range(_CHECKS):
            parts = torch.stack(
                [self._input_of(rows, rank, seed) for rank in range(self.ranks.size)]
            )
            for call in calls:
                problem = problem or self._check_sum(call, parts)
        return problem

    def _check_sum(self, call: Callable[[Tensor], Tensor], parts: Tensor) -> str | None:
        """Why the sum of parts [ranks, T, H] is wrong; None, on all ranks, if it is right."""
        checksum, problem = -1.0, None
        try:
            got = call(parts[self.ranks.rank].clone())
            if got.is_cuda:
                self.ranks.wait_for_device()
            # One rounding for each addition, and one for the result.
            limit = parts.double().abs().sum(0) * torch.finfo(self.dtype).eps * self.ranks.size
            if bool(((got.double() - parts.double().sum(0)).abs() > limit + 1e-30).any()):
                problem = "its sums are wrong"
            checksum = float(zlib.crc32(got.cpu().view(torch.uint8).numpy().tobytes()))
        except RankError:
            raise
        except Exception as error:  # of any kind: the other ranks must not wait for this one
            problem = first_line(error)
        most, least = self.ranks.max_over_ranks([checksum, -checksum])
        if most != -least:
            problem = problem or "its sums differ from rank to rank"
        if self.ranks.min_over_ranks(0 if problem else 1):
            return None
        return problem or "it failed on another rank"

    def _input_of(self, rows: int, rank: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * seed + rank)
        part = torch.randn(rows, self.width, generator=generator)
        return part.to(self.dtype).to(self.device)


class _InGraph:
    """An algorithm in a CUDA graph with the interface of a plain call; the first call captures."""

    def __init__(self, algorithm: Algorithm, ranks: Ranks) -> None:
        self._algorithm = algorithm
        self._ranks = ranks
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self._graph is None:
            self._x = torch.zeros_like(x)
            self._graph = torch.cuda.CUDAGraph()
            self._ranks.wait_for_device()  # a capture waits for the device without a limit
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._out = self._algorithm(self._x.clone())
        self._x.copy_(x)
        self._graph.replay()
        return self._out


# --- timing -----------------------------------------------------------------------------------


def host_us(call: Callable[[], object], calls: int = 10) -> float:
    """Microseconds per call; the best of a few repeats."""
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter() - began) / calls * 1e6)
    return best


Wait = Callable[[torch.cuda.Event], None]


def cuda_us(algorithm: Algorithm, x: Tensor, wait: Wait) -> list[float]:
    """Microseconds [called by the host, in a graph, in a graph with the add and the norm]."""
    residual, weight = torch.zeros_like(x), torch.ones(x.shape[1], device=x.device)

    def normed() -> object:
        if isinstance(algorithm, PeerAllReduce):
            return algorithm.all_reduce_norm(x, residual, weight, 1e-6, True, False)
        return add_rms_norm(algorithm(x), residual, weight, 1e-6)

    raw = _event_us(lambda: [algorithm(x) for _ in range(_CALLS)], wait)
    return [raw, _graph_us(lambda: algorithm(x), wait), _graph_us(normed, wait)]


def _between_us(algorithm: Algorithm, x: Tensor, wait: Wait) -> float:
    """Microseconds per call by the host, each followed by the graph of a norm."""
    residual, weight = torch.zeros_like(x), torch.ones(x.shape[1], device=x.device)
    add_rms_norm(x, residual, weight, 1e-6)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        add_rms_norm(x, residual, weight, 1e-6)

    def run() -> None:
        for _ in range(_CALLS):
            algorithm(x)
            graph.replay()

    return _event_us(run, wait)


def _graph_us(call: Callable[[], object], wait: Wait) -> float:
    _event_us(call, wait)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL has threads too
        for _ in range(_CALLS):
            call()
    return _event_us(graph.replay, wait)


def _event_us(run: Callable[[], object], wait: Wait) -> float:
    """Microseconds per call, where `run` makes `_CALLS` calls: the median of a few repeats."""
    run()
    found = []
    for _ in range(_REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        wait(end)
        found.append(start.elapsed_time(end) * 1e3 / _CALLS)
    return float(sorted(found)[_REPEATS // 2])


def _size(count: int) -> str:
    return f"{count / 1048576:g} MiB" if count >= 1 << 20 else f"{count / 1024:g} KiB"


def calls_per_step(config: ModelConfig, drafts: int) -> int:
    """All-reduces in a decode step: two for each layer and one for the embedding. Each draft adds
    a layer and an embedding; the draft head embeds the step's tokens once more to write its KV."""
    return 1 + 2 * config.num_layers + 3 * drafts + bool(drafts)


def table(timings: Sequence[Timing]) -> str:
    """The timings as a Markdown table."""

    def cell(value: float | None) -> str:
        return "" if value is None else f"{value:,.1f}"

    lines = [
        "| size | algorithm | raw us | in-graph us | with norm us | |",
        "|--:|--|--:|--:|--:|--|",
    ]
    for t in timings:
        note = "chosen" if t.chosen else t.problem or ""
        cells = (_size(t.bytes), t.algorithm, cell(t.raw_us), cell(t.graph_us), cell(t.normed_us))
        lines.append("| " + " | ".join((*cells, note)) + " |")
    return "\n".join(lines)
