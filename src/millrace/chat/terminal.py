"""The chat loop: lines of the terminal (or of a pipe) in, answers out."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console

from millrace.chat.client import Client
from millrace.chat.server import OwnServer
from millrace.chat.session import Session
from millrace.errors import ConfigError
from millrace.model_lookup import find_model

QUOTES = '"""'  # around a text of several lines


def talk_to_new_server(
    model: str | None,
    serve_options: Sequence[str],
    api_key: str | None,
    options: dict[str, Any],
    system: str,
) -> None:
    """Start a server of `model`, chat with it, and stop it. Raises UserError."""
    if model is None:
        raise ConfigError("MODEL is missing: name one (such as millrace-mini), or give --base-url")
    find_model(model)  # a wrong name is refused before anything starts
    if sys.stdin.isatty():
        Console(highlight=False).print(f"starting {model} ...", style="dim")
    with OwnServer([model, *serve_options]) as server:
        talk_to_server(server.url, None, api_key, options, system)


def talk_to_server(
    base_url: str,
    model: str | None,
    api_key: str | None,
    options: dict[str, Any],
    system: str,
) -> None:
    """Chat with a running server. model: None takes its first. Raises UserError."""
    console = Console(highlight=False)
    client = Client(base_url, api_key)
    names = client.models()
    if model is not None and model not in names:
        raise ConfigError(f"{base_url} has no model {model!r}; it has {', '.join(names)}")
    session = Session(client, model or names[0], console, options, system)
    _talk(session, console, f"{model or names[0]} at {base_url}; /help lists the commands")


def _talk(session: Session, console: Console, greeting: str) -> None:
    if not sys.stdin.isatty():  # a pipe: one question a line
        for line in _inputs(iter(sys.stdin.readline, "")):
            if not session.handle(line):
                return
        return
    import readline  # noqa: F401  (input() then has a history and editing)

    console.print(greeting, style="dim")
    while True:
        try:
            text = next(_inputs(iter(_prompt, None)), None)
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print("\nCtrl-D or /exit leaves", style="dim")
            continue
        if text is not None and not session.handle(text):
            return


def _prompt() -> str:
    return input("> ") + "\n"


def _inputs(lines: Iterator[str]) -> Iterator[str]:
    """Inputs from lines; those that end in a backslash, or between triple quotes, are joined."""
    for line in lines:
        text = line.rstrip("\n")
        if text.startswith(QUOTES):
            text = _quoted(text[len(QUOTES) :], lines)
        while text.endswith("\\"):
            text = text[:-1] + "\n" + next(lines, "").rstrip("\n")
        if text.strip():
            yield text


def _quoted(text: str, lines: Iterator[str]) -> str:
    """Up to the closing quotes, or the last line."""
    while not text.endswith(QUOTES):
        line = next(lines, None)
        if line is None:
            return text
        text += "\n" + line.rstrip("\n")
    return text[: -len(QUOTES)].strip("\n")
