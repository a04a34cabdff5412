"""A conversation: its turns, its settings, and the commands that begin with a slash."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.text import Text

from millrace.chat.client import Client, DraftCounters
from millrace.errors import UserError

HELP = """\
/reset            forget the conversation
/undo             forget the last question and its answer
/retry            ask the last question again
/system [TEXT]    set what the model is system first; alone: show it
/think on|off     let the model reason first, or not
/set NAME VALUE   a field of the request, such as: /set temperature 0.2
/set              show what is set
/save FILE        write the conversation as JSON
/help             this
/exit             leave (also Ctrl-D); Ctrl-C stops an answer
A line that ends in \\ goes on; \"\"\" begins and ends a text of many lines."""


class Timing(msgspec.Struct):
    """Of one answer, in seconds and tokens. drafts: those that the server verified meanwhile."""

    ttft: float = 0.0
    total: float = 0.0
    tokens: int = 0
    drafts: DraftCounters | None = None

    def line(self) -> str:
        parts = [f"{self.tokens} tokens"]
        if self.tokens > 1 and self.total > 0:
            parts.append(f"{self._rate():.1f} tok/s")
        parts.append(f"first after {self.ttft:.2f} s")
        drafts = self.drafts
        if drafts is not None and drafts.drafts > 0 and drafts.draft_tokens > 0:
            accepted = drafts.accepted_tokens
            parts.append(f"{accepted / drafts.draft_tokens:.0%} of drafts accepted")
            parts.append(f"{1 + accepted / drafts.drafts:.2f} tokens a step")
        return ", ".join(parts)

    def _rate(self) -> float:
        """Tokens a second after the first one; of all tokens where all arrived nearly at once."""
        span = self.total - self.ttft
        if span < self.total / 10:
            return self.tokens / self.total
        return (self.tokens - 1) / span


class Session:
    """One conversation with one model. options: further fields of each request."""

    def __init__(
        self, client: Client, model: str, console: Console, options: dict[str, Any], system: str
    ) -> None:
        self.messages: list[dict[str, str]] = []
        self._client = client
        self._model = model
        self._console = console
        self._options = options
        self._system = system
        self._commands: dict[str, Callable[[str], bool | None]] = {
            "reset": self._reset, "undo": self._undo, "retry": self._retry,
            "system": self._set_system, "think": self._think, "set": self._set,
            "save": self._save, "help": self._help, "exit": self._exit, "quit": self._exit,
        }  # fmt: skip

    def handle(self, line: str) -> bool:
        """Handle one input, a question or a command. Returns whether the conversation goes on."""
        try:
            if not line.startswith("/"):
                self._answer(line)
                return True
            name, _, rest = line[1:].partition(" ")
            command = self._commands.get(name)
            if command is None:
                raise UserError(f"no command /{name}; /help lists them")
            return command(rest.strip()) is not False
        except UserError as error:
            self._console.print(Text(str(error), style="red"), soft_wrap=True)
            return True

    # --- questions -----------------------------------------------------------------------------

    def _answer(self, question: str) -> None:
        """Stream the answer. A failed one leaves no turn; a stopped one is kept so far."""
        turn = {"role": "user", "content": question}
        system = [{"role": "system", "content": self._system}] if self._system else []
        before = self._client.draft_counters()
        timing = Timing()
        answer: list[str] = []
        try:
            self._stream([*system, *self.messages, turn], timing, answer)
        except KeyboardInterrupt:
            self._console.print(Text(" [stopped]", style="dim"), end="")
        self._console.print()
        after = self._client.draft_counters()
        if before is not None and after is not None:
            timing.drafts = after.since(before)
        self._console.print(Text(f"[{timing.line()}]", style="dim"), soft_wrap=True)
        self.messages += [turn, {"role": "assistant", "content": "".join(answer)}]

    def _stream(self, messages: list[dict[str, str]], timing: Timing, answer: list[str]) -> None:
        began = time.monotonic()
        reasoned = False
        with closing(self._client.answer(self._model, messages, self._options)) as deltas:
            for delta in deltas:
                if delta.tokens and not timing.tokens:
                    timing.ttft = time.monotonic() - began
                timing.tokens = delta.tokens or timing.tokens
                if delta.reasoning:
                    reasoned = True
                    self._write(delta.reasoning, "dim italic")
                if delta.content:
                    if reasoned and not answer:
                        self._write("\n", "")
                    answer.append(delta.content)
                    self._write(delta.content, "")
                if delta.finish_reason == "length":
                    self._write(" [cut: max_tokens]", "dim")
                if delta.finish_reason or delta.tokens:
                    timing.total = time.monotonic() - began

    def _write(self, text: str, style: str) -> None:
        self._console.print(Text(text, style=style), end="", soft_wrap=True)

    # --- commands ------------------------------------------------------------------------------

    def _reset(self, _: str) -> None:
        self.messages.clear()
        self._print("the conversation is empty")

    def _undo(self, _: str) -> None:
        if not self.messages:
            raise UserError("there is nothing to undo")
        del self.messages[-2:]
        self._print(f"{len(self.messages) // 2} questions are left")

    def _retry(self, _: str) -> None:
        if not self.messages:
            raise UserError("there is nothing to ask again")
        question = self.messages[-2]["content"]
        del self.messages[-2:]
        self._answer(question)

    def _set_system(self, text: str) -> None:
        self._system = text or self._system
        self._print(f"system: {self._system or '(nothing)'}")

    def _think(self, text: str) -> None:
        if text not in ("on", "off"):
            raise UserError("/think takes on or off")
        kwargs = self._options.setdefault("chat_template_kwargs", {})
        kwargs["enable_thinking"] = text == "on"
        self._print(f"reasoning is {text}")

    def _set(self, text: str) -> None:
        name, _, value = text.partition(" ")
        if not name:
            self._print(json.dumps(self._options))
            return
        if not value:
            raise UserError("/set takes a field and a value, such as: /set temperature 0.2")
        try:
            self._options[name] = json.loads(value)
        except ValueError:
            self._options[name] = value
        self._print(f"{name} = {json.dumps(self._options[name])}")

    def _save(self, text: str) -> None:
        if not text:
            raise UserError("/save takes a file")
        system = [{"role": "system", "content": self._system}] if self._system else []
        try:
            Path(text).expanduser().write_text(
                json.dumps([*system, *self.messages], ensure_ascii=False, indent=1) + "\n"
            )
        except OSError as error:
            raise UserError(f"{text}: {error.strerror}") from None
        self._print(f"written to {text}")

    def _help(self, _: str) -> None:
        self._print(HELP)

    def _exit(self, _: str) -> bool:
        return False

    def _print(self, text: str) -> None:
        self._console.print(Text(text, style="cyan"), soft_wrap=True)
