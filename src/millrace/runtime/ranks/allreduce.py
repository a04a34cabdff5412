"""The ways to add up a tensor over the ranks, measured at the start; the fastest right one is used.

Which way is fastest depends on the link, the driver and the size of the message, so nothing is
assumed: each candidate is run at the model's own sizes, its results are compared with a reference
and between the ranks, bit for bit, and every rank then makes the same choice. One that cannot be
set up or is wrong is left out, with a line in the log.
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
from millrace.model.parallel import Normed, TensorParallel
from millrace.runtime.ranks.allreduce_algorithms import (
    Algorithm,
    OwnPeers,
    advice,
    candidates,
    first_line,
)
from millrace.runtime.ranks.ranks import Ranks

log = logging.getLogger("millrace.ranks")

_CHAIN = 20  # calls in a graph that is measured
_REPEATS = 5
_abandoned: list[Algorithm] = []  # whose memory cannot be freed: it may still be in use
TRIAL_LIMIT = 40.0  # seconds for one way at one size, with what it compiles
_TRIES = 2  # different inputs that a candidate is checked with


# --- measuring ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Timing:
    """One algorithm at one size of message. Microseconds a call, the slowest rank's.

    raw: each call made by the host. graph: within a CUDA graph. normed: the same with the residual
    add and the norm that follow; None where there is no graph. problem: why it is not used.
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
        """What the choice goes by: the time in the step's graph, with the norm that follows."""
        return self.normed_us or self.graph_us or self.raw_us or float("inf")


