"""The options of `millrace chat`. Nothing heavy is imported before the command runs."""

from __future__ import annotations

import os
from typing import Any

import click

from millrace.errors import ConfigError


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("model", required=False)
@click.argument("serve_options", nargs=-1, type=click.UNPROCESSED)
@click.option("--base-url", help="A running server: http://127.0.0.1:8000, or with /v1.")
@click.option("--api-key", help="Key of the server (default: MILLRACE_API_KEY or OPENAI_API_KEY).")
@click.option("--system", default="", help="System message.")
@click.option("--temperature", type=float, help="Temperature of every answer.")
@click.option("--max-tokens", type=int, help="Most tokens of an answer.")
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

    With --base-url, MODEL is a model name of that server (default: the first). Without it, MODEL is
    a directory or a shipped model: a server is started for the chat, and all further options are
    passed on to `millrace serve`.
    """
    options: dict[str, Any] = {"temperature": temperature, "max_tokens": max_tokens}
    options = {name: value for name, value in options.items() if value is not None}
    if thinking is not None:
        options["chat_template_kwargs"] = {"enable_thinking": thinking}
    key = api_key or os.environ.get("MILLRACE_API_KEY") or os.environ.get("OPENAI_API_KEY")
    if base_url is not None and serve_options:
        raise ConfigError(f"{serve_options[0]}: options of serve work without --base-url only")

    from millrace.chat.terminal import talk_to_new_server, talk_to_server

    if base_url is None:
        talk_to_new_server(model, serve_options, key, options, system)
    else:
        talk_to_server(base_url, model, key, options, system)
