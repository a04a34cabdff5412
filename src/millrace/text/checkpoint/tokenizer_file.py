"""Reads a `tokenizer.json`, whatever is in it.

The library panics on some broken files, and ends its process on others. So a file is read in this
process at once only if its parts are those of a byte-level BPE and fit together, as in every Qwen
model. Any other one is tried in a process of its own before. What the tokenizer is used for is not
known here.

    python -m millrace.text.checkpoint.tokenizer_file PARENT_PID FILE
"""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
from pathlib import Path

import msgspec
import tokenizers

from millrace.common.child_process import end_with_parent, python_module
from millrace.errors import CheckpointError, is_library_failure

TRY_SECONDS = 120.0  # to read a file in a process of its own
TRY_BYTES = 8 << 30  # of address space for that
PROBE = "The quick brown fox jumps over the lazy dog 1\n"  # any usable tokenizer can encode it
_NORMALIZERS = frozenset((None, "NFC"))
_PRE_TOKENIZERS = frozenset((None, "Sequence", "Split", "ByteLevel"))
_POST_PROCESSORS = frozenset((None, "ByteLevel"))
_REASON_LENGTH = 300
_UNREADABLE = 3  # exit status of the process that tries a file; its output is the reason


class _Part(msgspec.Struct):
    type: str | None = None


class _PreTokenizer(_Part):
    pretokenizers: list[_Part] = []


class _Model(_Part):
    vocab: dict[str, int] = {}
    merges: list[str | list[str]] = []
    continuing_subword_prefix: str | None = None
    end_of_word_suffix: str | None = None


class _File(msgspec.Struct):
    model: _Model
    normalizer: _Part | None = None
    pre_tokenizer: _PreTokenizer | None = None
    post_processor: _Part | None = None
    decoder: _Part | None = None


def read_tokenizer(path: Path) -> tokenizers.Tokenizer:
    """The tokenizer in a file. Raises CheckpointError, in one line, for a file that is broken."""
    if not _is_usual(path):
        _try_in_child(path)
    return _read(path)


def _read(path: Path) -> tokenizers.Tokenizer:
    try:
        made = tokenizers.Tokenizer.from_file(str(path))
        if isinstance(made.decoder, tokenizers.decoders.ByteLevel):  # others encode nothing
            made.no_truncation()
            made.no_padding()
            made.encode(PROBE)
    except BaseException as error:
        if not is_library_failure(error):
            raise
        raise _unreadable(path, str(error)) from None
    return made


def _is_usual(path: Path) -> bool:
    """Whether a file has only parts that the library is known to read without a panic."""
    try:
        file = msgspec.json.decode(path.read_bytes(), type=_File)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OSError):
        return False
    before, model = file.pre_tokenizer or _PreTokenizer(), file.model
    return (
        model.type in (None, "BPE")
        and not model.continuing_subword_prefix
        and not model.end_of_word_suffix
        and _type(file.normalizer) in _NORMALIZERS
        and {before.type, *(one.type for one in before.pretokenizers)} <= _PRE_TOKENIZERS
        and _type(file.post_processor) in _POST_PROCESSORS
        and _type(file.decoder) == "ByteLevel"
        and all(_merged(pair) in model.vocab for pair in model.merges)
    )


def _type(part: _Part | None) -> str | None:
    return None if part is None else part.type


def _merged(pair: str | list[str]) -> str:
    """The token that a merge makes."""
    return pair.replace(" ", "", 1) if isinstance(pair, str) else "".join(pair)


def _try_in_child(path: Path) -> None:
    """Raise CheckpointError for a file that a process of its own cannot read."""
    command = python_module("millrace.text.checkpoint.tokenizer_file", str(os.getpid()), str(path))
    try:
        tried = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # a panic says there what stdout says as well
            timeout=TRY_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _unreadable(path, f"reading it takes over {TRY_SECONDS:g} s") from None
    if tried.returncode < 0:
        reason = f"the tokenizers library crashes on it (signal {-tried.returncode})"
        raise _unreadable(path, reason)
    if tried.returncode == _UNREADABLE:
        raise _unreadable(path, tried.stdout.decode(errors="replace"))
    if tried.returncode:
        raise _unreadable(path, f"the process that tried it ended with status {tried.returncode}")


def _unreadable(path: Path, reason: str) -> CheckpointError:
    line = " ".join(reason.split())[:_REASON_LENGTH]
    return CheckpointError(f"{path}: not a readable tokenizer: {line}")


def main() -> int:
    end_with_parent(int(sys.argv[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(ValueError, OSError):  # a lower hard limit holds already
        resource.setrlimit(resource.RLIMIT_AS, (TRY_BYTES, TRY_BYTES))
    path = Path(sys.argv[2])
    try:
        _read(path)
    except CheckpointError as error:
        print(str(error).removeprefix(f"{path}: not a readable tokenizer: "), flush=True)
        return _UNREADABLE
    return 0


if __name__ == "__main__":
    sys.exit(main())
