"""`millrace eval` against a server that answers rightly, wrongly, or not at all, and in-process."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from millrace.eval.command import eval_command
from millrace.eval.evaluation import make_all
from millrace.tasks import Item

ANSWERS = {
    item.messages[-1]["content"]: item for item in make_all(["policy", "math", "chat"], 30, 0)
}


class Handler(BaseHTTPRequestHandler):
    """Knows every reference answer; numbers below `wrong` of 10 arithmetic ones are spoilt."""

    protocol_version = "HTTP/1.1"
    wrong = 0
    fail = False

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._reply(200, {"data": [{"id": "the-model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.fail:
            self._reply(429, {"error": {"message": "full"}})
            return
        assert body["model"] == "the-model"
        assert body["temperature"] == 0.0
        item = ANSWERS[body["messages"][-1]["content"]]
        text = "nonsense" if item.task == "math" and item.index % 10 < self.wrong else item.answer
        message: dict[str, Any] = {"role": "assistant", "content": text or None}
        if item.tool_calls:
            assert body["tools"]
            message["tool_calls"] = [_as_openai(call) for call in item.tool_calls]
        self._reply(200, {"choices": [{"message": message}], "usage": {"completion_tokens": 3}})

    def _reply(self, status: int, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _as_openai(call: Any) -> dict[str, Any]:
    function = call["function"]
    return {"function": {**function, "arguments": json.dumps(function["arguments"])}}


@pytest.fixture
def url() -> Iterator[str]:
    Handler.wrong, Handler.fail = 0, False
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def run(*arguments: object) -> Result:
    return CliRunner().invoke(eval_command, [str(a) for a in arguments])


def test_a_right_server_scores_full_marks(url: str, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    result = run("--base-url", url, "--tasks", "policy,math,chat", "--num-items", 30,
                 "--json", file, "--min-accuracy", 1.0)  # fmt: skip
    assert result.exit_code == 0, result.output
    written = json.loads(file.read_text())
    assert written["run"]["model"] == "the-model"
    assert written["run"]["seed"] == 0
    assert len(written["items"]) == 90
    for task in ("policy", "math", "chat"):
        assert written["summary"][task]["items"]["right"] == 30
    assert written["summary"]["policy"]["fields"]["policyholder"]["accuracy"] == 1.0


def test_accuracy_below_the_minimum_is_exit_code_1(url: str) -> None:
    Handler.wrong = 3
    result = run("--base-url", url, "--tasks", "math", "--num-items", 30, "--min-accuracy", 0.8)
    assert result.exit_code == 1
    assert "below --min-accuracy 0.8" in result.output
    assert run("--base-url", url, "--tasks", "math", "--num-items", 30).exit_code == 0


def test_a_failing_server_counts_as_wrong_and_is_told(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Handler.fail = True
    monkeypatch.setattr("millrace.eval.models.RETRY_SECONDS", 0.6)
    result = run("--base-url", url, "--tasks", "math", "--num-items", 5, "--concurrency", 2)
    assert result.exit_code == 1
    assert "5 items got no answer" in result.output
    assert "HTTP 429" in result.output


def test_compare_pairs_two_runs(url: str, tmp_path: Path) -> None:
    a, b, c = (tmp_path / name for name in ("a.json", "b.json", "c.json"))
    asked = ("--base-url", url, "--tasks", "math,chat")
    assert run(*asked, "--num-items", 30, "--json", a).exit_code == 0
    Handler.wrong = 3
    assert run(*asked, "--num-items", 30, "--json", b).exit_code == 0
    assert run(*asked, "--num-items", 20, "--json", c).exit_code == 0
    result = run("--compare", a, b)
    assert result.exit_code == 0
    assert "0.003906" in result.output  # nine lost and none gained: 2 / 2**9
    other = run("--compare", a, c)
    assert other.exit_code == 2
    assert "different items" in other.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--tasks", "math"), "either --base-url"),
        (("--base-url", "ftp://localhost"), "'ftp://localhost' is no URL of a server"),
        (("--base-url", "http://127.0.0.1:1/v1"), "no answer"),
        (("--base-url", "http://x/v1", "--tasks", "poetry"), "there are policy, math, chat"),
        (("--base-url", "http://x/v1", "--tasks", " , "), "names no task"),
        (("--base-url", "http://x/v1", "--json", "/no/such/dir/a.json"), "create it first"),
        (("--model", "m", "--served-model-name", "n"), "give it with --base-url"),
        (("--num-items", "0"), "--num-items"),
        (("--compare", "/no/a.json", "/no/b.json"), "give a file written by --json"),
    ],
)
def test_bad_input_is_exit_code_2_and_one_line(arguments: tuple[str, ...], said: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert said in result.output
    assert "Traceback" not in result.output


class FakeLLM:
    """What eval uses of `millrace.LLM`."""

    made: dict[str, Any]

    def __init__(self, **options: Any) -> None:
        FakeLLM.made = options

    def chat(
        self, messages: list[Any], params: Any, use_tqdm: bool, chat_template_kwargs: dict[str, Any]
    ) -> list[Any]:
        assert params.temperature == 0
        outputs = []
        for conversation in messages:
            item: Item = ANSWERS[conversation[-1]["content"]]
            text = f"{item.reasoning}\n</think>\n\n{item.answer}"
            completion = SimpleNamespace(text=text, token_ids=[1, 2])
            outputs.append(SimpleNamespace(outputs=[completion]))
        return outputs


def test_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("millrace.llm.LLM", FakeLLM)
    result = run("--model", "some-dir", "--num-items", 30, "--concurrency", 4, "--min-accuracy", 1)
    assert result.exit_code == 0, result.output
    assert FakeLLM.made == {"model": "some-dir", "max_num_seqs": 4}
    assert "120 tokens" in result.output
