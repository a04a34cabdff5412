"""A fleet whose replicas advance together: requests, policy, engines and lives as arrays.

Time goes in windows, in which nothing ends that is begun in them. What ends is seen in the next
window, so no engine ever learns of something too late. The rest of the fleet is that of the other
mode: the same life of replicas, the same clients.
"""

from __future__ import annotations

from collections import deque
from heapq import heappop, heappush
from time import perf_counter

import numpy as np

from millrace.bench.load.arrivals import due_times
from millrace.gateway.routing.replicas import Member
from millrace.simulate.aggregated.engines import Engines, Steps
from millrace.simulate.aggregated.policies import Loads, make_pick, places
from millrace.simulate.aggregated.requests import EndedRequests, RequestTable, lengths_of
from millrace.simulate.common.lifecycle import NOTICED, Hooks, Lives
from millrace.simulate.common.options import PUBLISH_SECONDS, Scenario
from millrace.simulate.common.outcome import Gaps, Outcome, Records, Sample, TimeLine
from millrace.simulate.common.virtual_clock import VirtualClock
from millrace.target import Target

LONGEST = 7 * 24 * 3600.0
RETRY_AFTER = 1.0
_FIRST_MEAN_OUTPUT = 128.0  # as the gateway's ReplicaSet
_SMOOTHING = 0.05
_SAMPLE_SECONDS = 1.0
_MOST_SAMPLES = 1200
_LONGEST_OUTPUT = 1 << 17


