"""Every example of README and the documents: it runs, or at least its command line is read.

A block with the language `text` is the output of the example before it, letter by letter. Commands
of `millrace` are read by the command line that they name; those that a machine without a GPU can
run against the shipped model are run, with fewer requests.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
import pytest

from millrace.cli import cli
from millrace.common.sockets import free_port
from tests.support.live_server import LiveServer, started, wait_for

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
# Parts of programs. tests/model/test_documented_use.py runs those of the first, with its tensors;
# those of the others stand in files of the tree, as tests/test_docs.py checks.
SKETCHES = {"docs/model.md", "docs/extending.md", "docs/batch.md"}


class Block(NamedTuple):
    """One fenced block; output: the `text` block right behind it."""

    page: str
    language: str
    text: str
    output: str | None


def blocks() -> list[Block]:
    found = []
    for page in PAGES:
        name, text = str(page.relative_to(ROOT)), page.read_text(encoding="utf-8")
        pieces = list(re.finditer(r"^```(\w*)\n(.*?)^```\n", text, re.MULTILINE | re.DOTALL))
        for at, piece in enumerate(pieces):
            after = pieces[at + 1] if at + 1 < len(pieces) else None
            adjacent = after is not None and not text[piece.end() : after.start()].strip()
            is_output = after is not None and adjacent and after[1] == "text"
            output = after[2] if after is not None and is_output else None
            found.append(Block(name, piece[1], piece[2], output))
    return found


BLOCKS = blocks()
PYTHON = [b for b in BLOCKS if b.language == "python" and b.page not in SKETCHES]


def commands() -> Iterator[tuple[str, list[str]]]:
    """(page, words) of every shell command, its continued lines joined."""
    for block in BLOCKS:
        if block.language:
            continue
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield block.page, words


COMMANDS = list(commands())
MILLRACE = [
    (page, words[words.index("serve") :] if "millrace.cli" in words else words[1:])
    for page, words in COMMANDS
    if words[0] == "millrace" or "millrace.cli" in words
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    command = [sys.executable, "-m", "millrace", "serve", "millrace-mini", "--port=0"]
    with started(command, tmp_path_factory.mktemp("examples") / "log") as running:
        running.wait_ready(180)
        yield running


def run(*words: str, place: Path) -> str:
    """The output of a command that succeeds."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, cwd=place)
    assert done.returncode == 0, done.stderr
    return done.stdout


def at_server(words: list[str], server: LiveServer) -> list[str]:
    port = server.url.rpartition(":")[2]
    words = [word.replace("http://127.0.0.1:8000", server.url) for word in words]
    return [port if word == "8000" else word for word in words]


def test_there_are_examples_of_each_kind() -> None:
    assert len(PYTHON) >= 3
    assert len(MILLRACE) >= 10
    assert all(block.output is not None for block in PYTHON)


@pytest.mark.parametrize(("page", "words"), MILLRACE, ids=lambda value: str(value)[:60])
def test_a_command_line_is_read(page: str, words: list[str]) -> None:
    """Also those that need GPUs or other hosts."""
    context = cli.make_context("millrace", list(words))
    while isinstance(context.command, click.Group):
        rest = [*context._protected_args, *context.args]
        if not rest:
            return
        name, command, rest = context.command.resolve_command(context, rest)
        assert command is not None
        context = command.make_context(name, rest, parent=context)


def test_other_commands_name_what_is_there() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for page, words in COMMANDS:
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), (page, words)
        elif words[0] == "python":
            source = (ROOT / words[1]).read_text(encoding="utf-8")
            assert all(word in source for word in words[2:] if word.startswith("--")), words


@pytest.mark.slow
@pytest.mark.parametrize("block", PYTHON, ids=lambda block: f"{block.page}-{len(block.text)}")
def test_python_prints_what_is_shown(block: Block, server: LiveServer, tmp_path: Path) -> None:
    text = block.text.replace("http://127.0.0.1:8000", server.url)
    assert run(sys.executable, "-c", text, place=tmp_path).rstrip("\n") == (
        (block.output or "").rstrip("\n")
    )


@pytest.mark.slow
def test_the_readmes_curl_gets_what_is_shown(server: LiveServer, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    ((_, words),) = [one for one in COMMANDS if one[0] == "README.md" and one[1][0] == "curl"]
    answer = json.loads(run(*at_server(words, server), "-s", place=tmp_path))
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"`{answer['choices'][0]['message']['content']}`" in readme


LOADS = [
    (page, words, less)
    for page, words in MILLRACE
    for start, less in (
        (["bench", "serve"], ["--num-prompts=6", "--num-warmups=2"]),
        (["eval"], ["--num-items=4"]),
    )
    if words[: len(start)] == start and page in ("README.md", "docs/bench.md", "docs/eval.md")
]


@pytest.mark.slow
@pytest.mark.parametrize(("page", "words", "less"), LOADS, ids=lambda value: str(value)[:40])
def test_a_measurement_runs(
    page: str, words: list[str], less: list[str], server: LiveServer, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "millrace", *at_server(words, server), *less]
    assert run(*command, place=tmp_path)


@pytest.mark.slow
def test_a_gateway_takes_the_documented_changes(server: LiveServer, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    changes = [words for page, words in COMMANDS if page == "docs/gateway.md" and "curl" in words]
    assert len(changes) >= 4
    port, admin = free_port("127.0.0.1"), free_port("127.0.0.1")
    urls = f"{server.url},{server.url.replace('127.0.0.1', 'localhost')}"
    flags = [f"--worker-urls={urls}", f"--port={port}", f"--admin-port={admin}"]
    millrace = [sys.executable, "-m", "millrace"]
    with started([*millrace, "gateway", *flags], tmp_path / "log") as gateway:
        wait_for(lambda: "gateway on" in gateway.log, 30)
        for words in changes:
            there = [word.replace("127.0.0.1:8009", f"127.0.0.1:{admin}") for word in words]
            assert isinstance(json.loads(run(*there, "-sf", place=tmp_path) or "{}"), dict)
        url = f"http://127.0.0.1:{port}"
        (status,) = [w for _, w in MILLRACE if w[:2] == ["gateway", "status"]]
        shown = [word.replace("http://127.0.0.1:8000", url) for word in status]
        table = run(*millrace, *shown, "--once", place=tmp_path)
    assert server.url.removeprefix("http://") in table
    assert "10.0.0.3" not in table  # it was added, drained and removed
