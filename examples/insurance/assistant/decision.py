"""The decision in an answer: its schema, how it is read, and what of it is checked.

The model decides; it is not believed where the text can be asked instead. A clause must be one of
those in the prompt, and a sum must stand in that clause or in the policy's header.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

COVERED = ("yes", "no", "unclear", "not stated")


@dataclass(frozen=True, slots=True)
class Decision:
    """clause: the label of the clause that decides, if one does. covered: one of COVERED.

    The clause comes first, also in the text: the model looks before it decides.
    """

    clause: str | None
    covered: str
    amount: int | None
    deductible: int | None
    answer: str

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)


UNDECIDED = Decision(None, "unclear", None, None, "I could not decide this from the clauses.")


def schema(labels: Sequence[str]) -> dict[str, Any]:
    """JSON schema of an answer to a prompt with these clauses."""
    number = {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 10**7}, {"type": "null"}]}
    return {
        "type": "object",
        "properties": {
            "clause": {"enum": [*labels, None]},
            "covered": {"enum": list(COVERED)},
            "amount": number,
            "deductible": number,
            "answer": {"type": "string", "maxLength": 400},
        },
        "required": ["clause", "covered", "amount", "deductible", "answer"],
        "additionalProperties": False,
    }


def reference(
    verdict: str, label: str | None, amount: int | None, own: int | None, general: int
) -> Decision:
    """The right decision. own: the clause's deductible; general: the policy's."""
    if label is None:
        return Decision(None, "not stated", None, None, "This is not in your policy.")
    if verdict == "no":
        return Decision(label, "no", None, None, f"No. Clause {label} excludes this.")
    if verdict == "unclear":
        text = f"That depends. Clause {label} sets a condition."
        return Decision(label, "unclear", None, None, text)
    deductible = general if own is None else own
    limit = f" up to EUR {amount:,}" if amount else ""
    text = f"Yes. Clause {label} covers this{limit}, less EUR {deductible:,}."
    return Decision(label, "yes", amount, deductible, text)


def parse(text: str) -> Decision | None:
    """The decision of a whole answer; None if it is none."""
    try:
        found = json.loads(text)
        return Decision(**found) if isinstance(found, dict) and _valid(found) else None
    except (ValueError, TypeError):
        return None


def _valid(found: Mapping[str, Any]) -> bool:
    sums = (found.get("amount"), found.get("deductible"))
    return (
        found.get("covered") in COVERED
        and all(s is None or (isinstance(s, int) and not isinstance(s, bool)) for s in sums)
        and isinstance(found.get("answer"), str)
        and (found.get("clause") is None or isinstance(found["clause"], str))
    )


def sums_in(text: str) -> set[int]:
    """All whole numbers of a text, thousands with or without commas."""
    return {int(found.replace(",", "")) for found in re.findall(r"\d[\d,]*", text)}


def checked(decision: Decision, clauses: Mapping[str, str], policy: str) -> Decision:
    """The decision without what its sources do not bear out.

    clauses: label -> text of those in the prompt; policy: the header. A decision that names no
    clause of the prompt is none; a sum that is not written there is dropped.
    """
    if decision.covered == "not stated":
        return reference("", None, None, None, 0)
    if decision.clause is None or decision.clause not in clauses:
        return UNDECIDED
    written = sums_in(clauses[decision.clause])
    amount = decision.amount if decision.amount in written else None
    known = written | sums_in(policy)
    deductible = decision.deductible if decision.deductible in known else None
    kept = decision.covered == "yes"
    return Decision(
        decision.clause,
        decision.covered,
        amount if kept else None,
        deductible if kept else None,
        decision.answer,
    )
