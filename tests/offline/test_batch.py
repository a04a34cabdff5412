"""`millrace batch` with an engine of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from millrace.cli import run
from tests.offline.test_offline import ENGINE


def test_an_engine_of_this_command_answers_every_endpoint(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bodies = {
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
        "/v1/completions": {"prompt": [1, 2, 3]},
        "/v1/responses": {"input": "hi", "max_output_tokens": 4},
    }
    lines = [
        {"custom_id": f"{number}{url}", "method": "POST", "url": url,
         "body": {"model": "theirs", "max_tokens": 4, **body}}
        for number in range(3) for url, body in bodies.items()
    ]  # fmt: skip
    for line in lines:
        if line["url"] == "/v1/responses":
            del line["body"]["max_tokens"]  # type: ignore[attr-defined]
    lines.append({**lines[0], "custom_id": "bad", "body": {**bodies["/v1/chat/completions"],
                  "model": "m", "temperature": -1}})  # fmt: skip
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(map(json.dumps, lines)))
    files = ["-i", str(source), "-o", str(output)]
    assert run(["batch", *files, "--model", str(small_model), *ENGINE]) == 0
    rows = {row["custom_id"]: row for row in map(json.loads, output.read_text().splitlines())}
    assert set(rows) == {line["custom_id"] for line in lines} - {"bad"}
    assert all(row["response"]["body"]["model"] == str(small_model) for row in rows.values())
    (failed,) = map(json.loads, (tmp_path / "out.errors.jsonl").read_text().splitlines())
    assert failed["response"]["status_code"] == 400
    assert "10/10 done, 1 failed" in capsys.readouterr().err


def test_what_cannot_work_is_said_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("{}")
    files = ["-i", str(source), "-o", str(tmp_path / "out.jsonl")]
    cases = {
        "name servers with --base-url": [],
        "--max-num-seqs is the engine's": ["--base-url=h:1", "--max-num-seqs=4"],
        "three files": ["--base-url=h:1", f"--error-file={source}"],
        "line 1: custom_id is missing": ["--base-url=h:1"],
        "max_in_flight 0": ["--base-url=h:1", "--max-in-flight=0"],
        "one server is named twice": ["--base-url=h:1", "--base-url=http://h:1/v1"],
    }
    for said, arguments in cases.items():
        assert run(["batch", *files, *arguments]) == 2
        assert said in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"]
