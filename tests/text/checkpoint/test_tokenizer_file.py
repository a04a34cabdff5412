"""Files at which the tokenizers library panics, raises or ends its process: one line for each."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from millrace.errors import CheckpointError
from millrace.text.checkpoint import tokenizer_file
from millrace.text.checkpoint.tokenizer_file import read_tokenizer
from tests.support.text_model import write_text_model

Change = dict[str, Any]


def changed(folder: Path, file: Change, model: Change) -> Path:
    """A tokenizer.json with other values in it, and in its model."""
    path = write_text_model(folder) / "tokenizer.json"
    content = json.loads(path.read_text())
    content |= file
    content["model"] |= model
    path.write_text(json.dumps(content))
    return path


def charsmap(data: bytes) -> Change:
    return {
        "normalizer": {
            "type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()
        }
    }  # fmt: skip


def splitter(kind: str, **fields: Any) -> Change:
    return {"pre_tokenizer": {"type": kind, **fields}}


BROKEN: dict[str, tuple[Change, Change]] = {
    "a prefix": ({}, {"continuing_subword_prefix": "##"}),
    "a short prefix": ({}, {"continuing_subword_prefix": "x"}),
    "a merge without its token": ({}, {"vocab": {"a": 0, "b": 1}, "merges": ["a b"]}),
    "no map of characters": (charsmap(b""), {}),
    "a map of characters that is cut": (charsmap(b"\x00\xff\xff\xff\xff"), {}),
    "a map of characters that points nowhere": (
        charsmap(b"\x08\x00\x00\x00" + b"\xff" * 8 + b"abc"), {}
    ),
    "pieces of no length": (splitter("FixedLength", length=0), {}),
    "nothing is replaced": (
        {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "z"}}, {}
    ),
    "tokens that it lacks": ({}, {"type": "WordLevel", "vocab": {}, "unk_token": "?"}),
    "a template that names what is not there": (
        {
            "post_processor": {
                "type": "TemplateProcessing", "pair": [], "special_tokens": {},
                "single": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}],
            }
        },
        {},
    ),
    "an unknown kind": ({}, {"type": "Unknown"}),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_costs_one_line(name: str, tmp_path: Path) -> None:
    path = changed(tmp_path, *BROKEN[name])
    with pytest.raises(CheckpointError) as raised:
        read_tokenizer(path)
    line = str(raised.value)
    assert line.startswith(f"{path}: not a readable tokenizer: ")
    assert "\n" not in line
    assert len(line) < len(str(path)) + 400


@pytest.mark.parametrize("text", ["", "[" * 100_000, '{"a":' * 100_000, "{}", "null", "\0", "\xff"])
def test_what_is_no_tokenizer_costs_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"not a readable tokenizer: .+"):
        read_tokenizer(path)


def test_the_usual_file_is_read_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", None)
    path = write_text_model(tmp_path) / "tokenizer.json"
    assert read_tokenizer(path).encode("Hello").ids


def test_an_unusual_file_that_works_is_read(tmp_path: Path) -> None:
    path = changed(tmp_path, {"normalizer": {"type": "Lowercase"}}, {})
    made = read_tokenizer(path)
    assert made.encode("HELLO").ids == made.encode("hello").ids


def test_a_file_that_takes_too_long_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_file, "TRY_SECONDS", 0.01)
    path = changed(tmp_path, {"normalizer": {"type": "Lowercase"}}, {})
    with pytest.raises(CheckpointError, match=r"reading it takes over 0\.01 s"):
        read_tokenizer(path)


def test_a_server_does_not_start_with_it(tmp_path: Path) -> None:
    path = changed(tmp_path, *BROKEN["a prefix"])
    command = [sys.executable, "-m", "millrace.cli", "serve", str(tmp_path), "--port", "0"]
    done = subprocess.run(
        [*command, "--device", "cpu"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    (line,) = [one for one in done.stderr.splitlines() if "tokenizer" in one]
    assert line.startswith(f"millrace serve: {path}: not a readable tokenizer")
