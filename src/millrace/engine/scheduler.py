"""The scheduler: from its state and a token budget to the plan of the next step.

Pure bookkeeping. It knows requests, slots, pages and snapshots as numbers, and learns what the
device did only through `commit`. Up to `depth` steps may be planned ahead of the last known result;
until a result is known, the host works with upper bounds of every length.

A step is: decode rows (each verifies its drafts), then chunks of prompts, then new requests while
slots, pages and budget last. Requests are ranked by priority, then age. Out of pages it gives up
snapshots first, and then the request of the last rank, which waits again and is computed again.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from millrace.engine.cache import NO_SNAPSHOT, NULL_PAGE, Pool, PrefixTree
from millrace.engine.intake import Limits, check, make_request
from millrace.engine.messages import admission, delta
from millrace.engine.request import Phase, Request
from millrace.errors import RequestError
from millrace.protocol import (
    AddRequest,
    Admission,
    Chunk,
    Delta,
    EngineStats,
    PageGrant,
    Save,
    StepPlan,
    StepResult,
)


@dataclass(slots=True)
class _Step:
    """A plan in the making, with the requests behind its rows. now: seconds, when it is made."""

    budget: int
    now: float
    context: int = 0
    admissions: list[Admission] = field(default_factory=list)
    grants: list[PageGrant] = field(default_factory=list)
    decode: list[Request] = field(default_factory=list)
    chunks: list[tuple[Request, Chunk]] = field(default_factory=list)
    saves: list[tuple[Request, int, int]] = field(default_factory=list)  # request, depth, snapshot

    def requests(self) -> list[Request]:
        return self.decode + [request for request, _ in self.chunks]

    def sampled(self) -> list[Request]:
        """Whose rows bring new tokens, in the order of StepPlan.sampled_slots."""
        return self.decode + [request for request, chunk in self.chunks if chunk.last]


@dataclass(slots=True)
class _Totals:
    """Running totals behind EngineStats."""

    steps: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    drafts: int = 0
    accepted: list[int] = field(default_factory=list)


class Scheduler:
    """Plans steps and takes their results. One per replica; ranks only carry plans out."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._pages = Pool(limits.num_pages - 1, first=NULL_PAGE + 1)
        self._snapshots = Pool(limits.num_snapshots)
        self._tree = PrefixTree(limits.page_size, self._pages, self._snapshots)
        self._slots = Pool(limits.max_num_seqs, first=1)
        self._waiting: list[Request] = []  # these two are sorted by rank
        self._running: list[Request] = []
        self._requests: dict[str, Request] = {}
        self._launched: deque[tuple[StepPlan, _Step]] = deque()
        self._draining = False
        self._totals = _Totals(accepted=[0] * limits.drafts)
        self._width = limits.drafts + 1
        self._ordinal = 0

    # --- requests come and go ---------------------------------------------------------------

    def add(self, source: AddRequest) -> list[Delta]:
        """Queue a request. Raises RequestError for one that can never run.

        Returns its end, if the tokens that it resumes with are all it may have; else nothing.
        """
        self.check(source)
        self._ordinal += 1
        request = make_request(source, self.limits, self._ordinal)
        if reason := request.finish_reason():
            stop_token = request.tokens[-1] if reason == "stop" else None
            return [Delta(request.id, [], reason, stop_token)]
        self._requests[request.id] = request
        insort(self._waiting, request, key=_rank)
        return []

    def check(self, source: AddRequest) -> None:
        """Raise RequestError for a request that can never run."""
        if source.id in self._requests:
            raise RequestError(f"request id {source.id!r} is in use", param="request_id")
        check(source, self.limits)

    def abort(self, ids: Iterable[str]) -> None:
        """End requests; what they hold is free once no launched step names them."""
        for request_id in ids:
            request = self._requests.get(request_id)
            if request is None or request.phase is Phase.DONE:
                continue
            if request.phase is Phase.WAITING:
                self._waiting.remove(request)
                del self._requests[request_id]
                request.phase = Phase.DONE
            else:
                self._retire(request)

    def has_work(self) -> bool:
        return bool(self._waiting or self._running or self._launched)

    @property
    def in_flight(self) -> int:
        """Steps launched whose results are not known yet."""
        return len(self._launched)

    # --- planning ---------------------------------------------------------------------------

    def plan(self, now: float = 0.0) -> StepPlan | None:
        """The next step, or None: nothing to do before the next result.

        now: seconds on the clock of `AddRequest.arrival`; new requests stop waiting then.
        """
        if self._draining and self._launched:
            return None
        self._draining = False
        step = _Step(budget=self.limits.max_num_batched_tokens, now=now)
        self._plan_decode(step)
        if step.decode and self.limits.mixed_prefill_tokens:
            step.budget = min(step.budget, self.limits.mixed_prefill_tokens)
        self._plan_chunks(step)
        if not self._draining:
            self._plan_admissions(step)
        if not step.decode and not step.chunks:
            return None
        return self._seal(step)

    def _plan_decode(self, step: _Step) -> None:
        for request in list(self._running):
            if self._draining:
                break
            if request.phase is not Phase.DECODE or self._surely_done(request):
                continue
            # A row writes draft rows up to 2k past its own length (the head drafts ahead of the
            # longest acceptance); none beyond the request's end is ever read.
            reach = min(request.upper + 2 * self.limits.drafts + 1, request.max_total)
            if not self._grow(request, reach, step):
                continue
            request.upper += self._width
            step.context = max(step.context, request.upper)
            step.decode.append(request)
        # In slot order neighbouring rows lie side by side in the device's memory.
        step.decode.sort(key=lambda request: request.slot)
        step.budget -= len(step.decode) * self._width

    def _surely_done(self, request: Request) -> bool:
        """Each launched step brings at least one token, so no further step can be needed."""
        return len(request.tokens) + request.in_flight >= request.max_total

    def _grow(self, request: Request, length: int, step: _Step) -> bool:
        """Make sure that the request's pages hold `length` tokens; False: it cannot run now."""
        missing = -(-length // self.limits.page_size) - len(request.pages)
        if missing <= 0:
            return True
        while not self._free_pages(missing):
            if self._launched:
                self._draining = True
                return False
            # The last rank; rows are planned first rank first, so this step does not name it yet.
            victim = self._running[-1]
            self._preempt(victim)
            if victim is request:
                return False
        self._grant(request, missing, step)
        return True

    def _free_pages(self, count: int) -> bool:
        """Make `count` pages free, at the cost of snapshots if need be."""
        while self._pages.free < count:
            if not self._tree.evict():
                return False
        return True

    def _grant(self, request: Request, count: int, step: _Step) -> None:
        pages = self._pages.take(count)
        step.grants.append(PageGrant(request.slot, len(request.pages), pages))
        request.pages.extend(pages)

    def _preempt(self, request: Request) -> None:
        """Wait again; no launched step names it, so all its tokens are known."""
        self._totals.preemptions += 1
        self._running.remove(request)
        self._free(request)
        request.phase = Phase.WAITING
        insort(self._waiting, request, key=_rank)

    def _plan_chunks(self, step: _Step) -> None:
        for request in self._running:
            if step.budget <= 0:
                return
            if request.phase is Phase.PREFILL:
                self._chunk(request, step)

    def _chunk(self, request: Request, step: _Step) -> None:
        """The next chunk of a prompt: up to the budget, its end, or the next snapshot boundary."""
        start, total = request.computed, len(request.tokens)
        while request.boundaries and request.boundaries[-1] <= start:
            request.boundaries.pop()
        target = request.boundaries[-1] if request.boundaries else total
        end = min(start + step.budget, target)
        last = end == total
        step.chunks.append((request, Chunk(request.slot, start, end - start, last)))
        step.budget -= end - start
        step.context = max(step.context, end + self._width)
        request.computed = request.upper = end
        if last:
            request.phase = Phase.DECODE
        elif end == target:
            self._plan_save(request, end, step)

    def _plan_save(self, request: Request, depth: int, step: _Step) -> None:
        if self._tree.has_snapshot(request.tokens, depth):
            return
        if self._snapshots.free == 0 and not self._tree.evict():
            return  # every snapshot is about to be written by a launched step
        step.saves.append((request, depth, self._snapshots.take(1)[0]))

    def _plan_admissions(self, step: _Step) -> None:
        while self._slots.free and step.budget > 0:
            request = next((r for r in self._waiting if not self._held_back(r)), None)
            if request is None or not self._admit(request, step):
                return
            self._waiting.remove(request)
            self._chunk(request, step)

    def _held_back(self, request: Request) -> bool:
        """Whether the request does better to wait until another one's prompt is cached."""
        leader = self._requests.get(request.source.after or "")
        return (
            leader is not None
            and leader.ordinal < request.ordinal  # so that no two wait for each other
            and not leader.prompt_cached
            and self.limits.num_snapshots > 0
            and self._caches(request)
            and self._tree.aligned(request.prompt_len - 1) > 0
        )

    def _caches(self, request: Request) -> bool:
        """Whether its prompt may come from the cache: not if every position's logits are wanted."""
        return self.limits.prefix_caching and request.source.params.prompt_logprobs is None

    def _admit(self, request: Request, step: _Step) -> bool:
        """Give a waiting request its slot, prefix and pages; False if its pages are not there."""
        limits, length = self.limits, len(request.tokens)
        match = self._tree.match(request.tokens) if self._caches(request) else None
        shared = match.pages if match else []
        for page in shared:
            self._pages.hold(page)
        reach = min(length + self._width, request.max_total)
        missing = -(-reach // limits.page_size) - len(shared)
        # A page in hand for each running request keeps admissions from causing preemptions.
        if not self._free_pages(missing + len(self._running)):
            for page in shared:
                self._pages.drop(page)
            return False
        request.slot = self._slots.take(1)[0]
        request.pages = list(shared)
        request.computed = match.tokens if match else 0
        request.boundaries = self._boundaries(request, match.shared if match else 0)
        if shared:
            step.grants.append(PageGrant(request.slot, 0, shared))
        self._grant(request, missing, step)
        step.admissions.append(admission(request, match.snapshot if match else NO_SNAPSHOT))
        request.phase = Phase.PREFILL
        insort(self._running, request, key=_rank)
        self._count_prompt(request, step.now)
        return True

    def _boundaries(self, request: Request, shared: int) -> list[int]:
        """Where this prompt's prefill stops for snapshots, nearest last."""
        limits = self.limits
        if not limits.prefix_caching or limits.num_snapshots == 0:
            return []
        end = self._tree.aligned(len(request.tokens) - 1)
        wanted = {end, shared, *(self._tree.aligned(b) for b in request.source.boundaries)}
        if limits.snapshot_interval:
            wanted.update(range(limits.snapshot_interval, end, limits.snapshot_interval))
        return sorted((b for b in wanted if request.computed < b <= end), reverse=True)

    def _count_prompt(self, request: Request, now: float) -> None:
        if request.counted:
            return
        request.counted = True
        request.queued = now - request.source.arrival
        request.cached_tokens = request.computed
        self._totals.prompt_tokens += request.prompt_len
        if self.limits.prefix_caching:
            self._tree.remember(request.tokens)
            self._totals.prefix_queries += request.prompt_len
            self._totals.prefix_hits += request.computed

    def _seal(self, step: _Step) -> StepPlan:
        self._totals.steps += 1
        for request in step.requests():
            request.in_flight += 1
        plan = StepPlan(
            step=self._totals.steps,
            admissions=step.admissions,
            grants=step.grants,
            decode=[request.slot for request in step.decode],
            chunks=[chunk for _, chunk in step.chunks],
            saves=[Save(request.slot, snapshot) for request, _, snapshot in step.saves],
            context=step.context,
        )
        self._launched.append((plan, step))
        return plan

    # --- results ----------------------------------------------------------------------------

    def commit(self, result: StepResult) -> list[Delta]:
        """Take the oldest launched step's result: new tokens, ends, snapshots, freed resources."""
        plan, step = self._launched.popleft()
        if plan.step != result.step:
            raise RuntimeError(f"result of step {result.step} came where {plan.step} was due")
        for request in step.requests():
            request.in_flight -= 1
        for request, depth, snapshot in step.saves:
            pages = request.pages[: depth // self.limits.page_size]
            self._tree.publish(request.tokens[:depth], pages, snapshot)
        for request, chunk in step.chunks:
            request.prompt_cached |= chunk.last
        self._take_prompt_logprobs(step, result)
        deltas = self._take_tokens(step, result)
        for request in step.requests():
            if request.phase is Phase.DONE and request.in_flight == 0:
                self._release(request)
        return deltas

    def _take_prompt_logprobs(self, step: _Step, result: StepResult) -> None:
        by_slot = {request.slot: request for request, _ in step.chunks}
        for part in result.prompt_logprobs:
            request = by_slot[part.slot]
            have = len(request.prompt_logprobs)
            # A request that was preempted computes its prompt again; what is there stays.
            request.prompt_logprobs += part.rows[have - (part.start - 1) :]

    def _take_tokens(self, step: _Step, result: StepResult) -> list[Delta]:
        deltas = []
        for row, (request, tokens) in enumerate(zip(step.sampled(), result.tokens, strict=True)):
            if request.phase is Phase.DONE or not tokens:
                continue
            first = not request.answered
            request.answered = True
            request.tokens.extend(tokens)
            request.upper = len(request.tokens) - 1 + request.in_flight * self._width
            self._totals.generated_tokens += len(tokens)
            reason = request.finish_reason()
            if reason is not None:
                self._retire(request)
            elif row < len(step.decode) and self.limits.drafts:
                self._count_accepted(len(tokens) - 1)
            deltas.append(delta(request, tokens, reason, result.logprobs.get(row), first))
        return deltas

    def _count_accepted(self, accepted: int) -> None:
        """Acceptance by position, over rows that the request's end did not cut short."""
        self._totals.drafts += 1
        for position in range(accepted):
            self._totals.accepted[position] += 1

    def _retire(self, request: Request) -> None:
        """The request has ended; its resources go once no launched step names it."""
        request.phase = Phase.DONE
        self._running.remove(request)
        if request.in_flight == 0:
            self._release(request)

    def _release(self, request: Request) -> None:
        if self._requests.pop(request.id, None) is not None:
            self._free(request)

    def _free(self, request: Request) -> None:
        for page in request.pages:
            self._pages.drop(page)
        request.pages = []
        self._slots.drop(request.slot)
        request.slot = 0

    # --- what others may ask ----------------------------------------------------------------

    def masked_rows(self) -> list[tuple[int, str]]:
        """Of the step planned last, the sampled rows whose requests follow a grammar, with ids."""
        _, step = self._launched[-1]
        sampled = step.sampled()
        return [(row, r.id) for row, r in enumerate(sampled) if r.source.grammar is not None]

    def stats(self) -> EngineStats:
        totals, limits = self._totals, self.limits
        return EngineStats(
            steps=totals.steps,
            running=len(self._running),
            waiting=len(self._waiting),
            free_pages=self._pages.free,
            total_pages=self._pages.size,
            snapshots_used=limits.num_snapshots - self._snapshots.free,
            snapshots_total=limits.num_snapshots,
            preemptions=totals.preemptions,
            prompt_tokens=totals.prompt_tokens,
            generated_tokens=totals.generated_tokens,
            prefix_queries=totals.prefix_queries,
            prefix_hits=totals.prefix_hits,
            drafts=totals.drafts,
            accepted_per_position=list(totals.accepted),
        )

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix; running requests keep what they hold."""
        self._tree.clear()

    def check_integrity(self) -> None:
        """Raise AssertionError unless every page, slot and snapshot is accounted for."""
        self._tree.check()
        assert self._waiting == sorted(self._waiting, key=_rank), "waiting requests by rank"
        assert self._running == sorted(self._running, key=_rank), "running requests by rank"
        held = Counter(self._tree.held_pages())
        owners = [r for r in self._requests.values() if r.phase is not Phase.WAITING]
        for request in owners:
            held.update(request.pages)
        for page in range(NULL_PAGE + 1, self.limits.num_pages):
            assert self._pages.holders(page) == held[page], f"holders of page {page}"
        slots = [request.slot for request in owners]
        assert len(set(slots)) == len(slots) == self._slots.size - self._slots.free, "slots"
        for _, step in self._launched:
            assert all(request.slot for request in step.requests()), "launched rows keep their slot"
        saving = sum(len(step.saves) for _, step in self._launched)
        kept = self._tree.num_snapshots
        assert kept + saving == self._snapshots.size - self._snapshots.free, "snapshots"
        for request in owners:
            assert len(request.pages) * self.limits.page_size >= min(
                request.computed, request.max_total
            ), "pages cover what was computed"


def _rank(request: Request) -> tuple[int, int]:
    """Requests of a lower rank come first."""
    return request.source.priority, request.ordinal
