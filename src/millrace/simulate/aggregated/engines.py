"""All engines of a fleet as arrays: what one step of each does to its slots, pages and queue.

It follows `millrace.engine.scheduler` row by row, with these differences: pages count as if each
sequence left half of its last page empty; accepted drafts count by their mean, while a
request's number of steps is drawn; nobody is preempted, but steps that would have to are counted. A
prompt stops for a snapshot at its end, and finds nothing in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from millrace.engine.prompt_budget import FOLLOWING_STEPS
from millrace.engine.waiting_queue import WINDOW
from millrace.model.work import StepShape
from millrace.simulate.aggregated.budget import PromptBudgets, step_tokens
from millrace.simulate.aggregated.requests import RequestTable, step_tokens_moments, steps_drawer
from millrace.simulate.common.options import ReplicaKind

LARGE_PIECE = 512  # as in millrace.engine.engine
IDLE = np.inf
_QUEUE = 64  # places of each queue at first
_ADMITTED = 8  # places of a queue in which prompts that have a slot are
_STOP_LOSS = 4.0  # of jitter: no step is expected to be faster than that many spreads


@dataclass(slots=True)
class Steps:
    """What the steps of some engines brought. rows: the engines; ended, before: when this step and
    the one before it end; decoded: decode rows; first, last: requests that get their first token,
    and their last one; seconds: of each step."""

    rows: np.ndarray
    ended: np.ndarray
    before: np.ndarray
    decoded: np.ndarray
    first: np.ndarray
    last: np.ndarray
    seconds: np.ndarray


@dataclass(slots=True)
class _Chunks:
    """Pieces of prompts that steps compute: place among the steps, request, start, tokens, and
    whether the prompt ends."""

    at: np.ndarray
    request: np.ndarray
    start: np.ndarray
    count: np.ndarray
    last: np.ndarray


class Engines:
    """See the module. rows: how many engines. longest: output tokens that a request may have."""

    def __init__(
        self, kind: ReplicaKind, rows: int, table: RequestTable, longest: int, seed: int
    ) -> None:
        self._kind, self._table = kind, table
        self._limits = limits = kind.limits
        self._width = limits.drafts + 1
        rng = np.random.default_rng((seed, 11))
        self._rng = rng
        self.tokens_per_step, _ = step_tokens_moments(kind.speeds.acceptance)
        self._draw_steps = steps_drawer(kind.speeds.acceptance, rng)
        self.plan_at = np.full(rows, IDLE)  # when the next step is planned
        self.ended = np.zeros(rows)  # the last launched step ends
        self._before = np.zeros(rows)  # the step before that
        self._step = np.zeros(rows, dtype=np.int64)
        self.decoding = np.zeros(rows, dtype=np.int64)
        self.running = np.zeros(rows, dtype=np.int64)  # slots in use
        self._context = np.zeros(rows)
        self.generated = np.zeros(rows)  # tokens of running answers
        self.pages = np.zeros(rows)
        self._idle_rows = np.zeros(rows, dtype=np.int64)  # decode rows that have ended already
        # Slots and pages that are free once the next, the second and the third commit has come.
        self._freed = np.zeros((3, rows), dtype=np.int64)
        self._freed_pages = np.zeros((3, rows))
        self._following = np.zeros(rows, dtype=np.int64)
        self._queue = np.full((rows, _QUEUE), -1, dtype=np.int64)
        self._head = np.zeros(rows, dtype=np.int64)
        self._tail = np.zeros(rows, dtype=np.int64)
        self.queued_tokens = np.zeros(rows, dtype=np.int64)
        self._ring = longest + 2
        self._shortest = longest  # of all prompts
        self._lists = np.full((rows, self._ring), -1, dtype=np.int32)  # by the step that ends them
        self.page_shortages = self.steps = self._turn = 0
        self.busy = 0.0

    def shortest_step(self) -> float:
        """No step is shorter, seconds."""
        shapes = (
            StepShape.of(rows=1, width=self._width, context=1),
            StepShape.of(prompts=1, length=1),
        )
        least = min(float(sum(self._kind.model.times(shape))) for shape in shapes)
        return least * float(np.exp(-_STOP_LOSS * self._kind.speeds.jitter))

    def reset(self, row: int) -> None:
        """An engine starts anew, with nothing in it."""
        for name in ("ended", "_before", "_context", "generated", "pages"):
            getattr(self, name)[row] = 0.0
        for name in ("decoding", "running", "_idle_rows", "_following", "_head", "_tail"):
            getattr(self, name)[row] = 0
        self._freed[:, row] = 0
        self._freed_pages[:, row] = 0.0
        self.queued_tokens[row] = 0
        self._queue[row] = -1
        self._lists[row] = -1
        self.plan_at[row] = IDLE

    def waiting(self) -> np.ndarray:
        """Requests of each engine that have no slot, with holes of the queues among them."""
        count: np.ndarray = np.maximum(self._tail - self._head, 0)
        return count

    def add(self, row: int, request: int) -> None:
        """A request has come to an engine; its columns are filled."""
        table = self._table
        known = int(table.known[request])
        table.left[request] = known
        table.split[request] = table.admitted[request] = table.decoding[request] = False
        table.stop[request] = self._stop(known)
        self._shortest = min(self._shortest, known)
        if self._tail[row] - self._head[row] >= self._queue.shape[1]:
            self._widen()
        self._queue[row, self._tail[row] % self._queue.shape[1]] = request
        self._tail[row] += 1
        self.queued_tokens[row] += known
        if self.plan_at[row] == IDLE:
            self.plan_at[row] = max(table.arrives[request], self.ended[row])

    def made(self, requests: np.ndarray) -> np.ndarray:
        """Output tokens that these decoding requests have brought by now, but for their last."""
        table = self._table
        most = table.output[requests] - 1
        done = self.steps_done(requests)
        count = table.made[requests] + 1 + (done * self.tokens_per_step).astype(np.int64)
        return np.where(table.decoding[requests], np.minimum(count, most), table.made[requests])

    def steps_done(self, requests: np.ndarray) -> np.ndarray:
        """Decode steps of these decoding requests so far."""
        done = self._step[self._table.replica[requests]] - self._table.entered[requests]
        found: np.ndarray = np.maximum(done, 0)
        return found

    def _stop(self, known: int) -> int:
        """Where a prompt stops for a snapshot; 0: nowhere."""
        limits = self._limits
        if not (limits.prefix_caching and limits.num_snapshots):
            return 0
        end = (known - 1) // limits.page_size * limits.page_size
        return end if end >= max(1, limits.snapshot_distance) else 0

    def _widen(self) -> None:
        """Twice the places for each queue."""
        places = self._queue.shape[1]
        wider = np.full((len(self._queue), 2 * places), -1, dtype=np.int64)
        for row in np.flatnonzero(self._tail > self._head):
            at = np.arange(self._head[row], self._tail[row])
            wider[row, at % (2 * places)] = self._queue[row, at % places]
        self._queue = wider

    # --- a step of each of some engines ----------------------------------------------------------

    def step(self, rows: np.ndarray) -> Steps:
        """Plan and launch the next step of each of these engines, at its `plan_at`."""
        now = self.plan_at[rows]
        self._turn += 1
        self._commit(rows, now)
        live = self.decoding[rows].copy()
        decode = live + self._idle_rows[rows]
        tokens = step_tokens(self._limits, decode * self._width, self.queued_tokens[rows])
        following = self._following[rows] > 0
        budgets = PromptBudgets(self._limits, tokens, decode * self._width, following)
        chunks = self._plan_prompts(rows, now, budgets)
        self._following[rows] = np.where(
            budgets.whole_prompts > 0, FOLLOWING_STEPS, np.maximum(0, self._following[rows] - 1)
        )
        works = decode > 0
        works[chunks.at] = True
        seconds = self._seconds(rows, decode, chunks) * works
        before = self.ended[rows].copy()
        ended = np.where(works, np.maximum(before, now) + seconds, before)
        self._before[rows] = np.where(works, before, self._before[rows])
        self.ended[rows] = ended
        self._step[rows] += works
        self.steps += int(works.sum())
        self.busy += float(seconds.sum())
        self._idle_rows[rows] = 0
        last = self._decode(rows, live, works)
        first, single = self._end_prompts(rows, chunks)
        self._plan_next(rows, now, before, chunks)
        return Steps(rows, ended, before, live, first, np.concatenate([last, single]), seconds)

    def _commit(self, rows: np.ndarray, now: np.ndarray) -> None:
        """Free what launched steps have freed, as far as their results are known."""
        known = self.ended[rows] <= now
        freed, pages = self._freed, self._freed_pages
        self.running[rows] -= freed[0, rows] + np.where(known, freed[1, rows] + freed[2, rows], 0)
        self.pages[rows] -= pages[0, rows] + np.where(known, pages[1, rows] + pages[2, rows], 0)
        for values in (freed, pages):
            values[0, rows] = np.where(known, 0, values[1, rows])
            values[1, rows] = np.where(known, 0, values[2, rows])
            values[2, rows] = 0

    def _decode(self, rows: np.ndarray, live: np.ndarray, works: np.ndarray) -> np.ndarray:
        """Every decode row brings its tokens. Returns the requests that end."""
        gained = live * self.tokens_per_step
        self._context[rows] += gained
        self.generated[rows] += gained
        self.pages[rows] += gained / self._limits.page_size
        self.page_shortages += int((self.pages[rows] >= self._limits.num_pages).sum())
        place = self._step[rows] % self._ring
        heads = np.where(works, self._lists[rows, place], -1)
        self._lists[rows[works], place[works]] = -1
        found = []
        while (more := heads >= 0).any():
            heads = heads[more]
            found.append(heads)
            heads = self._table.next[heads]
        last = np.concatenate(found).astype(np.int64) if found else np.zeros(0, dtype=np.int64)
        if len(last):
            self._end_decoding(last)
        return last

    def _end_decoding(self, last: np.ndarray) -> None:
        table, mean = self._table, self.tokens_per_step
        row = table.replica[last]
        steps = table.steps[last]
        size = len(self.decoding)
        count = np.bincount(row, minlength=size)
        self.decoding -= count
        gained = steps * mean
        answers = table.made[last] + 1 + gained
        self._context -= np.bincount(row, table.known[last] + 1 + gained, size)
        self.generated -= np.bincount(row, answers, size)
        pages = table.pages[last] + gained / self._limits.page_size
        # A row that the host does not know to end runs in the next step once more.
        late = self._rng.random(len(last)) < self._late_share()
        for stage, chosen in ((1, ~late), (2, late)):
            self._freed[stage] += np.bincount(row[chosen], minlength=size)
            self._freed_pages[stage] += np.bincount(row[chosen], pages[chosen], size)
        self._idle_rows += np.bincount(row[late], minlength=size)

    def _late_share(self) -> float:
        """How many rows run in one more step after their end: where the steps launched ahead might
        not have ended them. A row ends surely if one token is left: one step in `mean` begins
        there."""
        return 1.0 - 1.0 / self.tokens_per_step if self._kind.depth else 0.0

    def _seconds(self, rows: np.ndarray, decode: np.ndarray, chunks: _Chunks) -> np.ndarray:
        size = len(rows)
        at, count, start = chunks.at, chunks.count.astype(float), chunks.start.astype(float)
        shape = StepShape(
            decode_rows=decode.astype(float),
            decode_tokens=decode.astype(float) * self._width,
            decode_context=np.maximum(self._context[rows], 0.0),  # of sums, but for roundings
            prompts=np.bincount(at, minlength=size).astype(float),
            prompt_tokens=np.bincount(at, count, size),
            prompt_context=np.bincount(at, start, size),
            prompt_attention=np.bincount(at, count * (start + count / 2), size),
            sampled_rows=decode + np.bincount(at, chunks.last.astype(float), size),
        )
        host, device = self._kind.model.times(shape)
        seconds = np.broadcast_to(np.asarray(host + device, dtype=float), (size,))
        if jitter := self._kind.speeds.jitter:
            drawn = np.clip(self._rng.standard_normal(size), -_STOP_LOSS, _STOP_LOSS)
            seconds = seconds * np.exp(jitter * drawn)
        return seconds

    def _end_prompts(self, rows: np.ndarray, chunks: _Chunks) -> tuple[np.ndarray, np.ndarray]:
        """Prompts whose last piece is computed bring a first token. Returns these requests, and
        those of them that have ended with it."""
        table = self._table
        first = chunks.request[chunks.last]
        row = rows[chunks.at[chunks.last]]
        left = table.output[first] - table.made[first] - 1
        single, more = first[left <= 0], left > 0
        size = len(self.decoding)
        if len(single):
            self._freed[1] += np.bincount(row[~more], minlength=size)
            self._freed_pages[1] += np.bincount(row[~more], table.pages[single], size)
        starts, owner = first[more], row[more]
        if len(starts):
            steps = self._draw_steps(left[more])
            table.steps[starts] = steps
            table.entered[starts] = self._step[owner]
            table.decoding[starts] = True
            self.decoding += np.bincount(owner, minlength=size)
            self._context += np.bincount(owner, table.known[starts] + 1.0, size)
            self.generated += np.bincount(owner, table.made[starts] + 1.0, size)
            self._list(starts, owner, (self._step[owner] + steps) % self._ring)
        return first, single

    def _list(self, requests: np.ndarray, rows: np.ndarray, place: np.ndarray) -> None:
        """Put each request into the list of its last step."""
        for request, row, at in zip(requests.tolist(), rows.tolist(), place.tolist(), strict=True):
            self._table.next[request] = self._lists[row, at]
            self._lists[row, at] = request

    def _plan_next(
        self, rows: np.ndarray, now: np.ndarray, before: np.ndarray, chunks: _Chunks
    ) -> None:
        """When each engine plans again: once the step before this one has ended; for an engine
        without a pipeline, and behind a large piece alone, once this one has."""
        ended = self.ended[rows]
        size = len(rows)
        if self._kind.depth:
            tokens = np.bincount(chunks.at, chunks.count, size)
            ends = np.bincount(chunks.at, chunks.last.astype(float), size) > 0
            alone = (tokens >= LARGE_PIECE) & ~ends & (self.decoding[rows] == 0)
            following = np.where(alone, ended, np.maximum(before, now))
        else:
            following = ended
        head, tail = self._head[rows], self._tail[rows]
        empty = tail <= head
        # Nothing was planned though requests wait: for a commit, or for one that is on its way.
        some = np.zeros(size, dtype=bool)
        some[chunks.at] = True
        nothing = ~some & (self.decoding[rows] + self._idle_rows[rows] == 0)
        first = self._queue[rows, head % self._queue.shape[1]]
        arrives = np.where(first >= 0, self._table.arrives[np.maximum(first, 0)], 0.0)
        held = np.where(arrives > now, np.maximum(arrives, now), np.maximum(ended, now + 1e-3))
        following = np.where(nothing, np.where(empty, IDLE, held), following)
        self.plan_at[rows] = following

    # --- prompts ---------------------------------------------------------------------------------

    def _plan_prompts(self, rows: np.ndarray, now: np.ndarray, budgets: PromptBudgets) -> _Chunks:
        found: list[tuple[np.ndarray, ...]] = []
        waits = np.flatnonzero((self._tail[rows] > self._head[rows]) & (budgets.left > 0))
        if len(waits):
            self._scan(rows, now, budgets, waits, found, whole=True)
            waits = waits[budgets.left[waits] > 0]
            self._scan(rows, now, budgets, waits, found, whole=False)
            self._pass_heads(rows)
        if not found:
            none = np.zeros(0, dtype=np.int64)
            return _Chunks(none, none, none, none, np.zeros(0, dtype=bool))
        at, request, start, count, last = (
            np.concatenate(part) for part in zip(*found, strict=True)
        )
        return _Chunks(at, request, start, count, last)

    def _scan(
        self,
        rows: np.ndarray,
        now: np.ndarray,
        budgets: PromptBudgets,
        at: np.ndarray,
        found: list[tuple[np.ndarray, ...]],
        whole: bool,
    ) -> None:
        """One round over the queues, place by place; all engines at once."""
        places = self._queue.shape[1]
        passed = np.zeros(len(rows), dtype=bool)  # a waiting request was left behind
        for depth in range(WINDOW):
            position = self._head[rows[at]] + depth
            inside = position < self._tail[rows[at]]
            if depth < _ADMITTED:
                least = 1
            else:  # only prompts that still wait are so deep in a queue
                inside &= self.running[rows[at]] < self._limits.max_num_seqs
                least = self._shortest
            inside &= budgets.round_1_left(at) >= least if whole else budgets.left[at] > 0
            at, position = at[inside], position[inside]
            if not len(at):
                return
            place = position % places
            request = self._queue[rows[at], place]
            there = (request >= 0) & (self._table.planned[request] != self._turn)
            there &= self._table.arrives[request] <= now[at]
            if there.any():
                here, asked = at[there], request[there]
                done = self._offer(rows, budgets, here, asked, passed, found, whole)
                self._queue[rows[here[done]], place[there][done]] = -1

    def _offer(
        self,
        rows: np.ndarray,
        budgets: PromptBudgets,
        at: np.ndarray,
        request: np.ndarray,
        passed: np.ndarray,
        found: list[tuple[np.ndarray, ...]],
        whole: bool,
    ) -> np.ndarray:
        """Offer tokens to one prompt of each of these engines. Returns which prompts are done."""
        table = self._table
        missing, split = table.left[request], table.split[request]
        chunk = budgets.whole(at, missing) * ~split if whole else budgets.chunk(at, missing, split)
        waits = ~table.admitted[request]
        takes = (chunk > 0) & (~waits | self._has_room(rows[at], request, passed[at]))
        passed[at] |= waits & ~takes
        done = np.zeros(len(at), dtype=bool)
        if not takes.any():
            return done
        at, request, chunk = at[takes], request[takes], chunk[takes]
        missing, split, waits = missing[takes], split[takes], waits[takes]
        self._admit(rows[at[waits]], request[waits])
        stop = table.stop[request]
        computed = np.where(stop > 0, np.minimum(chunk, stop), chunk)
        start = table.known[request] - missing
        table.planned[request] = self._turn
        table.left[request] = missing - computed
        done[takes] = computed == missing
        table.stop[request] = np.maximum(stop - computed, 0)
        if whole:
            budgets.spend_whole(at, computed)
        else:
            table.split[request] |= chunk < missing
            budgets.spend_chunk(at, missing, chunk, computed, split)
        self.queued_tokens[rows[at]] -= computed
        found.append((at, request, start, computed, computed == missing))
        return done

    def _has_room(self, rows: np.ndarray, request: np.ndarray, passed: np.ndarray) -> np.ndarray:
        """Whether there are a slot and pages; the last slot is for the first that waits."""
        limits = self._limits
        slots = limits.max_num_seqs - self.running[rows] >= np.where(passed, 2, 1)
        needed = -(-(self._table.known[request] + self._width) // limits.page_size)
        room: np.ndarray = slots & (
            self.pages[rows] + needed + self.running[rows] <= limits.num_pages - 1
        )
        return room

    def _admit(self, rows: np.ndarray, request: np.ndarray) -> None:
        table = self._table
        table.admitted[request] = True
        pages = -(-(table.known[request] + self._width) // self._limits.page_size)
        table.pages[request] = pages
        self.running[rows] += 1
        self.pages[rows] += pages

    def _pass_heads(self, rows: np.ndarray) -> None:
        """Queues begin with prompts that are not computed yet."""
        places = self._queue.shape[1]
        at = rows
        while len(at := at[self._tail[at] > self._head[at]]):
            at = at[self._queue[at, self._head[at] % places] < 0]
            self._head[at] += 1
