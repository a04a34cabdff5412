"""`millrace chat` as its user meets it: questions, commands, Ctrl-C, a server of its own."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from millrace.chat.client import DraftCounters
from millrace.chat.session import Timing
from millrace.cli import run
from tests.support.fake_engine import Behaviour
from tests.support.live_server import LiveServer, fake_server, wait_for
from tests.support.text_model import token_id


@pytest.fixture(scope="module")
def server(text_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """It says the question's words again, until max_tokens."""
    behaviour = Behaviour(refuse=token_id(text_model, "two words"))
    log = tmp_path_factory.mktemp("chat") / "log"
    with fake_server(text_model, log, behaviour, max_model_len=512) as running:
        yield running


def talk(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    text: str,
    *arguments: str,
) -> tuple[int, str, str]:
    """The exit status, stdout and stderr of a chat with these lines."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    monkeypatch.setenv("COLUMNS", "200")
    status = run(["chat", *arguments])
    return status, *capsys.readouterr()


def test_a_conversation(
    server: LiveServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    file = tmp_path / "talk.json"
    lines = [
        "hello", '"""', "two", "lines", '"""', "and\\", "three", "/undo", "/set top_k 5",
        "/think off", "/system be brief", "/retry", f"/save {file}", "/exit", "never asked",
    ]  # fmt: skip
    status, out, _ = talk(
        monkeypatch, capsys, "\n".join(lines), "--base-url", server.url, "--max-tokens", "7"
    )
    assert status == 0
    assert out.count("[7 tokens, ") == 4
    assert "tok/s, first after" in out
    assert "drafts accepted" in out
    assert "[cut: max_tokens]" in out
    assert "top_k = 5" in out
    saved = json.loads(file.read_text())
    assert [one["role"] for one in saved] == ["system", *["user", "assistant"] * 2]
    assert [one["content"] for one in saved if one["role"] == "user"] == ["hello", "two\nlines"]
    assert "never asked" not in out


def test_what_is_wrong_gets_a_line_and_the_chat_goes_on(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["/nope", "/undo", "/retry", "/set temperature", "/save", "two words", "/set top_p 7",
             "hello", "/set top_p 0.5", "hello"]  # fmt: skip
    status, out, _ = talk(
        monkeypatch, capsys, "\n".join(lines), "--base-url", f"{server.url}/v1/", "--max-tokens=3"
    )
    assert status == 0
    for said in (
        "no command /nope", "nothing to undo", "nothing to ask again", "such as: /set",
        "/save takes a file", "this prompt can never run", "top_p must be in (0, 1]",
    ):  # fmt: skip
        assert said in out
    assert out.count("[3 tokens") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name one"),
        (["nonsense"], "neither a directory nor a shipped model"),
        (["--base-url", "http://127.0.0.1:9"], "no answer from http://127.0.0.1:9"),
        (["--base-url", "ftp://x"], "is no URL of a server"),
    ],
)
def test_without_a_server_there_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    status, _, err = talk(monkeypatch, capsys, "hello", *arguments)
    assert status == 2
    assert said in err
    assert len(err.splitlines()) == 1


def test_a_model_that_the_server_does_not_have(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = talk(monkeypatch, capsys, "", "other", "--base-url", server.url)
    assert status == 2
    assert "it has fake, alias" in err


def test_ctrl_c_stops_an_answer_and_not_the_chat(text_model: Path, tmp_path: Path) -> None:
    with (
        fake_server(text_model, tmp_path / "log", Behaviour(step=0.05)) as server,
        subprocess.Popen(
            [sys.executable, "-u", "-m", "millrace.cli", "chat", "--base-url", server.url],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        ) as process,
    ):  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write("hello world\n/set max_tokens 4\nhello\n")
            process.stdin.flush()
            wait_for(lambda: server.metric("vllm:generation_tokens_total") > 3, 20)
            process.send_signal(signal.SIGINT)
            wait_for(lambda: server.open_in_engine() == 0, 10)
            out, _ = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == 0
    assert "[stopped]" in out
    assert "[4 tokens" in out


def test_a_server_of_its_own(
    small_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {one.pid for one in psutil.Process().children(recursive=True)}
    status, out, _ = talk(
        monkeypatch, capsys, "hello\n", str(small_model), "--max-tokens=5", "--max-model-len=128",
        "--kv-cache-memory-bytes=16000000", "--dtype=float32",
    )  # fmt: skip
    assert status == 0
    assert " tok" in out
    after = {one.pid for one in psutil.Process().children(recursive=True)}
    assert after <= before
    status, _, err = talk(monkeypatch, capsys, "", str(small_model), "--max-model-len=100000000")
    assert status == 2
    assert "the server did not start: millrace serve: max_model_len 100000000" in err


def test_the_line_under_an_answer() -> None:
    timing = Timing(ttft=1.0, total=3.0, tokens=21, drafts=DraftCounters(10, 20, 15))
    assert timing.line() == (
        "21 tokens, 10.0 tok/s, first after 1.00 s, 75% of drafts accepted, 2.50 tokens a step"
    )
    at_once = Timing(ttft=1.0, total=1.0, tokens=2)
    assert at_once.line() == "2 tokens, 2.0 tok/s, first after 1.00 s"
