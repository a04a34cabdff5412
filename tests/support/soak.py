"""Thousands of requests as a server meets them in a bad year, and the proof that nothing stays.

Good ones of every sort, clients that leave, prompts that are too long, bodies that are wrong or
hostile, bytes that are no HTTP. Every request is written as raw bytes on a connection of its own;
what must come back is known for each kind. `HeldResources` are what a server has in its hands.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import httpx
import psutil

from tests.support.live_server import command_line

WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "while", "seven")
SHARED = " ".join(WORDS * 6)  # what many prompts begin with
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ANSWER_LIMIT = 120.0  # seconds


@dataclass(frozen=True)
class Attack:
    """Bytes to send and what may come of them. statuses: 0 is a close without an answer.

    leave: seconds after which the client drops the connection; None: it reads to the end.
    half: it closes its sending side first. pieces: bytes go out in so many parts, slowly.
    """

    kind: str
    data: bytes
    statuses: frozenset[int]
    leave: float | None = None
    pieces: int = 1
    stream: bool = False


@dataclass
class Report:
    """What came back. answers: how often each kind had each status. problems: what never may be."""

    answers: Counter[tuple[str, int]] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def table(self) -> str:
        rows = [
            f"  {kind:12} {status:4} {n:7}" for (kind, status), n in sorted(self.answers.items())
        ]
        return "\n".join(rows)


# --- requests ----------------------------------------------------------------------------------


def post(path: str, body: bytes, *headers: str) -> bytes:
    """One request on a connection that closes behind it."""
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Connection: close", *headers]
    lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join((*lines, "\r\n")).encode("latin-1") + body


def good_body(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """A request that must be answered."""
    text = " ".join(rng.choices(WORDS, k=rng.randint(1, 30)))
    if rng.random() < 0.5:
        text = f"{SHARED} {text}"
    body: dict[str, Any] = {
        "max_tokens": rng.choice([1, 2, 3, 8, 8, 16, 100]),
        "stream": rng.random() < 0.6,
        "temperature": rng.choice([0, 0.7, 1.3]),
    }
    options: list[dict[str, Any]] = [
        {},
        {"seed": rng.randrange(1 << 32)},
        {"n": rng.randint(2, 3)},
        {"stop": ["e", "quick"]},
        {"ignore_eos": True},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
        {"min_p": 0.1, "top_k": 20, "top_p": 0.9},
        {"logit_bias": {"5": 10.0}, "min_tokens": 1},
        {"return_token_ids": True},
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"choice": ["yes", "no"]}},
        {"structured_outputs": {"regex": "[a-z]{1,9}"}},
    ]
    body |= rng.choice(options)
    if body["stream"] and rng.random() < 0.3:
        body["stream_options"] = {"include_usage": True}
    if rng.random() < 0.5:
        return CHAT, {**body, "messages": [{"role": "user", "content": text}]}
    prompt = text if rng.random() < 0.8 else [text, "and another"]
    return COMPLETIONS, {**body, "prompt": prompt}


def _good(rng: random.Random) -> Attack:
    path, body = good_body(rng)
    data = post(path, json.dumps(body).encode())
    return Attack("good", data, frozenset({200}), stream=body["stream"])


def _leaver(rng: random.Random, longest: float = 2.0) -> Attack:
    path, body = good_body(rng)
    body |= {"max_tokens": 200, "ignore_eos": True}
    body.pop("structured_outputs", None), body.pop("response_format", None), body.pop("stop", None)
    data = post(path, json.dumps(body).encode())
    return Attack("leaver", data, frozenset({0, 200}), leave=rng.uniform(0.0, longest))


def _half_sent(rng: random.Random) -> Attack:
    data = _good(rng).data
    cut = rng.randrange(1, len(data) - 1)
    return Attack("half sent", data[:cut], frozenset({0, 400, 408}), leave=rng.uniform(0.0, 0.1))


def _slow(rng: random.Random) -> Attack:
    good = _good(rng)
    return Attack(
        "in pieces", good.data, good.statuses, pieces=rng.randint(2, 6), stream=good.stream
    )


def _too_long(rng: random.Random) -> Attack:
    wrong: dict[str, Any] = rng.choice(
        [
            {"prompt": "x " * 50_000},
            {"prompt": [1] * 20_000},
            {"prompt": "hello", "max_tokens": 10_000_000},
        ]
    )
    return Attack("too long", post(COMPLETIONS, json.dumps(wrong).encode()), frozenset({400}))


_WRONG: tuple[bytes, ...] = (
    b"", b"{", b"null", b"[]", b'"x"', b"\xff\xfe\x00", b'{"prompt": "\xc3\x28"}',
    b'{"prompt": "\\ud800"}', b'{"prompt": NaN}', b'{"prompt": Infinity}',
    b'{"prompt": "a", "temperature": NaN}', b'{"prompt": "a", "temperature": -1}',
    b'{"prompt": "a", "temperature": 1e999}', b'{"prompt": "a", "top_p": -0.5}',
    b'{"prompt": "a", "max_tokens": -5}', b'{"prompt": "a", "max_tokens": 1e30}',
    b'{"prompt": "a", "n": 0}', b'{"prompt": "a", "n": 1000000000}',
    b'{"prompt": "a", "seed": 99999999999999999999999999}', b'{"prompt": {"a": 1}}',
    b'{"prompt": [[[1]]]}', b'{"prompt": [-1]}', b'{"prompt": [1e9]}', b'{"prompt": []}',
    b'{"prompt": "a", "stop": [[]]}', b'{"prompt": "a", "stream": "yes"}',
    b'{"prompt": "a", "logit_bias": {"x": 1}}', b'{"prompt": "a", "logit_bias": {"-1": 1}}',
    b'{"prompt": "a", "logprobs": 1000000}', b'{"prompt": "a", "model": "other"}',
    b'{"prompt": "a", "structured_outputs": {"regex": "("}}',
    b'{"prompt": "a", "structured_outputs": {"grammar": "start: ["}}',
    b'{"prompt": "a", "response_format": {"type": "json_schema", "json_schema": {"name": "x", '
    b'"schema": {"type": "no such"}}}}',
    b'{"prompt": ' + b"[" * 20_000 + b"]" * 20_000 + b"}",
    b'{"prompt": "a", "x": ' + b'{"a":' * 20_000 + b"1" + b"}" * 20_000 + b"}",
    b'{"messages": [{"role": "user", "content": 5}]}', b'{"messages": [{}]}',
    b'{"messages": "hello"}',
    b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
    b'{"messages": [{"role": "user", "content": "x"}], "tools": [5]}',
    b'{"messages": [{"role": "user", "content": "x"}], "tool_choice": {"type": "x"}}',
)  # fmt: skip


def _wrong(rng: random.Random) -> Attack:
    body = rng.choice(_WRONG)
    path = CHAT if b"messages" in body else COMPLETIONS
    return Attack("wrong", post(path, body), frozenset({400, 404, 422}))


def _odd(rng: random.Random) -> Attack:
    """A good body with one value replaced by rubbish; it may still be good."""
    path, body = good_body(rng)
    rubbish = [
        None,
        True,
        -1,
        0,
        1.5,
        2**70,
        "",
        "x",
        [],
        [None],
        {},
        {"a": {}},
        "\u0000",
        "🦊" * 99,
    ]
    body[rng.choice(list(body))] = rng.choice(rubbish)
    statuses = frozenset({200, 400, 404, 422})
    return Attack("odd", post(path, json.dumps(body).encode()), statuses)


def _large(rng: random.Random) -> Attack:
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: {1 << 40}\r\n\r\n".encode()
    return Attack("large", head + b"x" * rng.randrange(1000), frozenset({413}))


_RAW: tuple[bytes, ...] = (
    b"\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", b"GET / HTTP/9.9\r\n\r\n", b"\x00" * 5000,
    b"GET /" + b"a" * 300_000 + b" HTTP/1.1\r\n\r\n",
    b"GET /health HTTP/1.1\r\n" + b"X-Flood: yes\r\n" * 20_000 + b"\r\n",
    b"POST /v1/completions HTTP/1.1\r\nContent-Length: -7\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
    b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST /v1/completions HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nHost: a\x00b\r\n\r\n", b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
    b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET /health HTTP/1.1\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
    b"GET /%ff%fe%00 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
)  # fmt: skip


def _raw(rng: random.Random) -> Attack:
    data = rng.choice(_RAW)
    statuses = frozenset({0, 200, 400, 404, 405, 408, 431})
    return Attack("raw", data, statuses, leave=1.0)


def _pipelined(rng: random.Random) -> Attack:
    count = rng.randint(2, 20)
    one = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n"
    data = (one + b"\r\n") * count + one + b"Connection: close\r\n\r\n"
    return Attack("pipelined", data, frozenset({200}))


MIX: tuple[tuple[Callable[[random.Random], Attack], float], ...] = (
    (_good, 40), (_leaver, 15), (_slow, 4), (_half_sent, 6), (_too_long, 4), (_wrong, 14),
    (_odd, 8), (_large, 2), (_raw, 5), (_pipelined, 2),
)  # fmt: skip


# --- sending -----------------------------------------------------------------------------------


async def _exchange(host: str, port: int, attack: Attack) -> bytes:
    """Everything that came back before the server closed or the client left."""
    reader, writer = await asyncio.open_connection(host, port)
    answer = bytearray()
    try:
        size = -(-len(attack.data) // attack.pieces)
        for start in range(0, len(attack.data), size):
            writer.write(attack.data[start : start + size])
            await writer.drain()
            if attack.pieces > 1:
                await asyncio.sleep(0.02)
        async with asyncio.timeout(ANSWER_LIMIT if attack.leave is None else attack.leave):
            while part := await reader.read(1 << 16):
                answer += part
    except TimeoutError:
        if attack.leave is None:
            raise
    except ConnectionError:
        pass  # the server may close on what it refuses while more is being sent
    finally:
        writer.transport.abort()
    return bytes(answer)


def _fault(attack: Attack, answer: bytes) -> str | None:
    """What is wrong with an answer, if anything is."""
    status = status_of(answer)
    if status >= 500 or status not in attack.statuses:
        return f"{attack.kind}: status {status} for {attack.data[:300]!r}: {answer[-400:]!r}"
    body = answer.partition(b"\r\n\r\n")[2]
    if attack.leave is None and attack.stream and status == 200:
        if b"data: [DONE]" not in body[-40:] or b'"error"' in body:
            return f"{attack.kind}: a stream ended badly: {answer[-400:]!r}"
    elif status >= 400 and b'"error"' not in body and attack.leave is None:
        return f"{attack.kind}: no error object: {answer[-400:]!r}"
    return None


def status_of(answer: bytes) -> int:
    found = re.match(rb"HTTP/1\.1 (\d{3}) ", answer)
    return int(found.group(1)) if found else 0


async def soak(url: str, requests: int, seed: int = 0, at_once: int = 24) -> Report:
    """Send `requests` of the mix, `at_once` open at any time."""
    rng = random.Random(seed)
    host, port = url.removeprefix("http://").split(":")
    makers, weights = zip(*MIX, strict=True)
    attacks = iter([rng.choices(makers, weights)[0](rng) for _ in range(requests)])
    report, began = Report(), monotonic()

    async def client() -> None:
        for attack in attacks:
            try:
                answer = await _exchange(host, int(port), attack)
            except (TimeoutError, OSError) as error:
                report.problems.append(f"{attack.kind}: {error!r} for {attack.data[:300]!r}")
                continue
            report.answers[attack.kind, status_of(answer)] += 1
            if fault := _fault(attack, answer):
                report.problems.append(fault)

    await asyncio.gather(*(client() for _ in range(at_once)))
    report.seconds = monotonic() - began
    return report


# --- what a server holds -----------------------------------------------------------------------


@dataclass(frozen=True)
class HeldResources:
    """What front and engine hold when nobody asks anything of them.

    pages, snapshots: in use, after the prefix cache was told to forget everything.
    """

    running: float
    waiting: float
    pages: float
    snapshots: float
    requests: float
    connections: float
    tasks: float
    front_files: int
    engine_files: int
    engine_threads: int

    @property
    def at_rest(self) -> bool:
        """Whether all that was asked has ended, but for the question itself; the engine's word of
        an end comes after the answer."""
        held = self.running, self.waiting, self.pages, self.snapshots
        return not any(held) and self.requests <= 1 and self.connections <= 1


def holdings(url: str, pid: int) -> HeldResources:
    """Now, of the server with this pid; run with --debug, so that its cache can be emptied."""
    httpx.post(f"{url}/reset_prefix_cache", timeout=20).raise_for_status()
    page = httpx.get(f"{url}/metrics", timeout=20).text

    def metric(name: str) -> float:
        found = re.search(rf"^millrace:{name}{{.*}} (\S+)$", page, re.MULTILINE)
        assert found, f"no {name} in the metrics"
        return float(found.group(1))

    server = psutil.Process(pid)
    (engine,) = [one for one in server.children() if "--socket-dir" in command_line(one)]
    return HeldResources(
        running=metric("num_requests_running"),
        waiting=metric("num_requests_waiting"),
        pages=metric("kv_pages_capacity") - metric("kv_pages_free"),
        snapshots=metric("snapshots_used"),
        requests=metric("http_requests_open"),
        connections=metric("http_connections"),
        tasks=metric("front_tasks"),
        front_files=server.num_fds(),
        engine_files=engine.num_fds(),
        engine_threads=engine.num_threads(),
    )
