"""A fleet, event by event: clients, gateway and replicas on one virtual clock.

Every step of every engine is planned by the scheduler that serves, and every request is sent to a
replica by the policy that serves.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from zlib import crc32

from millrace.gateway.routing.replicas import Member
from millrace.protocol import Delta
from millrace.simulate.common.lifecycle import Hooks, Lives
from millrace.simulate.common.options import Scenario
from millrace.simulate.common.outcome import Outcome, Records, Sample
from millrace.simulate.common.virtual_clock import VirtualClock
from millrace.simulate.events.clients import Clients
from millrace.simulate.events.gateway import SimulatedGateway
from millrace.simulate.events.record_links import RecordLinks
from millrace.simulate.events.replica import SimulatedReplica
from millrace.simulate.events.workload import Requests

LONGEST = 7 * 24 * 3600.0  # seconds of a simulated run
_SAMPLE_SECONDS = 1.0
_MOST_SAMPLES = 1200


class Fleet:
    """One run of a scenario."""

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._clock = clock = VirtualClock()
        self._lengths: dict[int, int] = {}
        self.gateway = SimulatedGateway(clock, scenario.gateway, self._lengths, scenario.life.most)
        self.lives = Lives(clock, scenario.life, self._hooks())
        self.records = Records()
        limits = scenario.kind.limits
        self.links = RecordLinks(
            scenario.kind.speeds.link, limits.page_bytes, limits.snapshot_bytes
        )
        load = scenario.load
        self.clients = Clients(
            clock,
            self.gateway,
            Requests(load),
            load.schedule,
            self.records,
            limit=load.max_concurrency,
            until=load.duration,
        )
        self._samples: list[Sample] = []
        self._sample_seconds = _SAMPLE_SECONDS
        self.all_engines: list[SimulatedReplica] = []

    def run(self) -> Outcome:
        """Run it to its end."""
        began = perf_counter()
        self.lives.begin()
        self.clients.start()
        self._sample()
        self._clock.run(LONGEST, lambda: self.clients.done)
        outcome = self._outcome(perf_counter() - began)
        self.gateway.close()
        return outcome

    def _outcome(self, wall: float) -> Outcome:
        gateway, lives = self.gateway, self.lives
        stats = [engine.engine.stats() for engine in self.all_engines]
        seconds = self._clock.now()
        busy = sum(engine.worker.busy for engine in self.all_engines)
        return Outcome(
            records=self.records,
            samples=self._samples,
            seconds=seconds,
            wall_seconds=wall,
            ended=self.clients.done,
            replica_seconds=lives.replica_seconds,
            busy=min(1.0, busy / max(lives.replica_seconds, 1e-9)),
            counts={
                "requests": self.clients.requests_sent,
                "ended": self.clients.requests_ended,
                "steps": sum(one.steps for one in stats),
                "generated_tokens": sum(one.generated_tokens for one in stats),
                "computed_prompts": sum(one.prompt_tokens - one.prefix_hits for one in stats),
                "preemptions": sum(one.preemptions for one in stats),
                "retries": gateway.retries,
                "resumed": gateway.resumed,
                "cut_off": gateway.cut_off,
                "refused": gateway.refused,
                "crashes": lives.crashes,
                "reclaims": lives.reclaims,
                "starts": lives.starts,
                "handed_over": gateway.handed_over,
                "hand_over_failed": gateway.hand_over_failed,
                "hand_over_bytes": self.links.bytes,
            },
        )

    def _hooks(self) -> Hooks:
        return Hooks(
            begin=self._begin,
            end=self._end,
            publish=self.gateway.set_members,
            in_flight=self._in_flight,
            load=self._load,
            clear=self.gateway.counters.clear_replica,
        )

    def _begin(self, member: Member) -> None:
        id = member.id

        def deliver(deltas: Sequence[Delta], leaves: Sequence[float]) -> None:
            self.gateway.delivered(id, deltas, leaves)

        scenario = self._scenario
        seed = crc32(f"{scenario.seed} {id} {len(self.all_engines)}".encode())
        engine = SimulatedReplica(
            *(self._clock, scenario.kind, deliver, self._lengths, seed, scenario.check),
            links=self.links,
            number=id,
        )
        self.gateway.engines[id] = engine
        self.all_engines.append(engine)

    def _end(self, id: int, silent: bool) -> None:
        engine = self.gateway.engines.get(id)
        if engine is not None and engine.alive:
            engine.kill(silent)
            self.links.lost(id)

    def _in_flight(self, id: int) -> int:
        found = [r for r in self.gateway.replicas.all if r.member.id == id]
        return len(found[0].exchanges) if found else 0

    def _load(self) -> int:
        queued = self.gateway.admission.waiting("interactive")
        queued += self.gateway.admission.waiting("batch")
        return queued + sum(len(r.exchanges) for r in self.gateway.replicas.all)

    def _sample(self) -> None:
        """Note the fleet's state, every second at first, and rarer in a long run."""
        stats = [one.stats() for one in self.gateway.engines.values() if one.alive]
        pages = sum(one.total_pages for one in stats)
        free = sum(one.free_pages + one.evictable_pages for one in stats)
        self._samples.append(
            Sample(
                at=self._clock.now(),
                up=self.lives.up,
                starting=self.lives.starting,
                draining=self.lives.draining,
                running=sum(one.running for one in stats),
                waiting=sum(one.waiting for one in stats),
                queued=self.gateway.admission.waiting("interactive")
                + self.gateway.admission.waiting("batch"),
                kv_used=1.0 - free / pages if pages else 0.0,
            )
        )
        if len(self._samples) > _MOST_SAMPLES:
            del self._samples[1::2]
            self._sample_seconds *= 2
        self._clock.call_later(self._sample_seconds, self._sample)
