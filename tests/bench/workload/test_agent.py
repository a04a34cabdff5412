"""Sessions of an agent: the same for a seed, and what each request continues."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from millrace.bench.load.load_driver import Job
from millrace.bench.load.options import BenchOptions
from millrace.bench.load.request_builder import make_job
from millrace.bench.workload.agent import KINDS, AgentTurn
from millrace.bench.workload.prompts import AgentSpec, TraceRow, TraceSpec, check_spec, prompt_maker
from millrace.common.http_client import parse_url
from millrace.errors import UserError

SPEC = AgentSpec(
    count=4, turns=12, system_len=40, user_len=10, output_len=8, tool_min=20, tool_max=60,
    aux=0.5, branch=0.3, compaction=1.0, pause=0.1,
)  # fmt: skip
OPTIONS = BenchOptions(target=parse_url("http://h:1"), workload=SPEC, backend="openai-chat")


def session(index: int) -> list[tuple[Job, list[dict[str, Any]]]]:
    """All requests of a session with their messages; the answer of turn n is "answer n"."""
    found = []
    job: Job | None = make_job(OPTIONS, "m", prompt_maker(SPEC)(index), index)
    while job is not None:
        body = json.loads(job.request.split(b"\r\n\r\n")[1])
        found.append((job, body["messages"]))
        assert job.then is not None
        job = job.then(f"answer {job.turn}")
    return found


def test_every_request_begins_with_what_it_continues() -> None:
    for index in range(4):
        sent = session(index)
        by_turn = {job.turn: messages for job, messages in sent}
        assert list(by_turn) == list(range(len(sent)))
        for job, messages in sent:
            if job.base >= 0:
                answer = {"role": "assistant", "content": f"answer {job.base}"}
                assert messages[:-1] == [*by_turn[job.base], answer]
            else:
                assert len(messages) == 2
                counts = [len(m["content"].split()) for m in messages]
                assert job.fresh == round(1000 * counts[1] / sum(counts))


def test_a_seed_makes_every_kind_of_request() -> None:
    made = [session(index) for index in range(4)]
    assert [[m for _, m in one] for one in made] == [
        [m for _, m in session(index)] for index in range(4)
    ]
    kinds = {KINDS[job.kind] for one in made for job, _ in one}
    assert kinds == set(KINDS)
    systems = {one[0][1][0]["content"] for one in made}
    assert len(systems) == 1
    turns = [t for i in range(4) for t in prompt_maker(SPEC)(i).later_turns]
    tools = [len(t.text.split()) for t in turns if isinstance(t, AgentTurn) and t.kind == "tool"]
    assert tools
    assert all(20 <= length <= 60 for length in tools)
    assert max(job.pause for one in made for job, _ in one) > 0


def test_a_branch_leaves_out_the_last_exchanges() -> None:
    for index in range(4):
        last = -1
        for job, _ in session(index):
            kind = KINDS[job.kind]
            if kind in ("user", "tool", "compact"):
                assert job.base == last
            elif kind == "branch":
                assert 0 <= job.base <= last
            if kind != "aux":
                last = job.turn


def test_bad_sizes_are_refused_with_their_flag() -> None:
    for change, flag in (
        ({"turns": 0}, "--agent-turns 0"),
        ({"tool_max": 5}, "--agent-tool-max 5"),
        ({"aux": 1.5}, "--agent-aux 1.5"),
        ({"pause": -1.0}, "--agent-pause -1"),
    ):
        with pytest.raises(UserError, match=flag):
            check_spec(msgspec.structs.replace(SPEC, **change))


def test_blocks_of_a_trace_are_new_once() -> None:
    rows = (TraceRow(20, 1, (1, 2)), TraceRow(30, 1, (1, 2, 3)), TraceRow(20, 1, (4, 2)))
    make = prompt_maker(TraceSpec(rows=rows, count=3, block_tokens=10))
    assert [make(index).fresh for index in range(3)] == [1000, 333, 1000]
