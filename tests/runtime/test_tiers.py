"""Prompts that come back from the host's memory and from files: the same tokens as cold ones."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLMatcher

from millrace.engine.engine import Engine
from millrace.errors import ConfigError
from millrace.protocol import AddRequest, Grammar, SamplingParams
from tests.support.engines import assert_same, build, generate, run

_rng = random.Random(8)
LINES = [[_rng.randrange(3, 300) for _ in range(n)] for n in (33, 47, 64, 80)]
NEW = [5, 6, 7]
LENGTH = 9


@pytest.fixture(scope="module")
def turns(tiny_model: Path) -> list[tuple[list[list[int]], list[list[int]]]]:
    """(prompts, answers) of three turns of each line, each computed alone and cold."""
    found, prompts = [], LINES
    for _ in range(3):
        answers = [run(tiny_model, [p], LENGTH, max_num_seqs=1)[0][0] for p in prompts]
        found.append((prompts, answers))
        prompts = [[*p, *a, *NEW] for p, a in zip(prompts, answers, strict=True)]
    return found


def options(k: int = 0, **more: Any) -> dict[str, Any]:
    drafts = {"speculative_config": {"num_speculative_tokens": k}} if k else {}
    return {
        "enable_prefix_caching": True, "num_snapshots": 2, "host_cache_gb": 0.02, **drafts, **more,
    }  # fmt: skip


def settle(engine: Engine) -> None:
    """Run until nothing is left to do, files included."""
    while engine.has_work():
        engine.step()


def talk(
    engine: Engine, model: Path, turns: list[tuple[list[list[int]], list[list[int]]]], first: int
) -> int:
    """All turns from `first` on, one line after another. Returns how many tokens of the prompts
    were computed that an earlier turn had."""
    again = 0
    for number, (prompts, answers) in enumerate(turns):
        for prompt, answer in zip(prompts, answers, strict=True) if number >= first else ():
            before = engine.stats().prefix_hits
            assert_same(model, [prompt], [answer], generate(engine, [prompt], LENGTH))
            if number:
                again += len(prompt) - len(NEW) - (engine.stats().prefix_hits - before)
    settle(engine)
    return again


@pytest.mark.parametrize(
    "given",
    [
        *(pytest.param(options(k), id=f"mtp-{k}") for k in range(4)),
        pytest.param(options(2, async_scheduling=True, block_size=4), id="pipelined"),
        pytest.param(options(1, tensor_parallel_size=2), id="two-ranks"),
        pytest.param(options(1, mamba_ssm_cache_dtype="bfloat16"), id="states-of-16-bits"),
    ],
)
def test_same_tokens_from_memory(
    tiny_model: Path, turns: list[tuple[list[list[int]], list[list[int]]]], given: dict[str, Any]
) -> None:
    if "mamba_ssm_cache_dtype" in given:
        engine = build(tiny_model, **given)
        everything = build(tiny_model, **{**given, "num_snapshots": 64, "host_cache_gb": 0.0})
        for prompts, _ in turns:
            for prompt in prompts:
                want = generate(everything, [prompt], LENGTH)
                assert generate(engine, [prompt], LENGTH) == want
        assert engine.stats().host_hits > 0
        everything.close()
    else:
        engine = build(tiny_model, **given)
        assert talk(engine, tiny_model, turns, 0) == 2 * len(LINES)  # an answer's last token each
        assert engine.stats().host_hits > 0
    engine.scheduler.check_integrity()
    engine.close()


@pytest.mark.parametrize("k", [0, 3])
def test_same_tokens_from_files_after_a_restart(
    tiny_model: Path,
    turns: list[tuple[list[list[int]], list[list[int]]]],
    tmp_path: Path,
    k: int,
) -> None:
    given = options(k, disk_cache=str(tmp_path / "cache"), host_cache_gb=0.0)
    engine = build(tiny_model, **given)
    talk(engine, tiny_model, turns[:2], 0)
    engine.close()
    engine = build(tiny_model, **given)
    assert talk(engine, tiny_model, turns, 2) == len(LINES)
    assert engine.stats().disk_hits > 0
    engine.close()


def test_files_of_two_ranks(
    tiny_model: Path, turns: list[tuple[list[list[int]], list[list[int]]]], tmp_path: Path
) -> None:
    """Each has its own. What one of them lacks, or cannot read, is computed again."""
    given = options(1, disk_cache=str(tmp_path), host_cache_gb=0.0, tensor_parallel_size=2)
    engine = build(tiny_model, **given)
    talk(engine, tiny_model, turns[:2], 0)
    engine.close()
    folders = list(tmp_path.iterdir())
    names = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    assert names[0] == names[1]
    ends = sorted(folders[1].glob("*.state"), key=lambda path: path.stat().st_mtime_ns)
    missing, spoiled = ends[-2:]  # of the latest answers
    missing.unlink()
    data = spoiled.read_bytes()
    spoiled.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    engine = build(tiny_model, **given)
    assert len(LINES) < talk(engine, tiny_model, turns, 2) < sum(map(len, turns[2][0]))
    assert engine.stats().disk_hits > 0
    assert not (folders[0] / missing.name).exists()
    engine.scheduler.check_integrity()
    engine.close()


KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0, "max_tokens": LENGTH, "ignore_eos": True},
    {"temperature": 0.9, "seed": 3, "max_tokens": LENGTH, "ignore_eos": True},
    {"temperature": 1.0, "seed": 7, "max_tokens": 40},  # under a grammar, as the last
    {"temperature": 0.0, "max_tokens": 40},
]
PATTERN = r"(yes|no), [0-9]{2,5}( and [a-f]{1,6}){1,2}\."


def answers(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    """Of each line in its own kind, one after another."""
    grammar = Grammar(LLMatcher.grammar_from_regex(PATTERN))
    found = []
    for number, (prompt, kind) in enumerate(zip(prompts, KINDS, strict=True)):
        bound = grammar if number > 1 else None
        engine.add(AddRequest(f"{number}", prompt, SamplingParams(**kind), grammar=bound))
        found.append([])
        while engine.has_work():
            found[-1] += [token for delta in engine.step() for token in delta.token_ids]
    return found


@pytest.fixture(scope="module")
def kinds(tiny_model: Path) -> list[tuple[list[list[int]], list[list[int]]]]:
    """(prompts, answers) of three turns of each line, cold."""
    engine, prompts, found = build(tiny_model, max_num_seqs=1), LINES, []
    for _ in range(3):
        found.append((prompts, answers(engine, prompts)))
        prompts = [[*p, *a, *NEW] for p, a in zip(*found[-1], strict=True)]
    engine.close()
    return found


@pytest.mark.parametrize("k", range(4))
def test_every_kind_of_request_through_every_tier(
    tiny_model: Path,
    kinds: list[tuple[list[list[int]], list[list[int]]]],
    tmp_path: Path,
    k: int,
) -> None:
    """Greedy and seeded, free and under a grammar: from the host's memory, then from files."""
    given = options(k, disk_cache=str(tmp_path))
    for number, (prompts, expected) in enumerate(kinds):
        if number != 1:  # the last turn comes from files
            engine = build(tiny_model, **given)
        assert answers(engine, prompts) == expected
        settle(engine)
        if number == 1:
            assert engine.stats().host_hits > 0
            engine.close()
    assert engine.stats().disk_hits > 0
    engine.close()


