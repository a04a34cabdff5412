"""The scheduler: it plans steps from its own state and a token budget, and commits their results.

It is pure bookkeeping: which requests run, and what each step does for them. Device memory is
accounted in kv_manager.py. What the device did is known only through `commit`. Up to `depth` steps
may be planned ahead of the last known result; until then the host uses upper bounds of all lengths.

A step has decode rows (each verifies its drafts), then chunks of prompts, as long as there are
tokens, slots and pages. prompt_budget.py shares the tokens between prompts. background.py says when
batch work runs. waiting_queue.py says which waiting request may overtake another. Requests are
ranked by priority, then by age, batch work behind all others. Without free pages the scheduler
gives up cached prefixes first, and then preempts the request of the last rank, which waits again
and is computed again.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from heapq import merge, nsmallest
from itertools import groupby

from millrace.engine.background import Turn, Turns, rows_beside
from millrace.engine.draft_depth import DraftDepth
from millrace.engine.kv_manager import KVManager
from millrace.engine.plan_builders import make_admission, make_delta
from millrace.engine.prompt_budget import FOLLOWING_STEPS, PromptBudget, step_tokens
from millrace.engine.request import Phase, Request
from millrace.engine.step import Step, StepCounts
from millrace.engine.validation import check, make_request
from millrace.engine.waiting_queue import WaitingQueue, rank
from millrace.errors import RequestError
from millrace.protocol import (
    STEP_TOKENS,
    AddRequest,
    Chunk,
    Delta,
    DraftStats,
    EngineStats,
    FoundFile,
    Limits,
    StepPlan,
    StepResult,
    TransferEnd,
)


@dataclass(slots=True)
class _Totals:
    """Running totals behind EngineStats."""

    steps: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    prefilled_tokens: int = 0
    generated_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    host_hits: int = 0
    disk_hits: int = 0
    remote_hits: int = 0
    remote_queries: int = 0
    rows_not_finite: int = 0
    drafts: DraftStats = field(default_factory=DraftStats)
    by_method: dict[str, DraftStats] = field(default_factory=dict)
    by_depth: dict[int, int] = field(default_factory=dict)
    step_tokens: list[int] = field(default_factory=lambda: [0] * (len(STEP_TOKENS) + 1))
    step_tokens_sum: int = 0


NOT_FINITE_ERROR = "the model computed logits that are NaN or infinite; the request cannot go on"
LOOKUPS = 4  # waiting prompts that a step looks up in the prefix cache


class Scheduler:
    """Plans steps and commits their results. One for each replica; ranks only run the plans."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._kv_manager = KVManager(limits)
        self._tiers = self._kv_manager.tiers
        self.waiting = WaitingQueue()
        self.running: list[Request] = []  # sorted by rank
        self._requests: dict[str, Request] = {}
        self._followed: set[str] = set()  # requests whose prompts others wait for
        self._launched: deque[tuple[StepPlan, Step]] = deque()
        self._committed = Step(now=0.0)
        self._draining = False
        self._turns, self._turn = Turns(), Turn.ALL
        self._following_steps = 0  # that are to come after one with a short prompt
        self._totals = _Totals(
            drafts=DraftStats(accepted=[0] * limits.drafts),
            by_method={name: DraftStats(accepted=[0] * limits.drafts) for name in limits.methods},
        )
        self._width = limits.drafts + 1
        self.draft_depth = DraftDepth(limits)
        self._made = 0  # drafts that the newest step makes
        self._ordinal = 0

    # --- add and abort requests --------------------------------------------------------------

    def add(self, source: AddRequest) -> list[Delta]:
        """Queue a request. Raises RequestError if it can never run.

        Returns its end if the tokens that it resumes with end it already; else an empty list.
        """
        self.check(source)
        self._ordinal += 1
        request = make_request(source, self.limits, self._ordinal)
        if reason := request.finish_reason():
            stop_token = request.tokens[-1] if reason == "stop" else None
            return [Delta(request.id, [], reason, stop_token)]
        self._requests[request.id] = request
        if source.wait_for is not None and source.wait_for in self._requests:
            self._followed.add(source.wait_for)
        self.waiting.add(request)
        if request.expected and self._tiers is not None:
            self._totals.remote_queries += request.expected
            self._tiers.hand_overs.expect(request)
        return []

    def check(self, source: AddRequest) -> None:
        """Raise RequestError if the request can never run."""
        if source.id in self._requests:
            raise RequestError(f"request id {source.id!r} is in use", param="request_id")
        check(source, self.limits)

    def abort(self, ids: Iterable[str]) -> None:
        """End requests. Their resources are freed once no launched step names them."""
        for request_id in ids:
            request = self._requests.get(request_id)
            if request is None or request.phase is Phase.DONE:
                continue
            if request.phase is Phase.WAITING:
                self.waiting.remove(request)
                self._forget(request)
            else:
                self._retire(request)

    def _forget(self, request: Request) -> None:
        """A waiting request has gone from the queue, and does not run."""
        request.phase = Phase.DONE
        self._kv_manager.end_hand_over(request)
        if self._tiers is not None:
            self._tiers.release(request)
            self._tiers.hand_overs.released(request)
        self._followed.discard(request.id)
        del self._requests[request.id]

    def has_work(self) -> bool:
        work = self.waiting or self.running or self._launched or self._kv_manager.has_ends
        return bool(work) or (self._tiers is not None and self._tiers.has_work)

    @property
    def in_flight(self) -> int:
        """Launched steps whose results are not known yet."""
        return len(self._launched)

    @property
    def uses_tiers(self) -> bool:
        """Whether transfers between tiers are to be reported by `transferred`."""
        return self._tiers is not None

    def transferred(self, ended: Iterable[TransferEnd]) -> list[Delta]:
        """Transfers have ended. Returns the ends of requests whose records did not come."""
        assert self._tiers is not None
        for end in ended:
            for request in self._tiers.ended(end, self._kv_manager.ensure_pages_for_load):
                request.estimate_version = -1
        failures, self._tiers.hand_overs.failures = self._tiers.hand_overs.failures, []
        return [
            delta for request, why in failures for delta in self._end_untransferred(request, why)
        ]

    def _end_untransferred(self, request: Request, why: str) -> list[Delta]:
        if request.phase is not Phase.WAITING:
            return []
        self.waiting.remove(request)
        self._forget(request)
        error = f"the record of the prompt did not come: {why}"
        return [Delta(request.id, [], "error", error=error, transfer_failed=True)]

    def restore(self, found: Mapping[str, FoundFile]) -> None:
        """Records of an earlier process, by key."""
        if self._tiers is not None:
            self._tiers.store.restore(found)

    # --- planning ---------------------------------------------------------------------------

    def plan(self, now: float = 0.0) -> StepPlan | None:
        """The next step's plan. None: there is nothing to do before the next result.

        now: seconds on the clock of `AddRequest.arrival`.
        """
        if self._draining and self._launched:
            return None
        self._draining = False
        self._kv_manager.policy.now = now
        decoding = [request for request in self.running if request.phase is Phase.DECODE]
        drafts = self.draft_depth.choose(decoding)
        step = Step(now=now, drafts=drafts, made=self._made, ends=self._kv_manager.take_ends())
        self._turn = self._choose_turn()
        if self._turn is not Turn.ALL:
            self._make_room()
        self._plan_decode(step)
        self._plan_prompts(step)
        if self._turn is not Turn.ALL and not (step.decode or step.chunks):
            self._turn = Turn.ALL  # those whose turn it is wait for something
            self._plan_decode(step)
            self._plan_prompts(step)
        if self._tiers is not None:
            step.transfers, step.deletes = self._tiers.take(), self._tiers.take_deletes()
        if not (step.decode or step.chunks or step.ends or step.transfers or step.deletes):
            return None
        return self._record_launch(step)

    def _choose_turn(self) -> Turn:
        """Whose step it is: of all, or without the background, or of the background alone."""
        ends = [*self.running[:1], *self.running[-1:], *self.waiting.ends]
        sorts = {request.source.background for request in ends}
        return self._turns.choose(False in sorts, True in sorts)

    def _make_room(self) -> None:
        """Preempt a request of the background if another one waits for its slot or pages. To be
        called before anything is planned: no step may name it."""
        first, victim = self.waiting.ends[:1], self.running[-1:]
        if not first or first[0].source.background or not victim:
            return
        blocked = self.waiting.blocked
        lacks_pages = blocked is not None and not blocked.source.background
        idle = victim[0].source.background and victim[0].in_flight == 0
        if idle and (lacks_pages or not self._kv_manager.slots.free):
            self._preempt(victim[0])

    def _plan_decode(self, step: Step) -> None:
        page_size = self.limits.page_size
        others = 0  # rows of the background, beside those that go first
        for request in list(self.running):
            if self._draining:
                break
            if request.phase is not Phase.DECODE or self._certainly_done(request):
                continue
            if request.source.background and self._turn is Turn.FOREGROUND:
                if others >= rows_beside(len(step.decode) - others):
                    break  # by rank, so only the background is left
                others += 1
            elif not request.source.background and self._turn is Turn.BACKGROUND:
                continue
            # A row writes draft rows up to 2k past its own length (the head drafts ahead of the
            # longest acceptance); none beyond the request's end is ever read.
            reach = min(request.upper + 2 * self.limits.drafts + 1, request.max_total)
            if reach > len(request.pages) * page_size and not self._grow(request, reach, step):
                continue
            request.upper += step.drafts + 1
            step.context = max(step.context, request.upper)
            step.known += len(request.tokens)
            step.decode.append(request)
        # In slot order, neighbouring rows are neighbours in device memory too.
        step.decode.sort(key=lambda request: request.slot)

    def _certainly_done(self, request: Request) -> bool:
        """Whether the launched steps surely end it: each brings at least one token."""
        return len(request.tokens) + request.in_flight >= request.max_total

    def _grow(self, request: Request, length: int, step: Step) -> bool:
        """Allocate the pages missing for `length` tokens. False: the request cannot run now."""
        missing = self._kv_manager.missing_pages(request, length)
        while not self._kv_manager.ensure_free_pages(missing):
            if self._launched:
                self._draining = True
                return False
            # The request of the last rank. Rows are planned by rank, so this step does not name it.
            victim = self.running[-1]
            self._preempt(victim)
            if victim is request:
                return False
        step.grants.append(self._kv_manager.grant(request, missing))
        return True

    def _preempt(self, request: Request) -> None:
        """Put a request back into the queue. No launched step names it, so its tokens are known."""
        self._totals.preemptions += 1
        request.preemptions += 1
        self.running.remove(request)
        self._kv_manager.release(request)
        request.phase, request.split = Phase.WAITING, False
        self.waiting.add(request)

    def _plan_prompts(self, step: Step) -> None:
        """Plan chunks of running and waiting prompts within the step's token budget."""
        running = [
            request
            for request in self.running
            if request.phase is Phase.PREFILL and not self._turn.bars(request.source.background)
        ]
        waiting = self._candidates()
        ready = running + waiting[: self._kv_manager.slots.free]
        decode_tokens = len(step.decode) * (step.drafts + 1)
        tokens = step_tokens(self.limits, decode_tokens, sum(r.missing for r in ready))
        budget = PromptBudget(self.limits, tokens, decode_tokens, self._following_steps > 0)
        prompts = merge(running, waiting, key=rank)
        for _, group in groupby(prompts, key=lambda request: rank(request)[:2]):
            budget.start_priority()
            others = [r for r in group if not self._plan_whole(r, step, budget)]
            for request in others:
                self._plan_chunk(request, step, budget)
        following = max(0, self._following_steps - 1)
        self._following_steps = FOLLOWING_STEPS if budget.whole_prompts else following

    def _candidates(self) -> list[Request]:
        """Waiting requests that this step may admit, by rank."""
        if self._draining or not self._kv_manager.slots.free:
            self.waiting.deferred = 0  # they wait for room first
            return []
        waiting = self.waiting.candidates(self._waits_for_prefix)
        version = self._kv_manager.policy.version
        stale = [request for request in waiting if request.estimate_version != version]
        for request in nsmallest(LOOKUPS, stale, key=lambda request: request.estimate_version):
            self._kv_manager.estimate_cached_tokens(request)
        if any(request.loading for request in waiting):  # since the lookup
            return self.waiting.candidates(self._waits_for_prefix)
        return waiting

    def _plan_whole(self, request: Request, step: Step, budget: PromptBudget) -> bool:
        """Round 1: all of a prompt that was never split, if it fits. False: not planned."""
        if request.split or not budget.whole(request.missing):
            return False
        if request.phase is Phase.WAITING and not self._admit(request, step, budget.whole):
            return False
        budget.spend_whole(self._add_chunk(request, request.missing, step))
        return True

    def _plan_chunk(self, request: Request, step: Step, budget: PromptBudget) -> None:
        """Round 2: as many tokens of a prompt as the budget allows."""
        if not budget.chunk(request.missing, request.split):
            return
        if request.phase is Phase.WAITING and not self._admit(request, step, budget.chunk):
            return
        missing, split = request.missing, request.split
        chunk = budget.chunk(missing, split)
        request.split |= chunk < missing
        budget.spend_chunk(missing, chunk, self._add_chunk(request, chunk, step), split)

    def _add_chunk(self, request: Request, most: int, step: Step) -> int:
        """Plan a prompt's next `most` tokens, or fewer up to a snapshot boundary. Returns how
        many."""
        start, total = request.computed, len(request.tokens)
        while request.boundaries and request.boundaries[-1] <= start:
            request.boundaries.pop()
        target = request.boundaries[-1] if request.boundaries else total
        end = min(start + most, target)
        if end == target < total and self._waits_for_snapshot(request, step):
            end -= 1  # its record has its snapshot from a later step
            if end == start:
                return 0
        last = end == total
        step.chunks.append((request, Chunk(request.slot, start, end - start, last)))
        step.context = max(step.context, end + self._width)
        request.computed = request.upper = end
        if last:
            request.phase = Phase.DECODE
        elif end == target:
            snapshot = self._kv_manager.take_snapshot(request, end)
            if snapshot is not None:
                step.saves.append((request, end, snapshot))
        return end - start

    def _waits_for_snapshot(self, request: Request, step: Step) -> bool:
        """Whether the record of a prompt has to wait for a snapshot, and one will be free soon."""
        if not self._kv_manager.lacks_snapshot(request) or request in step.admitted:
            return False
        moving = self._tiers is not None and self._tiers.waits_for_any
        return bool(self._launched or step.saves) or moving

    def _waits_for_room(self, request: Request) -> bool:
        """Whether a lower tier has more of a prompt than the device, and that comes, or waits for
        pages that others will leave. To compute it anew would take as many."""
        if self._tiers is None or request.expected:
            return False
        lacks_room = self._kv_manager.estimate_cached_tokens(request)
        if lacks_room and (self.running or self._launched):
            self.waiting.lacks_pages(request)
            return True
        return request.loading

    def _waits_for_prefix(self, request: Request) -> bool:
        """Whether the request waits until another one's prompt is cached, or a lower tier's part
        of its own is on the device, or until it is its turn."""
        if self._turn.bars(request.source.background):
            return True
        leader = self._requests.get(request.source.wait_for or "")
        return request.loading or (
            leader is not None
            and leader.ordinal < request.ordinal  # so that no two wait for each other
            and not leader.prompt_cached
            and self._kv_manager.can_gain_from_cache(request)
        )

    def _admit(self, request: Request, step: Step, offer: Callable[[int], int]) -> bool:
        """Give a waiting request its slot, cached prefix and pages. False: it still waits.

        offer: from the tokens left to compute to the tokens that the step has for them. It is
        called after the lookup: the prefix cache may have changed since the estimate.
        """
        if not self.waiting.may_admit(request, self._kv_manager.slots.free):
            return False
        if self._waits_for_snapshot(request, step) or self._waits_for_room(request):
            return False
        match = self._kv_manager.match(request)
        request.cached_estimate = match.tokens
        if match.tokens < request.expected:  # its record is in a lower tier again
            request.estimate_version = -1
            return False
        if not offer(request.missing):
            return False
        reach = min(len(request.tokens) + self._width, request.max_total)
        # One spare page for each running request keeps admissions from causing preemptions.
        granted = self._kv_manager.admit(request, match, reach, spare=len(self.running))
        if granted is None:
            self.waiting.lacks_pages(request)
            return False
        step.grants += granted.grants
        step.copies += granted.copies
        step.admitted.append(request)
        request.computed = match.tokens
        resumed = None if request.id in self._followed else match.kind
        request.boundaries = self._kv_manager.boundaries(request, match.shared, resumed)
        step.admissions.append(make_admission(request, match.snapshot, self.limits.methods))
        self.waiting.admitted(request)
        request.phase, request.expected = Phase.PREFILL, 0
        if self._tiers is not None:
            self._tiers.hand_overs.released(request)
        insort(self.running, request, key=rank)
        self._count_prompt(request, step.now)
        return True

    def _count_prompt(self, request: Request, now: float) -> None:
        if request.prompt_counted:
            return
        request.prompt_counted = True
        request.queue_seconds = now - request.source.arrival
        request.cached_tokens = min(request.computed, request.prompt_len)
        self._totals.prompt_tokens += request.prompt_len
        self._totals.prefilled_tokens += request.cached_tokens
        if self.limits.prefix_caching:
            request.report = self._kv_manager.report(request)
            self._kv_manager.record_prompt(request)
            self._totals.prefix_queries += request.prompt_len
            self._totals.prefix_hits += request.cached_tokens
            self._totals.host_hits += self._loaded(request, "host")
            self._totals.disk_hits += self._loaded(request, "disk")
            self._totals.remote_hits += self._loaded(request, "remote")

    def _loaded(self, request: Request, tier: str) -> int:
        """Cached tokens that a lower tier brought for this prompt."""
        first, last = request.loaded.get(tier, (0, 0))
        return max(0, min(last, request.cached_tokens) - first)

    def _record_launch(self, step: Step) -> StepPlan:
        self._totals.steps += 1
        for request in step.requests():
            request.in_flight += 1
        plan = step.plan(self._totals.steps)
        self._made = step.drafts
        if step.decode and self.limits.drafts:
            counts = self._totals.by_depth
            counts[step.drafts] = counts.get(step.drafts, 0) + 1
        self._launched.append((plan, step))
        return plan

    # --- results ----------------------------------------------------------------------------

    def commit(self, result: StepResult, seconds: float = 0.0) -> list[Delta]:
        """Take the result of the oldest launched step. Returns what it brought, request by
        request. seconds: that it took; 0: nobody knows."""
        plan, step = self._launched.popleft()
        self._committed = step
        if plan.step != result.step:
            raise RuntimeError(f"got the result of step {result.step}, expected step {plan.step}")
        if seconds and step.decode and not step.chunks:
            self.draft_depth.took(len(step.decode), step.drafts, seconds)
        for request in step.requests():
            request.in_flight -= 1
        for request in step.admitted:
            self._kv_manager.admitted(request)
        for request, depth, snapshot in step.saves:
            self._kv_manager.publish(request, depth, snapshot)
        for request, chunk in step.chunks:
            if chunk.last:
                request.prompt_cached = True
                self._kv_manager.store(request, chunk.start + chunk.count)
                self._kv_manager.hand_over(request)
            elif request.phase is not Phase.DONE:
                self._kv_manager.grow_hand_over(request, chunk.start + chunk.count)
        self._take_prompt_logprobs(step, result)
        before = self._totals.generated_tokens
        deltas = self._take_tokens(step, result)
        self._count_tokens(step, self._totals.generated_tokens - before)
        for request in step.requests():
            if request.phase is Phase.DONE and request.in_flight == 0:
                self._release(request)
        return deltas

    def _take_prompt_logprobs(self, step: Step, result: StepResult) -> None:
        by_slot = {request.slot: request for request, _ in step.chunks}
        for part in result.prompt_logprobs:
            request = by_slot[part.slot]
            have = len(request.prompt_logprobs)
            # A preempted request computes its prompt again; skip the rows that are there already.
            request.prompt_logprobs += part.rows[have - (part.start - 1) :]

    def _take_tokens(self, step: Step, result: StepResult) -> list[Delta]:
        deltas = []
        failed = set(result.not_finite)
        for row, (request, tokens) in enumerate(zip(step.sampled(), result.tokens, strict=True)):
            if request.phase is Phase.DONE or not (tokens or row in failed):
                continue
            if row in failed:
                deltas.append(self._end_not_finite(request))
                continue
            first = not request.first_delta_sent
            request.first_delta_sent = True
            request.tokens.extend(tokens)
            request.upper = len(request.tokens) - 1 + request.in_flight * self._width
            self._totals.generated_tokens += len(tokens)
            reason = request.finish_reason()
            if reason is not None:
                request.ended = True
                self._retire(request)
            elif row < len(step.decode) and self.limits.drafts:
                had, method = result.drafted[row] if result.drafted else (step.drafts, 0)
                self._count_accepted(min(had, step.drafts), method, accepted=len(tokens) - 1)
                depth = min(step.drafts, step.made)
                self.draft_depth.accepted(request, depth, len(tokens) - 1)
            deltas.append(make_delta(request, tokens, reason, result.logprobs.get(row), first))
        return deltas

    def _count_tokens(self, step: Step, generated: int) -> None:
        """Count the tokens that a step computed, if any: of prompts, and those it generated."""
        prefilled = sum(chunk.count for _, chunk in step.chunks)
        self._totals.prefilled_tokens += prefilled
        computed = generated + prefilled
        if computed:
            self._totals.step_tokens[bisect_left(STEP_TOKENS, computed)] += 1
            self._totals.step_tokens_sum += computed

    def _end_not_finite(self, request: Request) -> Delta:
        """End a request whose row could not be used. What was cached may be the reason: drop it."""
        self._totals.rows_not_finite += 1
        request.failed = True
        self._retire(request)
        self.reset_prefix_cache()
        return Delta(request.id, [], "error", error=NOT_FINITE_ERROR, model_failed=True)

    def _count_accepted(self, proposed: int, method: int, *, accepted: int) -> None:
        """Count drafts by position, in rows that have some and that the end of the request did not
        cut. method: the number of the one that made them."""
        if not proposed:
            return
        counts = [self._totals.drafts]
        if method < len(self.limits.methods):
            counts.append(self._totals.by_method[self.limits.methods[method]])
        for count in counts:
            count.drafts += 1
            count.tokens += proposed
            for position in range(accepted):
                count.accepted[position] += 1

    def _retire(self, request: Request) -> None:
        """End a request; its resources are freed once no launched step names it."""
        request.phase = Phase.DONE
        self.running.remove(request)
        if request.in_flight == 0:
            self._release(request)

    def _release(self, request: Request) -> None:
        self._followed.discard(request.id)
        if self._requests.pop(request.id, None) is not None:
            self._kv_manager.end_hand_over(request)
            if request.ended:
                self._kv_manager.save_end(request)
            elif request.upper == request.computed < len(request.tokens):
                self._kv_manager.save_part(request)
            self._kv_manager.release(request)

    # --- queries ----------------------------------------------------------------------------

    def take_moved(self) -> dict[int, int]:
        """Prefixes, by their requests' tags, whose tier has changed since the last call."""
        return self._kv_manager.prefix_tiers.take_changed()

    @property
    def kv_manager(self) -> KVManager:
        """The device's memory, for tools that put prefixes there themselves."""
        return self._kv_manager

    def committed_counts(self) -> tuple[StepCounts, int]:
        """The sizes of the step that was committed last, and the drafts of its rows."""
        return self._committed.counts(), self._committed.drafts

    def masked_rows(self) -> list[tuple[int, str]]:
        """Sampled rows of the newest plan whose requests follow a grammar: (row, request id)."""
        _, step = self._launched[-1]
        sampled = step.sampled()
        return [(row, r.id) for row, r in enumerate(sampled) if r.source.grammar is not None]

    def stats(self) -> EngineStats:
        totals, pages = self._totals, self._kv_manager.pages
        used, snapshots = self._kv_manager.policy.snapshots
        stats = EngineStats(
            steps=totals.steps,
            running=len(self.running),
            waiting=len(self.waiting),
            waiting_deferred=min(self.waiting.deferred, len(self.waiting)),
            free_pages=pages.free,
            evictable_pages=pages.evictable,
            total_pages=pages.size,
            snapshots_used=used,
            snapshots_total=snapshots,
            preemptions=totals.preemptions,
            prompt_tokens=totals.prompt_tokens,
            prefilled_tokens=totals.prefilled_tokens,
            generated_tokens=totals.generated_tokens,
            prefix_queries=totals.prefix_queries,
            prefix_hits=totals.prefix_hits,
            host_hits=totals.host_hits,
            disk_hits=totals.disk_hits,
            remote_hits=totals.remote_hits,
            remote_queries=totals.remote_queries,
            drafts=totals.drafts.drafts,
            draft_tokens=totals.drafts.tokens,
            accepted_per_position=list(totals.drafts.accepted),
            draft_methods={
                name: DraftStats(one.drafts, one.tokens, list(one.accepted))
                for name, one in totals.by_method.items()
            },
            steps_by_depth=dict(totals.by_depth),
            rows_not_finite=totals.rows_not_finite,
            step_tokens=list(totals.step_tokens),
            step_tokens_sum=totals.step_tokens_sum,
        )
        return stats if self._tiers is None else self._tiers.with_sizes(stats)

    def reset_prefix_cache(self) -> None:
        """Drop every cached prefix. Running requests keep their pages."""
        self._kv_manager.clear()

    def check_integrity(self) -> None:
        """Raise AssertionError unless every page, slot and snapshot is accounted for."""
        assert list(self.waiting) == sorted(self.waiting, key=rank), "waiting requests by rank"
        assert self.running == sorted(self.running, key=rank), "running requests by rank"
        for _, step in self._launched:
            assert all(request.slot for request in step.requests()), "launched rows keep their slot"
        owners = [r for r in self._requests.values() if r.phase is not Phase.WAITING]
        self._kv_manager.check(owners, saving=sum(len(step.saves) for _, step in self._launched))
