"""Prefixes that come back from lower tiers: right tokens, no leak, and nothing computed twice."""

from __future__ import annotations

import random
from unittest.mock import patch

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.engine.cache import cold_store
from millrace.engine.engine import Engine
from millrace.engine.scheduler import Scheduler
from millrace.protocol import AddRequest, Limits, SamplingParams
from tests.support.fake_worker import EOS, FakeWorker, expected_output

PAGE = 4


def limits(**changes: object) -> Limits:
    values: dict[str, object] = {
        "max_num_seqs": 3, "max_num_batched_tokens": 64, "max_model_len": 400, "page_size": PAGE,
        "num_pages": 260, "num_snapshots": 3, "drafts": 1, "eos_ids": frozenset({EOS}),
        "host_cache": 1 << 20, "page_bytes": 256, "snapshot_bytes": 1024,
    }  # fmt: skip
    return Limits(**{**values, **changes})  # type: ignore[arg-type]


def engine(lim: Limits, depth: int = 0, seed: int = 0, worker: FakeWorker | None = None) -> Engine:
    made = worker or FakeWorker(PAGE, lim.drafts, lim.max_num_batched_tokens, seed=seed)
    return Engine(Scheduler(lim), made, depth=depth, check=True)


def ask(eng: Engine, prompts: dict[str, list[int]], most: int = 12) -> dict[str, list[int]]:
    """Send all at once; the answers."""
    for name, prompt in prompts.items():
        params = SamplingParams(max_tokens=most, temperature=0.0)
        eng.add(AddRequest(id=name, prompt=prompt, params=params))
    got: dict[str, list[int]] = {name: [] for name in prompts}
    for _ in range(20_000):
        if not eng.has_work():
            break
        for delta in eng.step():
            got[delta.id] += delta.token_ids
    assert not eng.has_work()
    for name, prompt in prompts.items():
        total = min(len(prompt) + most, eng.scheduler.limits.max_model_len)
        assert got[name] == expected_output(prompt, total, frozenset({EOS}))
    return got


def talk(eng: Engine, rng: random.Random, sessions: int, turns: int) -> tuple[int, int]:
    """Conversations in turn. Returns (tokens computed, tokens that were new) from turn 2 on."""
    lines = [[rng.randint(1, 49) for _ in range(40)] for _ in range(sessions)]
    computed = new = 0
    for turn in range(turns):
        for number, line in enumerate(lines):
            before = eng.stats()
            answer = ask(eng, {f"{turn}.{number}": line})[f"{turn}.{number}"]
            after = eng.stats()
            if turn:
                computed += len(line) - (after.prefix_hits - before.prefix_hits)
                new += 10
            lines[number] = [*line, *answer, *(rng.randint(1, 49) for _ in range(10))]
    return computed, new


def test_sessions_that_do_not_fit_the_device_come_back_from_memory() -> None:
    eng = engine(limits())
    computed, new = talk(eng, random.Random(1), sessions=12, turns=5)
    assert computed <= 1.1 * new + 48  # the last token of each answer is computed again
    assert eng.stats().host_hits > 0
    eng.scheduler.reset_prefix_cache()
    eng.scheduler.check_integrity()
    assert eng.stats().host_cache_used == 0


@pytest.mark.parametrize("seed", range(12))
def test_prompts_wait_for_room_rather_than_be_computed_again(seed: int) -> None:
    """All sessions ask at once, where the device has room for two and memory for all."""
    rng = random.Random(seed)
    lim = limits(num_pages=110, num_snapshots=8, max_num_seqs=6, drafts=rng.randint(0, 2))
    eng = engine(lim, depth=rng.randint(0, 1), seed=seed)
    lines = [[rng.randint(1, 49) for _ in range(rng.randint(120, 180))] for _ in range(6)]
    for number, line in enumerate(lines):
        line += [*ask(eng, {f"first {number}": line})[f"first {number}"], 7]
    for turn in range(3):
        for number, line in enumerate(lines):
            params = SamplingParams(max_tokens=8, temperature=0.0)
            eng.add(AddRequest(id=f"{turn}.{number}", prompt=line, params=params))
        cached: dict[str, int] = {}
        said: dict[str, list[int]] = {f"{turn}.{n}": [] for n in range(6)}
        for _ in range(20_000):
            for delta in eng.step() if eng.has_work() else []:
                cached.setdefault(delta.id, delta.cached_tokens or 0)
                said[delta.id] += delta.token_ids
        assert not eng.has_work()
        for number, line in enumerate(lines):
            assert cached[f"{turn}.{number}"] > len(line) // 2
            total = len(line) + 8
            assert said[f"{turn}.{number}"] == expected_output(line, total, frozenset({EOS}))
            line += [*said[f"{turn}.{number}"], rng.randint(1, 49)]


def test_sessions_that_do_not_fit_memory_come_back_from_files() -> None:
    few = 8 * (256 * 30 + 1024)
    eng = engine(limits(host_cache=few, disk_cache=1 << 30))
    computed, new = talk(eng, random.Random(2), sessions=16, turns=4)
    assert computed <= 1.1 * new + 48
    assert eng.stats().disk_hits > 0


def test_conversations_go_on_from_files_after_a_restart() -> None:
    rng, worker = random.Random(3), FakeWorker(PAGE, 1, 64)
    lim = limits(disk_cache=1 << 30)
    eng = engine(lim, worker=worker)
    prompt = [rng.randint(1, 49) for _ in range(50)]
    answer = ask(eng, {"a": prompt})["a"]
    later = [*prompt, *answer, 5, 6, 7]
    second = FakeWorker(PAGE, 1, 64)
    second.files = worker.files
    restarted = engine(lim, worker=second)
    restarted.scheduler.restore(worker.found())
    ask(restarted, {"b": later})
    assert restarted.stats().prefix_hits == len(later) - 4
    assert restarted.stats().disk_hits == len(later) - 4


