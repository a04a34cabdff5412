"""CUDA graphs of a step's two parts: its forward, and what follows for the rows that are sampled.

A forward depends on nothing but a short vector of numbers: which slots decode, which chunks of
which prompts there are. Lengths, tokens, windows and drafts are all on the device, and rows and
tokens beyond those asked for are padding. So a graph serves every step that fits into its sizes:
there is one for each bucket of decode rows alone, and one for each bucket of tokens, times a few
classes of decode rows beside them, for steps with prompts. What follows depends on the sampled rows
alone, so it has graphs of its own, by their number: counts add up and do not multiply, and a step
with logits processors uses the same forward. All graphs read one vector and pass on one buffer of
hidden vectors.
"""

from __future__ import annotations

import gc
import logging
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from millrace.config import EngineConfig, bucket_above, token_buckets
from millrace.logs.progress import PROGRESS_SECONDS, Due
from millrace.protocol import StepPlan
from millrace.runtime.step.inputs import (
    Numbers,
    Room,
    Sizes,
    listed,
    listed_sampled,
    tokens_of,
    width_of,
)
from millrace.runtime.step.upload import overwrite

logger = logging.getLogger(__name__)

MOST_CHUNKS = 64  # of a step's prompts; room for rows that are not there costs 0.3 ms of a step
FEW_ROWS = 64  # decode rows of the class between none and all
FEW_TOKENS = 1024  # of a step's, up to which there are graphs for fewer than all decode rows


class Forward(NamedTuple):
    """What a forward's graph has room for: decode rows of `width` tokens, chunks, tokens."""

    decode: int
    chunks: int
    tokens: int
    width: int = 1


class Tail(NamedTuple):
    """And that of what follows: sampled rows; whether any draws with top_k or top_p; candidates
    of a decode row, and one more than the drafts that are made."""

    rows: int
    filters: bool
    width: int = 1


@dataclass(slots=True)
class _Captured:
    """A part in a graph; on a CPU, which has none, it runs anew each time."""

    run: Callable[[], Tensor | None]
    graph: torch.cuda.CUDAGraph | None = None
    out: Tensor | None = None

    def replay(self) -> Tensor | None:
        if self.graph is None:
            return self.run()
        self.graph.replay()
        return self.out


