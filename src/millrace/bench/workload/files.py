"""Workloads from files with texts: prompts and messages of several tools, and ShareGPT.

Read as what they are: JSON Lines of `vllm bench serve`'s custom data set, of guidellm and of
AIPerf, OpenAI's batch files, AIPerf's inputs.json, CSV with a column of prompts. What a file holds
that cannot be sent as it is, is refused. Errors name the file and the line.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from millrace.bench.workload.messages import check_messages, text_parts
from millrace.bench.workload.prompts import FileSpec, Prompt, Turn
from millrace.bench.workload.text_files import read_text, rows_of, whole_number
from millrace.errors import UserError, is_library_failure

_CHARACTERS = 4  # of English text per token, where there is no tokenizer

CountTokens = Callable[[str], int]


def estimate_tokens(text: str) -> int:
    """An estimate of the tokens of a text; at least 1."""
    return max(1, len(text) // _CHARACTERS)


def tokenizer_counts(path: str) -> CountTokens:
    """A function that counts tokens with a `tokenizer.json`, or with that of a model directory.

    Raises UserError when there is none.
    """
    from tokenizers import Tokenizer

    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UserError(f"--tokenizer {path}: no tokenizer.json there; give a model directory")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except BaseException as error:
        if not is_library_failure(error):
            raise
        raise UserError(f"--tokenizer {file}: cannot be read ({error})") from None
    return lambda text: max(1, len(tokenizer.encode(text, add_special_tokens=False).ids))


# --- prompts and messages ----------------------------------------------------------------------

# Names of one thing in the files of different tools, the first one that is there counts.
_PROMPTS = ("prompt", "text", "question", "instruction", "input", "content")
_OUTPUT_TOKENS = (
    *("output_tokens", "output_length", "output_tokens_count", "output_sequence_length"),
    *("max_completion_tokens", "max_output_tokens", "max_tokens"),
)
# Of a request's own body, what the load generator decides.
_NOT_SENT = frozenset(
    {"model", "messages", "prompt", "stream", "stream_options", "n", *_OUTPUT_TOKENS}
)


def read_custom(path: str, *, count: int | None, output_len: int, tokens: CountTokens) -> FileSpec:
    """A file with a prompt (text or token ids), messages or a request in each row.

    output_len: output tokens of a row that names none. Raises UserError.
    """
    prompts = []
    for where, row in _custom_rows(path, read_text(path)):
        try:
            prompts.append(_custom(row, output_len, tokens))
        except UserError as error:
            raise UserError(f"{path}, {where}: {error}") from None
    return _file_spec(path, prompts, count)


def _custom_rows(path: str, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it is, row) of JSON Lines, a JSON list of rows, AIPerf's inputs.json, or CSV."""
    start = text.lstrip()[:1]
    if start == "[":
        yield from _listed_rows(path, text)
    elif start == "{" and (payloads := _payloads(text)) is not None:
        yield from ((f"payload {n}", {"body": body}) for n, body in enumerate(payloads, 1))
    elif start in ("{", ""):
        yield from ((f"line {line}", row) for line, row in rows_of(path, text))
    else:
        yield from _csv_rows(path, text)