def test_damaged_files_are_computed_again() -> None:
    rng, worker = random.Random(4), FakeWorker(PAGE, 1, 64)
    lim = limits(disk_cache=1 << 30)
    eng = engine(lim, worker=worker)
    prompt = [rng.randint(1, 49) for _ in range(50)]
    answer = ask(eng, {"a": prompt})["a"]
    later = [*prompt, *answer, 5, 6, 7]
    second = FakeWorker(PAGE, 1, 64)
    second.files, second.damaged = worker.files, {key for key, _ in worker.files}
    restarted = engine(lim, worker=second)
    restarted.scheduler.restore(worker.found())
    ask(restarted, {"b": later})
    assert restarted.stats().prefix_hits == 0


@pytest.mark.parametrize("part", [1, 1 << 28], ids=["in parts", "whole"])
def test_files_stay_within_their_limit(monkeypatch: pytest.MonkeyPatch, part: int) -> None:
    monkeypatch.setattr(cold_store, "PART_BYTES", part)
    eng = engine(limits(disk_cache=40_000))
    talk(eng, random.Random(5), sessions=10, turns=3)
    assert 0 < eng.stats().disk_cache_used <= 40_000
    worker = eng.worker
    assert isinstance(worker, FakeWorker)
    kept = sum(1024 if part == "state" else 0 for _, part in worker.files)
    assert kept <= 40_000


def test_where_prefixes_are_is_told_by_their_tags() -> None:
    """Of three conversations that take turns, those whose snapshots were evicted are in memory."""
    eng, rng = engine(limits(num_snapshots=2)), random.Random(6)
    lines = {tag: [rng.randint(1, 49) for _ in range(40)] for tag in (11, 22, 33)}
    where: dict[int, int] = {}
    for turn in range(2):
        for tag, line in lines.items():
            params = SamplingParams(max_tokens=4, temperature=0.0)
            eng.add(AddRequest(id=f"{turn}.{tag}", prompt=line, params=params, tag=tag))
            while eng.has_work():
                for delta in eng.step():
                    line += delta.token_ids
            where |= eng.scheduler.take_moved()
            line += [5, 6, 7]
            assert where[tag] == 4
    assert where == {11: 2, 22: 2, 33: 4}
    eng.reset_prefix_cache()
    where |= eng.scheduler.take_moved()
    assert set(where.values()) == {0}


def test_salts_share_nothing_in_lower_tiers() -> None:
    eng = engine(limits(num_snapshots=1))
    prompt = list(range(1, 49))
    for name, salt in (("a", "x"), ("b", ""), ("c", "y")):
        params = SamplingParams(max_tokens=4, temperature=0.0)
        eng.add(AddRequest(id=name, prompt=prompt, params=params, cache_salt=salt))
        while eng.has_work():
            eng.step()
    assert eng.stats().prefix_hits == 0


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    depth=st.integers(0, 2),
    drafts=st.integers(0, 3),
    pages=st.integers(110, 200),
    snapshots=st.integers(1, 6),
    host=st.sampled_from([6_000, 20_000, 100_000]),
    disk=st.sampled_from([0, 30_000, 1 << 30]),
    part=st.sampled_from([1, 600, 1 << 28]),
)
def test_every_mix_brings_the_right_tokens(part: int, **given: int) -> None:
    """Turns, branches, repeats, aborts, resets and damaged files, with little room everywhere."""
    with patch.object(cold_store, "PART_BYTES", part):
        talk_in_a_mix(**given)


def talk_in_a_mix(
    seed: int, depth: int, drafts: int, pages: int, snapshots: int, host: int, disk: int
) -> None:
    rng = random.Random(seed)
    lim = limits(
        num_pages=pages, num_snapshots=snapshots, host_cache=host, disk_cache=disk, drafts=drafts
    )
    eng = engine(lim, depth, seed)
    worker = eng.worker
    assert isinstance(worker, FakeWorker)
    lines = [[rng.randint(1, 49) for _ in range(rng.randint(1, 60))] for _ in range(4)]
    for turn in range(6):
        chosen = rng.sample(range(len(lines)), rng.randint(1, 3))
        got = ask(eng, {f"{turn}.{n}": lines[n] for n in chosen}, rng.randint(1, 20))
        for n in chosen:
            answer = got[f"{turn}.{n}"]
            if rng.random() < 0.8 and len(lines[n]) + len(answer) < 300:
                kept = answer if rng.random() < 0.8 else answer[: len(answer) // 2]
                lines[n] = [*lines[n], *kept, *(rng.randint(1, 49) for _ in range(5))]
        event = rng.random()
        if event < 0.1:
            eng.reset_prefix_cache()
        elif event < 0.2:
            worker.damaged |= {key for key, _ in worker.files if rng.random() < 0.5}
        elif event < 0.3:
            params = SamplingParams(max_tokens=30, temperature=0.0)
            eng.add(AddRequest(id=f"x{turn}", prompt=lines[0], params=params))
            for _ in range(rng.randint(0, 5)):
                eng.step()
            eng.abort([f"x{turn}"])
    eng.scheduler.reset_prefix_cache()
    while eng.has_work():
        eng.step()
    eng.scheduler.reset_prefix_cache()
    eng.scheduler.check_integrity()
    stats = eng.stats()
    assert stats.free_pages == stats.total_pages
    assert (stats.snapshots_used, stats.host_cache_used, stats.disk_cache_used) == (0, 0, 0)
    assert msgspec.structs.asdict(stats)["running"] == 0
