"""`millrace chat`: where the server is, and the loop over the lines of the terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import click
from rich.console import Console

from millrace.chat.client import Client
from millrace.chat.server import OwnServer
from millrace.chat.session import Session
from millrace.errors import ConfigError
from millrace.model_lookup import find_model

BLOCK = '"""'


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("model", required=False)
@click.argument("serve_options", nargs=-1, type=click.UNPROCESSED)
@click.option("--base-url", help="A server that runs already, such as http://127.0.0.1:8000.")
@click.option("--api-key", help="Its key (default: MILLRACE_API_KEY or OPENAI_API_KEY).")
@click.option("--system", default="", help="What the model is told first.")
@click.option("--temperature", type=float, help="Temperature of every answer.")
@click.option("--max-tokens", type=int, help="Longest answer.")
@click.option("--thinking/--no-thinking", default=None, help="Let the model reason first, or not.")
def chat(
    model: str | None,
    serve_options: tuple[str, ...],
    base_url: str | None,
    api_key: str | None,
    system: str,
    temperature: float | None,
    max_tokens: int | None,
    thinking: bool | None,
) -> None:
    """Talk with MODEL in the terminal; /help there lists the commands.

    With --base-url, MODEL is a name that the server there has (default: its first). Without it,
    MODEL is a directory or a model that ships; a server is started for the chat, with all further
    options handed on to `millrace serve`.
    """
    options: dict[str, Any] = {"temperature": temperature, "max_tokens": max_tokens}
    options = {name: value for name, value in options.items() if value is not None}
    if thinking is not None:
        options["chat_template_kwargs"] = {"enable_thinking": thinking}
    console = Console(highlight=False)
    with ExitStack() as stack:
        if base_url is None:
            base_url = _start(model, serve_options, console, stack)
            model = None
        elif serve_options:
            raise ConfigError(f"{serve_options[0]}: options of serve work without --base-url only")
        key = api_key or os.environ.get("MILLRACE_API_KEY") or os.environ.get("OPENAI_API_KEY")
        client = Client(base_url, key)
        names = client.models()
        if model is not None and model not in names:
            raise ConfigError(f"{base_url} has no model {model!r}; it has {', '.join(names)}")
        session = Session(client, model or names[0], console, options, system)
        _talk(session, console, f"{model or names[0]} at {base_url}; /help lists the commands")


def _start(
    model: str | None, serve_options: tuple[str, ...], console: Console, stack: ExitStack
) -> str:
    if model is None:
        raise ConfigError("which model? name one (such as millrace-mini), or give a --base-url")
    find_model(model)  # a wrong name is known at once
    if sys.stdin.isatty():
        console.print(f"starting {model} ...", style="dim")
    return stack.enter_context(OwnServer([model, *serve_options])).url


def _talk(session: Session, console: Console, greeting: str) -> None:
    if not sys.stdin.isatty():  # questions from a pipe: one a line
        for line in _texts(iter(sys.stdin.readline, "")):
            if not session.handle(line):
                return
        return
    import readline  # noqa: F401  (input() then has a history and editing)

    console.print(greeting, style="dim")
    while True:
        try:
            text = next(_texts(iter(_prompt, None)), None)
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


def _texts(lines: Iterator[str]) -> Iterator[str]:
    """Inputs from lines: joined where one ends in a backslash or stands between triple quotes."""
    for line in lines:
        text = line.rstrip("\n")
        if text.startswith(BLOCK):
            text = _block(text[len(BLOCK) :], lines)
        while text.endswith("\\"):
            text = text[:-1] + "\n" + next(lines, "").rstrip("\n")
        if text.strip():
            yield text


def _block(text: str, lines: Iterator[str]) -> str:
    """Up to the closing quotes, or the last line."""
    while not text.endswith(BLOCK):
        line = next(lines, None)
        if line is None:
            return text
        text += "\n" + line.rstrip("\n")
    return text[: -len(BLOCK)].strip("\n")
