"""`millrace batch --task policy`: its requests have known answers, and grading tells them apart."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from millrace.batch.journal import Counts
from millrace.batch.lines import Usage, read_line
from millrace.cli import run
from millrace.offline.policy_batch import SCHEMA, accuracy, estimate, items, write_requests


def line(index: int, content: str) -> str:
    body = {"choices": [{"message": {"content": content}}]}
    return json.dumps({"custom_id": f"policy-{index}", "response": {"body": body}}) + "\n"


def test_requests_are_valid_and_every_reference_answer_fits_their_schema(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    write_requests(path, 30, "m")
    found = [read_line(data) for data in path.read_bytes().splitlines()]
    assert len({one.custom_id for one in found}) == 30
    for item in islice(items(), 30):
        jsonschema.validate(json.loads(item.answer), SCHEMA)


def test_a_wrong_and_a_missing_answer_lower_the_accuracy(tmp_path: Path) -> None:
    right, wrong, _ = islice(items(), 3)
    spoiled: dict[str, Any] = {**json.loads(wrong.answer), "deductible": -1}
    output = tmp_path / "out.jsonl"
    output.write_text(line(right.index, right.answer) + line(wrong.index, json.dumps(spoiled)))
    said = accuracy(output, 3)
    assert "1 of 3 right (33.33%), 2 answered; fields: 17 of 18 right" in said
    assert "deductible 1" in said


def test_the_estimate_grows_with_the_batch() -> None:
    def seconds(number: int) -> float:
        counts = Counts(number, number, 0, Usage(400 * number, 150 * number, 0), 1.0)
        said = estimate(counts, "epyc-2", "tiny-9m", 1, 64)
        return float(said.split()[1].replace(",", ""))

    assert seconds(20_000) > 1.5 * seconds(10_000) > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--num-items", "3"], "--num-items and --plan-gpu are of --task policy"),
        ([], "use --task policy"),
        (["--task", "policy", "-i", "x"], "-i and --task exclude each other"),
        (["--task", "policy", "--base-url", "h:1"], "name the model with --model"),
    ],
)
def test_options_that_do_not_fit_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert run(["batch", "-o", str(tmp_path / "out.jsonl"), *arguments]) == 2
    assert said in capsys.readouterr().err