def _listed_rows(path: str, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        listed = msgspec.json.decode(text, type=list[dict[str, Any]])
    except msgspec.DecodeError as error:
        raise UserError(f"--dataset-path {path}: not a JSON list of rows ({error})") from None
    if listed and "conversations" in listed[0]:
        raise UserError(f"--dataset-path {path}: a ShareGPT file; use --dataset-name sharegpt")
    yield from ((f"row {number}", row) for number, row in enumerate(listed, 1))


def _payloads(text: str) -> list[dict[str, Any]] | None:
    """The requests of AIPerf's inputs.json; None for another file."""
    try:
        content = msgspec.json.decode(text)
    except msgspec.DecodeError:
        return None
    sessions = content.get("data") if isinstance(content, dict) else None
    if not isinstance(sessions, list):
        return None
    listed = [s.get("payloads") for s in sessions if isinstance(s, dict)]
    return [body for payloads in listed if isinstance(payloads, list) for body in payloads]


def _csv_rows(path: str, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(text.splitlines(keepends=True), skipinitialspace=True)
    names = [name.strip() for name in reader.fieldnames or ()]
    if not set(names) & set(_PROMPTS):
        raise UserError(
            f"{path}, line 1: not a JSON object, nor CSV with a column of prompts "
            f"({', '.join(_PROMPTS)})"
        )
    reader.fieldnames = names
    for row in reader:
        made = {
            name: int(value) if name in _OUTPUT_TOKENS and str(value).isdigit() else value
            for name, value in row.items()
            if name and value
        }
        yield f"line {reader.line_num}", made


def _custom(row: dict[str, Any], output_len: int, tokens: CountTokens) -> Prompt:
    """The prompt of a row. Raises UserError without the place."""
    if isinstance(body := row.get("body"), dict):  # a request, as in OpenAI's batch files
        extra = {name: value for name, value in body.items() if name not in _NOT_SENT}
        return _with_content(body, output_len, tokens, extra)
    tools = {name: row[name] for name in ("tools", "tool_choice") if row.get(name)}
    return _with_content(row, output_len, tokens, tools)


def _with_content(
    row: Mapping[str, Any], output_len: int, tokens: CountTokens, extra: dict[str, Any]
) -> Prompt:
    wanted = _output_tokens(row, output_len)
    if row.get("messages"):
        messages = row["messages"]
        check_messages(messages)
        return Prompt(messages, tokens(text_parts(messages)), wanted, extra=extra)
    if isinstance(row.get("turns"), list):
        return _turns(row["turns"], output_len, tokens, extra)
    content = next((row[name] for name in _PROMPTS if row.get(name)), None)
    texts = row.get("texts")
    if content is None and isinstance(texts, list) and len(texts) == 1:
        content = texts[0]
    if isinstance(content, str) and content:
        return Prompt(content, tokens(content), wanted, extra=extra)
    if isinstance(content, list) and content:
        ids = [whole_number(token) for token in content]
        if all(number is not None for number in ids) and not any(
            isinstance(token, float) for token in content
        ):
            return Prompt(content, len(content), wanted, extra=extra)
    if "input_length" in row or "timestamp" in row:
        raise UserError("a trace without a prompt; use --dataset-name trace")
    raise UserError("neither a prompt (text or token ids) nor messages")


def _turns(
    listed: list[Any], output_len: int, tokens: CountTokens, extra: dict[str, Any]
) -> Prompt:
    """A conversation in AIPerf's form: turns with a text each."""
    turns = []
    for one in listed:
        text = one.get("text") if isinstance(one, dict) else one
        if not isinstance(text, str) or not text:
            raise UserError("a turn has no text; images and audio are not sent")
        turns.append(Turn(text, _output_tokens(one if isinstance(one, dict) else {}, output_len)))
    if not turns:
        raise UserError("a conversation without turns")
    first, *later = turns
    count = tokens(first.text)
    return Prompt(first.text, count, first.output_tokens, tuple(later), extra=extra)


def _output_tokens(row: Mapping[str, Any], otherwise: int) -> int:
    name = next((name for name in _OUTPUT_TOKENS if row.get(name) is not None), None)
    if name is None:
        return otherwise
    number = whole_number(row[name], least=1)
    if number is None:
        raise UserError(f"{name} {row[name]!r} is not a count; use 1 or more")
    return number


# --- ShareGPT ----------------------------------------------------------------------------------

_USERS = ("human", "user")


def read_sharegpt(
    path: str, *, count: int | None, output_len: int | None, turns: int, tokens: CountTokens
) -> FileSpec:
    """A ShareGPT file: its user turns, with as many output tokens as its answers have.

    output_len: that many output tokens instead. turns: user turns of a conversation that are sent.
    """
    text = read_text(path)
    try:
        listed = msgspec.json.decode(text, type=list[dict[str, Any]])
    except msgspec.DecodeError as error:
        if not text.lstrip().startswith("{"):
            raise UserError(
                f"--dataset-path {path}: not a ShareGPT file, a JSON list of conversations "
                f"({error})"
            ) from None
        listed = [row for _, row in rows_of(path, text)]
        if not any("conversations" in row or "conversation" in row for row in listed):
            raise UserError(
                f"--dataset-path {path}: not a ShareGPT file, a JSON list of conversations; for "
                "lines with prompts or messages use --dataset-name custom"
            ) from None
    prompts = []
    for entry in listed:
        found = entry.get("conversations", entry.get("conversation"))
        pairs = list(_exchanges(found))[:turns]
        if pairs:
            user_turns = [Turn(said, output_len or tokens(answer)) for said, answer in pairs]
            first, *later = user_turns
            prompts.append(
                Prompt(first.text, tokens(first.text), first.output_tokens, tuple(later))
            )
    return _file_spec(path, prompts, count)


def _exchanges(conversation: Any) -> Iterator[tuple[str, str]]:
    """(user turn, answer) pairs, until the speakers do not alternate any more.

    What comes before the first user turn (a system prompt, a greeting) is skipped.
    """
    listed = conversation if isinstance(conversation, list) else []
    turns = [t for t in listed if isinstance(t, dict) and isinstance(t.get("value"), str)]
    turns = [turn for turn in turns if turn["value"]]
    first = next((n for n, turn in enumerate(turns) if turn.get("from") in _USERS), len(turns))
    turns = turns[first:]
    for user, answer in zip(turns[::2], turns[1::2], strict=False):
        if user.get("from") not in _USERS or answer.get("from") in (*_USERS, "system"):
            return
        yield user["value"], answer["value"]


def _file_spec(path: str, prompts: list[Prompt], count: int | None) -> FileSpec:
    if not prompts:
        raise UserError(f"--dataset-path {path}: there is no prompt in it")
    return FileSpec(prompts=tuple(prompts[:count]), count=count, source=Path(path).name)
