"""What a review asks of a document, as a line of a batch, and what its answers come to.

A review reads every edition of the conditions, and every policy's endorsements: which clauses
exclude something, which are no standard wording, which terms are defined. What excludes is known of
generated documents, so findings are graded.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from examples.insurance.documents.insurer import Insurer
from examples.insurance.retrieval.chunks import Chunk

KINDS = ("conditions", "endorsement")
SYSTEM = (
    "List, in JSON, of these clauses: exclusions (labels of clauses that exclude a loss), "
    "non_standard (labels of clauses in unusual words), defined_terms."
)
MOST_TERMS, MOST_LABELS, MAX_TOKENS = 4, 12, 200

Labels = dict[str, str]  # of a document's clauses: label -> text


@dataclass(frozen=True, slots=True)
class Finding:
    """What a review found in a document. failed: why there is nothing. right, wrong, missed:
    exclusions, against what is known."""

    document: str
    clauses: Labels
    exclusions: tuple[str, ...] = ()
    non_standard: tuple[str, ...] = ()
    defined_terms: tuple[str, ...] = ()
    failed: str = ""
    right: int = 0
    wrong: int = 0
    missed: int = 0


def documents_of(chunks: Iterable[Chunk]) -> dict[str, Labels]:
    """The clauses of each document that is reviewed; one without clauses is left out."""
    wanted = sorted((c for c in chunks if c.kind in KINDS), key=lambda c: c.document)
    return {
        name: {chunk.label: chunk.text for chunk in members}
        for name, members in groupby(wanted, key=lambda chunk: chunk.document)
    }


def request_lines(documents: dict[str, Labels], model: str) -> Iterator[str]:
    """A line of a batch for each document. What never changes stands first in the prompt."""
    for name, clauses in documents.items():
        text = "\n".join(f"{label} {words}" for label, words in clauses.items())
        body = {
            "model": model,
            "messages": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": text},
            ],
            "temperature": 0,
            "max_tokens": MAX_TOKENS,
            "chat_template_kwargs": {"enable_thinking": False},
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "review", "schema": schema(list(clauses))},
            },
        }
        line = {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}
        yield json.dumps(line) + "\n"


def schema(labels: list[str]) -> dict[str, Any]:
    """JSON schema of an answer: labels are those of the document."""
    some = {"type": "array", "items": {"enum": labels}, "maxItems": min(MOST_LABELS, len(labels))}
    terms = {"type": "array", "items": {"type": "string", "maxLength": 40}, "maxItems": MOST_TERMS}
    return {
        "type": "object",
        "properties": {"exclusions": some, "non_standard": some, "defined_terms": terms},
        "required": ["exclusions", "non_standard", "defined_terms"],
        "additionalProperties": False,
    }


def known_exclusions(insurer: Insurer) -> set[tuple[str, str]]:
    """(document's form or policy, label) of clauses that exclude something."""
    forms = {(name, c.label) for name, form in insurer.forms.items() for c in form.clauses
             if c.verdict == "no"}  # fmt: skip
    changes = {(policy.number, e.clause.label) for policy in insurer.policies
               for e in policy.endorsements if e.clause.verdict == "no"}  # fmt: skip
    return forms | changes


def findings_of(
    results: Iterable[Path], documents: dict[str, Labels], owners: dict[str, str],
    known: set[tuple[str, str]],
) -> list[Finding]:  # fmt: skip
    """From a batch's result files. owners: the form or policy of each document."""
    lines = [json.loads(line) for path in results if path.exists() for line in path.open()]
    found = {line["custom_id"]: line for line in lines}
    by_owner: dict[str, set[str]] = {}
    for owner, label in known:
        by_owner.setdefault(owner, set()).add(label)
    return [
        _finding(name, clauses, found.get(name), by_owner.get(owners[name], set()) & set(clauses))
        for name, clauses in documents.items()
    ]


def _finding(name: str, clauses: Labels, line: dict[str, Any] | None, known: set[str]) -> Finding:
    """known: labels of the document's clauses that exclude something."""
    answer = _answer(line)
    if isinstance(answer, str):
        return Finding(name, clauses, failed=answer, missed=len(known))
    exclusions = _said(answer, "exclusions")
    return Finding(
        name,
        clauses,
        exclusions,
        _said(answer, "non_standard"),
        _said(answer, "defined_terms"),
        right=len(known & set(exclusions)),
        wrong=len(set(exclusions) - known),
        missed=len(known - set(exclusions)),
    )


def _said(answer: dict[str, Any], name: str) -> tuple[str, ...]:
    """A list of the answer, each entry once."""
    found = answer.get(name)
    return tuple(dict.fromkeys(map(str, found))) if isinstance(found, list) else ()


def _answer(line: dict[str, Any] | None) -> dict[str, Any] | str:
    """The JSON of an answer, or why there is none."""
    if line is None:
        return "no result yet"
    response = line.get("response") or {}
    if response.get("status_code") != 200:
        return json.dumps(line.get("error") or response.get("body"))[:200]
    text = response["body"]["choices"][0]["message"]["content"]
    try:
        found = json.loads(text)
    except (TypeError, ValueError):
        return "the answer was cut short"
    return found if isinstance(found, dict) else "the answer is no object"
