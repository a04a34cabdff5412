"""Flags of `vllm bench serve`, given as it takes them."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from millrace.bench.command import bench
from millrace.bench.flags.command_line import SeveralValues, flags_of, read_flags
from millrace.bench.flags.structs import ServeFlags
from millrace.bench.report.results import load_results
from millrace.errors import UserError
from tests.support.mock_replica import MockReplica
from tests.support.running import run


def parsed(*arguments: str) -> ServeFlags:
    found: list[ServeFlags] = []

    @click.command(cls=SeveralValues)
    @flags_of(ServeFlags)
    def command(**values: Any) -> None:
        found.append(read_flags(ServeFlags, values))

    result = CliRunner().invoke(command, list(arguments))
    assert result.exit_code == 0, result.output
    return found[0]


def test_some_flags_take_several_values() -> None:
    flags = parsed("--goodput", "ttft:500", "tpot:50", "--seed", "3", "--goodput=e2el:9",
                   "--metadata", "a=1", "b=-2", "--port", "1")  # fmt: skip
    assert flags.goodput == ["ttft:500", "tpot:50", "e2el:9"]
    assert flags.metadata == ["a=1", "b=-2"]
    assert (flags.seed, flags.port) == (3, 1)
    assert parsed("--header", "A=b", "--insecure").insecure is True


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--append-result",), "give --result-filename"),
        (("--metadata", "a"), "NAME=VALUE"),
    ],
)
def test_flags_that_cannot_work(flags: tuple[str, ...], expected: str) -> None:
    result = CliRunner().invoke(bench, ["serve", *flags])
    assert isinstance(result.exception, UserError)
    assert expected in str(result.exception)


def test_results_are_appended_labelled_and_described(tmp_path: Path) -> None:
    async def scenario() -> tuple[list[dict[str, Any]], str]:
        replica = await MockReplica(model="small").start()
        errors = ""
        for label in ("one", "two"):
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "millrace.cli", "bench", "serve"),
                *("--base-url", f"{replica.url}/v1", "--num-prompts", "2"),
                *("--random-input-len", "4", "--random-output-len", "2"),
                *("--model", "org/Small", "--served-model-name", "small", "--label", label),
                *("--metadata", f"commit={label}", "completed=no"),
                *("--append-result", "--result-dir", str(tmp_path), "--result-filename", "all"),
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
            )
            _, told = await process.communicate()
            errors += told.decode()
            assert process.returncode == 0, errors
        await replica.stop()
        return replica.bodies, errors

    bodies, errors = run(scenario())
    assert {body["model"] for body in bodies} == {"small"}
    assert "--metadata completed is left out" in errors
    content = (tmp_path / "all").read_text()
    assert [json.loads(line)["label"] for line in content.splitlines()] == ["one", "two"]
    first, second = load_results(str(tmp_path))
    assert (first.fields["model_id"], first.fields["commit"]) == ("org/Small", "one")
    assert first.fields["completed"] == 2
    assert first.raw("requests") != second.raw("requests")
    assert None not in (first.raw("requests"), second.raw("requests"))