def _recorded(
    run: Callable[[], Tensor | None], graph: torch.cuda.CUDAGraph, pool: Any, stream: Any
) -> Tensor | None:
    """Capture what `run` launches. Nothing is freed meanwhile, because that waits for the device.

    `torch.cuda.graph` would also empty PyTorch's cache each time, and the next one fill it again.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.stream(stream):
            # Other threads, such as NCCL's, may query events meanwhile.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                return run()
            finally:
                graph.capture_end()
    finally:
        if collects:
            gc.enable()


@dataclass(frozen=True, slots=True)
class Parts:
    """The two parts of a step, without host or sync.

    forward: writes the hidden vectors of the numbers' tokens to the buffer [T, H].
    tail: from that buffer to the step's result [R, ...], for rows of so many candidates. fits:
    whether the lengths of a plan's chunks may run in a graph. gemms: runs the model's GEMMs for so
    many tokens, which have their own kernels.
    """

    forward: Callable[[Numbers, Room, Tensor], None]
    tail: Callable[[Numbers, Tensor, int, bool], Tensor]
    fits: Callable[[StepPlan], bool]
    gemms: Callable[[int], None]


class StepGraphs:
    """Captures the parts of steps and replays them.

    hidden: [T, H], the buffer, for the tokens of the largest step. context: no row is ever longer.
    wait_for_device: has a limit, so it ends if ranks have failed.
    """

    def __init__(
        self,
        parts: Parts,
        sizes: GraphSizes,
        hidden: Tensor,
        context: int,
        wait_for_device: Callable[[], None],
    ) -> None:
        self._parts, self._wait_for_device = parts, wait_for_device
        self._sizes, self._context = sizes, context
        self._device = hidden.device
        self._vector = torch.zeros(len(sizes.most), dtype=torch.int64, device=hidden.device)
        self.hidden = hidden
        self.numbers = Numbers.split(self._vector, sizes.most)
        self._captured: dict[Forward | Tail, _Captured] = {}
        # (decode rows beside prompts, their tokens) whose kernels are loaded
        self._seen: set[tuple[int, int]] = set()
        self._pool: Any = None  # the memory that all graphs share
        self._stream = torch.cuda.Stream() if hidden.is_cuda else None

    @property
    def covers_prompts(self) -> bool:
        """Whether there are graphs of steps with prompts."""
        return bool(self._sizes.tokens)

    # --- capturing --------------------------------------------------------------------------

    def capture(self, largest_only: bool = False) -> int:
        """Capture every graph, larger ones first, so that the others fit into their memory;
        returns how many. largest_only: one of each kind, to see what they take."""
        keys = list(self._sizes.largest() if largest_only else self._sizes.all())
        due = Due(PROGRESS_SECONDS)
        for number, key in enumerate(keys):
            if due:
                logger.info("%d of %d graphs of steps are captured", number, len(keys))
            self._captured[key] = self._capture(key)
        return len(self._captured)

    def _capture(self, key: Forward | Tail) -> _Captured:
        run = self._runs(key)
        if self._device.type != "cuda":
            return _Captured(run)
        self._prepare(key, run)
        self._wait_for_device()
        graph = torch.cuda.CUDAGraph()
        out = _recorded(run, graph, self._pool, self._stream)
        self._pool = self._pool or graph.pool()
        return _Captured(run, graph, out)

    def _prepare(self, key: Forward | Tail, run: Callable[[], object]) -> None:
        """Compile and load what is used for the first time. Forwards beside the same decode rows
        differ only in the tiling of GEMMs."""
        if isinstance(key, Forward) and key.chunks and (key.decode, key.width) in self._seen:
            self._parts.gemms(key.tokens)
            return
        run()
        if isinstance(key, Forward) and key.chunks:
            self._seen.add((key.decode, key.width))

    def _runs(self, key: Forward | Tail) -> Callable[[], Tensor | None]:
        if isinstance(key, Tail):
            cut = self.numbers.cut(Sizes(0, 0, key.rows))
            return lambda: self._parts.tail(cut, self.hidden, key.width, key.filters)
        cut = self.numbers.cut(Sizes(key.decode, key.chunks, 0))
        room = Room(key.width, key.tokens, self._context)
        return lambda: self._parts.forward(cut, room, self.hidden)

    def release(self) -> None:
        """Free the graphs; no step may follow. What runs them knows this object, and objects that
        were there when the process froze its garbage collector are freed only by the last
        reference."""
        self._captured.clear()

    # --- replaying --------------------------------------------------------------------------

    def forward(self, plan: StepPlan) -> bool:
        """Run a plan's forward, and leave its hidden vectors in the buffer; False where no graph
        has room for it."""
        key = self._sizes.forward(plan)
        found = self._captured.get(key) if key else None
        if found is None or not self._parts.fits(plan):
            return False
        overwrite(self._vector, listed(plan, self._sizes.width_of(plan), self._sizes.most))
        found.replay()
        return True

    def take(self, plan: StepPlan, hidden: Tensor) -> None:
        """Put the hidden vectors of a plan's candidates, [R * width, H], where `tail` looks."""
        self.hidden[: len(hidden)] = hidden
        width = self._sizes.width_of(plan)
        overwrite(self._vector, listed_sampled(plan, width, self._sizes.most))

    def tail(self, plan: StepPlan, filters: bool) -> Tensor:
        """What follows the forward, for each sampled row, valid until the next one."""
        out = self._captured[self._sizes.tail(plan, filters)].replay()
        assert out is not None
        return out[: len(plan.sampled_slots)]


