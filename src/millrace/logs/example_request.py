"""The command by which a user tries a server that has just started."""

from __future__ import annotations

import msgspec


def example_request(url: str, model: str, *, token_ids: bool = False, socket: str = "") -> str:
    """A curl command that asks `model` at `url`. token_ids: prompts must be token ids. socket: path
    of the Unix socket on which the server listens."""
    path: str
    body: dict[str, object]
    path, body = "chat/completions", {"messages": [{"role": "user", "content": "Hello"}]}
    if token_ids:
        path, body = "completions", {"prompt": [1, 2, 3], "return_token_ids": True}
    example = msgspec.json.encode({"model": model, **body, "max_tokens": 64}).decode()
    where = f" --unix-socket {socket}" if socket else ""
    return f"curl{where} {url}/v1/{path} -H 'Content-Type: application/json' -d '{example}'"
