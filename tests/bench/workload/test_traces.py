"""Published traces: read as what they are, with their units, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from millrace.bench.workload.prompts import prompt_maker
from millrace.bench.workload.traces import read_trace
from millrace.errors import UserError

MOONCAKE = [
    {"timestamp": 0, "input_length": 6, "output_length": 3, "hash_ids": [0]},
    {"timestamp": 100, "input_length": 700, "output_length": 3, "hash_ids": [0, 1]},
    {"timestamp": 200, "input_length": 520, "output_length": 2, "hash_ids": [0, 2]},
]
BAILIAN = [
    {"chat_id": 1, "parent_chat_id": -1, "timestamp": 61.1, "input_length": 40,
     "output_length": 5, "type": "text", "turn": 1, "hash_ids": [7, 8, 9]},
    {"chat_id": 2, "parent_chat_id": 1, "timestamp": 62.6, "input_length": 48,
     "output_length": 6, "type": "text", "turn": 2, "hash_ids": [7, 8, 10]},
]  # fmt: skip
AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,12,3
2023-11-16 18:15:47.9305900,15,2
"""
BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,20,3,23,Conversation log
45,GPT-4,18,0,18,API log
65.5,GPT-4,18,4,22,API log
"""


def written(tmp_path: Path, content: str | list[dict[str, Any]]) -> str:
    text = content if isinstance(content, str) else "\n".join(map(json.dumps, content))
    (tmp_path / "trace").write_text(text)
    return str(tmp_path / "trace")


@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize(
    ("content", "lengths", "times", "block"),
    [
        (MOONCAKE, [(6, 3), (700, 3), (520, 2)], [0, 0.1, 0.2], 512),
        (BAILIAN, [(40, 5), (48, 6)], [0, 1.5], 16),
        (AZURE, [(12, 3), (15, 2)], [0, 1.25], 512),
        (AZURE.replace("\n", "\r\n"), [(12, 3), (15, 2)], [0, 1.25], 512),
        (BURSTGPT, [(20, 3), (18, 4)], [0, 60.5], 512),
    ],
)
def test_published_traces(
    tmp_path: Path, start: str, content: Any, lengths: Any, times: list[float], block: int
) -> None:
    text = content if isinstance(content, str) else "\n".join(map(json.dumps, content))
    spec, found = read_trace(written(tmp_path, start + text), count=None, seed=0)
    assert found == pytest.approx(times)
    assert [(row.input_tokens, row.output_tokens) for row in spec.rows] == lengths
    assert spec.block_tokens == block


def test_equal_blocks_are_equal_tokens_and_words(tmp_path: Path) -> None:
    spec, _ = read_trace(written(tmp_path, BAILIAN), count=None, seed=0)
    one, two = (prompt_maker(spec)(index).content for index in range(2))
    assert one[:32] == two[:32]
    assert one[32:40] != two[32:40]
    words = [str(prompt_maker(spec, as_text=True)(index).content).split() for index in range(2)]
    assert [len(w) for w in words] == [40, 48]
    assert words[0][:32] == words[1][:32]


def test_blocks_of_16_tell_bailians_trace_without_its_other_fields(tmp_path: Path) -> None:
    bare = [{k: v for k, v in row.items() if "chat_id" not in k} for row in BAILIAN]
    spec, times = read_trace(written(tmp_path, bare), count=None, seed=0)
    assert (spec.block_tokens, times) == (16, (0.0, pytest.approx(1.5)))


def test_failed_requests_of_a_trace_are_left_out_and_named(tmp_path: Path) -> None:
    spec, _ = read_trace(written(tmp_path, BURSTGPT), count=None, seed=0)
    assert spec.source == "trace without 1 failed request(s)"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([{**MOONCAKE[1], "hash_ids": [0, 1, 2, 3, 4]}], "line 1: input_length 700 does not fit"),
        ([{**MOONCAKE[0], "timestamp": True}], "line 1: a trace needs the numbers timestamp"),
        ([{**MOONCAKE[0], "input_length": True}], "line 1: a trace needs"),
        ([{**MOONCAKE[0], "output_length": "3"}], "line 1: a trace needs"),
        ([{**MOONCAKE[0], "hash_ids": [-1]}], "line 1: hash_ids must be"),
        ([{**MOONCAKE[0], "hash_ids": [True]}], "line 1: hash_ids must be"),
        ([{**MOONCAKE[0], "hash_ids": "0"}], "line 1: hash_ids must be"),
        (BURSTGPT.replace(",23,", ",24,"), "line 2: 20 request and 3 response tokens are not"),
        (BURSTGPT.replace("ChatGPT,20", "ChatGPT,many"), "line 2: BurstGPT's trace has"),
        (AZURE.replace("12", "x"), "line 2: Azure's trace has"),
        (AZURE.replace("2023-11-16 18:15:46.6805900", "soon"), "line 2: Azure's trace has"),
        ("time,tokens\n1,2\n", "not a known trace (it begins with time, tokens)"),
        ("[1, 2]", "not a known trace"),
        ("", "there is no request in it"),
        ("PAR1xxxx", "a Parquet file; give it as JSON Lines or CSV"),
    ],
)
def test_what_contradicts_itself_is_refused(tmp_path: Path, content: Any, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        read_trace(written(tmp_path, content), count=None, seed=0)
    assert expected in str(caught.value)
