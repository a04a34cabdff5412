"""What a replica says of the prefixes it holds: hashes as a gateway has them, bounded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from millrace.common.prefix_hash import BLOCK, MAX_BLOCKS, hash_chain, hash_pieces
from millrace.gateway.http.message import Request
from millrace.gateway.http.request_info import body_for, read_request_info
from millrace.server.api.fields import COMPLETIONS, parse_body
from millrace.server.api.request_schema import CompletionRequest
from millrace.server.telemetry.prefix_report import (
    MAX_HASHES_PER_REPORT,
    MAX_PROMPTS,
    PrefixReporter,
)
from tests.support.live_server import fake_server

CHAT = b"/v1/chat/completions"
TEXT = b"/v1/completions"


def as_gateway(path: bytes, body: bytes) -> list[int]:
    return hash_pieces(read_request_info(Request(b"POST", path, "1.1", [], body, True)).prompt)


def told(http: httpx.Client, cursor: str = "0") -> Any:
    return http.get("/load", params={"prefixes_since": cursor}).json()["prefixes"]


def prefix_hashes(number: int, length: int = 1) -> list[int]:
    return hash_chain(f"{number:08}".encode() * (BLOCK // 8) * length)


BODIES = [
    (TEXT, b'{"prompt" :  "one two \\u00e9 words" , "max_tokens": 2}'),
    (TEXT, b'{"max_tokens": 2, "prompt": [%s]}' % b", ".join([b"7"] * 300)),
    (TEXT, b'{"max_tokens": 1, "prompt": ["a b", "c d"]}'),
    (CHAT, b'{"messages": [{"role": "user", %s "content": "hi"}], "max_tokens": 2}' % (b" " * 600)),
    (
        b"/v1/messages",
        b'{"messages": [ %s {"role": "user", "content": "hi"}], "max_tokens": 2, "system": "hm"}'
        % (b" " * 600),
    ),
    (b"/v1/messages", b'{"max_tokens": 2, "messages": [{"role": "user", "content": "hi"}]}'),
    (
        b"/v1/responses",
        b'{"input": "what of it?", "instructions": "be brief", "max_output_tokens": 2}',
    ),
]
NAMES = ["text", "ids", "texts", "chat", "messages", "messages alone", "responses"]


@pytest.mark.parametrize(("path", "body"), BODIES, ids=NAMES)
def test_both_sides_hash_a_prompt_alike(http: httpx.Client, path: bytes, body: bytes) -> None:
    before = told(http)
    while (more := told(http, before["since"]))["since"] != before["since"]:
        before = more
    headers = {"Content-Type": "application/json"}
    assert http.post(path.decode(), content=body, headers=headers).status_code == 200
    after = told(http, before["since"])
    assert after["hashes"] == as_gateway(path, body)
    assert after["epoch"] == before["epoch"]
    assert told(http, after["since"])["hashes"] == []


def test_a_request_that_a_gateway_words_anew_keeps_its_hashes() -> None:
    body = b'{"prompt": [1,  2, 3], "stream": true, "return_token_ids": true, "max_tokens": 9}'
    info = read_request_info(Request(b"POST", TEXT, "1.1", [], body, True))
    sent = body_for(info, "millrace", [4, 5])
    assert json.loads(sent)["resume_token_ids"] == [4, 5]
    _, given = parse_body(sent, CompletionRequest, COMPLETIONS)
    assert PrefixReporter(enabled=True).prefix_hashes([given["prompt"]]) == as_gateway(TEXT, body)
    assert PrefixReporter(enabled=False).prefix_hashes([given["prompt"]]) == []


def test_only_those_who_ask_are_told_and_a_refused_request_is_no_prefix(http: httpx.Client) -> None:
    assert set(http.get("/load").json()) == {"requests", "tokens", "server_load"}
    before = told(http)["since"]
    assert http.post("/v1/completions", json={"prompt": "x", "n": -1}).status_code == 400
    assert told(http)["since"] == before


def test_what_is_remembered_and_told_is_bounded() -> None:
    reporter = PrefixReporter(enabled=True)
    for number in range(MAX_PROMPTS + 10):
        reporter.add(prefix_hashes(number))
    report = reporter.report("0")
    assert report is not None
    assert report.hashes == [prefix_hashes(n)[0] for n in range(10, MAX_PROMPTS + 10)]
    for number in range(MAX_PROMPTS):
        reporter.add(prefix_hashes(number, 70))
    seen, since = [], report.since
    while (report := reporter.report(since)) and report.hashes:
        assert len(report.hashes) < MAX_HASHES_PER_REPORT + MAX_BLOCKS
        seen += report.hashes
        since = report.since
    assert seen == [one for n in range(MAX_PROMPTS) for one in prefix_hashes(n, 70)]


def test_what_prompts_share_is_told_once_a_report() -> None:
    reporter = PrefixReporter(enabled=True)
    for end in (b"1", b"2"):
        reporter.add(hash_chain(b"s" * 2 * BLOCK + end * BLOCK))
    report = reporter.report("0")
    assert report is not None
    assert len(report.hashes) == 4


def test_an_empty_cache_is_a_new_epoch_in_which_old_cursors_start_over() -> None:
    reporter = PrefixReporter(enabled=True)
    for number in range(5):
        reporter.add(prefix_hashes(number))
    before = reporter.report("0")
    reporter.clear()
    reporter.add(prefix_hashes(9))
    assert before is not None
    after = reporter.report(before.since)
    assert after is not None
    assert (after.hashes, after.epoch == before.epoch) == (prefix_hashes(9), False)


@pytest.mark.parametrize(
    "cursor", ["", "x", "7", "{epoch}.-1", "{epoch}.²", "{epoch}." + "9" * 5000]
)
def test_a_cursor_that_means_nothing_starts_over(cursor: str) -> None:
    reporter = PrefixReporter(enabled=True)
    reporter.add(prefix_hashes(1))
    report = reporter.report("0")
    assert report is not None
    again = reporter.report(cursor.format(epoch=report.epoch))
    assert again is not None
    assert again.hashes == prefix_hashes(1)
    beyond = reporter.report(f"{report.epoch}.99")
    assert beyond == reporter.report(report.since)


def test_without_a_prefix_cache_nothing_is_kept_or_told(text_model: Path, tmp_path: Path) -> None:
    with (
        fake_server(text_model, tmp_path / "log", enable_prefix_caching=False) as server,
        httpx.Client(base_url=server.url, timeout=20) as http,
    ):
        assert http.post("/v1/completions", json={"prompt": [1, 2]}).status_code == 200
        answer = http.get("/load", params={"prefixes_since": "0"})
        assert answer.json() == {"requests": 0, "tokens": 0, "server_load": 0}


def test_a_cache_that_was_reset_holds_nothing(text_model: Path, tmp_path: Path) -> None:
    with (
        fake_server(text_model, tmp_path / "log", debug=True) as server,
        httpx.Client(base_url=server.url, timeout=20) as http,
    ):
        assert http.post("/v1/completions", json={"prompt": [1, 2]}).status_code == 200
        before = told(http)
        assert http.post("/reset_prefix_cache").status_code == 200
        after = told(http, before["since"])
        assert (len(before["hashes"]), after["hashes"]) == (1, [])
        assert after["epoch"] != before["epoch"]


def test_a_prefix_that_has_moved_is_told_with_its_tier() -> None:
    """What two prompts begin with is where the nearer one is."""
    reporter = PrefixReporter(enabled=True)
    chains = [hash_chain(b"s" * 2 * BLOCK + end * BLOCK) for end in (b"1", b"2")]
    one, other = (reporter.add(chain) for chain in chains)
    first = reporter.report("0")
    assert first is not None
    reporter.moved({one: 2})
    second = reporter.report(first.since)
    assert second is not None
    assert (second.hashes, second.host) == ([], chains[0][2:])
    reporter.moved({other: 0})
    reporter.moved({one: 1, 999: 4})
    third = reporter.report(second.since)
    assert third is not None
    assert third.gone == chains[1][2:]
    assert third.disk == chains[0]
    assert third.host == []
    reporter.add(chains[0])  # it is asked for again, and so brought back
    last = reporter.report(third.since)
    assert last is not None
    assert (last.hashes, last.disk) == (chains[0], [])
