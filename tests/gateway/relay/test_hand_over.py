"""Prompts that one replica computes and another answers: which go, what happens where they do not
get there, and vLLM pairs whose counters do not move."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.common.http_client import Response, Target, fetch, parse_url
from millrace.gateway.app import Gateway
from millrace.gateway.common.limits import GatewayLimits
from millrace.gateway.health.health_monitor import ReplicaSpec
from millrace.gateway.relay import pair_checks
from millrace.gateway.relay.rebalance import MOST_AT_ONCE, Rebalancer
from millrace.gateway.routing.replicas import Member, Replica
from tests.support.gateways import gateway
from tests.support.mock_replica import MockReplica, next_token
from tests.support.running import eventually, run

PROMPT = list(range(1, 41))
LIMITS = GatewayLimits(hand_over_prompt=32, hand_over_ratio=2.0)
MOVES = GatewayLimits(hand_over_prompt=128, hand_over_ratio=1e6)
NEVER = GatewayLimits(hand_over_prompt=1 << 20)


class Paired(MockReplica):
    """A replica that hands prompts over. records: those that it has computed and nobody has taken.

    fault: "null": it hands nothing over; "lost": what it should take is gone; "recompute": the
    same, and it says nothing, like vLLM. taken: tokens that came, which /metrics shows. early: it
    says where its records are, so they are asked for while prompts are computed.
    """

    def __init__(self, kind: str, role: str, fault: str = "", early: bool = False) -> None:
        super().__init__(kind=kind, name=role)
        self.role, self.fault = role.split()[0] if role else "", fault
        self.early = early
        self.records: dict[str, int] = {}
        self.taken = 0
        self.partners: dict[str, Paired] = {}

    async def _complete(
        self, path: str, body: dict[str, Any], writer: asyncio.StreamWriter
    ) -> None:
        params = body.get("kv_transfer_params") or {}
        if params.get("do_remote_decode"):
            name = params.get("remote_request_id") or f"record-{len(self.bodies)}"
            if self.early:  # the other one is asked meanwhile
                other = self.partners["decode"]
                await eventually(lambda: other.bodies or not other.early, 10)
            self.records[name] = len(PROMPT) - 1
            answer = {"do_remote_prefill": True, "remote_request_id": name, "from": self.name}
            given = None if self.fault == "null" else answer
            if self.fault == "null":
                del self.records[name]
            self._plain(writer, 200, {"choices": [{}], "kv_transfer_params": given})
            return
        if params.get("do_remote_prefill"):
            if self.fault == "lost":
                error = {"message": "did not come", "code": "kv_transfer_failed"}
                self._plain(writer, 502, {"error": error})
                return
            if self.fault != "recompute":
                partner = self.partners[params.get("from") or params["remote_engine_id"]]
                await eventually(lambda: params["remote_request_id"] in partner.records, 60)
                self.taken += partner.records.pop(params["remote_request_id"])
        await super()._complete(path, body, writer)

    def _get(self, path: str, writer: asyncio.StreamWriter) -> None:
        if path == "/health":
            where = {"records": {"engine": self.name, "host": "here", "port": 1}}
            role = {"role": self.role if self.kind == "millrace" else ""}
            self._plain(writer, 200, {**role, **(where if self.early else {})})
        elif path == "/metrics":
            self._text(writer, f'vllm:external_prefix_cache_hits_total{{a="b"}} {self.taken}\n')
        else:
            super()._get(path, writer)


Scenario = Callable[[Gateway, Target, dict[str, Paired]], Awaitable[None]]


def with_pair(
    scenario: Scenario,
    kind: str = "millrace",
    endpoint: str | None = None,
    roles: tuple[str, ...] = ("prefill", "decode", ""),
    limits: GatewayLimits = LIMITS,
    policy: str = "least_loaded",
    early: bool = False,
    **faults: str,
) -> None:
    """Run it with replicas of these roles, as a rule one that does everything by itself, too.
    endpoint: of a collector of traces. early: as in `Paired`."""

    async def whole() -> None:
        made = {role: Paired(kind, role, faults.get(role or "plain", ""), early) for role in roles}
        for one in made.values():
            one.partners = made
            await one.start()
        specs = [
            ReplicaSpec(target=parse_url(one.url), role=role if kind == "vllm" else "")  # type: ignore[arg-type]
            for role, one in made.items()
        ]
        async with gateway(
            replicas=specs, limits=limits, policy=policy, otlp_traces_endpoint=endpoint
        ) as (
            started,
            target,
        ):
            await eventually(lambda: started.replicas.has_roles)
            await scenario(started, target, made)
        for one in made.values():
            await one.stop()

    run(whole())


async def ask(target: Target, path: str = "/v1/completions", **more: Any) -> Response:
    body = {"prompt": PROMPT, "max_tokens": 8, "stream": True, **more}
    return await fetch(target, path, method="POST", body=json.dumps(body).encode(), timeout=20)


def tokens(response: Response) -> str:
    assert response.status == 200, response.body
    events = [json.loads(e[6:]) for e in response.body.split(b"\n\n") if e[:7] == b"data: {"]
    return "".join(e["choices"][0]["text"] for e in events if e["choices"])


RIGHT = "".join(f"w{next_token(PROMPT, at)} " for at in range(8))


def test_the_record_is_asked_for_while_the_prompt_is_computed() -> None:
    """The replica for the prompt answers here once the other one has been asked."""

    async def scenario(made: Gateway, target: Target, replicas: dict[str, Paired]) -> None:
        assert tokens(await ask(target)) == RIGHT
        [first], [second] = replicas["prefill"].bodies, replicas["decode"].bodies
        name = first["kv_transfer_params"]["remote_request_id"]
        assert second["kv_transfer_params"]["remote_request_id"] == name != ""
        assert replicas["decode"].taken == len(PROMPT) - 1
        assert not replicas[""].bodies
        events = made.counters.events()
        assert (events["handed_over"], events["hand_over_failed"]) == (1, 0)

    with_pair(scenario, early=True)


@pytest.mark.parametrize(("role", "fault"), [("prefill", "null"), ("decode", "lost")])
def test_a_record_asked_for_early_that_does_not_come_costs_no_wait(role: str, fault: str) -> None:
    """The other replica would wait for a minute."""

    async def scenario(made: Gateway, target: Target, replicas: dict[str, Paired]) -> None:
        began = asyncio.get_running_loop().time()
        assert tokens(await ask(target)) == RIGHT
        assert asyncio.get_running_loop().time() - began < 30
        assert made.counters.events()["hand_over_failed"] == 1
        await eventually(lambda: not any(one.exchanges for one in made.replicas.all))

    with_pair(scenario, early=True, **{role: fault})


@pytest.mark.parametrize("kind", ["millrace", "vllm"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_prompt_goes_from_one_to_the_other(kind: str, stream: bool) -> None:
    async def scenario(made: Gateway, target: Target, replicas: dict[str, Paired]) -> None:
        response = await ask(target, stream=stream, min_tokens=2, stream_options=None)
        assert response.status == 200
        assert not stream or tokens(response) == RIGHT
        [first], [second] = replicas["prefill"].bodies, replicas["decode"].bodies
        assert (first["max_tokens"], first["stream"]) == (1, False)
        assert "min_tokens" not in first
        assert first["prompt"] == second["prompt"] == PROMPT
        assert second["max_tokens"] == 8
        assert replicas["decode"].taken == len(PROMPT) - 1
        assert not replicas[""].bodies
        events = made.counters.events()
        assert (events["handed_over"], events["hand_over_failed"]) == (1, 0)

    with_pair(scenario, kind)


@pytest.mark.parametrize(
    "more",
    [
        {"prompt": PROMPT[:8]},  # short
        {"max_tokens": 30},  # a long answer
        {"n": 2, "stream": False},
        {"prompt_logprobs": 1},
        {"max_tokens": 1},
        {"resume_token_ids": [5]},
    ],
)
def test_what_would_not_pay_is_done_by_one_replica(more: dict[str, Any]) -> None:
    async def scenario(made: Gateway, target: Target, replicas: dict[str, Paired]) -> None:
        for _ in range(4):
            assert (await ask(target, **more)).status == 200
        assert not replicas["prefill"].bodies, "it is for prompts of others"
        assert all("kv_transfer_params" not in body for body in replicas["decode"].bodies)
        assert made.counters.events()["handed_over"] == 0

    with_pair(scenario)


@pytest.mark.parametrize(
    ("faults", "handed"),
    [({"prefill": "null"}, 0), ({"decode": "lost"}, 1), ({"prefill": "down"}, 0)],
)
def test_where_nothing_moves_one_replica_does_everything_and_it_is_counted(
    faults: dict[str, str], handed: int
) -> None:
    async def scenario(made: Gateway, target: Target, replicas: dict[str, Paired]) -> None:
        if "down" in faults.values():
            replicas["prefill"].behaviour = "error"
            replicas["prefill"].fault = ""
            plain = replicas["prefill"]

            async def error(path: str, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
                plain._plain(writer, 500, {"error": {"message": "broken"}})

            plain._complete = error  # type: ignore[method-assign]
        assert tokens(await ask(target)) == RIGHT
        events = made.counters.events()
        assert (events["handed_over"], events["hand_over_failed"]) == (handed, 1)

    with_pair(scenario, **faults)


def test_a_client_may_have_any_replica_do_everything() -> None:
    async def scenario(made: Gateway, target: Target, replicas: dict[str, Paired]) -> None:
        body = json.dumps({"prompt": PROMPT, "max_tokens": 8, "stream": True}).encode()
        never = (("X-Hand-Over", "never"),)
        for _ in range(6):
            response = await fetch(
                target, "/v1/completions", method="POST", body=body, headers=never, timeout=20
            )
            assert tokens(response) == RIGHT
        assert all(replica.bodies for replica in replicas.values())
        assert made.counters.events()["handed_over"] == 0

    with_pair(scenario)


def test_a_decode_replica_that_breaks_off_is_followed_by_another() -> None:
    async def scenario(made: Gateway, target: Target, replicas: dict[str, Paired]) -> None:
        replicas["decode"].cut_after = 3
        assert tokens(await ask(target)) == RIGHT
        assert made.counters.events()["resumed"] == 1
        assert replicas[""].bodies[-1]["resume_token_ids"]
        assert "kv_transfer_params" not in replicas[""].bodies[-1]

    with_pair(scenario)


def test_a_cached_beginning_goes_to_the_replica_that_has_time() -> None:
    """While its own replica has time, nothing moves."""

    async def scenario(made: Gateway, target: Target, replicas: dict[str, Paired]) -> None:
        conversation = PROMPT * 10
        for _ in range(2):
            assert (await ask(target, prompt=conversation)).status == 200
        [holder] = [one for one in replicas.values() if one.bodies]
        [other] = [one for one in replicas.values() if one is not holder]
        assert len(holder.bodies) == 2
        holder.gap_s = 5.0
        long = [*conversation, *[9] * 6000]
        busy = asyncio.create_task(ask(target, prompt=long, max_tokens=6000))
        await eventually(lambda: len(holder.bodies) == 3)
        holder.gap_s = 0.0
        assert (await ask(target, prompt=conversation)).status == 200
        assert other.bodies[-1]["kv_transfer_params"]["do_remote_prefill"]
        assert other.taken == len(PROMPT) - 1
        events = made.counters.events()
        assert (events["prefix_moved"], events["handed_over"]) == (1, 0)
        busy.cancel()

    with_pair(scenario, roles=("both", "both 2"), limits=MOVES, policy="prefix_aware")


def test_streams_of_a_drained_replica_go_on_elsewhere_by_their_records() -> None:
    """The client sees one stream; the record is of the prompt and all tokens so far."""

    async def scenario(made: Gateway, target: Target, replicas: dict[str, Paired]) -> None:
        one, other = replicas["decode"], replicas["both"]
        one.gap_s = 0.05
        asked = asyncio.create_task(ask(target))
        await eventually(lambda: one.bodies and made.replicas.all[1].exchanges)
        await eventually(lambda: sum(e.account.chunks for e in made.replicas.all[1].exchanges) > 3)
        made.monitor.drain(made.replicas.all[1].member.id, then_remove=False)
        assert tokens(await asked) == RIGHT
        record, rest = one.bodies[-1], other.bodies[-1]
        assert record["kv_transfer_params"]["do_remote_decode"]
        made_so_far = len(record["resume_token_ids"])
        assert 0 < made_so_far < 8
        assert (record["max_tokens"], record["stream"]) == (made_so_far + 1, False)
        assert rest["resume_token_ids"] == record["resume_token_ids"]
        assert rest["kv_transfer_params"]["do_remote_prefill"]
        assert other.taken == len(PROMPT) - 1
        events = made.counters.events()
        assert (events["stream_moved"], events["resumed"], events["cut_off"]) == (1, 1, 0)

    with_pair(scenario, roles=("prefill", "decode", "both"), limits=NEVER)


@pytest.mark.parametrize("least", [1, 10_000], ids=["by records", "computed again"])
def test_streams_of_a_crowded_replica_go_where_there_is_room(least: int) -> None:
    """A quarter of the difference goes, each stream once; clients see one stream of the right
    tokens. Then the replicas are near enough, and nothing goes back."""
    right = "".join(f"w{next_token(PROMPT, at)} " for at in range(120))

    async def scenario(made: Gateway, target: Target, replicas: dict[str, Paired]) -> None:
        crowded, free = replicas["decode"], replicas["both"]
        by_name = {one.target.port: one for one in made.replicas.all}
        other = by_name[parse_url(free.url).port].member.id
        made.monitor.drain(other, then_remove=False)
        crowded.gap_s = free.gap_s = 0.05
        asked = [asyncio.create_task(ask(target, max_tokens=120)) for _ in range(12)]
        await eventually(lambda: len(crowded.bodies) == 12)
        made.monitor.undrain(other)
        assert [tokens(await one) for one in asked] == [right] * 12
        events = made.counters.events()
        assert events["stream_rebalanced"] == events["resumed"] == len(free.bodies) == 3
        assert events["stream_moved"] == (3 if least == 1 else 0)
        assert events["cut_off"] == events["hand_over_failed"] == 0
        assert free.taken == events["stream_moved"] * (len(PROMPT) - 1)
        assert all(body["resume_token_ids"] for body in free.bodies)

    limits = msgspec.structs.replace(NEVER, rebalance_gap=8, move_record_tokens=least)
    with_pair(scenario, roles=("decode", "both"), limits=limits)


class Crowd:
    """A stream at a replica: it moves at once, as often as it is asked to."""

    def __init__(self, at: Replica, made: int) -> None:
        self.at, self.output_tokens, self.moves = at, made, 0
        at.exchanges.add(self)  # type: ignore[arg-type]

    def rebalance(self, to: Replica) -> bool:
        self.at.exchanges.discard(self)  # type: ignore[arg-type]
        self.at, self.moves = to, self.moves + 1
        to.exchanges.add(self)  # type: ignore[arg-type]
        return True


class Replicas:
    """As `ReplicaSet`, of replicas whose requests are all of this process."""

    has_roles = True

    def __init__(self, count: int) -> None:
        self.all = [
            Replica(Member(id=n, slot=n, target=Target("x", n), kind="millrace", role="both"))
            for n in range(count)
        ]

    def available(self) -> list[Replica]:
        return self.all

    def refresh_load(self, of: list[Replica]) -> None:
        for one in of:
            one.in_flight = len(one.exchanges)


@settings(max_examples=40, deadline=None)
@given(crowds=st.lists(st.integers(0, 60), min_size=2, max_size=5), gap=st.integers(4, 20))
def test_rebalancing_comes_to_rest_and_never_turns_the_balance(crowds: list[int], gap: int) -> None:
    replicas = Replicas(len(crowds))
    made = [Crowd(replicas.all[at], n) for at, count in enumerate(crowds) for n in range(count)]
    rebalancer = Rebalancer(replicas, gap)  # type: ignore[arg-type]
    spread = max(crowds) - min(crowds)
    for _ in range(400):
        moved = rebalancer.look()
        sizes = [len(one.exchanges) for one in replicas.all]
        assert max(sizes) - min(sizes) <= spread, "no move makes it worse"
        assert moved <= MOST_AT_ONCE
        spread = max(sizes) - min(sizes)
    assert spread < gap
    assert sum(sizes) == len(made)
    assert not any(rebalancer.look() for _ in range(4)), "at rest"


def test_a_vllm_pair_whose_counters_stand_still_is_reported_and_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pair_checks, "READ_AFTER", 0.01)

    async def scenario(made: Gateway, target: Target, replicas: dict[str, Paired]) -> None:
        assert tokens(await ask(target)) == RIGHT
        await eventually(lambda: made.counters.events()["hand_over_unproven"] == 1)
        before = len(replicas["prefill"].bodies)
        assert tokens(await ask(target)) == RIGHT
        assert len(replicas["prefill"].bodies) == before

    with_pair(scenario, "vllm", decode="recompute")


def test_a_vllm_pair_that_hands_over_is_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_checks, "READ_AFTER", 0.01)

    async def scenario(made: Gateway, target: Target, replicas: dict[str, Paired]) -> None:
        for _ in range(3):
            assert tokens(await ask(target)) == RIGHT
        await asyncio.sleep(0.1)
        events = made.counters.events()
        assert (events["handed_over"], events["hand_over_unproven"]) == (3, 0)

    with_pair(scenario, "vllm")


def test_both_replicas_are_in_the_trace() -> None:
    pytest.importorskip("opentelemetry.sdk.trace")
    from tests.support.observed.collector import collector

    asked: list[str] = []

    async def scenario(made: Gateway, target: Target, replicas: dict[str, Paired]) -> None:
        assert tokens(await ask(target)) == RIGHT
        asked.extend(replicas[role].headers[-1]["traceparent"] for role in ("prefill", "decode"))

    with collector() as spans:
        with_pair(scenario, endpoint=spans.endpoint)
    (root,) = spans.named("gateway")
    assert [one.name for one in spans.below(root)] == ["prompt", "replica"]
    told = [value.rpartition("-")[0] for value in asked]
    assert told == [f"00-{root.trace}-{one.id}" for one in spans.below(root)]
