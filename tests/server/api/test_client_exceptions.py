"""The exceptions that the official clients raise, as the table in docs/api.md says."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from millrace.common.api_errors import ApiError

PAGE = Path(__file__).parents[3] / "docs" / "api.md"
ROWS = re.findall(r"^\| (\d{3}) \| `(\w+)` \| `(\w+)` \|", PAGE.read_text(), re.MULTILINE)
CHAT: Any = [{"role": "user", "content": "hi"}]


class _Failing(BaseHTTPRequestHandler):
    """Answers with an error of the status that the key names, in the server's own shape."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        key = self.headers.get("x-api-key") or self.headers["authorization"].split()[1]
        error = ApiError(int(key), "what is wrong")
        body = error.encode(self.path)
        self.send_response(error.status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        for name, value in error.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is logged."""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Failing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_the_table_is_there() -> None:
    assert {"400", "401", "404", "408", "413", "429", "500", "502", "503", "504"} == {
        row[0] for row in ROWS
    }


@pytest.mark.parametrize(("status", "of_openai", "of_anthropic"), ROWS)
def test_a_status_is_the_exception_of_the_table(
    url: str, status: str, of_openai: str, of_anthropic: str
) -> None:
    one = openai.OpenAI(base_url=f"{url}/v1", api_key=status, max_retries=0)
    with pytest.raises(openai.APIStatusError, match="what is wrong") as caught:
        one.chat.completions.create(model="m", messages=CHAT)
    names = {kind.__name__ for kind in type(caught.value).__mro__}
    assert of_openai in names
    other = anthropic.Anthropic(base_url=url, api_key=status, max_retries=0)
    with pytest.raises(anthropic.APIStatusError, match="what is wrong") as failed:
        other.messages.create(model="m", max_tokens=5, messages=CHAT)
    # Older versions have no class of their own for some statuses.
    kinds = {kind.__name__ for kind in type(failed.value).__mro__}
    assert of_anthropic in kinds or not hasattr(anthropic, of_anthropic)
