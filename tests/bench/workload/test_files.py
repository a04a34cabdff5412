"""Workloads: every kind, item by item, and files that are not what they should be."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from millrace.bench.command import bench
from millrace.bench.load.arrivals import Schedule, check_schedule, due_times, rate_at
from millrace.bench.workload.files import estimate_tokens, read_custom, read_sharegpt
from millrace.bench.workload.prompts import (
    FileSpec,
    PolicySpec,
    PrefixSpec,
    RandomSpec,
    lengths,
    merge_lengths,
    prompt_maker,
    random_prompts,
    workload_line,
)
from millrace.bench.workload.traces import read_trace
from millrace.errors import UserError


def lines(path: Path, *rows: Any) -> str:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


# --- drawn -------------------------------------------------------------------------------------


def test_an_item_is_the_same_whoever_makes_it_and_when() -> None:
    spec = RandomSpec(count=None, input_len=30, output_len=9, range_ratio=0.5, seed=3)
    first, second = prompt_maker(spec), prompt_maker(spec)
    assert [first(i) for i in (7, 2, 7)] == [second(i) for i in (7, 2, 7)]
    assert first(1).content != first(2).content


def test_shared_prefixes_repeat_and_suffixes_do_not() -> None:
    spec = PrefixSpec(count=9, prefix_len=5, suffix_len=4, num_prefixes=3, output_len=2)
    prompts = [prompt_maker(spec)(i) for i in range(9)]
    heads = [tuple(p.content[:5]) for p in prompts]
    assert len(set(heads)) == 3
    assert heads[0] == heads[3] == heads[6]
    assert len({tuple(p.content[5:]) for p in prompts}) == 9
    assert {p.input_tokens for p in prompts} == {9}


def test_a_context_is_each_prompts_own_and_a_prefix_is_shared() -> None:
    spec = RandomSpec(count=3, input_len=4, output_len=2, prefix_len=3, context_len=50)
    prompts = random_prompts(spec)
    assert {p.input_tokens for p in prompts} == {57}
    assert len({tuple(p.content[:3]) for p in prompts}) == 1
    assert len({tuple(p.content[3:53]) for p in prompts}) == 3


def test_policy_documents_are_those_of_the_evaluation() -> None:
    make = prompt_maker(PolicySpec(count=4, output_len=30), as_text=True)
    prompt = make(0)
    assert isinstance(prompt.content, list)
    assert prompt.content[-1]["role"] == "user"
    assert prompt.input_tokens > 30
    text = prompt_maker(PolicySpec(count=4, output_len=30))(0).content
    assert prompt.content[-1]["content"] in text


def test_a_conversation_has_its_turns() -> None:
    spec = RandomSpec(count=2, input_len=6, output_len=4, turns=3)
    one, other = random_prompts(spec)
    assert [len(turn.text.split()) for turn in one.later_turns] == [6, 6]
    assert len({one.content, *(t.text for t in one.later_turns)}) == 3
    assert one.later_turns != other.later_turns


def test_the_line_names_the_meaning_of_the_ratio_and_the_realised_means() -> None:
    spec = RandomSpec(
        count=400, input_len=100, output_len=10, range_ratio=0.5, convention="inferencex"
    )
    seen = lengths(random_prompts(spec))
    line = workload_line(spec, seen)
    assert "range ratio 0.5 as inferencex [L*r, L]" in line
    assert 70 < seen.mean_input < 80
    assert 50 <= seen.min_input <= seen.max_input <= 100


@given(st.lists(st.integers(1, 90), min_size=1, max_size=30), st.integers(1, 6))
def test_lengths_of_parts_are_those_of_the_whole(sizes: list[int], parts: int) -> None:
    spec = RandomSpec(count=1, input_len=1, output_len=1)
    prompts = [
        prompt_maker(RandomSpec(count=1, input_len=size, output_len=size))(0) for size in sizes
    ]
    assert spec.count == 1
    whole = lengths(prompts)
    assert merge_lengths([lengths(prompts[n::parts]) for n in range(parts)]) == whole


# --- read --------------------------------------------------------------------------------------


def test_custom_lines_are_text_ids_or_messages(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "p.jsonl",
        {"prompt": "four words are here", "output_tokens": 7},
        {"prompt": [1, 2, 3]},
        {"messages": [{"role": "user", "content": "hello"}]},
    )
    spec = read_custom(path, count=None, output_len=5, tokens=lambda text: len(text.split()))
    assert [(p.input_tokens, p.output_tokens) for p in spec.prompts] == [(4, 7), (3, 5), (1, 5)]
    make = prompt_maker(spec)
    assert make(3) == make(0)  # from the start again


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "line 1: not a JSON object"),
        ('{"words": "x"}', "line 1: neither a prompt"),
        ('{"prompt": ""}', "line 1: neither a prompt"),
        ('{"prompt": "x", "output_tokens": 0}', "output_tokens 0 is not a count"),
        ("", "there is no prompt in it"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, expected: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(line)
    with pytest.raises(UserError, match="p.jsonl.*" + expected):
        read_custom(str(path), count=None, output_len=5, tokens=estimate_tokens)


def test_sharegpt_gives_what_people_said_and_how_long_answers_were(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    talk = [
        {"from": "system", "value": "be nice"},
        {"from": "human", "value": "one two three"},
        {"from": "gpt", "value": "a b"},
        {"from": "human", "value": "four"},
        {"from": "gpt", "value": "c d e"},
    ]
    path.write_text(json.dumps([{"conversations": talk}, {"conversations": talk[2:]}, {}]))

    def words(text: str) -> int:
        return len(text.split())

    spec = read_sharegpt(str(path), count=None, output_len=None, turns=2, tokens=words)
    prompt, greeted = spec.prompts
    assert (greeted.content, greeted.output_tokens) == ("four", 3)  # what the model said first
    assert (prompt.content, prompt.input_tokens, prompt.output_tokens) == ("one two three", 3, 2)
    assert [(t.text, t.output_tokens) for t in prompt.later_turns] == [("four", 3)]
    path.write_text('{"a": 1}')
    with pytest.raises(UserError, match="JSON list of conversations"):
        read_sharegpt(str(path), count=None, output_len=None, turns=1, tokens=words)


@pytest.mark.parametrize(
    ("row", "content", "input_tokens", "output_tokens"),
    [
        ({"text": "two words"}, "two words", 2, 5),  # AIPerf
        ({"texts": ["two words"], "output_sequence_length": 7}, "two words", 2, 7),
        ({"prompt": "a b", "prompt_tokens_count": 9, "output_tokens_count": 3}, "a b", 2, 3),
        ({"question": "why not", "max_tokens": 4}, "why not", 2, 4),
        ({"prompt": [1, 2, 3], "output_length": 2.0}, [1, 2, 3], 3, 2),
        (
            {"custom_id": "r1", "method": "POST", "url": "/v1/completions",
             "body": {"model": "x", "prompt": "a b c", "max_tokens": 6}},
            "a b c", 3, 6,
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a b"}]}]},
            [{"role": "user", "content": [{"type": "text", "text": "a b"}]}], 2, 5,
        ),
    ],
)  # fmt: skip
def test_rows_of_other_tools(
    tmp_path: Path, row: dict[str, Any], content: Any, input_tokens: int, output_tokens: int
) -> None:
    for text in (json.dumps(row), "\ufeff" + json.dumps(row) + "\r\n", json.dumps([row], indent=1)):
        path = tmp_path / "p.jsonl"
        path.write_text(text)
        spec = read_custom(str(path), count=None, output_len=5, tokens=lambda t: len(t.split()))
        (prompt,) = spec.prompts
        assert (prompt.content, prompt.input_tokens) == (content, input_tokens)
        assert prompt.output_tokens == output_tokens


def test_a_request_of_a_batch_file_keeps_its_other_fields(tmp_path: Path) -> None:
    body = {"model": "x", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5,
            "temperature": 0.7, "tools": [{}], "stream": False}  # fmt: skip
    path = lines(tmp_path / "b.jsonl", {"custom_id": "r1", "url": "/x", "body": body})
    (prompt,) = read_custom(path, count=None, output_len=9, tokens=estimate_tokens).prompts
    assert prompt.extra == {"temperature": 0.7, "tools": [{}]}
    assert prompt.output_tokens == 5


def test_aiperfs_inputs_and_sessions(tmp_path: Path) -> None:
    path = tmp_path / "inputs.json"
    payloads = [{"messages": [{"role": "user", "content": t}], "max_tokens": 3} for t in "ab"]
    path.write_text(json.dumps({"data": [{"session_id": "s", "payloads": payloads}]}, indent=2))
    spec = read_custom(str(path), count=None, output_len=9, tokens=estimate_tokens)
    assert [p.output_tokens for p in spec.prompts] == [3, 3]
    session = lines(tmp_path / "s.jsonl", {"session_id": "s", "turns": [{"text": "a"}, "b"]})
    (prompt,) = read_custom(session, count=None, output_len=9, tokens=estimate_tokens).prompts
    assert (prompt.content, [turn.text for turn in prompt.later_turns]) == ("a", ["b"])


def test_a_csv_with_a_column_of_prompts(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text('prompt,output_tokens_count\n"a, b",3\nc,\n')
    spec = read_custom(str(path), count=None, output_len=9, tokens=estimate_tokens)
    assert [(p.content, p.output_tokens) for p in spec.prompts] == [("a, b", 3), ("c", 9)]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"prompt": "x y", "output_tokens": true}', "line 1: output_tokens True is not a count"),
        ('{"prompt": [true, 1]}', "line 1: neither a prompt"),
        ('{"prompt": [-1]}', "line 1: neither a prompt"),
        ('{"messages": [1]}', "line 1: a message is 1"),
        ('{"messages": [{"role": "user", "content": 5}]}', "a message's content is 5"),
        ('{"timestamp": 1, "input_length": 2, "output_length": 3}', "use --dataset-name trace"),
        ('[{"conversations": []}]', "use --dataset-name sharegpt"),
        ('{"session_id": "s", "turns": [{"image": "x"}]}', "line 1: a turn has no text"),
        ("a,b\n1,2\n", "line 1: not a JSON object, nor CSV with a column of prompts"),
        ("PAR1", "a Parquet file"),
        (b"\xff\x00\xff", "not UTF-8 text"),
    ],
)
def test_what_would_be_other_work_is_refused(
    tmp_path: Path, content: str | bytes, expected: str
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        read_custom(str(path), count=None, output_len=5, tokens=estimate_tokens)
    assert expected in str(caught.value)


def test_a_trace_keeps_its_times_and_its_shared_blocks(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "t.jsonl",
        {"timestamp": 2500, "input_length": 600, "output_length": 3, "hash_ids": [1, 2]},
        {"timestamp": 1000, "input_length": 700, "output_length": 4, "hash_ids": [1, 3]},
    )
    spec, times = read_trace(path, count=None, seed=0)
    assert times == (0.0, 1.5)
    first, second = (prompt_maker(spec)(index) for index in range(2))
    assert [(p.input_tokens, p.output_tokens) for p in (first, second)] == [(700, 4), (600, 3)]
    assert first.content[:512] == second.content[:512]
    assert first.content[512:600] != second.content[512:600]
    schedule = Schedule(times=times, speed=2.0)
    assert list(due_times(schedule)) == [0.0, 0.75]
    with pytest.raises(UserError, match=r"line 1: a trace needs the numbers timestamp"):
        read_trace(lines(tmp_path / "u.jsonl", {"timestamp": 1}), count=1, seed=0)


# --- when --------------------------------------------------------------------------------------


@given(
    rate=st.floats(0.1, 1000),
    burstiness=st.sampled_from([0.3, 1.0, 5.0, math.inf]),
    processes=st.integers(1, 8),
)
def test_processes_together_send_when_one_would(
    rate: float, burstiness: float, processes: int
) -> None:
    schedule = Schedule(rate=rate, burstiness=burstiness, seed=1)
    whole = list(itertools.islice(due_times(schedule), 40))
    parts = [
        list(itertools.islice(due_times(schedule), number, 40, processes))
        for number in range(processes)
    ]
    assert sorted(at for part in parts for at in part) == whole
    assert whole == sorted(whole)
    if math.isinf(burstiness):
        assert whole[1] == pytest.approx(1 / rate)


def test_a_ramp_goes_from_its_start_to_its_end() -> None:
    linear = Schedule(ramp="linear", ramp_start=2.0, ramp_end=10.0, count=101)
    assert [rate_at(linear, n) for n in (0, 50, 100, 500)] == pytest.approx([2, 6, 10, 10])
    steep = Schedule(ramp="exponential", ramp_start=1.0, ramp_end=100.0, count=101)
    assert [rate_at(steep, n) for n in (0, 50, 100)] == pytest.approx([1, 10, 100])
    times = list(itertools.islice(due_times(steep), 101))
    early, late = times[20] - times[0], times[100] - times[80]
    assert early > 5 * late
    from_nothing = Schedule(ramp="linear", ramp_start=0.0, ramp_end=10.0, count=10)
    assert rate_at(from_nothing, 0) > 0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"ramp": "linear"}, "--ramp-up-start-rps and --ramp-up-end-rps"),
        ({"ramp": "linear", "rate": 5.0}, "leave out --request-rate"),
        ({"ramp": "linear", "ramp_start": 9.0}, "not below the start"),
        ({"ramp": "exponential", "ramp_start": 0.0}, "a start above 0"),
        ({"ramp": "linear", "count": None}, "give --num-prompts"),
        ({"speed": 0.0}, "--trace-speed"),
    ],
)
def test_a_ramp_that_makes_no_sense_is_refused(changes: dict[str, Any], expected: str) -> None:
    given_ = {"count": 10, **changes}
    if "ramp_start" in changes or "count" in changes or "rate" in changes:
        given_ = {"ramp_start": 1.0, "ramp_end": 5.0, **given_}
    with pytest.raises(UserError, match=expected):
        check_schedule(Schedule(**given_))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--dataset-name", "custom"), "give --dataset-path"),
        (("--dataset-path", "x"), "--dataset-path goes with"),
        (("--dataset-name", "custom", "--dataset-path", "/no/file"), "/no/file: No such file"),
        (("--preset", "inferencex"), "give --max-concurrency"),
        (("--duration", "0"), "--duration 0"),
        (("--processes", "0"), "--processes 0: use 1 or more"),
        (("--multi-turn-turns", "0"), "--multi-turn-turns 0: use 1 or more"),
        (("--num-runs", "0"), "--num-runs 0"),
        (("--metrics-url", "ftp://x", "--port", "9"), "no answer from"),
    ],
)
def test_flags_that_do_not_go_together(flags: tuple[str, ...], expected: str) -> None:
    result = CliRunner().invoke(bench, ["serve", *flags])
    assert isinstance(result.exception, UserError)
    assert expected in str(result.exception)


def test_a_file_is_a_workload_of_its_own() -> None:
    spec = FileSpec(prompts=tuple(random_prompts(RandomSpec(count=2, input_len=3, output_len=1))),
                     count=2, source="mine.jsonl")  # fmt: skip
    assert "2 prompts of mine.jsonl" in workload_line(spec, lengths(spec.prompts))
