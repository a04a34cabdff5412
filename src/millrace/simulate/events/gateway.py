"""The gateway on the virtual clock: its own policies, load counters and admission, without HTTP.

Which replica gets a request is decided by the classes of `millrace.gateway.routing`. What a
connection would do is done here: a chunk costs time, a replica that dies breaks its streams, and a
broken stream goes on at another replica from the tokens that it has. Which replicas there are, and
when one is up, is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from millrace.gateway.common.shared_counters import IN_FLIGHT, RESIDENT, SharedCounters
from millrace.gateway.health.load_report import LoadReport, correct_load
from millrace.gateway.relay.hand_over import whole
from millrace.gateway.relay.suspicion import Suspicion
from millrace.gateway.routing.admission import AdmissionControl
from millrace.gateway.routing.candidates import Candidates
from millrace.gateway.routing.load_account import LoadAccount
from millrace.gateway.routing.policies import make_policy
from millrace.gateway.routing.prefix_index import PrefixTable
from millrace.gateway.routing.replicas import Member, Replica, ReplicaSet
from millrace.gateway.routing.suspects import Failure
from millrace.protocol import AddRequest, Delta, RecordSource, SamplingParams
from millrace.simulate.common.options import PUBLISH_SECONDS, GatewayOptions
from millrace.simulate.common.outcome import RequestRecord
from millrace.simulate.common.virtual_clock import VirtualClock, VirtualTimer
from millrace.simulate.events.replica import SimulatedReplica
from millrace.simulate.events.workload import SimulatedRequest

_WAIT_STEP = 0.05  # between searches for a replica that can go on with a stream


class SimulatedGateway:
    """See the module. replicas: the most that there will be.

    lengths: filled for the workers (see SimulatedWorker). queued: called with +1 and -1 as requests
    wait for admission.
    """

    def __init__(
        self,
        clock: VirtualClock,
        options: GatewayOptions,
        lengths: dict[int, int],
        replicas: int,
    ) -> None:
        self.clock, self.options, self.lengths = clock, options, lengths
        self.counters = SharedCounters(1, replicas=max(1, replicas))
        own = self.counters.process_counters(0)
        self.replicas = ReplicaSet(
            self.counters, own, lambda id, outcome: None, options.health.slow_start, clock
        )
        self.replicas.on_lost = self._lost
        self.replicas.on_removed = self._lost
        table = PrefixTable(self.counters.prefixes)
        self.policy = make_policy(
            options.policy, self.replicas, table, options.gap, seed=options.seed
        )
        self.admission = AdmissionControl(self.counters, own, options.limits, clock)
        self.engines: dict[int, SimulatedReplica] = {}  # by the id of the member
        self.exchanges: dict[str, SimulatedExchange] = {}
        self.retries = self.resumed = self.cut_off = self.refused = 0
        self.handed_over = self.hand_over_failed = 0
        self._backlog = 0.0  # seconds of work that the processes have before them
        self._backlog_at = 0.0
        clock.call_later(PUBLISH_SECONDS, self._publish)
        if options.health.load_interval > 0:
            clock.call_later(options.health.load_interval, self._read_load)

    def close(self) -> None:
        """Free what the operating system gave."""
        self.counters.close()

    def submit(self, request: SimulatedRequest, record: RequestRecord, done: Done) -> None:
        """A client sends a request."""
        exchange = SimulatedExchange(self, request, record, done)
        self.clock.call_later(self.options.network_seconds, exchange.start)

    def set_members(self, members: Sequence[Member]) -> None:
        """The health monitor's list has changed."""
        self.replicas.apply(members)
        self.admission.dispatch()

    def delivered(self, replica: int, deltas: Sequence[Delta], leaves: Sequence[float]) -> None:
        """A step of a replica has brought this; called when the step ends."""
        now, cost = self.clock.now(), self.options.chunk_seconds
        shared = cost / self.options.processes if self.options.processes else 0.0
        self._backlog = max(0.0, self._backlog - (now - self._backlog_at))
        self._backlog_at = now
        after = self.options.network_seconds
        for delta, leaving in zip(deltas, leaves, strict=True):
            self._backlog += shared
            exchange = self.exchanges.get(delta.id)
            if exchange is not None:
                exchange.take(delta, max(leaving + cost, now + self._backlog) + after)

    # --- what a gateway does by itself ---------------------------------------------------------

    def _publish(self) -> None:
        for replica in self.replicas.all:
            for exchange in replica.exchanges:
                exchange.publish(replica)
            replica.publish(self.replicas.process_counters)
        self.clock.call_later(PUBLISH_SECONDS, self._publish)

    def _read_load(self) -> None:
        """The load reports of all replicas."""
        for replica in self.replicas.all:
            slot = replica.slot
            if replica.member.state == "down":
                self.counters.set_load_correction(slot, 0)
                continue
            requests = len(replica.exchanges)
            tokens = sum([one.resident for one in replica.exchanges])  # type: ignore[attr-defined]
            before = (
                self.counters.replica_total(slot, RESIDENT),
                self.counters.replica_total(slot, IN_FLIGHT),
            )
            correct_load(self.counters, slot, LoadReport(requests, tokens), *before)
        self.clock.call_later(self.options.health.load_interval, self._read_load)

    def _lost(self, replica: Replica) -> None:
        for exchange in sorted(replica.exchanges, key=hash):
            exchange.lost("lost", removed=replica.removed)


