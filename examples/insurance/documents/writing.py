"""The insurer's papers as text: conditions, schedules, endorsements, letters, notes, claims.

Everything downstream reads this text, never the facts. Some papers look scanned: a running head
in the middle of a page, words broken at the end of a line, letters taken for digits.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from examples.insurance.documents import wording as w
from examples.insurance.documents.insurer import Claim, Form, Insurer, Policy, money

Kind = Literal["conditions", "schedule", "endorsement", "letter", "note", "claim", "guideline"]
INTERNAL: frozenset[Kind] = frozenset({"note", "claim", "guideline"})  # for operators only


@dataclass(frozen=True, slots=True)
class Document:
    """One paper. policy: whose it is; form: the conditions that it is; else ""."""

    name: str
    kind: Kind
    text: str
    policy: str = ""
    form: str = ""


def write_all(insurer: Insurer) -> Iterator[Document]:
    for form in insurer.forms.values():
        yield Document(form.name, "conditions", conditions(form), form=form.name)
    yield Document("guidelines", "guideline", guidelines())
    for policy in insurer.policies:
        yield from papers(policy)


def papers(policy: Policy) -> Iterator[Document]:
    """All that belongs to one policy."""
    number = policy.number
    rng = random.Random(f"scan/{number}")

    def page(text: str) -> str:
        return (
            scanned(rng, text, f"{number} - page {rng.randint(2, 9)}") if policy.scanned else text
        )

    yield Document(f"{number}-schedule", "schedule", page(schedule(policy)), number)
    if policy.endorsements:
        yield Document(f"{number}-endorsements", "endorsement", page(endorsements(policy)), number)
    yield Document(f"{number}-letter", "letter", page(f"L1 {policy.letter}"), number)
    yield Document(f"{number}-note", "note", f"N1 {policy.note}", number)
    for claim in policy.claims:
        yield Document(claim.number, "claim", claim_record(policy, claim), number)


def conditions(form: Form) -> str:
    parts = [f"{w.PRODUCTS[form.product]} - General conditions, edition {form.edition}"]
    for section, clauses in groupby(form.clauses, key=lambda clause: clause.section):
        members = list(clauses)
        parts.append(f"\n{members[0].label.split('.')[0]} {section}")
        parts += [f"{clause.label} {clause.text}" for clause in members]
    return "\n".join(parts)


def schedule(policy: Policy) -> str:
    product, edition = policy.form.split("-")
    return "\n".join(
        (
            f"Schedule of policy {policy.number}",
            f"S1 The policyholder is {policy.holder}, {policy.address}.",
            f"S2 {w.PRODUCTS[product]}, conditions of edition {edition}, form {policy.form}.",
            f"S3 The sum insured is {money(policy.sum_insured)}.",
            f"S4 A deductible of {money(policy.deductible)} applies to each loss.",
        )
    )


def endorsements(policy: Policy) -> str:
    lines = [f"Endorsements to policy {policy.number}"]
    for change in policy.endorsements:
        if change.replaces:
            lines.append(f"Clause {change.replaces} is deleted and replaced by:")
        lines.append(f"{change.clause.label} {change.clause.text}")
    return "\n".join(lines)


def claim_record(policy: Policy, claim: Claim) -> str:
    what = w.TOPICS[claim.topic].names[0]
    return (
        f"C1 Claim {claim.number} of policy {policy.number}, {claim.date}: {what}, "
        f"{money(claim.amount)}. Status: {claim.status}. {claim.remark}"
    )


def guidelines() -> str:
    """The claims department's own rules, one set for each topic."""
    lines = ["Guidelines for claims handlers", f"G0 {w.GUIDELINES[0]}"]
    for number, topic in enumerate(w.TOPICS.values(), 1):
        texts = [text.format(name=topic.names[0]) for text in w.GUIDELINES[1:]]
        lines.append(f"G{number} {' '.join(texts)}")
    return "\n".join(lines)


# --- the look of a scan --------------------------------------------------------------------------


def scanned(rng: random.Random, text: str, head: str) -> str:
    """Long lines broken, some within words; a running head; l and o read as 1 and 0 now and then.

    Labels and sums stay as they are: a scan that garbles those is sent back.
    """
    lines: list[str] = []
    for line in text.split("\n"):
        lines += _broken(rng, _misread(rng, line))
    lines.insert(rng.randint(1, len(lines)), f"=== {head} ===")
    return "\n".join(lines)


def _misread(rng: random.Random, line: str) -> str:
    def change(match: re.Match[str]) -> str:
        word = match[0]
        if rng.random() < 0.04:
            return word.replace("l", "1", 1) if rng.random() < 0.5 else word.replace("o", "0", 1)
        return word

    return re.sub(r"\b[a-z]{4,}\b", change, line)


def _broken(rng: random.Random, line: str, width: int = 60) -> list[str]:
    made = []
    while len(line) > width:
        at = line.rfind(" ", 0, width)
        word = re.match(r" ([a-z]{3,})([a-z]{3,})", line[at:])
        if word and rng.random() < 0.4:
            at += 1 + len(word[1])
            made.append(line[:at] + "-")
            line = line[at:]
        else:
            made.append(line[:at])
            line = line[at + 1 :]
    return [*made, line]