@dataclass(slots=True)
class AllReduce:
    """The sums over the ranks of one model: messages are [T, width] of one dtype."""

    ranks: Ranks
    width: int
    dtype: torch.dtype
    device: torch.device
    timings: list[Timing] = field(default_factory=list)
    calls: int = 0  # sums so far, of calls that were made by the host
    _candidates: list[Algorithm] = field(default_factory=list)
    _bounds: list[int] = field(default_factory=list)
    _chosen: list[Algorithm] = field(default_factory=list)

    @classmethod
    def build(cls, ranks: Ranks, width: int, dtype: torch.dtype, device: torch.device) -> AllReduce:
        """All candidates that can be set up here. Called on every rank alike."""
        found = cls(ranks, width, dtype, device)
        if ranks.size > 1:
            found._candidates = candidates(ranks, width, dtype, device)
        return found

    def parallel(self) -> TensorParallel:
        """This rank's part of a model, summed up as chosen."""
        ranks = self.ranks
        if ranks.size == 1:
            return TensorParallel()
        return TensorParallel(
            *(ranks.rank, ranks.size, self.all_reduce),
            *(ranks.gather, ranks.maximum, self.reduce_norm),
        )

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks; the same bits on every rank. x is not needed any more."""
        self.calls += 1
        return self._for(x)(x)

    def reduce_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, keep: bool, quantized: bool
    ) -> Normed | None:
        """The sum over ranks plus residual, and its norm, in one; None where that is slower."""
        algorithm = self._for(x)
        if not isinstance(algorithm, OwnPeers):
            return None
        self.calls += 1
        return algorithm.norm(x, residual, weight, eps, keep, quantized)

    def _for(self, x: Tensor) -> Algorithm:
        place = bisect_left(self._bounds, x.nbytes)
        if place < len(self._bounds) and self._chosen[place].takes(x):
            return self._chosen[place]
        return self._candidates[0]

    def settle(self, rows: Sequence[int]) -> None:
        """Measure messages of so many tokens and choose. Called on every rank alike."""
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
            if isinstance(algorithm, OwnPeers):
                algorithm.trust()
        if self.ranks.rank == 0:
            log.info("all-reduce over %d ranks: %s", self.ranks.size, self.summary())

    def cost_us(self, rows: int) -> float:
        """Microseconds of a sum over a message of so many tokens, as measured and chosen."""
        size = rows * self.width * self.dtype.itemsize
        chosen = [timing for timing in self.timings if timing.chosen]
        return next((t.cost for t in chosen if t.bytes >= size), chosen[-1].cost)

    def summary(self) -> str:
        """The choice by message size, in one line."""
        chosen = [t for t in self.timings if t.chosen]
        return ", ".join(f"{t.algorithm} to {_size(t.bytes)} ({t.cost:.0f} us)" for t in chosen)

    def measure(self, rows: Sequence[int]) -> list[Timing]:
        """Every candidate at every size, the fastest right one of each size marked as chosen."""
        timings = []
        for count in sorted(set(rows)):
            tried = [self._timing(algorithm, count) for algorithm in self._candidates]
            best = min(tried, key=lambda timing: timing.cost)
            timings += [replace(timing, chosen=timing is best) for timing in tried]
            if self.device.type == "cuda":
                timings.append(self._between_graphs(count))
        return timings

    def _between_graphs(self, rows: int) -> Timing:
        """What the library's own sum would cost if it were called by the host between two graphs,
        each of the norm that follows. To compare with: a step is one graph."""
        library = self._candidates[0]
        x = torch.zeros(rows, self.width, dtype=self.dtype, device=self.device)
        with self.ranks.limited(f"calling {library.name} between graphs", TRIAL_LIMIT):
            mine = _between_us(library, x, self.ranks.wait)
            (found,) = self.ranks.largest([mine])
        name = f"{library.name} between graphs"
        return Timing(x.nbytes, name, normed_us=found, problem="to compare; a step is one graph")

    def _timing(self, algorithm: Algorithm, rows: int) -> Timing:
        """One way at one size, within a limit of time: what hangs on a GPU cannot be undone, so the
        group fails with a line that says which way it was."""
        name, size = algorithm.name, _size(rows * self.width * self.dtype.itemsize)
        helps = "" if algorithm is self._candidates[0] else advice(name)
        try:
            with self.ranks.limited(f"trying all-reduce by {name} of {size}", TRIAL_LIMIT, helps):
                return self._try(algorithm, rows)
        except RankError:
            _abandoned.append(algorithm)
            raise

    def _try(self, algorithm: Algorithm, rows: int) -> Timing:
        x = torch.zeros(rows, self.width, dtype=self.dtype, device=self.device)
        timing = Timing(x.nbytes, algorithm.name)
        if not algorithm.takes(x):
            return replace(timing, problem="not for messages of this size")
        problem = self._fault(algorithm, rows)
        if problem is not None:
            log.warning("%s is not used for %s: %s", algorithm.name, _size(x.nbytes), problem)
            return replace(timing, problem=problem)
        if not x.is_cuda:
            (raw,) = self.ranks.largest([_host_us(lambda: algorithm(x))])
            return replace(timing, raw_us=raw)
        try:
            mine = _cuda_us(algorithm, x, self.ranks.wait)
        except RankError:
            raise
        except Exception as error:
            log.warning("%s is not used for %s: %s", algorithm.name, _size(x.nbytes), error)
            mine = [float("inf")] * 3
        raw, graph, normed = self.ranks.largest(mine)
        if normed == float("inf"):
            return replace(timing, problem="it cannot be timed")
        return replace(timing, raw_us=raw, graph_us=graph, normed_us=normed)

    # --- checking ---------------------------------------------------------------------------

    def _fault(self, algorithm: Algorithm, rows: int) -> str | None:
        """What is wrong with an algorithm's sums; None if nothing is. Alike on every rank."""
        ways: list[Callable[[Tensor], Tensor]] = [algorithm]
        if self.device.type == "cuda":
            ways.append(_Replayed(algorithm, self.ranks))
        problem = None
        for seed in range(_TRIES):
            parts = torch.stack([self._part(rows, rank, seed) for rank in range(self.ranks.size)])
            for way in ways:
                problem = problem or self._wrong_sum(way, parts)
        return problem

    def _wrong_sum(self, way: Callable[[Tensor], Tensor], parts: Tensor) -> str | None:
        """What is wrong with the sum of parts, [ranks, T, H]; None on all ranks if nothing is."""
        mark, problem = -1.0, None
        try:
            got = way(parts[self.ranks.rank].clone())
            if got.is_cuda:
                self.ranks.settle()
            # A rounding for each addition, and one for the result.
            limit = parts.double().abs().sum(0) * torch.finfo(self.dtype).eps * self.ranks.size
            if bool(((got.double() - parts.double().sum(0)).abs() > limit + 1e-30).any()):
                problem = "its sums are wrong"
            mark = float(zlib.crc32(got.cpu().view(torch.uint8).numpy().tobytes()))
        except RankError:
            raise
        except Exception as error:  # whatever it is, the others must not wait for this rank
            problem = first_line(error)
        most, least = self.ranks.largest([mark, -mark])
        if most != -least:
            problem = problem or "its sums differ from rank to rank"
        if self.ranks.smallest(0 if problem else 1):
            return None
        return problem or "it failed on another rank"

    def _part(self, rows: int, rank: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * seed + rank)
        part = torch.randn(rows, self.width, generator=generator)
        return part.to(self.dtype).to(self.device)


