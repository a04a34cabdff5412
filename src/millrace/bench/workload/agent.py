"""Sessions of an agent, from a written model: what clients that code, search or operate send.

A session is one conversation. It begins with a system prompt, the same in all sessions, and a task.
Turns follow: results of tools, of lengths drawn evenly on a logarithmic scale, and messages of the
user. Between them come auxiliary calls (a title, a topic), which have a system prompt of their own
and leave the conversation as it is. A branch goes back some turns and goes on differently. A
compaction asks for a summary, and the conversation begins anew with that. Pauses lie between turns:
short ones while a tool runs, long ones while a user reads.

Session i depends on the seed and on i alone. This module knows no server and no tokens: lengths are
in words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import msgspec
import numpy as np

from millrace.bench.workload.prompts import AgentSpec, Prompt, Turn, words
from millrace.errors import UserError

Kind = Literal["user", "tool", "aux", "branch", "compact", "resume"]
KINDS: tuple[Kind, ...] = ("user", "tool", "aux", "branch", "compact", "resume")
Messages = list[dict[str, Any]]

_SYSTEM, _AUX, _FIRST, _LATER = 1, 2, 3, 4  # keys of random streams
_AUX_WORDS, _AUX_OUTPUT = 60, 12
_TOOL_PAUSE_SHARE = 0.1  # of the pause before a message of the user
_SUMMARIZE = "Summarize the conversation so far, so that you can go on from the summary alone."
_TITLE = "Give a short title for a conversation that begins with this message."


class AgentTurn(Turn, frozen=True):
    """A later request of a session. pause: seconds before it is sent. back: exchanges that a branch
    leaves out."""

    kind: Kind = "user"
    pause: float = 0.0
    back: int = 0


class Exchange(msgspec.Struct, frozen=True):
    """A request of the conversation with its answer. turn: its number in the session."""

    turn: int
    messages: Messages
    answer: str


class Continuation(msgspec.Struct, frozen=True):
    """The messages of a session's next request.

    line: the exchanges that it continues. base: the turn whose messages and answer it begins with;
    -1: none. fresh: permille of its words that no other session has, where it has no base.
    """

    messages: Messages
    line: tuple[Exchange, ...]
    base: int
    fresh: int = 1000


def agent_maker(spec: AgentSpec) -> Callable[[int], Prompt]:
    """The function that gives session i: its first request, with all turns that follow."""
    system = _text(_generator(spec.seed, _SYSTEM), spec.system_len)

    def make(index: int) -> Prompt:
        rng = _generator(spec.seed, _FIRST, index)
        first = _text(rng, int(rng.integers(*_around(spec.user_len))))
        messages = [{"role": "system", "content": system}, {"role": "user", "content": first}]
        rng = _generator(spec.seed, _LATER, index)
        return Prompt(
            messages,
            spec.system_len + len(first.split()),
            _output(rng, spec),
            tuple(_turns(rng, spec)),
            fresh=_fresh(messages),
        )

    return make


def _turns(rng: np.random.Generator, spec: AgentSpec) -> list[AgentTurn]:
    turns: list[AgentTurn] = []
    compact_at = -1
    if spec.turns > 2 and rng.random() < spec.compaction:
        compact_at = int(rng.integers(spec.turns // 2, spec.turns))
    for number in range(1, spec.turns):
        if rng.random() < spec.aux:
            turns.append(AgentTurn(_text(rng, _AUX_WORDS), _AUX_OUTPUT, "aux"))
        if number == compact_at:
            turns.append(AgentTurn(_SUMMARIZE, _output(rng, spec), "compact"))
            turns.append(AgentTurn(_user_text(rng, spec), _output(rng, spec), "resume"))
        elif rng.random() < spec.branch:
            back = int(rng.integers(1, 3))
            text, pause = _user_text(rng, spec), _pause(rng, spec.pause)
            turns.append(AgentTurn(text, _output(rng, spec), "branch", pause, back))
        elif rng.random() < spec.tools:
            low, high = math.log(spec.tool_min), math.log(spec.tool_max)
            text = _text(rng, round(math.exp(rng.uniform(low, high))))
            pause = _pause(rng, spec.pause * _TOOL_PAUSE_SHARE)
            turns.append(AgentTurn(text, _output(rng, spec), "tool", pause))
        else:
            text, pause = _user_text(rng, spec), _pause(rng, spec.pause)
            turns.append(AgentTurn(text, _output(rng, spec), "user", pause))
    return turns


def continuation(line: Sequence[Exchange], system: Messages, turn: AgentTurn) -> Continuation:
    """The messages of `turn`. line: the conversation so far, one exchange or more; system: the
    messages that every session begins with."""
    said = {"role": "user", "content": turn.text}
    if turn.kind == "tool":
        said = {"role": "tool", "tool_call_id": f"call_{len(line)}", "content": turn.text}
    if turn.kind == "aux":
        messages = [{"role": "system", "content": _TITLE}, said]
        return Continuation(messages, tuple(line), -1, _fresh(messages))
    if turn.kind == "resume":
        summary = {"role": "user", "content": f"{line[-1].answer}\n{turn.text}"}
        messages = [*system, summary]
        return Continuation(messages, (), -1, _fresh(messages))
    kept = tuple(line[: max(1, len(line) - turn.back)])
    last = kept[-1]
    messages = [*last.messages, {"role": "assistant", "content": last.answer}, said]
    return Continuation(messages, kept, last.turn)


def check_agent(spec: AgentSpec) -> None:
    """Raise UserError for sizes that cannot be used; the message names the flag."""
    for name in ("turns", "system_len", "user_len", "output_len", "tool_min"):
        if (value := getattr(spec, name)) < 1:
            raise UserError(f"--agent-{name.replace('_', '-')} {value}: use 1 or more")
    if spec.tool_max < spec.tool_min:
        raise UserError(f"--agent-tool-max {spec.tool_max}: use --agent-tool-min or more")
    for name in ("tools", "aux", "branch", "compaction"):
        if not 0 <= (share := getattr(spec, name)) <= 1:
            raise UserError(f"--agent-{name} {share:g}: use a share from 0 to 1")
    if not 0 <= spec.pause < math.inf:
        raise UserError(f"--agent-pause {spec.pause:g}: use seconds from 0 on")


def _fresh(messages: Messages) -> int:
    """Permille of the words that are not of the system prompt."""
    counts = [len(str(message["content"]).split()) for message in messages]
    return round(1000 * sum(counts[1:]) / max(1, sum(counts)))


def _generator(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


def _text(rng: np.random.Generator, length: int) -> str:
    return words(rng, max(1, length))


def _user_text(rng: np.random.Generator, spec: AgentSpec) -> str:
    return _text(rng, int(rng.integers(*_around(spec.user_len))))


def _output(rng: np.random.Generator, spec: AgentSpec) -> int:
    return int(rng.integers(*_around(spec.output_len)))


def _around(mean: int) -> tuple[int, int]:
    """A range of lengths around a mean; its end does not belong to it."""
    return max(1, mean // 2), mean + mean // 2 + 1


def _pause(rng: np.random.Generator, mean: float) -> float:
    return float(rng.exponential(mean)) if mean else 0.0
