"""Disposable processes: a job that kills or hangs one fails alone, and the next one is served."""

from __future__ import annotations

import asyncio
import os
import signal
from array import array
from collections.abc import Awaitable, Callable
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from millrace.protocol import StructuredOutputs
from millrace.server.sandbox.jobs import EncodeText, OutputGrammar, Refused, Source, TokenIds
from millrace.server.sandbox.pool import (
    Sandbox,
    SandboxBusyError,
    SandboxFailedError,
    SandboxOptions,
)
from millrace.text.tokenizer import Tokenizer
from tests.support.live_server import SANDBOX, command_line


def grammar(text: str) -> OutputGrammar:
    return OutputGrammar(StructuredOutputs(grammar=text), "structured_outputs", gap=False)


def chain(rules: int) -> str:
    """A grammar whose compilation recurses once for each rule."""
    names = "\n".join(f"r{at}: r{at + 1}" for at in range(rules))
    return f'start: r0\n{names}\nr{rules}: "a"'


def deep_schema() -> OutputGrammar:
    """Within every limit that is counted, and too deep for the stack all the same."""
    names = [f"a{at}" for at in range(990)]
    definitions = {name: {"type": "string"} for name in names}
    for name, following in pairwise(names):
        part: dict[str, object] = {"$ref": f"#/$defs/{following}"}
        for _ in range(6):
            part = {"items": part}
        definitions[name] = part  # type: ignore[assignment]
    schema = {"$defs": definitions, "$ref": "#/$defs/a0"}
    return OutputGrammar(StructuredOutputs(json=schema), "response_format", gap=False)


def children() -> list[psutil.Process]:
    """The sandbox processes of this process."""
    return [one for one in psutil.Process().children() if SANDBOX in command_line(one)]


def run(work: Callable[[Sandbox], Awaitable[None]], **options: object) -> None:
    """Do `work` with a sandbox, and leave no process behind."""
    given = {"processes": 1, "max_queue": 4, "job_seconds": 20.0, "memory_bytes": 2 << 30}
    sandbox = Sandbox(SandboxOptions(name="jobs", **{**given, **options}))  # type: ignore[arg-type]

    async def main() -> None:
        try:
            await work(sandbox)
        finally:
            await sandbox.close()

    asyncio.run(main())
    assert not children()


def test_a_grammar_is_built_or_refused_with_the_reason() -> None:
    async def work(sandbox: Sandbox) -> None:
        assert isinstance(await sandbox.run(grammar('start: "a" | "b"')), Source)
        answer = await sandbox.run(grammar("start: nowhere"))
        assert isinstance(answer, Refused)
        assert "nowhere" in answer.message
        assert answer.param == "structured_outputs"

    run(work)


def test_a_grammar_that_kills_its_process_fails_alone() -> None:
    async def work(sandbox: Sandbox) -> None:
        for _ in range(2):
            with pytest.raises(SandboxFailedError, match="signal"):
                await sandbox.run(deep_schema())
            assert isinstance(await sandbox.run(grammar('start: "c"')), Source)

    run(work)


def test_the_number_of_rules_has_a_limit_that_the_error_names() -> None:
    async def work(sandbox: Sandbox) -> None:
        answer = await sandbox.run(grammar(chain(3000)))
        assert isinstance(answer, Refused)
        assert "3002 rules; at most 1000 work" in answer.message
        assert isinstance(await sandbox.run(grammar(chain(900))), Source)

    run(work)


def test_a_job_has_a_time_limit() -> None:
    async def work(sandbox: Sandbox) -> None:
        assert isinstance(await sandbox.run(grammar('start: "warm"')), Source)
        (child,) = children()
        os.kill(child.pid, signal.SIGSTOP)
        with pytest.raises(SandboxFailedError, match="took over"):
            await sandbox.run(grammar('start: "late"'))
        assert isinstance(await sandbox.run(grammar('start: "next"')), Source)

    run(work, job_seconds=3.0)


def test_a_process_that_dies_while_idle_is_replaced() -> None:
    async def work(sandbox: Sandbox) -> None:
        assert isinstance(await sandbox.run(grammar('start: "one"')), Source)
        (child,) = children()
        child.kill()
        while psutil.pid_exists(child.pid):  # until it is reaped
            await asyncio.sleep(0.01)
        assert isinstance(await sandbox.run(grammar('start: "two"')), Source)

    run(work)


def test_the_queue_has_a_limit() -> None:
    async def work(sandbox: Sandbox) -> None:
        assert isinstance(await sandbox.run(grammar('start: "warm"')), Source)
        (child,) = children()
        os.kill(child.pid, signal.SIGSTOP)
        waiting = [asyncio.ensure_future(sandbox.run(grammar(f'start: "{at}"'))) for at in range(8)]
        await asyncio.sleep(0.2)
        refused = [one for one in waiting if one.done()]
        assert len(refused) >= 3  # one runs and four wait, at most
        for one in refused:
            with pytest.raises(SandboxBusyError, match="as many as may"):
                one.result()
        os.kill(child.pid, signal.SIGCONT)
        answers = await asyncio.gather(*(one for one in waiting if one not in refused))
        assert all(isinstance(one, Source) for one in answers)

    run(work)


def test_a_text_is_encoded_as_in_this_process(text_model: Path) -> None:
    text = "The quick brown fox, naïve 🦊 " * 50

    async def work(sandbox: Sandbox) -> None:
        expected = Tokenizer.load(text_model).encode(text)
        answer = await sandbox.run(EncodeText(text, True, most=100_000))
        assert isinstance(answer, TokenIds)
        assert array("I", answer.ids).tolist() == expected
        few = await sandbox.run(EncodeText(text, True, most=3))
        assert few == TokenIds(len(expected), b"")

    run(work, arguments=("--tokenizer", str(text_model)))


def test_memory_has_a_limit(text_model: Path) -> None:
    async def work(sandbox: Sandbox) -> None:
        with pytest.raises(SandboxFailedError):
            await sandbox.run(EncodeText("ab " * 5_000_000, True, most=10))
        assert isinstance(await sandbox.run(EncodeText("ab", True, most=10)), TokenIds)

    run(work, arguments=("--tokenizer", str(text_model)), memory_bytes=1 << 30)