def test_files_of_another_model_or_layout_are_not_used(tiny_model: Path, tmp_path: Path) -> None:
    for change in ({}, {"block_size": 8}, {"mamba_ssm_cache_dtype": "bfloat16"}):
        engine = build(tiny_model, **options(disk_cache=str(tmp_path), **change))
        generate(engine, [LINES[3]], LENGTH)
        settle(engine)
        assert engine.stats().disk_hits == 0
        engine.close()
    assert len(list(tmp_path.iterdir())) == 3


def test_damaged_and_half_written_files_are_computed_again(
    tiny_model: Path, turns: list[tuple[list[list[int]], list[list[int]]]], tmp_path: Path
) -> None:
    given = options(1, disk_cache=str(tmp_path))
    engine = build(tiny_model, **given)
    talk(engine, tiny_model, turns[:1], 0)
    engine.close()
    [folder] = tmp_path.iterdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        data = bytearray(path.read_bytes())
        if number % 3 == 0:
            data[-1] ^= 1
        elif number % 3 == 1:
            data = data[: len(data) // 2]
        path.write_bytes(data)
    (folder / "left.pages.new").write_bytes(b"x")
    engine = build(tiny_model, **given)
    talk(engine, tiny_model, turns, 1)
    engine.scheduler.check_integrity()
    engine.close()
    assert not (folder / "left.pages.new").exists()


def test_others_run_while_a_prefix_comes_back(tiny_model: Path, tmp_path: Path) -> None:
    """A slow disk delays only who waits for it."""
    given = options(disk_cache=str(tmp_path))
    engine = build(tiny_model, **given)
    answer = generate(engine, [LINES[3]], LENGTH)[0]
    settle(engine)
    engine.close()
    engine = build(tiny_model, **given)
    files = engine.worker.tiers.files  # type: ignore[attr-defined]
    fetch = files._fetch
    files._fetch = lambda moves: time.sleep(0.5) or fetch(moves)
    late = [*LINES[3], *answer, *NEW]
    ended = []

    def watch() -> None:
        ended.extend(r.id for r in engine.scheduler.running if r.generated and r.id not in ended)

    got = generate(engine, [late, LINES[0]], LENGTH, between=watch)
    assert ended == ["1", "0"]
    assert engine.stats().prefix_hits == len(late) - len(NEW) - 1
    expected = [run(tiny_model, [p], LENGTH, max_num_seqs=1)[0][0] for p in (late, LINES[0])]
    assert_same(tiny_model, [late, LINES[0]], expected, got)
    engine.close()


def test_options_that_cannot_work_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    for given, words in (
        ({"host_cache_gb": -1.0}, "host_cache_gb -1"),
        ({"disk_cache": str(tmp_path), "disk_cache_gb": 0.0}, "disk_cache_gb 0"),
        ({"host_cache_gb": 1.0, "enable_prefix_caching": False}, "prefix caching"),
        ({"host_cache_gb": 1e6}, "are free; give less"),
    ):
        with pytest.raises(ConfigError, match=words):
            build(tiny_model, **{"enable_prefix_caching": True, **given})
    (tmp_path / "file").write_text(json.dumps("a file, no folder"))
    with pytest.raises(ConfigError, match="cannot be written"):
        build(tiny_model, **options(disk_cache=str(tmp_path / "file")))