@dataclass(frozen=True, slots=True)
class GraphSizes:
    """Which graphs there are.

    widths: tokens of decode rows, ascending; all rows of a step have the same. rows: buckets of
    rows. tokens: buckets of tokens of steps with prompts. most: what the vector has room for.
    """

    widths: list[int]
    rows: list[int]
    tokens: list[int]
    most: Sizes

    @classmethod
    def of(cls, config: EngineConfig) -> GraphSizes:
        rows = bucket_sizes(config.max_num_seqs)
        tokens = token_buckets(config.most_mixed_tokens) if has_prefill_graphs(config) else []
        most = Sizes(rows[-1], min(MOST_CHUNKS, rows[-1]), rows[-1])
        widths = [1 + depth for depth in config.speculation.all_depths]
        return cls(widths, rows, tokens, most)

    @property
    def width(self) -> int:
        """The largest of the widths."""
        return self.widths[-1]

    def width_of(self, plan: StepPlan) -> int:
        """Tokens of a plan's decode rows."""
        return width_of(plan, self.width)

    @property
    def most_tokens(self) -> int:
        return max([*self.tokens, self.rows[-1] * self.width])

    def forward(self, plan: StepPlan) -> Forward | None:
        """The graph that a plan's forward may run in; None: there is none."""
        if not self.most.cover(Sizes.of(plan)):
            return None
        width = self.width_of(plan)
        if not plan.chunks:
            decode = self.rows[bisect_left(self.rows, len(plan.decode))]
            return Forward(decode, 0, decode * width, width)
        tokens = bucket_above(tokens_of(plan, width))
        classes = self._classes(tokens, width)
        return self._mixed(classes[bisect_left(classes, len(plan.decode))], tokens, width)

    def tail(self, plan: StepPlan, filters: bool) -> Tail:
        """The graph of what follows a plan's forward."""
        rows = self.rows[bisect_left(self.rows, len(plan.sampled_slots))]
        return Tail(rows, filters, self.width_of(plan))

    def all(self) -> Iterator[Forward | Tail]:
        """Every graph, larger ones first."""
        for width in reversed(self.widths):
            for tokens in reversed(self.tokens):
                for decode in reversed(self._classes(tokens, width)):
                    if decode or width == self.width:
                        yield self._mixed(decode, tokens, width)
            for rows in reversed(self.rows):
                yield Forward(rows, 0, rows * width, width)
            for filters in (True, False):
                for rows in reversed(self.rows):
                    yield Tail(rows, filters, width)

    def largest(self) -> Iterator[Forward | Tail]:
        """The largest of each kind."""
        if self.tokens:
            yield self._mixed(self.rows[-1], self.tokens[-1], self.width)
        yield Forward(self.rows[-1], 0, self.rows[-1] * self.width, self.width)
        yield Tail(self.rows[-1], True, self.width)

    def _mixed(self, decode: int, tokens: int, width: int) -> Forward:
        # Without decode rows their width is nothing that a graph depends on.
        return Forward(
            decode, min(self.most.chunks, tokens), tokens, width if decode else self.width
        )

    def _classes(self, tokens: int, width: int) -> list[int]:
        """Decode rows that there is room for beside prompts, in steps of so many tokens.

        Rows that are not there cost little beside many tokens.
        """
        few, most = min(FEW_ROWS, self.rows[-1]), self.rows[-1]
        if tokens > FEW_TOKENS:
            return [most]
        return sorted({0, few, most} if tokens > few * width else {0, few})


def has_prefill_graphs(config: EngineConfig) -> bool:
    """Whether steps with prompts are graphs, too. Ranks that share a model run them eagerly: their
    graphs of prompts were never tried on several GPUs."""
    return config.args.prefill_graphs and config.args.tensor_parallel_size == 1


def bucket_sizes(max_rows: int) -> list[int]:
    """Row counts worth a graph each: finely spaced where few run, by 32 where many do."""
    sizes = [1, 2, 4, 8, 12, 16, 24, 32, 48, 64]
    sizes += range(96, max_rows, 32)
    return [*(size for size in sizes if size < max_rows), max_rows]
