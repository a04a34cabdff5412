"""Workloads from files: JSON Lines, ShareGPT, and traces with arrival times.

Errors name the file and the line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from millrace.bench.workload.prompts import FileSpec, Prompt, TraceRow, TraceSpec, Turn
from millrace.errors import UserError

_CHARACTERS = 4  # of English text per token, where there is no tokenizer
_BLOCK_TOKENS = 512  # of a trace's hash_ids: ids that two requests share are a shared prefix

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
    except Exception as error:
        raise UserError(f"--tokenizer {file}: cannot be read ({error})") from error
    return lambda text: max(1, len(tokenizer.encode(text, add_special_tokens=False).ids))


def read_custom(path: str, *, count: int | None, output_len: int, tokens: CountTokens) -> FileSpec:
    """JSON Lines with `prompt` (text or token ids) or `messages`; `output_tokens` if wanted."""
    prompts = [
        _custom(row, f"{path}, line {number}", output_len, tokens) for number, row in _rows(path)
    ]
    return _given(path, prompts, count)


def _custom(row: dict[str, Any], where: str, output_len: int, tokens: CountTokens) -> Prompt:
    wanted = row.get("output_tokens", row.get("output_length", output_len))
    if not isinstance(wanted, int) or wanted < 1:
        raise UserError(f"{where}: output_tokens {wanted!r} is not a count; use 1 or more")
    if isinstance(messages := row.get("messages"), list) and messages:
        said = " ".join(str(m.get("content", "")) for m in messages if isinstance(m, dict))
        return Prompt(messages, tokens(said), wanted)
    content = row.get("prompt")
    if isinstance(content, str) and content:
        return Prompt(content, tokens(content), wanted)
    if isinstance(content, list) and content and all(isinstance(t, int) for t in content):
        return Prompt(content, len(content), wanted)
    raise UserError(f"{where}: neither a prompt (text or token ids) nor messages")


def read_sharegpt(
    path: str, *, count: int | None, output_len: int | None, turns: int, tokens: CountTokens
) -> FileSpec:
    """A ShareGPT file: its user turns, with as many output tokens as its answers have.

    output_len: that many output tokens instead. turns: user turns of a conversation that are sent.
    """
    try:
        listed = msgspec.json.decode(_bytes(path), type=list[dict[str, Any]])
    except msgspec.DecodeError as error:
        raise UserError(
            f"--dataset-path {path}: not a ShareGPT file, a JSON list of conversations ({error})"
        ) from None
    prompts = []
    for entry in listed:
        pairs = list(_exchanges(entry.get("conversations")))[:turns]
        if pairs:
            later_turns = tuple(
                Turn(said, output_len or tokens(answer)) for said, answer in pairs[1:]
            )
            said, answer = pairs[0]
            prompts.append(Prompt(said, tokens(said), output_len or tokens(answer), later_turns))
    return _given(path, prompts, count)


def _exchanges(conversation: Any) -> Iterator[tuple[str, str]]:
    """(user turn, answer) pairs, until the speakers do not alternate any more."""
    said = [m for m in conversation or [] if isinstance(m, dict) and m.get("value")]
    if said and said[0].get("from") == "system":
        said = said[1:]
    for user, answer in zip(said[::2], said[1::2], strict=False):
        if user.get("from") not in ("human", "user") or answer.get("from") in ("human", "user"):
            return
        yield str(user["value"]), str(answer["value"])


def read_trace(path: str, *, count: int | None, seed: int) -> tuple[TraceSpec, tuple[float, ...]]:
    """A trace in the Mooncake format, and the arrival times of its requests, in seconds.

    JSON Lines with `timestamp` (ms), `input_length`, `output_length` and optionally `hash_ids`:
    blocks of 512 tokens, of which equal ids stand for equal tokens.
    """
    found = sorted(_trace_rows(path), key=lambda row: row[0])[:count]
    if not found:
        raise UserError(f"--dataset-path {path}: there is no request in it")
    spec = TraceSpec(
        rows=tuple(row for _, row in found),
        count=len(found),
        block_tokens=_BLOCK_TOKENS,
        seed=seed,
        source=Path(path).name,
    )
    return spec, tuple((at - found[0][0]) / 1e3 for at, _ in found)


def _trace_rows(path: str) -> Iterator[tuple[float, TraceRow]]:
    for number, row in _rows(path):
        try:
            at, length, output = (row[k] for k in ("timestamp", "input_length", "output_length"))
            blocks = tuple(int(block) for block in row.get("hash_ids") or [])
            yield float(at), TraceRow(max(1, int(length)), max(1, int(output)), blocks)
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"{path}, line {number}: a trace needs the numbers timestamp (ms), input_length "
                "and output_length"
            ) from None


def _rows(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, object) of each line that is not empty."""
    for number, line in enumerate(_bytes(path).splitlines(), 1):
        if line.strip():
            try:
                yield number, msgspec.json.decode(line, type=dict[str, Any])
            except msgspec.DecodeError as error:
                raise UserError(f"{path}, line {number}: not a JSON object ({error})") from None


def _bytes(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"--dataset-path {path}: {error.strerror}; give a file") from None


def _given(path: str, prompts: list[Prompt], count: int | None) -> FileSpec:
    if not prompts:
        raise UserError(f"--dataset-path {path}: there is no prompt in it")
    kept = prompts[:count]
    return FileSpec(prompts=tuple(kept), count=count, source=Path(path).name)
