"""Prompts computed by one engine and answered by another: right tokens, no leak, no recompute."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.engine.engine import Engine
from millrace.engine.scheduler import Scheduler
from millrace.errors import RequestError
from millrace.protocol import AddRequest, Delta, Limits, RecordSource, SamplingParams
from tests.support.fake_worker import EOS, FakeNetwork, FakeWorker, expected_output

PAGE = 4


def limits(**changes: object) -> Limits:
    values: dict[str, object] = {
        "max_num_seqs": 3, "max_num_batched_tokens": 64, "max_model_len": 400, "page_size": PAGE,
        "num_pages": 260, "num_snapshots": 4, "drafts": 1, "eos_ids": frozenset({EOS}),
        "host_cache": 1 << 20, "page_bytes": 256, "snapshot_bytes": 1024, "transfers": True,
    }  # fmt: skip
    return Limits(**{**values, **changes})  # type: ignore[arg-type]


class Pair:
    """An engine for prompts and one for answers."""

    def __init__(self, seed: int = 0, depth: int = 0, **changes: object) -> None:
        self.network = FakeNetwork()
        lim = limits(**changes)
        policy = lim.cache_policy
        self.workers = [
            FakeWorker(PAGE, lim.drafts, 64, seed=seed + n, policy=policy, network=self.network)
            for n in range(2)
        ]
        self.prefill, self.decode = (
            Engine(Scheduler(lim), worker, depth=depth, check=True) for worker in self.workers
        )
        self.deltas: dict[str, list[Delta]] = {}
        self.sources: dict[str, RecordSource] = {}

    def compute(self, name: str, prompt: list[int]) -> None:
        params = SamplingParams(max_tokens=1, temperature=0.0)
        self.prefill.add(AddRequest(name, prompt, params, hand_over=name))

    def early(self, name: str) -> RecordSource:
        """Where a record will be, before its prompt is computed."""
        return RecordSource("here", 1, "prefill", name, 0)

    def answer(self, name: str, prompt: list[int], source: RecordSource, most: int = 12) -> None:
        params = SamplingParams(max_tokens=most, temperature=0.0)
        self.decode.add(AddRequest(name, prompt, params, source=source))

    def step(self, which: Engine) -> None:
        for delta in which.step() if which.has_work() else []:
            if which is self.decode:
                self.deltas.setdefault(delta.id, []).append(delta)
            elif delta.record:
                self.sources[delta.id] = RecordSource("here", 1, "prefill", delta.id, delta.record)

    def run(self) -> None:
        for _ in range(20_000):
            if not (self.prefill.has_work() or self.decode.has_work()):
                break
            self.step(self.prefill)
            self.step(self.decode)
        assert not self.prefill.has_work()
        assert not self.decode.has_work()
        self.prefill.poll()

    def tokens(self, name: str) -> list[int]:
        return [token for delta in self.deltas[name] for token in delta.token_ids]

    def assert_nothing_left(self) -> None:
        """Records that nobody took go with their leases; then nothing is held."""
        self.workers[0].expire_leases()
        for engine in (self.prefill, self.decode):
            for _ in range(50):
                engine.poll()
            engine.scheduler.reset_prefix_cache()
            engine.scheduler.check_integrity()
            stats = engine.stats()
            assert stats.host_cache_used == 0
            assert stats.transfers.open == 0
            assert stats.free_pages == stats.total_pages


def hand_over(pair: Pair, name: str, prompt: list[int]) -> list[int]:
    pair.compute(name, prompt)
    pair.run()
    pair.answer(name, prompt, pair.sources[name])
    pair.run()
    return pair.tokens(name)


@pytest.mark.parametrize("policy", ["snapshot", "page"])
@pytest.mark.parametrize("length", [2, 4, 5, 8, 9, 33, 64, 100])
def test_an_answer_goes_on_from_another_engines_record(policy: str, length: int) -> None:
    pair = Pair(cache_policy=policy, snapshot_bytes=1024 if policy == "snapshot" else 0)
    prompt = [random.Random(length).randint(1, 49) for _ in range(length)]
    if policy == "page" and length <= PAGE:
        pair.compute("a", prompt)
        pair.run()
        assert not pair.sources  # no whole page is computed before the last token
        return
    assert hand_over(pair, "a", prompt) == expected_output(prompt, length + 12, frozenset({EOS}))
    computed = length - 1 if policy == "snapshot" else (length - 1) // PAGE * PAGE
    assert pair.decode.stats().prefix_hits == computed
    first = pair.deltas["a"][0]
    assert first.cache is not None
    assert first.cache.loaded["remote"] == (0, computed)
    assert pair.decode.stats().transfers.received == pair.prefill.stats().transfers.sent == 1
    pair.assert_nothing_left()


def test_pages_that_are_here_do_not_come_again() -> None:
    pair = Pair()
    first = [random.Random(1).randint(1, 49) for _ in range(64)]
    hand_over(pair, "a", first)
    before = pair.decode.stats().transfers.received_pages
    hand_over(pair, "b", [*first[:63], 7, 8, 9, 10, 11])
    moved = pair.decode.stats().transfers.received_pages - before
    assert moved == 2  # the page with the 64th token, and the next
    hand_over(pair, "c", first)
    assert pair.decode.stats().transfers.local == 1
    pair.assert_nothing_left()


def test_two_requests_of_one_record_bring_it_once() -> None:
    pair = Pair()
    prompt = [random.Random(2).randint(1, 49) for _ in range(50)]
    pair.compute("a", prompt)
    pair.run()
    for name in ("x", "y"):
        pair.answer(name, prompt, pair.sources["a"])
    pair.run()
    assert pair.tokens("x") == pair.tokens("y") == expected_output(prompt, 62, frozenset({EOS}))
    assert pair.decode.stats().transfers.received == 1
    pair.assert_nothing_left()


@pytest.mark.parametrize("policy", ["snapshot", "page"])
@pytest.mark.parametrize("depth", [0, 1])
def test_a_record_is_taken_while_its_prompt_is_computed(policy: str, depth: int) -> None:
    """The answer is asked for first; pages go as they become final, and each one once."""
    pair = Pair(depth=depth, cache_policy=policy, snapshot_bytes=1024 * (policy == "snapshot"))
    prompt = [random.Random(8).randint(1, 49) for _ in range(300)]
    pair.answer("a", prompt, pair.early("a"))
    for _ in range(3):
        pair.step(pair.decode)
    pair.compute("a", prompt)
    pair.run()
    assert pair.tokens("a") == expected_output(prompt, 312, frozenset({EOS}))
    sizes = [len(m.pages) for t in transfers(pair, 0, "offload") for m in t.moves]
    assert len(sizes) >= 300 // 64, "a part for each step"
    assert sum(sizes) == -(-299 // PAGE) - (policy == "page")
    ready = [move.record.ready for kind in ("send", "grow") for move in transfers(pair, 0, kind)]
    assert ready == [*sorted(ready[:-1]), -1]
    assert pair.decode.stats().transfers.received == pair.prefill.stats().transfers.sent == 1
    pair.assert_nothing_left()


def transfers(pair: Pair, worker: int, kind: str) -> list[Any]:
    plans = pair.workers[worker].plans
    return [one for plan in plans for one in plan.transfers if one.kind == kind]


@pytest.mark.parametrize("steps", range(5))
def test_a_prompt_that_is_given_up_is_told_to_whoever_waits_for_its_record(steps: int) -> None:
    pair = Pair()
    prompt = [random.Random(9).randint(1, 49) for _ in range(300)]
    pair.answer("a", prompt, pair.early("a"))
    pair.compute("a", prompt)
    for _ in range(steps):
        pair.step(pair.prefill)
    pair.prefill.abort(["a"])
    pair.run()
    [delta] = pair.deltas["a"]
    assert delta.transfer_failed
    assert pair.prefill.stats().transfers.sent_failed == 1
    pair.assert_nothing_left()


def test_two_prompts_of_one_record_bring_it_to_memory_once() -> None:
    pair = Pair()
    prompt = [random.Random(10).randint(1, 49) for _ in range(150)]
    for name in "ab":
        pair.answer(name, prompt, pair.early(name))
        pair.compute(name, prompt)
    pair.run()
    assert pair.tokens("a") == pair.tokens("b") == expected_output(prompt, 162, frozenset({EOS}))
    pair.assert_nothing_left()


@pytest.mark.parametrize("recompute", [False, True])
def test_a_record_that_does_not_come_is_an_error_unless_recompute_is_chosen(
    recompute: bool,
) -> None:
    pair = Pair(recompute=recompute)
    prompt = [random.Random(3).randint(1, 49) for _ in range(50)]
    pair.compute("a", prompt)
    pair.run()
    pair.network.broken.add("a")
    pair.answer("x", prompt, pair.sources["a"])
    pair.answer("y", prompt, pair.sources["a"])
    pair.run()
    for name in ("x", "y"):
        if recompute:
            assert pair.tokens(name) == expected_output(prompt, 62, frozenset({EOS}))
        else:
            [delta] = pair.deltas[name]
            assert delta.transfer_failed
            assert delta.error == "the record of the prompt did not come: it is not there"
    assert pair.decode.stats().transfers.received_failed >= 1
    pair.assert_nothing_left()


def test_without_room_in_memory_nothing_is_handed_over() -> None:
    pair = Pair(host_cache=256)
    pair.compute("a", [5] * 40)
    deltas = [delta for _ in range(20) for delta in pair.prefill.step()]
    [first] = [delta for delta in deltas if delta.token_ids]
    assert first.record == 0
    assert "--host-cache-gb" in first.record_error
    pair.answer("b", [5] * 40, RecordSource("here", 1, "prefill", "b", 39))
    pair.run()
    assert "--host-cache-gb" in (pair.deltas["b"][0].error or "")
    pair.assert_nothing_left()


@pytest.mark.parametrize("snapshots", [1, 2, 3])
@pytest.mark.parametrize("depth", [0, 1])
def test_more_prompts_at_once_than_snapshots_are_all_handed_over(
    depth: int, snapshots: int
) -> None:
    """The last token of a prompt waits for a snapshot that another record leaves."""
    pair = Pair(3, depth, num_snapshots=snapshots, max_num_seqs=8)
    rng = random.Random(snapshots)
    prompts = {
        str(n): [rng.randint(1, 49) for _ in range(length)]
        for n, length in enumerate([2, 9, 40, 17, 150, 16, 33, 90, 5, 64, 65, 12])
    }
    for name, prompt in prompts.items():
        pair.compute(name, prompt)
    pair.run()
    records = {name: source.tokens for name, source in pair.sources.items()}
    assert records == {name: len(prompt) - 1 for name, prompt in prompts.items()}
    for name, prompt in prompts.items():
        pair.answer(name, prompt, pair.sources[name])
    pair.run()
    for name, prompt in prompts.items():
        wanted = expected_output(prompt, len(prompt) + 12, frozenset({EOS}))
        assert pair.tokens(name) == wanted
    pair.assert_nothing_left()


def test_requests_that_cannot_go_on_from_a_record_are_refused() -> None:
    pair = Pair()
    with pytest.raises(RequestError, match="the record has 9 tokens, and the prompt has 9"):
        pair.answer("a", [3] * 9, RecordSource("here", 1, "prefill", "a", 9))
    other = Engine(Scheduler(limits(transfers=False)), pair.workers[0])
    with pytest.raises(RequestError, match="--role prefill, decode or both"):
        other.add(AddRequest("a", [1, 2], SamplingParams(), hand_over="a"))


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    depth=st.integers(0, 1),
    host=st.sampled_from([6_000, 20_000, 1 << 20]),
    pages=st.sampled_from([60, 120, 260]),
)
def test_any_order_of_hand_overs_failures_and_aborts(
    seed: int, depth: int, host: int, pages: int
) -> None:
    """Many conversations through a small pair, with records that break, aborts and resets: each
    answer is right or an error that says so, and nothing is left."""
    rng = random.Random(seed)
    pair = Pair(seed, depth, host_cache=host, num_pages=pages)
    prompts: dict[str, list[int]] = {}
    asked: set[str] = set()
    aborted: set[str] = set()
    shared = [rng.randint(1, 49) for _ in range(30)]
    for turn in range(200):
        if len(prompts) < 12 and rng.random() < 0.2:
            name = str(turn)
            length = rng.choice([20, 20, 150])
            prompts[name] = shared[: rng.randint(0, 30)]
            prompts[name] += [rng.randint(1, 49) for _ in range(length)]
            if rng.random() < 0.4:
                asked.add(name)
                pair.answer(name, prompts[name], pair.early(name))
            pair.compute(name, prompts[name])
        for name in sorted(set(pair.sources) - asked):
            if rng.random() < 0.5:
                asked.add(name)
                if rng.random() < 0.2:
                    pair.network.broken.add(name)
                pair.answer(name, prompts[name], pair.sources[name])
        if asked and rng.random() < 0.05:
            victim = rng.choice(sorted(asked))
            aborted.add(victim)
            pair.decode.abort([victim])
        if prompts and rng.random() < 0.05:
            pair.prefill.abort([rng.choice(sorted(prompts))])
        if rng.random() < 0.02:
            rng.choice([pair.prefill, pair.decode]).reset_prefix_cache()
        if rng.random() < 0.02:
            pair.workers[0].expire_leases()
        pair.step(rng.choice([pair.prefill, pair.decode]))
    pair.run()
    for name in asked - aborted:
        deltas = pair.deltas[name]
        if not deltas[-1].error:
            total = len(prompts[name]) + 12
            assert pair.tokens(name) == expected_output(prompts[name], total, frozenset({EOS}))
            assert deltas[0].cached_tokens == len(prompts[name]) - 1, "nothing is computed twice"
    pair.assert_nothing_left()


def test_a_plan_with_records_survives_its_encoding() -> None:
    pair = Pair()
    hand_over(pair, "a", [9] * 40)
    for plan in [plan for worker in pair.workers for plan in worker.plans if plan.transfers]:
        data = msgspec.msgpack.encode(plan)
        assert msgspec.msgpack.decode(data, type=type(plan)) == plan