class AggregatedFleet:
    """One run of a scenario."""

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        load, kind, life = scenario.load, scenario.kind, scenario.life
        self._lengths = lengths_of(load.workload)
        self._due = due_times(load.schedule)
        rows = life.most
        self._table = RequestTable(min(1 << 20, max(1024, (load.max_concurrency or 0) + 8)))
        longest = min(kind.limits.max_model_len, _LONGEST_OUTPUT)
        self._engines = Engines(kind, rows, self._table, longest, scenario.seed)
        self._is_open = load.schedule.open_loop
        self._window = max(1e-4, 0.999 * self._engines.shortest_step())
        self._clock = VirtualClock()
        self._lives = Lives(self._clock, life, self._hooks())
        self._row_of: dict[int, int] = {}
        self._targets: dict[int, Target] = {}
        self._pick = make_pick(
            scenario.gateway.policy, scenario.gateway.seed, self._targets.__getitem__
        )
        self._up = np.zeros(0, dtype=np.int64)
        self._places: dict[int, int] = {}  # of the rows in _up
        self._ramps: dict[int, float] = {}
        self._alive = np.zeros(rows, dtype=bool)
        self._load = np.zeros(rows)
        self._in_flight = np.zeros(rows, dtype=np.int64)
        self._flying = 0  # all of them
        # When the API servers have done with the chunks of launched steps, and with requests.
        self._server_free = np.zeros(rows)
        self._taken_in = np.zeros(rows)
        self._mean_output = _FIRST_MEAN_OUTPUT
        self._correction = np.zeros(rows)  # of load, by load reports
        self._published = np.zeros(rows)  # chunks of running answers that are counted
        # What happens at the gateway: moment, number of the request, and its row of the table if it
        # comes, or the row's complement if it has ended.
        self._events: list[tuple[float, int, int]] = []
        self._held: deque[tuple[float, int]] = deque()  # wait for admission
        self._next_due: float | None = 0.0
        self._exhausted = False
        self._sent = self._ended_count = 0
        self._conversations = 0
        self._numbers = 0
        self.records = Ended()
        self._samples: list[Sample] = []
        self._counts = dict.fromkeys(("retries", "resumed", "cut_off", "refused"), 0)

    def run(self) -> Outcome:
        """Run it to its end."""
        began = perf_counter()
        self._lives.begin()
        self._clock.call_later(0.0, self._sample, _SAMPLE_SECONDS)
        self._clock.call_later(PUBLISH_SECONDS, self._publish_chunks)
        if self._scenario.gateway.health.load_interval > 0:
            self._clock.call_later(self._scenario.gateway.health.load_interval, self._read_load)
        self._next_due = next(self._due, None) if self._is_open else None
        now = 0.0
        self._begin_requests(now)
        while not self._done and now < LONGEST:
            now = self._next_moment(now)
            self._clock.run(now)
            horizon = self._horizon(now)
            self._begin_requests(horizon)
            self._route(horizon)
            while len(rows := np.flatnonzero(self._engines.plan_at < horizon)):
                self._take(self._engines.step(rows))
        return self._outcome(self.records.last_end, perf_counter() - began)

    # --- time ------------------------------------------------------------------------------------

    @property
    def _done(self) -> bool:
        return self._exhausted and self._conversations == 0

    def _next_moment(self, now: float) -> float:
        """The next moment at which something happens."""
        moments = [float(self._engines.plan_at.min()), self._clock.next_call]
        if self._events:
            moments.append(self._events[0][0])
        if self._next_due is not None and self._may_begin:
            moments.append(self._next_due)
        return max(now, min(moments))

    def _horizon(self, now: float) -> float:
        """The end of the window that begins now: no request that is sent to an engine in it, nor a
        step that is planned in it, ends before. A step begins when the one before has ended."""
        engines = self._engines
        busy = engines.plan_at < np.inf
        if not busy[self._up].all():  # an idle engine may begin at once
            return now + self._window
        begins = np.maximum(engines.ended, engines.plan_at)
        earliest = float(begins[busy].min()) if busy.any() else now
        latest = max(self._clock.next_call, now + self._window)
        return min(max(earliest, now) + self._window, latest)

    # --- clients ---------------------------------------------------------------------------------

    @property
    def _may_begin(self) -> bool:
        limit = self._scenario.load.max_concurrency
        return not self._exhausted and (limit is None or self._conversations < limit)

    def _begin_requests(self, horizon: float, freed: list[float] | None = None) -> None:
        """Send what is due before the horizon. freed: moments at which a slot of the closed loop
        became free; none: all slots are."""
        until = self._scenario.load.duration
        moments = iter(freed or ())
        while self._may_begin:
            moment = next(moments, 0.0)
            due = moment
            if self._is_open:
                if self._next_due is None:
                    self._exhausted = True
                    return
                if self._next_due >= horizon:
                    return
                due = self._next_due
                moment = max(moment, due)
            if until is not None and moment >= until:
                self._exhausted = True
                return
            pair = next(self._lengths, None)
            if pair is None:
                self._exhausted = True
                return
            if self._is_open:
                self._next_due = next(self._due, None)
            self._send(due, moment, *pair)

    def _send(self, due: float, sent: float, prompt: int, output: int) -> None:
        table = self._table
        row = table.take()
        output = min(output, self._scenario.kind.limits.max_model_len - prompt)
        table.due[row], table.sent[row], table.first[row] = due, sent, -1.0
        table.prompt[row] = table.known[row] = prompt
        table.output[row], table.made[row], table.replica[row] = output, 0, -1
        table.ending[row] = False
        table.number[row], self._numbers = self._numbers, self._numbers + 1
        self._sent += 1
        self._conversations += 1
        self._come(sent + self._scenario.gateway.network_seconds, row)

    def _come(self, moment: float, row: int) -> None:
        """A request reaches the gateway then."""
        heappush(self._events, (moment, int(self._table.number[row]), row))

    # --- gateway ---------------------------------------------------------------------------------

    def _route(self, horizon: float) -> None:
        """What happens at the gateway before the horizon, in order: requests that have come are
        sent to replicas, and those that have ended leave theirs."""
        if not self._events or self._events[0][0] >= horizon:
            return
        loads = self._loads()
        while self._events and self._events[0][0] < horizon:
            moment, _, row = heappop(self._events)
            if row < 0:
                self._leave(moment, ~row, loads)
            elif not len(self._up):
                self._no_replica(moment, row)
            elif self._flying >= self._scenario.gateway.limits.max_concurrent_requests:
                self._hold(moment, row)
            else:
                self._assign(moment, row, loads)

    def _loads(self) -> Loads:
        """The loads of replicas that are up."""
        up = self._up
        weights = self._weights(up) if self._ramps else None
        load = np.maximum(self._load[up] + self._correction[up], 0)
        return Loads(up, load, weights, self._places)

    def _leave(self, moment: float, request: int, loads: Loads | None) -> None:
        """A request has ended: its replica has room, and its client may send the next one."""
        table = self._table
        replica, size = int(table.replica[request]), int(table.size[request])
        if replica >= 0 and self._in_flight[replica]:
            self._load[replica] -= size
            self._in_flight[replica] -= 1
            self._flying -= 1
            if loads is not None:
                loads.add(replica, -size)
        failed = bool(table.failed[request])
        if not failed:
            chunks = int(table.steps[request]) + 1
            self._mean_output += _SMOOTHING * (chunks - self._mean_output)
        table.free(request)
        was_full = not self._may_begin
        self._conversations -= 1
        if self._held:
            self._release_held(moment)
        if was_full or not self._is_open:
            freed = moment + (RETRY_AFTER if failed else 0.0)
            self._begin_requests(freed, [freed])

    def _publish_chunks(self) -> None:
        """Answers that have grown beyond what was expected of them count as they are."""
        table, size = self._table, len(self._load)
        rows = np.flatnonzero(table.used & table.decoding)
        owner = table.replica[rows]
        chunks = self._engines.steps_done(rows) + 1
        grown = table.known[rows] + chunks - table.size[rows]
        more = grown > 0
        table.size[rows[more]] += grown[more]
        self._load += np.bincount(owner[more], grown[more], size)
        self._published = np.bincount(owner, chunks, size).astype(float)
        self._clock.call_later(PUBLISH_SECONDS, self._publish_chunks)

    def _read_load(self) -> None:
        """Load reports: tokens that the gateway has not counted yet, half way each time."""
        target = self._engines.generated - self._published
        self._correction = np.floor((self._correction + target) / 2)
        self._clock.call_later(self._scenario.gateway.health.load_interval, self._read_load)

    def _assign(self, moment: float, request: int, loads: Loads) -> None:
        """Give the request to the replica that the policy picks."""
        table, options = self._table, self._scenario.gateway
        open_ones = loads
        if most := options.limits.max_requests_per_replica:
            open_ones = loads.where(self._in_flight[loads.rows] < most)
            if not len(open_ones.rows):
                self._hold(moment, request)
                return
        known, made = int(table.known[request]), int(table.made[request])
        prompt, number = known - made, int(table.number[request])
        replica = self._pick(open_ones, prompt, number)
        if not self._alive[replica]:  # it refuses connections: another one
            self._counts["retries"] += 1
            open_ones = open_ones.where(self._alive[open_ones.rows])
            if not len(open_ones.rows):
                self._no_replica(moment, request)
                return
            replica = self._pick(open_ones, prompt, number)
        asked = options.max_tokens or int(table.output[request])
        size = prompt + max(made, min(int(self._mean_output), max(asked, 1)))
        table.replica[request], table.size[request] = replica, size
        loads.add(replica, size)
        self._load[replica] += size
        self._in_flight[replica] += 1
        self._flying += 1
        cost = self._scenario.kind.api_server.request
        arrives = max(float(self._taken_in[replica]), moment) + cost
        table.arrives[request] = self._taken_in[replica] = arrives
        self._engines.add(replica, request)

    def _weights(self, up: np.ndarray) -> np.ndarray:
        """Weights of replicas; one that has come back has a slow start."""
        weights = np.ones(len(up))
        slow = self._scenario.gateway.health.slow_start
        now = self._clock.now()
        for replica, since in list(self._ramps.items()):
            if slow <= 0 or now - since >= slow:
                del self._ramps[replica]
            else:
                weights[up == replica] = min(1.0, max(0.1, (now - since) / slow))
        return weights

    def _hold(self, moment: float, request: int) -> None:
        if len(self._held) >= self._scenario.gateway.limits.queue_size:
            self._fail(moment, request, "refused")
        else:
            self._held.append((moment, request))

    def _release_held(self, moment: float) -> None:
        """Requests have ended: admit some of those that wait."""
        limits = self._scenario.gateway.limits
        while self._held and self._flying < limits.max_concurrent_requests:
            waited_since, request = self._held[0]
            if (
                limits.max_requests_per_replica
                and not (self._in_flight[self._up] < limits.max_requests_per_replica).any()
            ):
                return
            self._held.popleft()
            if moment - waited_since > limits.queue_timeout:
                self._fail(waited_since + limits.queue_timeout, request, "refused")
            elif len(self._up):
                self._assign(max(moment, waited_since), request, self._loads())
            else:
                self._no_replica(moment, request)

    def _no_replica(self, moment: float, request: int) -> None:
        """New requests are refused; streams that have begun look for a replica for a while."""
        table, limits = self._table, self._scenario.gateway.limits
        if not table.made[request]:
            self._fail(moment, request, "refused")
        elif moment - table.arrives[request] > limits.resume_timeout:
            self._fail(moment, request, "cut_off")
        else:
            self._come(moment + 0.05, request)

    def _fail(self, moment: float, request: int, why: str) -> None:
        self._counts[why] += 1
        self._end_requests(np.array([request]), np.array([moment]), failed=True)

    # --- what steps bring ------------------------------------------------------------------------

    def _take(self, steps: Steps) -> None:
        """Pass on the tokens of some steps."""
        table, gateway = self._table, self._scenario.gateway
        cost = self._scenario.kind.api_server.chunk
        size = len(self._load)
        ends, frees, chunks = np.zeros(size), np.zeros(size), np.zeros(size)
        ends[steps.rows] = steps.ended
        chunks[steps.rows] = steps.decoded
        owner = table.replica[steps.first]
        chunks += np.bincount(owner, minlength=size)
        rows = steps.rows
        frees[rows] = np.maximum(self._server_free[rows], ends[rows])
        self._server_free[rows] = frees[rows] + cost * chunks[rows]
        after = gateway.chunk_seconds + gateway.network_seconds
        # First tokens are the last chunks of a step; those of decode rows lie anywhere before.
        fresh = steps.first[table.first[steps.first] < 0]
        owner = table.replica[fresh]
        table.first[fresh] = frees[owner] + cost * chunks[owner] + after
        self.records.tokens.add_many(steps.ended, steps.decoded * self._engines.tokens_per_step)
        self.records.tokens.add_many(ends[table.replica[steps.first]], np.ones(len(steps.first)))
        running = steps.decoded > 0
        self.records.gaps.add_many((steps.ended - steps.before)[running], steps.decoded[running])
        if len(steps.last):
            owner = table.replica[steps.last]
            middle = np.where(table.decoding[steps.last], 0.5, 1.0)
            moments = frees[owner] + middle * cost * chunks[owner] + after
            table.decoding[steps.last] = False
            self._end_requests(steps.last, moments, failed=False)

    def _end_requests(self, rows: np.ndarray, moments: np.ndarray, failed: bool) -> None:
        """Record the ends of requests, which come at these moments."""
        table = self._table
        self.records.ended.add(
            due=table.due[rows],
            sent=table.sent[rows],
            first=np.minimum(table.first[rows], moments),
            ended=moments,
            prompt=table.prompt[rows],
            output=table.made[rows] if failed else table.output[rows],
            replica=table.replica[rows],
            failed=np.full(len(rows), failed),
        )
        self.records.last_end = max(self.records.last_end, float(moments.max()))
        table.ending[rows], table.failed[rows] = True, failed
        self._ended_count += len(rows)
        numbers = table.number[rows].tolist()
        for moment, number, row in zip(moments.tolist(), numbers, rows.tolist(), strict=True):
            heappush(self._events, (moment, number, ~row))

    # --- the life of replicas --------------------------------------------------------------------

    def _hooks(self) -> Hooks:
        return Hooks(
            begin=self._begin_replica,
            end=self._end_replica,
            publish=self._publish,
            in_flight=lambda id: int(self._in_flight[self._row_of[id]]),
            load=lambda: self._flying + len(self._held),
            clear=lambda slot: None,
        )

    def _begin_replica(self, member: Member) -> None:
        row = member.slot
        self._engines.reset(row)
        self._alive[row] = True
        self._server_free[row] = self._taken_in[row] = 0.0
        self._ramps.pop(row, None)

    def _publish(self, members: list[Member]) -> None:
        self._row_of = {one.id: one.slot for one in members}
        self._targets.update({one.slot: one.target for one in members})
        up = [one for one in members if one.state == "up"]
        now, slow = self._clock.now(), self._scenario.gateway.health.slow_start
        for one in up:
            if one.slow_start_from is not None and now - one.slow_start_from < slow:
                self._ramps[one.slot] = one.slow_start_from
        self._up = np.array([one.slot for one in up], dtype=np.int64)
        self._places = places(self._up)

    def _end_replica(self, id: int, silent: bool) -> None:
        row = self._row_of.get(id, -1)
        if row < 0 or not self._alive[row]:
            return
        self._alive[row] = False
        self._ramps.pop(row, None)
        table = self._table
        lost = np.flatnonzero(table.used & ~table.ending & (table.replica == row))
        table.made[lost] = self._engines.made(lost)
        table.known[lost] = table.prompt[lost] + table.made[lost]
        self._engines.reset(row)
        # Those whose last tokens are on their way leave by themselves.
        self._in_flight[row] -= len(lost)
        self._flying -= len(lost)
        self._load[row] -= table.size[lost].sum()
        self._correction[row] = self._published[row] = 0
        table.replica[lost] = -1
        table.decoding[lost] = False
        health = self._scenario.life.health
        noticed = self._clock.now() + NOTICED
        if silent:
            noticed += health.health_check_interval
            noticed += health.max_missed_checks * health.health_check_timeout
        table.arrives[lost] = noticed
        resumed = int((table.made[lost] > 0).sum())
        self._counts["resumed"] += resumed
        self._counts["retries"] += len(lost) - resumed
        for request in lost.tolist():
            self._come(noticed, request)

    # --- what is reported ------------------------------------------------------------------------

    def _sample(self, seconds: float) -> None:
        engines, up = self._engines, self._up
        pages = len(up) * (self._scenario.kind.limits.num_pages - 1)
        running = int(engines.running[up].sum())
        self._samples.append(
            Sample(
                at=self._clock.now(),
                up=self._lives.up,
                starting=self._lives.starting,
                draining=self._lives.draining,
                running=running,
                waiting=max(0, self._flying - running),
                queued=len(self._held),
                kv_used=float(engines.pages[up].sum()) / pages if pages else 0.0,
            )
        )
        if len(self._samples) > _MOST_SAMPLES:
            del self._samples[1::2]
            seconds *= 2
        self._clock.call_later(seconds, self._sample, seconds)

    def _outcome(self, seconds: float, wall: float) -> Outcome:
        lives, engines = self._lives, self._engines
        self._clock.run(seconds)
        return Outcome(
            records=self.records.records(),
            samples=[one for one in self._samples if one.at <= seconds],
            seconds=seconds,
            wall_seconds=wall,
            ended=self._done,
            replica_seconds=lives.replica_seconds,
            busy=min(1.0, engines.busy / max(lives.replica_seconds, 1e-9)),
            counts={
                "requests": self._sent,
                "ended": self._ended_count,
                "steps": engines.steps,
                "page_shortages": engines.page_shortages,
                **self._counts,
                "crashes": lives.crashes,
                "reclaims": lives.reclaims,
                "starts": lives.starts,
            },
            mode="aggregated",
        )


class Ended:
    """What is kept of requests that have ended."""

    def __init__(self) -> None:
        self.ended = EndedRequests()
        self.gaps = Gaps()
        self.tokens = TimeLine()
        self.last_end = 0.0

    def records(self) -> Records:
        """The same as records of the other mode."""
        column = self.ended.column
        return Records.of(
            {name: column(name, float) for name in ("due", "sent", "first", "ended")},
            {name: column(name, int) for name in ("prompt", "output", "replica")},
            column("failed", bool),
            self.gaps,
            self.tokens,
        )