Done = Callable[["SimulatedExchange"], None]


class SimulatedExchange:
    """One request, from its arrival at the gateway to its last chunk; record: what a client
    measures of it. made: the tokens of its answer so far."""

    def __init__(
        self,
        gateway: SimulatedGateway,
        request: SimulatedRequest,
        record: RequestRecord,
        done: Done,
    ) -> None:
        self._gateway = gateway
        self.request, self.record = request, record
        self.info = request.info
        self.made: list[int] = []
        self._done = done
        self._account = LoadAccount(gateway.replicas)
        self._candidates = Candidates(
            gateway.replicas,
            gateway.policy,
            self.info,
            gateway.options.limits.max_requests_per_replica,
        )
        self._suspicion = Suspicion()
        self._replica: Replica | None = None
        self._id = ""
        self._attempts = 0
        self._failures = 0
        self._sent_at = 0.0
        self._admitted = self._ended = False
        self._timer: VirtualTimer | None = None
        self._deadline = 0.0
        self._splits = self._pays()  # its prompt is computed for another replica first
        self._source: RecordSource | None = None  # the prompt's record

    def __hash__(self) -> int:
        return self.request.number  # so that sets of exchanges have the same order in every run

    @property
    def resident(self) -> int:
        """Tokens that its replica holds for it."""
        return len(self.request.tokens) + len(self.made)

    def start(self) -> None:
        """Admit the request, queue it, or refuse it."""
        gateway = self._gateway
        if self._candidates.refusal() is not None:
            self._end("no healthy replica")
            return
        if gateway.admission.submit(self) is not None:
            self._end("queue full")
        elif not self._admitted:
            limit = gateway.options.limits.queue_timeout
            self._timer = gateway.clock.call_later(limit, self._end, "waited in the queue")

    # --- as the routing classes know it ----------------------------------------------------------

    def has_capacity(self) -> bool:
        return self._candidates.has_capacity()

    def admitted(self) -> None:
        self._admitted = True
        if self._timer is not None:
            self._timer.cancel()
        self._attempt()

    def publish(self, replica: Replica) -> None:
        self._account.publish(replica)

    def lost(self, reason: str, *, removed: bool) -> None:
        self._fail(reason, reached=not removed)

    def move(self) -> None:
        """Simulated streams end where they are."""

    @property
    def output_tokens(self) -> int:
        return len(self.made)

    def rebalance(self, to: Replica) -> bool:
        return False

    # --- towards the replica ---------------------------------------------------------------------

    def _pays(self) -> bool:
        """Whether one replica computes the prompt and another answers, as the gateway decides."""
        limits, asked = self._gateway.options.limits, self.info.max_tokens or 0
        prompt = len(self.request.tokens)
        long = prompt >= max(limits.hand_over_prompt, limits.hand_over_ratio * asked)
        return self._gateway.replicas.has_roles and long and asked != 1

    def _untried(self) -> Sequence[Replica]:
        untried = self._candidates.untried()
        if self._splits:
            if found := [one for one in untried if one.member.role == "prefill"]:
                return found
            self._splits = False
            self._gateway.hand_over_failed += 1
        return whole(untried)

    def _attempt(self) -> None:
        if self._ended:
            return
        untried = self._untried()
        if not untried:
            self._no_replica_left()
            return
        replica = self._replica = self._candidates.pick(untried)
        self._account.begin(replica, self.info, len(self.made), self)
        gateway = self._gateway
        self._attempts += 1
        self._id = f"{self.request.number}.{self._attempts}"
        self._sent_at = gateway.clock.now()
        self.record.replica = replica.member.id
        engine = gateway.engines[replica.member.id]
        if not engine.alive:
            limits, options = gateway.options.limits, gateway.options
            wait = limits.connect_timeout if engine.silent else options.network_seconds
            gateway.clock.call_later(wait, self._cannot_connect, self._id)
            return
        gateway.exchanges[self._id] = self
        engine.send(self._message())

    def _cannot_connect(self, attempt: str) -> None:
        if attempt == self._id:
            self._fail("cannot connect", reached=False)

    def _message(self) -> AddRequest:
        request, asked = self.request, self._gateway.options.max_tokens
        most = 1 if self._splits else max(asked, request.output_tokens)
        self._gateway.lengths[request.number] = len(request.tokens) + request.output_tokens
        return AddRequest(
            id=self._id,
            prompt=request.tokens,
            params=SamplingParams(max_tokens=most, seed=request.number),
            boundaries=request.boundaries,
            resume=list(self.made),
            cache_salt=self.info.cache_salt,
            hand_over=self._id if self._splits else "",
            source=self._source,
        )

    # --- from the replica ------------------------------------------------------------------------

    def take(self, delta: Delta, at: float) -> None:
        """New tokens, which reach the client at that moment."""
        if self._splits or delta.transfer_failed:
            self._gateway.clock.call_at(at, self._computed, self._id, delta.record)
            return
        self.made += delta.token_ids
        self._account.chunks += 1
        self._failures = 0
        self.record.chunk(at, len(delta.token_ids))
        if delta.queued is not None:
            self.record.cached_tokens = delta.cached_tokens
        if delta.finish_reason is not None:
            error = delta.error or ""
            if not error and self.info.stream:
                self._gateway.replicas.record_output(self._account.chunks)
            self._gateway.exchanges.pop(self._id, None)
            self._gateway.clock.call_at(at, self._end, error)

    def _computed(self, attempt: str, record: int) -> None:
        """The prompt is computed, and its record of so many tokens may be taken; or, with 0, it is
        not there: then one replica does everything."""
        if attempt != self._id or self._ended or self._replica is None:
            return
        self._splits, self._source = False, None
        if record:
            self._source = RecordSource("", 0, "", attempt, record)
            self._gateway.handed_over += 1
        else:
            self._gateway.hand_over_failed += 1
        self._release()
        self._candidates.reset(keep_last=False)
        self._attempt()

    # --- failures and ends -----------------------------------------------------------------------

    def _fail(self, reason: str, reached: bool = True) -> None:
        replica, gateway = self._replica, self._gateway
        if replica is None or self._ended or self._complete:
            return
        self._candidates.record_failure(replica, reason)
        self._failures += 1
        self._source = None  # it may be gone, too
        self._release()
        digest = self.request.number.to_bytes(16, "big") + bytes(8)
        gateway.replicas.report_failure(replica, Failure(reason, digest, sent_at=self._sent_at))
        if reached and self._suspicion.add(replica.burst, len(self.made)):
            self._end("two replicas failed on it")
        elif self.made:
            gateway.resumed += 1
            self.record.resumptions += 1
            self._candidates.reset(keep_last=True)
            self._deadline = gateway.clock.now() + gateway.options.limits.resume_timeout
            self._attempt()
        elif self._failures > gateway.options.limits.max_retries:
            self._no_replica_left()
        else:
            gateway.retries += 1
            self._attempt()

    @property
    def _complete(self) -> bool:
        """Its last token has left the replica."""
        return len(self.made) >= self.request.output_tokens

    def _no_replica_left(self) -> None:
        gateway = self._gateway
        if not self.made:
            self._end("every replica failed")
        elif gateway.clock.now() > self._deadline:
            gateway.cut_off += 1
            self._end("cut off")
        else:
            self._candidates.reset(keep_last=False)
            self._timer = gateway.clock.call_later(_WAIT_STEP, self._attempt)

    def _release(self) -> None:
        self._gateway.exchanges.pop(self._id, None)
        replica, self._replica = self._replica, None
        if replica is not None:
            self._account.end(replica, self)

    def _end(self, error: str) -> None:
        if self._ended:
            return
        self._ended = True
        gateway = self._gateway
        self._release()
        self.record.end(gateway.clock.now(), error)
        if self._admitted:
            gateway.admission.release(self.info.service_class)
        else:
            gateway.refused += 1
            gateway.admission.cancel_wait(self)
        gateway.lengths.pop(self.request.number, None)
        self._done(self)