class _Replayed:
    """An algorithm in a CUDA graph, called as if it were outside; the first call captures it."""

    def __init__(self, algorithm: Algorithm, ranks: Ranks) -> None:
        self._algorithm = algorithm
        self._ranks = ranks
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self._graph is None:
            self._x = torch.zeros_like(x)
            self._graph = torch.cuda.CUDAGraph()
            self._ranks.settle()  # what follows waits for the device without looking up
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._out = self._algorithm(self._x.clone())
        self._x.copy_(x)
        self._graph.replay()
        return self._out


# --- clocks ------------------------------------------------------------------------------------


def _host_us(call: Callable[[], object], calls: int = 10) -> float:
    """Microseconds a call; the best of a few repeats."""
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter() - began) / calls * 1e6)
    return best


Wait = Callable[[torch.cuda.Event], None]


def _cuda_us(algorithm: Algorithm, x: Tensor, wait: Wait) -> list[float]:
    """[called by the host, in a graph, in a graph with the add and the norm that follow]."""
    residual, weight = torch.zeros_like(x), torch.zeros(x.shape[1], device=x.device)

    def normed() -> object:
        if isinstance(algorithm, OwnPeers):
            return algorithm.norm(x, residual, weight, 1e-6, True, False)
        return add_rms_norm(algorithm(x), residual, weight, 1e-6)

    raw = _event_us(lambda: [algorithm(x) for _ in range(_CHAIN)], wait)
    return [raw, _graph_us(lambda: algorithm(x), wait), _graph_us(normed, wait)]


def _between_us(algorithm: Algorithm, x: Tensor, wait: Wait) -> float:
    """A call by the host and the graph of a norm, in turn."""
    residual, weight = torch.zeros_like(x), torch.zeros(x.shape[1], device=x.device)
    add_rms_norm(x, residual, weight, 1e-6)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        add_rms_norm(x, residual, weight, 1e-6)

    def run() -> None:
        for _ in range(_CHAIN):
            algorithm(x)
            graph.replay()

    return _event_us(run, wait)


def _graph_us(call: Callable[[], object], wait: Wait) -> float:
    _event_us(call, wait)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL has threads too
        for _ in range(_CHAIN):
            call()
    return _event_us(graph.replay, wait)


def _event_us(run: Callable[[], object], wait: Wait) -> float:
    """Microseconds a call of `_CHAIN` calls that `run` makes: the median of a few repeats."""
    run()
    found = []
    for _ in range(_REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        wait(end)
        found.append(start.elapsed_time(end) * 1e3 / _CHAIN)
    return float(sorted(found)[_REPEATS // 2])


def _size(count: int) -> str:
    return f"{count / 1048576:g} MiB" if count >= 1 << 20 else f"{count / 1024:g} KiB"


def budget(config: ModelConfig, drafts: int) -> int:
    """Sums over the ranks in a step that decodes, with so many drafts: two a layer and one for the
    embedding; each draft is a layer and an embedding more."""
    return 1 + 2 * config.num_layers + 3 * drafts


def table(timings: Sequence[Timing]) -> str:
    """The timings as text (Markdown)."""

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
