"""The nightly review: each document asked about once, findings graded, text shown as text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from examples.insurance.documents.insurer import Insurer, draw_insurer
from examples.insurance.documents.writing import write_all
from examples.insurance.retrieval.chunks import all_chunks
from examples.insurance.review import findings as review
from examples.insurance.review.__main__ import page_of, summary
from millrace.batch.lines import read_line

WRITTEN_BY_A_CUSTOMER = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def insurer() -> Insurer:
    return draw_insurer(30)


@pytest.fixture(scope="module")
def documents(insurer: Insurer) -> dict[str, dict[str, str]]:
    return review.documents_of(all_chunks(write_all(insurer)))


def owners(insurer: Insurer) -> dict[str, str]:
    return {document.name: document.policy or document.form for document in write_all(insurer)}


def result(name: str, content: str) -> str:
    body = {"choices": [{"message": {"content": content}}]}
    return json.dumps({"custom_id": name, "response": {"status_code": 200, "body": body}}) + "\n"


def found(
    folder: Path, insurer: Insurer, documents: dict[str, dict[str, str]], lines: list[str]
) -> list[review.Finding]:
    path = folder / "results.jsonl"
    path.write_text("".join(lines))
    known = review.known_exclusions(insurer)
    return review.findings_of([path, folder / "absent"], documents, owners(insurer), known)


def test_every_document_is_one_request_that_a_batch_takes(
    insurer: Insurer, documents: dict[str, dict[str, str]]
) -> None:
    lines = [read_line(line.encode()) for line in review.request_lines(documents, "m")]
    assert [line.custom_id for line in lines] == list(documents)
    changed = {policy.number for policy in insurer.policies if policy.endorsements}
    named = {owners(insurer)[name] for name in documents}
    assert named == changed | set(insurer.forms)


def test_a_perfect_answer_misses_nothing(
    insurer: Insurer, documents: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    known, owner = review.known_exclusions(insurer), owners(insurer)

    def perfect(name: str) -> dict[str, Any]:
        labels = [label for label in documents[name] if (owner[name], label) in known]
        return {"exclusions": labels, "non_standard": [], "defined_terms": []}

    lines = [result(name, json.dumps(perfect(name))) for name in documents]
    findings = found(tmp_path, insurer, documents, lines)
    assert sum(one.right for one in findings) > 20
    assert all((one.wrong, one.missed, one.failed) == (0, 0, "") for one in findings)
    nothing = found(tmp_path, insurer, documents, [])
    assert sum(one.missed for one in nothing) == sum(one.right for one in findings)
    assert all(one.failed == "no result yet" for one in nothing)


def test_answers_that_cannot_be_read_are_named_and_the_page_shows_text_as_text(
    insurer: Insurer, documents: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    first, second, third = list(documents)[:3]
    failed = {"custom_id": third, "response": None, "error": {"code": "no_answer", "message": "x"}}
    terms = {"exclusions": ["no label"], "defined_terms": [WRITTEN_BY_A_CUSTOMER]}
    lines = [result(first, '{"exclusions": ["1.1"'), result(second, json.dumps(terms))]
    findings = found(tmp_path, insurer, documents, [*lines, json.dumps(failed) + "\n"])
    by_name = {one.document: one for one in findings}
    assert by_name[first].failed == "the answer was cut short"
    assert by_name[second].wrong == 1
    assert "no_answer" in by_name[third].failed
    page = page_of(findings)
    assert WRITTEN_BY_A_CUSTOMER not in page
    assert "&lt;script&gt;alert(1)" in page
    assert summary(findings) in page.replace("&#39;", "'")
